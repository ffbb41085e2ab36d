"""The part of an image that the student sees: a box cut around the organ or the centre, and put back exactly.

Arrays are ``(C, D, H, W)`` or ``(D, H, W)`` with D, H, W = Z, Y, X, voxel order as stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int, int]
"""``(D, H, W)`` in voxels."""

MASK_DEPTH = 20
"""Slices of a mask-anchored window unless the config says otherwise (specification §1)."""


@dataclass(frozen=True)
class Window:
    """A box on the grid of one image.

    Attributes:
        start: First voxel ``(D, H, W)``; negative where the box begins before the image.
        size: Extent of the box in voxels.
        low: First voxel whose content is used.
        high: One past the last voxel whose content is used; outside ``[low, high)`` the box is padding.
    """

    start: Size
    size: Size
    low: Size
    high: Size

    def to_meta(self) -> dict[str, list[int]]:
        """Plain values for a file beside extracted features."""
        return {
            "start": list(self.start),
            "size": list(self.size),
            "low": list(self.low),
            "high": list(self.high),
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Window:
        """Rebuild what `to_meta` gave; a KeyError, TypeError or ValueError if it is something else."""
        return cls(*(_triple(meta[name]) for name in ("start", "size", "low", "high")))

    def _inside(self) -> tuple[slice, slice, slice]:
        """Where the used content lies in the box."""
        return _slices(
            [low - start for low, start in zip(self.low, self.start, strict=True)],
            [high - start for high, start in zip(self.high, self.start, strict=True)],
        )

    def cut(self, array: NDArray[Any]) -> NDArray[Any]:
        """Copy the box out of ``(..., D, H, W)``; padding is 0."""
        box = np.zeros((*array.shape[:-3], *self.size), dtype=array.dtype)
        box[(..., *self._inside())] = array[(..., *_slices(self.low, self.high))]
        return box

    def put_back(self, box: NDArray[Any], shape: Sequence[int], *, fill: float = 0.0) -> NDArray[Any]:
        """Place a box ``(..., d, h, w)`` on a full grid `shape` = (D, H, W); `fill` elsewhere."""
        full = np.full((*box.shape[:-3], *shape), fill, dtype=box.dtype)
        full[(..., *_slices(self.low, self.high))] = box[(..., *self._inside())]
        return full


def mask_window(mask: NDArray[Any], size: Size) -> Window:
    """Anchor the depth of the window to the slices of an organ mask, and centre it in plane.

    With z0, z1 the first and last mask slice and Z = z1 - z0 + 1: a mask as deep as the window gives its
    middle slices; a shallower one gives its own slices, padded ``(size - Z) // 2`` before and the rest
    after. An empty mask counts as full.

    Args:
        mask: ``(D, H, W)``, non-zero inside the organ.
        size: Extent of the window.

    Source: specification §1, upstream ``dataset/pimedloader_3d.py``.
    """
    slices = np.flatnonzero(mask.any(axis=(1, 2)))
    z0, z1 = (int(slices[0]), int(slices[-1])) if slices.size else (0, mask.shape[0] - 1)
    extent, depth = z1 - z0 + 1, size[0]
    plane = centre_window(mask.shape, size)
    if extent >= depth:
        start = z0 + (extent - depth) // 2
        low, high = start, start + depth
    else:
        start = z0 - (depth - extent) // 2
        low, high = z0, z1 + 1
    return Window(
        start=(start, *plane.start[1:]), size=size, low=(low, *plane.low[1:]), high=(high, *plane.high[1:])
    )


def centre_window(shape: Sequence[int], size: Size) -> Window:
    """Centre the window on the image ``(D, H, W)``: crop a larger image, pad a smaller one."""
    start = _triple(
        [
            (extent - wanted) // 2 if extent >= wanted else -((wanted - extent) // 2)
            for extent, wanted in zip(shape, size, strict=True)
        ]
    )
    low = _triple([max(0, first) for first in start])
    high = _triple(
        [min(extent, first + wanted) for extent, first, wanted in zip(shape, start, size, strict=True)]
    )
    return Window(start=start, size=size, low=low, high=high)


def rounded_up(size: Sequence[int], divisor: Sequence[int]) -> Size:
    """Round each extent up to a multiple of what the network needs."""
    return _triple([-(-extent // step) * step for extent, step in zip(size, divisor, strict=True)])


def _triple(values: Sequence[Any]) -> Size:
    depth, height, width = (int(value) for value in values)
    return depth, height, width


def _slices(low: Sequence[int], high: Sequence[int]) -> tuple[slice, slice, slice]:
    return slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])
