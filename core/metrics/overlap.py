"""Counts of voxels that two masks share, and the scores made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError


@dataclass(frozen=True)
class Confusion:
    """Voxel counts of a predicted mask against a reference mask.

    Attributes:
        tp: In both masks.
        fp: Only predicted.
        fn: Only in the reference.
        tn: In neither.
    """

    tp: int
    fp: int
    fn: int
    tn: int

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)

    @property
    def dice(self) -> float:
        """``2 TP / (2 TP + FP + FN)``; NaN if both masks are empty."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """``TP / (TP + FP + FN)``; NaN if both masks are empty."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def sensitivity(self) -> float:
        """``TP / (TP + FN)``; NaN if the reference is empty."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def precision(self) -> float:
        """``TP / (TP + FP)``; NaN if nothing is predicted."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def specificity(self) -> float:
        """``TN / (TN + FP)``; NaN if the reference fills the image."""
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def volume_difference(self) -> float:
        """Predicted minus reference volume over the reference volume; NaN if the reference is empty."""
        return _ratio(self.fp - self.fn, self.tp + self.fn)


def confusion(pred: NDArray[Any], ref: NDArray[Any]) -> Confusion:
    """Count the voxels of two masks of the same shape, of any dimension.

    Raises:
        DataError: The shapes differ.
    """
    pred, ref = as_masks(pred, ref)
    tp = int(np.count_nonzero(pred & ref))
    fp = int(np.count_nonzero(pred)) - tp
    fn = int(np.count_nonzero(ref)) - tp
    return Confusion(tp=tp, fp=fp, fn=fn, tn=pred.size - tp - fp - fn)


def dice(pred: NDArray[Any], ref: NDArray[Any]) -> float:
    """Return the Dice coefficient of two masks: NaN if both are empty, 0 if one is.

    Source: Dice 1945.
    """
    return confusion(pred, ref).dice


def iou(pred: NDArray[Any], ref: NDArray[Any]) -> float:
    """Return intersection over union of two masks: NaN if both are empty, 0 if one is.

    Source: Jaccard 1901.
    """
    return confusion(pred, ref).iou


def as_masks(pred: NDArray[Any], ref: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return both arrays as masks; every value but 0 is inside.

    Raises:
        DataError: The shapes differ.
    """
    if pred.shape != ref.shape:
        raise DataError(
            "two masks cannot be compared",
            why=f"their shapes are {pred.shape} and {ref.shape}, expected equal",
        )
    return _as_mask(pred), _as_mask(ref)


def _as_mask(array: NDArray[Any]) -> NDArray[np.bool_]:
    return array if array.dtype == np.bool_ else array != 0


def _ratio(above: int, below: int) -> float:
    return above / below if below else math.nan
