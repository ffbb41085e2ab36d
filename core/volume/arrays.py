"""Voxel values: finite images, whole-numbered labels, the smallest type that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError

LABEL_LIMIT = 65535
"""Largest label value; larger ones are a sign of a damaged or mistaken file."""


def as_image(data: NDArray[Any], source: Path | str) -> NDArray[np.float32]:
    """Return float32 voxels.

    Raises:
        DataError: Some voxels are NaN or infinite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        image = np.array(data, dtype=np.float32, order="C")
    # One pass without a temporary mask: the sum of a float64 accumulator is finite if every voxel is.
    if not np.isfinite(image.sum(dtype=np.float64)):
        bad = int(np.count_nonzero(~np.isfinite(image)))
        if bad:
            raise DataError(
                str(source),
                why=f"{bad} of {image.size} voxels are NaN or infinite",
                do="replace them before use; medrl does not guess values",
            )
    return image


def as_label(data: NDArray[Any], source: Path | str) -> NDArray[Any]:
    """Return a label map in the smallest unsigned integer type.

    Raises:
        DataError: Values are fractional, negative, not finite, above 65535, or more than one channel.
    """
    if data.shape[0] != 1:
        raise DataError(str(source), why=f"a label map has one channel, this file has {data.shape[0]}")
    if data.dtype.kind == "f":
        whole = np.rint(data)
        wrong = ~np.isfinite(data) | (whole != data)
        if wrong.any():
            values = ", ".join(f"{value:g}" for value in np.unique(data[wrong])[:4])
            raise DataError(
                str(source),
                why=f"label values must be whole numbers, found {values} in {int(wrong.sum())} voxels",
                do="threshold or round the label map where it was made; it may have been interpolated",
            )
        data = whole
    low, high = (data.min(), data.max()) if data.size else (0, 0)
    if low < 0 or high > LABEL_LIMIT:
        raise DataError(
            str(source), why=f"label values must lie between 0 and {LABEL_LIMIT}, found {low:g} to {high:g}"
        )
    return np.array(data, dtype=smallest_integer(int(low), int(high)), order="C")


def smallest_integer(low: int, high: int) -> np.dtype[Any]:
    """Return the smallest integer type that holds `low` to `high`, unsigned where it can be."""
    unsigned: tuple[Any, ...] = (np.uint8, np.uint16, np.uint32)
    signed: tuple[Any, ...] = (np.int8, np.int16, np.int32)
    for dtype in unsigned if low >= 0 else signed:
        info = np.iinfo(dtype)
        if info.min <= low and high <= info.max:
            found: np.dtype[Any] = np.dtype(dtype)
            return found
    return np.dtype(np.int64)


def present_labels(labels: NDArray[Any]) -> dict[int, int]:
    """Return ``{label value: voxels}`` of a non-negative integer map, in rising order."""
    if labels.dtype.itemsize <= 2:
        counts = np.bincount(labels.ravel())
        values = np.flatnonzero(counts)
        return {int(value): int(counts[value]) for value in values}
    values, numbers = np.unique(labels, return_counts=True)
    return {int(value): int(number) for value, number in zip(values, numbers, strict=True)}
