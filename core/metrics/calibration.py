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


def adaptive_calibration_error(confidence: NDArray[Any], correct: NDArray[Any], *, bins: int = 20) -> float:
    """Return the calibration error over bins of equally many voxels, weighted by voxels; NaN without any.

    Args:
        confidence: `(...)` in [0, 1]: how probable it is that a voxel is right.
        correct: `(...)` whether it is.
        bins: Number of bins.

    Source: Nixon et al. 2019, for one confidence a voxel. Deviation: RL4Seg and RL4Seg3D divide by the number
    of bins where the number of voxels belongs, which gives values far above 1.
    """
    values = np.asarray(confidence, dtype=np.float64).ravel()
    hits = np.asarray(correct).ravel().astype(np.float64)
    if values.size == 0:
        return math.nan
    order = np.argsort(values, kind="stable")
    gap = 0.0
    for part in np.array_split(order, bins):
        if part.size:
            gap += part.size * abs(float(values[part].mean()) - float(hits[part].mean()))
    return gap / values.size


def mutual_information(correct: NDArray[Any], confidence: NDArray[Any], *, bins: int = 10) -> float:
    """Return ``2 I / (H + H)`` of being right and confidence over a ``bins × bins`` histogram.

    In [0, 1]; NaN where neither varies.

    Source: RL4Seg `uncertainty_reward.py`, RL4Seg3D `uncertainty_reward_3d.py`: compute_mi.
    """
    from scipy import stats

    counts = np.histogram2d(
        np.asarray(correct, dtype=np.float64).ravel(),
        np.asarray(confidence, dtype=np.float64).ravel(),
        bins=bins,
    )[0]
    joint = counts / counts.sum()
    rows, columns = joint.sum(1), joint.sum(0)
    entropies = float(stats.entropy(rows) + stats.entropy(columns))
    if entropies == 0.0:
        return math.nan
    at = joint > 0
    shared = float((joint[at] * np.log(joint[at] / np.outer(rows, columns)[at])).sum())
    return 2.0 * shared / entropies


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
