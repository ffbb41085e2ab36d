"""Where an upstream feature file lies in the student's window.

The original centres what it reads in 20 slices, whatever the image window shows. Here the file's shape tells
whether it shows the window itself, the whole image or the organ's slices, and doubt is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from medrl.core.errors import DataError
from medrl.plugins.graft.features import Expected

Align = Literal["auto", "window", "image", "organ", "centre"]
ALIGNMENTS: tuple[Align, ...] = ("auto", "window", "image", "organ", "centre")


@dataclass(frozen=True)
class Place:
    """Where the slices and the plane of a file lie in the student's window.

    Attributes:
        first: First slice of the file that is used.
        to: Slice of the window where it goes.
        count: Number of slices.
        plane: The file's plane is the window's (False) or the whole image's (True).
    """

    first: int
    to: int
    count: int
    plane: bool


def find_place(shape: Sequence[int], expected: Expected, align: Align, path: Path) -> Place:
    """Find out what part of the case a file shows, from the shape ``[.., D, H, W]`` of its logits.

    - ``window``: exactly the student's window, the convention of the original's released files;
    - ``image``: the whole image, from which the student's window is cut;
    - ``organ``: the slices of the organ, padded as the student's window is;
    - ``auto``: the one of these that fits; two that fit and differ are an error;
    - ``centre``: the middle slices, or zeros around, whatever the window shows: what the original does.

    Raises:
        DataError: It fits nowhere, or several fit and differ; file and case are named.
    """
    depth = int(shape[-3])
    window = expected.window
    size, low, high, start = window.size[0], window.low[0], window.high[0], window.start[0]
    plane = _plane(shape, expected, align, path)
    if align == "centre":
        if depth >= size:
            return Place((depth - size) // 2, 0, size, plane)
        return Place(0, (size - depth) // 2, depth, plane)
    fits: dict[str, Place] = {}
    if depth == size:
        fits["window"] = Place(0, 0, size, plane)
    if depth == expected.shape[0]:
        fits["image"] = Place(low, low - start, high - low, plane)
    if depth == high - low:
        fits["organ"] = Place(0, low - start, high - low, plane)
    if align != "auto":
        if align not in fits:
            raise refuse(path, expected.case_id, _depths(depth, expected) + f", so it cannot be the {align}")
        return fits[align]
    if len(set(fits.values())) == 1:
        return next(iter(fits.values()))
    if not fits:
        raise refuse(
            path,
            expected.case_id,
            _depths(depth, expected),
            do="extract on the student's window, or take the middle slices as the original: --align centre",
        )
    raise refuse(
        path,
        expected.case_id,
        f"its {depth} slices may be the {' or the '.join(fits)}, which differ for this case",
        do=f"say which: --align {' or --align '.join(fits)}",
    )


def placed(
    array: Tensor, place: Place, expected: Expected, path: Path, *, fill: Tensor | None = None
) -> Tensor:
    """Put an array ``[C, D, h, w]`` of a file where it lies in the student's window.

    Its plane may be coarser than the image by a whole factor, which it keeps.

    Args:
        array: In the file's slices and plane.
        place: See `find_place`.
        expected: The student's window.
        path: Only for messages.
        fill: ``[C]`` values outside; 0 if left out.

    Raises:
        DataError: The plane is no whole fraction, or the window does not lie on its coarser grid.
    """
    window = expected.window
    source = expected.shape[1:] if place.plane else window.size[1:]
    factor = _factor(tuple(array.shape[-2:]), source)
    if factor == 0:
        raise refuse(
            path,
            expected.case_id,
            f"an array has {tuple(array.shape[-2:])} voxels in plane, no whole fraction of {tuple(source)}",
        )
    ranges = [slice(place.first, place.first + place.count)]
    inside = [slice(place.to, place.to + place.count)]
    size = [window.size[0]]
    for axis in (1, 2):
        low, high, start, extent = (
            (window.low[axis], window.high[axis], window.start[axis], window.size[axis])
            if place.plane
            else (0, window.size[axis], 0, window.size[axis])
        )
        if any(value % factor for value in (low, high, start, extent)):
            raise refuse(
                path,
                expected.case_id,
                f"the student's window begins or ends between the voxels of an array {factor} times coarser",
                do=f"choose a sample.size whose margins are multiples of {factor}",
            )
        ranges.append(slice(low // factor, high // factor))
        inside.append(slice((low - start) // factor, (high - start) // factor))
        size.append(extent // factor)
    box = torch.zeros((array.shape[0], *size), dtype=array.dtype)
    if fill is not None:
        box += fill.to(array.dtype).view(-1, 1, 1, 1)
    box[(slice(None), *inside)] = array[(slice(None), *ranges)]
    return box


def _plane(shape: Sequence[int], expected: Expected, align: Align, path: Path) -> bool:
    """Whether the plane of a file is the whole image's and not the window's."""
    image, window = expected.shape[1:], expected.window.size[1:]
    found = (int(shape[-2]), int(shape[-1]))
    if image == window:
        return False
    if align in ("window", "image"):
        return align == "image"
    fits = [name for name, size in (("image", image), ("window", window)) if _factor(found, size)]
    if len(fits) == 1 or (fits and align != "auto"):
        return "window" not in fits
    raise refuse(
        path,
        expected.case_id,
        f"its plane of {found} voxels may be the image's {image} or the window's {window}"
        if fits
        else f"its plane of {found} voxels fits neither the image {image} nor the window {window}",
        do="say which: --align window or --align image",
    )


def _factor(found: Sequence[int], size: Sequence[int]) -> int:
    """How many times coarser a plane is, the same in both directions; 0 if by no whole number."""
    factors = {extent // max(have, 1) for have, extent in zip(found, size, strict=True)}
    factor = factors.pop()
    exact = all(have * factor == extent for have, extent in zip(found, size, strict=True))
    return factor if not factors and exact else 0


def _depths(depth: int, expected: Expected) -> str:
    window = expected.window
    return (
        f"its {depth} slices are neither the student's window ({window.size[0]}), nor the part of it inside "
        f"the image or organ ({window.high[0] - window.low[0]}), nor the image ({expected.shape[0]})"
    )


def refuse(path: Path, case_id: str, why: str, *, do: str = "extract its features again") -> DataError:
    """The error of a feature file; file and case are named."""
    return DataError(f"case {case_id}: {path}", why=why, do=do, case=case_id)
