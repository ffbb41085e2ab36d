"""A label map prepared for measuring: regions cut to their boxes, components and surroundings made once.

Everything lies on the bounding box of the named labels with a border of one pixel. Noise makes thousands of
tiny components, which are never visited one by one: they are counted by `numpy.bincount`, or not labelled at
all where what lies near the solid part of a region decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medrl.core.errors import DataError

from .rules import BACKGROUND, Rules

Mask = NDArray[np.bool_]
Box = tuple[slice, slice]

EIGHT = np.ones((3, 3), dtype=np.bool_)
FOUR = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=np.bool_)
_REACH = 8
"""Pixels around the solid part of a region within which its component should end."""
_STEPS = 16
"""Pixels that are followed one by one from the outside before all is labelled."""


@dataclass(frozen=True, eq=False)
class Part:
    """One region, cut to its bounding box with a border of one pixel.

    Attributes:
        mask: `(h + 2, w + 2)`; the border is False.
        inside: The pixels of `mask` that lie in the image; the border is cut off where the image ends.
        box: Where `mask` lies in the map that it was cut from.
    """

    mask: Mask
    inside: Box
    box: Box

    @cached_property
    def pixels(self) -> int:
        """Number of pixels."""
        return int(np.count_nonzero(self.mask))

    @cached_property
    def fills_image(self) -> bool:
        """Whether every pixel of the image belongs to the region."""
        return bool(self.mask[self.inside].all())

    @cached_property
    def largest(self) -> int:
        """Pixels of the largest 8-connected component."""
        if self.solid is not None:
            size = int(np.count_nonzero(self.solid[1]))
            if 2 * size >= self.pixels:
                return size
        numbers, count = ndimage.label(self.mask, EIGHT)
        return self.pixels if count < 2 else int(np.bincount(numbers.ravel())[1:].max())

    @cached_property
    def solid(self) -> tuple[Box, Mask] | None:
        """One whole 8-connected component and where it lies in `mask`; None if none is found quickly.

        It holds a 3×3 square. Noise rarely has one, and what lies near such squares is labelled much faster
        than everything.
        """
        lines = self.mask[:-2] & self.mask[1:-1] & self.mask[2:]
        squares = lines[:, :-2] & lines[:, 1:-1] & lines[:, 2:]
        rows, columns = bounding_box(squares)
        if rows.start == rows.stop:
            return None
        near = tuple(slice(max(side.start - _REACH, 0), side.stop + 2 + _REACH) for side in (rows, columns))
        numbers = ndimage.label(self.mask[near], EIGHT)[0]
        column = int(squares[rows.start].argmax())
        found = numbers == numbers[rows.start + 1 - near[0].start, column + 1 - near[1].start]
        # A component that ends before the border of this cut-out is whole.
        if found[0].any() or found[-1].any() or found[:, 0].any() or found[:, -1].any():
            return None
        return (near[0], near[1]), found


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What lies around a region: the 4-connected components of its complement.

    Attributes:
        outside: `(h + 2, w + 2)`: the component that holds the border.
        enclosed: `(n,)` flat indices of the pixels of all other components. None lies on the border, so that
            each has all its neighbours in the array.
        owner: `(n,)` number of the component of each enclosed pixel.
        count: Largest number.
    """

    outside: Mask
    enclosed: NDArray[np.intp]
    owner: NDArray[np.int32]
    count: int

    @classmethod
    def of(cls, mask: Mask) -> Surroundings:
        """Label the complement of a mask with an empty border."""
        around = ~mask
        numbers, count = ndimage.label(around, FOUR)
        if count == 1:
            return cls(around, np.empty(0, dtype=np.intp), np.empty(0, dtype=np.int32), 1)
        outside = numbers == numbers[0, 0]
        enclosed = np.flatnonzero(around ^ outside)
        return cls(outside, enclosed, numbers.ravel()[enclosed], count)

    def beside(self, mask: Mask) -> Mask:
        """Return `(count + 1,)`: whether an enclosed component has a 4-neighbour in the mask."""
        width = mask.shape[1]
        flat, at = mask.ravel(), self.enclosed
        touching = flat[at - 1] | flat[at + 1] | flat[at - width] | flat[at + width]
        found = np.zeros(self.count + 1, dtype=np.bool_)
        found[self.owner[touching]] = True
        return found


class LabelMap:
    """One two-dimensional label map.

    Args:
        mask: `(X, Y)` integers.
        rules: Names of labels and regions, and orientation.
        spacing: `(2,)` pixel size in mm along X and Y.

    Raises:
        DataError: The map holds values that no label names and the rules refuse such.
    """

    def __init__(self, mask: NDArray[Any], rules: Rules, spacing: tuple[float, float] | None = None) -> None:
        self.rules = rules
        self.spacing = spacing
        self.image_pixels = mask.size
        named = [value for name, value in rules.labels.items() if name != BACKGROUND]
        found = mask == named[0]
        for value in named[1:]:
            found |= mask == value
        if rules.unlisted == "refuse":
            _refuse_unlisted(mask, found, rules)
        box = bounding_box(found)
        self._inside = _inside(box, mask.shape)
        # Pixels of no label are False in every region, whatever value they have.
        shape = tuple(side.stop - side.start + 2 for side in box)
        self._values = np.full(shape, _unused(named), dtype=mask.dtype)
        self._values[1:-1, 1:-1] = mask[box]
        self._masks: dict[frozenset[str], Mask] = {}
        self._parts: dict[str, Part] = {}
        self._surroundings: dict[frozenset[str], Surroundings] = {}

    def mask(self, region: str) -> Mask:
        """Return a region on the bounding box of all labels with a border of one pixel."""
        return self._mask(frozenset(self.rules.regions[region]))

    def part(self, region: str) -> Part:
        """Return a region on its own bounding box."""
        found = self._parts.get(region)
        if found is None:
            found = self._parts[region] = self._cut(self.mask(region))
        return found

    def surroundings(self, *regions: str) -> Surroundings:
        """Return what lies around the union of regions."""
        return self._around(self.rules.union(*regions))

    def enclosed(self, region: str) -> int:
        """Return the pixels of the complement that no 8-connected path joins to the border.

        A union of regions that holds this one may be labelled anyway. Its outside is outside this region
        too, and so is the solid part of a further label that touches it; what is left is followed.
        """
        labels = self.rules.union(region)
        wider = self.rules.wider_union(labels)
        open_ = self._around(wider).outside.copy()
        if wider == labels and self._around(labels).enclosed.size == 0:
            return 0
        for label in wider - labels:
            part = self.part(label)
            if part.solid is not None:
                (rows, columns), solid = part.solid
                seen = open_[part.box][rows, columns]
                if (grown(solid) & seen).any():
                    seen |= solid
        return _not_reached(~self._mask(labels), open_)

    def _around(self, labels: frozenset[str]) -> Surroundings:
        found = self._surroundings.get(labels)
        if found is None:
            found = self._surroundings[labels] = Surroundings.of(self._mask(labels))
        return found

    def _mask(self, labels: frozenset[str]) -> Mask:
        found = self._masks.get(labels)
        if found is None:
            if BACKGROUND in labels:
                others = (name for name in self.rules.labels if name not in labels)
                found = ~self._any_of(others)
            else:
                found = self._any_of(labels)
            self._masks[labels] = found
        return found

    def _any_of(self, labels: Iterable[str]) -> Mask:
        values = [self.rules.labels[label] for label in labels]
        if not values:
            return np.zeros(self._values.shape, dtype=np.bool_)
        found: Mask = self._values == values[0]
        for value in values[1:]:
            found |= self._values == value
        return found

    def _cut(self, mask: Mask) -> Part:
        rows, columns = bounding_box(mask)
        if rows.start == rows.stop:
            corner = slice(0, 2)
            return Part(np.zeros((2, 2), dtype=np.bool_), (corner, corner), (corner, corner))
        cut = slice(rows.start - 1, rows.stop + 1), slice(columns.start - 1, columns.stop + 1)
        inside = tuple(
            slice(max(whole.start - side.start, 0), min(whole.stop, side.stop) - side.start)
            for whole, side in zip(self._inside, cut, strict=True)
        )
        return Part(mask[cut], (inside[0], inside[1]), cut)


def grown(mask: Mask) -> Mask:
    """Return the pixels of a mask and their 8 neighbours."""
    lines = mask.copy()
    lines[:-1] |= mask[1:]
    lines[1:] |= mask[:-1]
    found = lines.copy()
    found[:, :-1] |= lines[:, 1:]
    found[:, 1:] |= lines[:, :-1]
    return found


def bounding_box(mask: Mask) -> Box:
    """Return the smallest box that holds every True; empty at 0 if there is none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _not_reached(around: Mask, open_: Mask) -> int:
    """Return the pixels of `around` that 8-connected paths inside it do not join to `open_`.

    Args:
        around: `(h, w)`; its border is part of `open_`.
        open_: `(h, w)` part of `around`; written over.
    """
    width = around.shape[1]
    steps = np.array([[-width - 1], [-width], [-width + 1], [-1], [1], [width - 1], [width], [width + 1]])
    flat = open_.ravel()
    rest = np.flatnonzero(around & ~open_)
    for _ in range(_STEPS):
        reached = flat[rest + steps].any(axis=0)
        if not reached.any():
            return rest.size
        flat[rest[reached]] = True
        rest = rest[~reached]
    numbers = ndimage.label(around, EIGHT)[0]
    return int(np.count_nonzero(around) - np.count_nonzero(numbers == numbers[0, 0]))


def _inside(box: Box, shape: tuple[int, ...]) -> Box:
    """Return which part of a box with a border of one pixel lies in the image."""
    first, second = (
        slice(int(side.start == 0), side.stop - side.start + 2 - int(side.stop == size))
        for side, size in zip(box, shape, strict=True)
    )
    return first, second


def _unused(values: list[int]) -> int:
    """Return the smallest number from 0 that is no label."""
    return next(number for number in range(len(values) + 1) if number not in values)


def _refuse_unlisted(mask: NDArray[Any], found: Mask, rules: Rules) -> None:
    rest = mask[~found]
    background = rules.labels.get(BACKGROUND)
    wrong = np.unique(rest if background is None else rest[rest != background])
    if wrong.size:
        shown = ", ".join(str(value) for value in wrong[:4].tolist())
        raise DataError("the label map", why=f"holds values that the rules {rules.name} do not name: {shown}")
