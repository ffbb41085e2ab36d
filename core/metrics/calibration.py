"""Calibration: does a probability of 0.8 come true in 8 of 10 voxels?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: what was promised and what came true, in bins of equal width on [0, 1].

    Attributes:
        edges: `(bins + 1,)`.
        confidence: `(bins,)` mean confidence; NaN in an empty bin.
        accuracy: `(bins,)` part that came true; NaN in an empty bin.
        count: `(bins,)` voxels.
    """

    edges: NDArray[np.float64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    count: NDArray[np.int64]

    @property
    def ece(self) -> float:
        """Expected calibration error: gap between accuracy and confidence, weighted by voxels."""
        total = int(self.count.sum())
        if total == 0:
            return math.nan
        used = self.count > 0
        gap = np.abs(self.accuracy[used] - self.confidence[used])
        return float((gap * self.count[used]).sum() / total)

    @property
    def mce(self) -> float:
        """Maximum calibration error: the largest gap of any bin that holds voxels."""
        used = self.count > 0
        return float(np.abs(self.accuracy[used] - self.confidence[used]).max()) if used.any() else math.nan


def reliability(
    probabilities: NDArray[Any], labels: NDArray[Any], *, bins: int = 15, mask: NDArray[Any] | None = None
) -> Reliability:
    """Bin the confidence of the predicted class and compare it with how often it is right.

    Args:
        probabilities: `(K, ...)` over K classes that sum to 1, or `(...)`, the probability of a foreground.
        labels: `(...)` reference class of each voxel; for a foreground, everything but 0 is inside.
        bins: Number of bins.
        mask: `(...)` voxels to look at; the background of a whole image is easy and hides errors.

    Raises:
        DataError: The shapes do not fit.
    """
    if probabilities.shape == labels.shape:
        confidence = np.asarray(probabilities, dtype=np.float64)
        right = labels != 0
    elif probabilities.shape[1:] == labels.shape:
        winner = probabilities.argmax(axis=0)
        confidence = np.take_along_axis(probabilities, winner[None], axis=0)[0].astype(np.float64)
        right = winner == labels
    else:
        raise DataError(
            "calibration", why=f"probabilities {probabilities.shape} do not fit labels {labels.shape}"
        )
    if mask is not None:
        confidence, right = confidence[mask != 0], right[mask != 0]
    edges = np.linspace(0.0, 1.0, bins + 1)
    at = np.clip(np.searchsorted(edges, confidence.ravel(), side="left") - 1, 0, bins - 1)
    count = np.bincount(at, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(at, weights=confidence.ravel(), minlength=bins) / count
        accuracy = np.bincount(at, weights=right.ravel().astype(np.float64), minlength=bins) / count
    return Reliability(edges=edges, confidence=mean, accuracy=accuracy, count=count)


def expected_calibration_error(
    probabilities: NDArray[Any], labels: NDArray[Any], *, bins: int = 15, mask: NDArray[Any] | None = None
) -> float:
    """Return the expected calibration error in [0, 1]; 0 is perfect.

    Source: Naeini et al. 2015; Guo et al. 2017, eq. 3, with bins ``(low, high]``.
    """
    return reliability(probabilities, labels, bins=bins, mask=mask).ece


def brier_score(
    probabilities: NDArray[Any], labels: NDArray[Any], *, mask: NDArray[Any] | None = None
) -> float:
    """Return the mean squared distance of the probabilities to the truth.

    With `(K, ...)` probabilities it is the sum over classes, in [0, 2]; with `(...)`, in [0, 1].

    Source: Brier 1950.
    """
    if probabilities.shape == labels.shape:
        error = (probabilities.astype(np.float64) - (labels != 0)) ** 2
    elif probabilities.shape[1:] == labels.shape:
        error = np.zeros(labels.shape)
        for k in range(probabilities.shape[0]):
            error += (probabilities[k].astype(np.float64) - (labels == k)) ** 2
    else:
        raise DataError(
            "Brier score", why=f"probabilities {probabilities.shape} do not fit labels {labels.shape}"
        )
    values = error if mask is None else error[mask != 0]
    return float(values.mean()) if values.size else math.nan
