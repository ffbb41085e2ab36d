"""What a mask, a map and a path are worth: per volume, then over patients; the threshold, from validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import ndimage
from torch import Tensor

from medrl.core.metrics import auroc, hd95

from .aggregate import dice, dice_bound
from .maps import segment_with
from .painting import visit_count
from .play_config import MapConfig

METRICS: Mapping[str, str] = {
    "dice": "Dice of volumes with a lesion",
    "hd95_mm": "95 % Hausdorff distance in mm, where both masks hold something",
    "recall": "lesions that the mask touches",
    "hit": "episodes whose last window touches a lesion",
    "covered": "lesion voxels inside visited windows",
    "false_positive": "volumes without a lesion in which something is marked",
}

WANTED = 0.45
"""The threshold of the findings, to which image labels that cannot decide leave it."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One volume under one policy.

    Attributes:
        id: Case.
        patient: Group.
        present: Whether the truth holds a lesion.
        dice: 1 where both masks are empty.
        hd95_mm: NaN where one mask is empty.
        recall: Share of lesions (26-connected) that the mask touches; NaN without lesions.
        hit: Share of episodes whose last window touches a lesion; NaN without lesions or episodes.
        covered: Share of lesion voxels inside visited windows; NaN without lesions.
        marked: Voxels of the mask.
        bound: Largest Dice of a mask that is one window around the largest lesion; NaN without lesions.
        windows: Windows that were scored.
        confidence: Largest value of the map inside the mask: what the volume's presence is told by.
    """

    id: str
    patient: str
    present: bool
    dice: float
    hd95_mm: float
    recall: float
    hit: float
    covered: float
    marked: int
    bound: float
    windows: int
    confidence: float


def measure(
    mask: Tensor,
    truth: Tensor,
    *,
    case: str,
    patient: str,
    spacing_mm: Sequence[float],
    window: Sequence[int],
    score_map: Tensor | None = None,
    visited: Tensor | None = None,
    finals: Tensor | None = None,
    windows: int = 0,
    with_hd: bool = True,
) -> Measured:
    """Compare a mask ``(X, Y, Z)`` bool with the truth.

    Args:
        mask: What was found.
        truth: ``(X, Y, Z)`` bool.
        case: Identifier.
        patient: Group.
        spacing_mm: Voxel size.
        window: Voxels of a window.
        score_map: ``(X, Y, Z)``, for the confidence.
        visited: ``(X, Y, Z)`` bool, voxels inside visited windows.
        finals: ``(R, 3)`` minimum corners of the last windows of episodes.
        windows: Windows that were scored.
        with_hd: Also measure the distance of surfaces.
    """
    present = bool(truth.any())
    recall, bound, covered, hit = (math.nan,) * 4
    if present:
        lesions, count = ndimage.label(truth.numpy(), structure=np.ones((3, 3, 3)))
        found = np.unique(lesions[mask.numpy()])
        recall = float(np.count_nonzero(found)) / count
        largest = int(np.bincount(lesions.ravel())[1:].max())
        bound = dice_bound(largest, tuple(int(size) for size in window))
        if visited is not None:
            covered = float((truth & visited).sum()) / float(truth.sum())
        if finals is not None and len(finals):
            hit = float(np.mean([_touches(truth, corner, window) for corner in finals.tolist()]))
    distance = math.nan
    if with_hd and present and bool(mask.any()):
        distance = float(hd95(mask.numpy(), truth.numpy(), tuple(float(size) for size in spacing_mm)))
    confidence = 0.0
    if score_map is not None and bool(mask.any()):
        confidence = float(score_map[mask].max())
    return Measured(
        id=case,
        patient=patient,
        present=present,
        dice=float(dice(mask, truth)),
        hd95_mm=distance,
        recall=recall,
        hit=hit,
        covered=covered,
        marked=int(mask.sum()),
        bound=bound,
        windows=int(windows),
        confidence=confidence,
    )


def by_patient(rows: Iterable[Measured], metric: str) -> dict[str, float]:
    """Mean of a metric over the volumes of each patient to which it applies.

    `dice` is of volumes with a lesion; `false_positive` of volumes without one; ``empty_dice`` of volumes
    without a lesion (1 where nothing is marked).
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        value = _value(row, metric)
        if math.isfinite(value):
            values.setdefault(row.patient, []).append(value)
    return {name: float(np.mean(each)) for name, each in sorted(values.items())}


def mean_of(rows: Iterable[Measured], metric: str) -> float:
    """Mean over patients; NaN where there is none."""
    values = list(by_patient(rows, metric).values())
    return float(np.mean(values)) if values else math.nan


def presence_auc(rows: Sequence[Measured]) -> float:
    """Area under the ROC curve of the confidence; NaN with one class alone."""
    labels = [row.present for row in rows]
    if all(labels) or not any(labels):
        return math.nan
    return float(auroc([row.confidence for row in rows], labels))


# -- the threshold -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """What validation chose.

    Attributes:
        value: Of the map.
        by: ``image``: from image labels alone; ``mask``: from voxel masks; ``none``: set by hand.
        worth: Of each threshold that was tried: negated cost (`image`) or mean Dice (`mask`).
    """

    value: float
    by: Literal["image", "mask", "none"]
    worth: Mapping[float, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "value": self.value,
            "by": self.by,
            "worth": {f"{key:g}": value for key, value in self.worth.items()},
        }


def choose_by_images(
    maps: Sequence[Tensor], presence: Sequence[bool], cfg: MapConfig, thresholds: Sequence[float]
) -> Threshold:
    """Choose from image labels alone: fewest wrong volumes, and of equals the middle of their run.

    A volume counts as positive where its mask holds anything. Where many thresholds tell all volumes apart,
    image labels say nothing more; the middle of the longest run of the best keeps the largest distance from
    errors on both sides, and of two middles the one nearer to `WANTED` is taken.
    """
    worth: dict[float, float] = {}
    for threshold in sorted(thresholds):
        wrong = [
            bool(segment_with(one, threshold, cfg).any()) != bool(label)
            for one, label in zip(maps, presence, strict=True)
        ]
        worth[threshold] = -float(np.mean(wrong)) if wrong else 0.0
    return Threshold(value=_middle(worth, WANTED), by="image", worth=worth)


def choose_by_masks(
    maps: Sequence[Tensor], truths: Sequence[Tensor], cfg: MapConfig, thresholds: Sequence[float]
) -> Threshold:
    """Choose by the mean Dice of volumes with a lesion."""
    worth: dict[float, float] = {}
    for threshold in sorted(thresholds):
        values = [
            float(dice(segment_with(one, threshold, cfg), truth))
            for one, truth in zip(maps, truths, strict=True)
            if bool(truth.any())
        ]
        worth[threshold] = float(np.mean(values)) if values else 0.0
    return Threshold(value=max(worth, key=lambda key: worth[key]), by="mask", worth=worth)


def window_mask(shape: Sequence[int], corners: Tensor, window: Sequence[int]) -> Tensor:
    """``(X, Y, Z)`` bool: inside any of the windows at ``(M, 3)`` minimum corners."""
    return visit_count(shape, window, corners) > 0


# -- private -----------------------------------------------------------------------------------------


def _value(row: Measured, metric: str) -> float:
    if metric == "dice":
        return row.dice if row.present else math.nan
    if metric == "empty_dice":
        return math.nan if row.present else row.dice
    if metric == "false_positive":
        return math.nan if row.present else float(row.marked > 0)
    return float(getattr(row, metric))


def _touches(truth: Tensor, corner: Sequence[int], window: Sequence[int]) -> bool:
    box = tuple(slice(int(at), int(at) + int(size)) for at, size in zip(corner, window, strict=True))
    return bool(truth[box].any())


def _middle(worth: Mapping[float, float], wanted: float) -> float:
    """The middle of the longest run of the best; of equal runs and middles the one nearest to `wanted`."""
    order = sorted(worth)
    best = max(worth.values())
    runs: list[list[float]] = [[]]
    for key in order:
        if worth[key] == best:
            runs[-1].append(key)
        elif runs[-1]:
            runs.append([])
    runs = [run for run in runs if run]
    longest = max(len(run) for run in runs)
    middles = [run[at] for run in runs if len(run) == longest for at in {(len(run) - 1) // 2, len(run) // 2}]
    return min(middles, key=lambda key: (abs(key - wanted), key))
