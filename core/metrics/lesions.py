"""Lesion-wise detection: candidates matched to reference lesions, average precision, AUROC.

A reference lesion is a 26-connected component. A candidate is found if it overlaps its lesion by at least
`min_overlap` (IoU); the matching is one to one and takes as many pairs as possible, then the largest
overlap. A lesion without candidate is a miss, a candidate without lesion a false alarm. A second
candidate on a lesion that is already matched is neither, as in the evaluation of the PI-CAI challenge.

Source: Saha et al. 2024 (PI-CAI), `picai_eval`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError

from .surface import components


@dataclass(frozen=True)
class LesionMatch:
    """The detections of one case, or of many after `pool`.

    Attributes:
        hits: Confidence of each matched candidate.
        false_alarms: Confidence of each candidate that belongs to no lesion.
        misses: Number of lesions without candidate.
        overlaps: IoU of each matched pair, in the order of `hits`.
    """

    hits: tuple[float, ...] = ()
    false_alarms: tuple[float, ...] = ()
    misses: int = 0
    overlaps: tuple[float, ...] = ()

    @property
    def lesions(self) -> int:
        """Number of reference lesions."""
        return len(self.hits) + self.misses

    @property
    def sensitivity(self) -> float:
        """Part of the lesions that was found; NaN without lesions."""
        return len(self.hits) / self.lesions if self.lesions else math.nan

    @property
    def precision(self) -> float:
        """Part of the candidates that are lesions; NaN without candidates."""
        candidates = len(self.hits) + len(self.false_alarms)
        return len(self.hits) / candidates if candidates else math.nan

    @property
    def f1(self) -> float:
        """Harmonic mean of sensitivity and precision; NaN without lesions and candidates."""
        total = 2 * len(self.hits) + len(self.false_alarms) + self.misses
        return 2 * len(self.hits) / total if total else math.nan

    @property
    def average_precision(self) -> float:
        """Area under the precision-recall curve over lesions; NaN without lesions."""
        scores = (*self.hits, *self.false_alarms)
        truth = (True,) * len(self.hits) + (False,) * len(self.false_alarms)
        return average_precision(scores, truth, missed=self.misses)


def pool(matches: Iterable[LesionMatch]) -> LesionMatch:
    """Join the detections of many cases; average precision of the result is that over all lesions."""
    found = list(matches)
    return LesionMatch(
        hits=tuple(score for match in found for score in match.hits),
        false_alarms=tuple(score for match in found for score in match.false_alarms),
        misses=sum(match.misses for match in found),
        overlaps=tuple(value for match in found for value in match.overlaps),
    )


def lesion_candidates(
    probability: NDArray[Any], *, threshold: float = 0.5
) -> tuple[NDArray[np.int32], tuple[float, ...]]:
    """Split a probability map into candidates: components above the threshold.

    Args:
        probability: `(X, Y, Z)` in [0, 1]; a mask is fine too.
        threshold: A voxel belongs to a candidate if its probability is larger.

    Returns:
        Component numbers `(X, Y, Z)`, 0 outside, and the confidence of each candidate: its largest value.
    """
    labels, count = components(probability > threshold)
    if count == 0:
        return labels, ()
    inside = labels > 0
    peak = np.full(count + 1, -np.inf)
    np.maximum.at(peak, labels[inside], np.asarray(probability, dtype=np.float64)[inside])
    return labels, tuple(float(value) for value in peak[1:])


def match_lesions(
    probability: NDArray[Any], ref: NDArray[Any], *, threshold: float = 0.5, min_overlap: float = 0.1
) -> LesionMatch:
    """Match the candidates of a probability map (or a mask) to the lesions of a reference mask.

    Raises:
        DataError: The shapes differ.
    """
    if probability.shape != ref.shape:
        raise DataError(
            "lesions cannot be matched",
            why=f"the shapes are {probability.shape} and {ref.shape}, expected equal",
        )
    candidates, scores = lesion_candidates(probability, threshold=threshold)
    lesions, count = components(ref != 0)
    if not scores or not count:
        return LesionMatch(false_alarms=scores, misses=count)
    overlap = _overlaps(candidates, len(scores), lesions, count)
    overlap[overlap < min_overlap] = 0.0
    from scipy.optimize import linear_sum_assignment  # as slow to import as all other metrics together

    # Every pair counts 1 and its overlap is the tie-break, so that the number of matches comes first.
    rows, columns = linear_sum_assignment(
        np.where(overlap > 0, 1.0 + overlap / (count + 1), 0.0), maximize=True
    )
    pairs = [(i, j) for i, j in zip(rows.tolist(), columns.tolist(), strict=True) if overlap[i, j] > 0]
    matched = {i for i, _ in pairs}
    alarms = tuple(score for i, score in enumerate(scores) if i not in matched and not (overlap[i] > 0).any())
    return LesionMatch(
        hits=tuple(scores[i] for i, _ in pairs),
        false_alarms=alarms,
        misses=count - len(pairs),
        overlaps=tuple(float(overlap[i, j]) for i, j in pairs),
    )


def average_precision(scores: Sequence[float], truth: Sequence[bool], *, missed: int = 0) -> float:
    r"""Return :math:`\sum_n (R_n - R_{n-1}) P_n` over falling thresholds; equal scores share one threshold.

    Args:
        scores: Confidence of each candidate.
        truth: Whether it is a true one.
        missed: Positives without candidate: they lower the recall and are never found.

    Returns:
        The average precision; NaN if there is no positive at all.
    """
    values = np.asarray(scores, dtype=np.float64)
    hit = np.asarray(truth, dtype=np.bool_)
    positives = int(hit.sum()) + missed
    if positives == 0:
        return math.nan
    if values.size == 0:
        return 0.0
    order = np.argsort(-values, kind="stable")
    values, hit = values[order], hit[order]
    last = np.flatnonzero(np.append(np.diff(values) != 0, True))
    tp = np.cumsum(hit)[last]
    precision = tp / (last + 1)
    recall = tp / positives
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def auroc(scores: Sequence[float], truth: Sequence[bool]) -> float:
    """Return the area under the ROC curve by ranks, ties counted half; NaN if one class is missing.

    Source: Mann-Whitney U statistic, Hanley and McNeil 1982.
    """
    from scipy.stats import rankdata

    hit = np.asarray(truth, dtype=np.bool_)
    positives, negatives = int(hit.sum()), int((~hit).sum())
    if positives == 0 or negatives == 0:
        return math.nan
    ranks = rankdata(np.asarray(scores, dtype=np.float64))
    return float((ranks[hit].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _overlaps(
    candidates: NDArray[np.int32], n: int, lesions: NDArray[np.int32], m: int
) -> NDArray[np.float64]:
    """Return the IoU of every candidate with every lesion `(n, m)`."""
    joint = candidates.astype(np.int64) * (m + 1) + lesions
    table = np.bincount(joint.ravel(), minlength=(n + 1) * (m + 1)).reshape(n + 1, m + 1)
    shared = table[1:, 1:].astype(np.float64)
    union = table[1:].sum(axis=1)[:, None] + table[:, 1:].sum(axis=0)[None] - shared
    return np.asarray(shared / union, dtype=np.float64)
