r"""Evaluation of probability maps: overlap, distance, detection of cases and of lesions.

Protocols, for one *lesion probability* p (a channel of the network) and one reference lesion mask:

- **overlap**: Dice and IoU of each structure, pooled over the voxels of all cases and for each case; HD95 in
  mm. A structure that neither prediction nor reference holds is left out and counted.
- **case**: is there a lesion? The score of a case is its largest p; AUROC and average precision over cases.
- **picai**: candidates are the 26-connected components of p > 0.5, each with its largest p; they are matched
  one to one to the 26-connected reference lesions at IoU of at least 0.10, as many pairs as possible, then
  the largest overlap. AP over all candidates and lesions; AUROC over cases, whose score is that of its best
  candidate (0 without one); score = (AUROC + AP) / 2, the ranking score of the PI-CAI challenge.
- **sextant**: each reference lesion is a positive, each sextant of the organ without lesion voxels a
  negative; the score of both is the 90th percentile of p inside. AUROC, AP, sensitivity, specificity at 0.5.
  Sextants are left and right of the organ mask's mean position, times the thirds of its slices from below
  (apex, mid, base). The publication says no more than the percentile; the rest is this toolkit's completion.

Intervals are percentile bootstrap intervals that draw patients with all their cases.

Source: specification §7; Saha et al. 2024 (PI-CAI), `picai_eval`. On 20 sets of random maps and lesions the
numbers of ``picai`` equalled those of `picai_eval` 1.4.13 to 1e-15.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.errors import ConfigError, DataError, did_you_mean
from medrl.core.metrics import (
    Confusion,
    LesionMatch,
    Row,
    auroc,
    average_precision,
    case_metrics,
    components,
    confusion,
    match_lesions,
    pool,
)
from medrl.plugins.graft.regions import Target

PROTOCOLS = ("picai", "sextant")
METRICS = ("dice", "iou", "hd95")
PERCENTILE = 90.0
_THIRDS = ("apex", "mid", "base")


@dataclass(frozen=True)
class Lesion:
    """What counts as a lesion.

    Attributes:
        name: Such as ``cancer``.
        channels: Channels of the network whose probabilities add up to p.
        values: Label values of the reference.
    """

    name: str
    channels: tuple[int, ...]
    values: tuple[int, ...]


@dataclass(frozen=True)
class Rules:
    """Numbers that the protocols leave open.

    Attributes:
        threshold: p above it makes a candidate.
        min_overlap: Least IoU of a match.
        operating_point: p above it calls a lesion or a sextant positive.
    """

    threshold: float = 0.5
    min_overlap: float = 0.1
    operating_point: float = 0.5


@dataclass(frozen=True)
class Scored:
    """One lesion or one lesion-free sextant.

    Attributes:
        name: Number of the lesion, or side and third.
        score: 90th percentile of p inside.
        positive: Whether it is a lesion.
    """

    name: str
    score: float
    positive: bool


@dataclass(frozen=True)
class CaseResult:
    """Everything that is known of one case.

    Attributes:
        rows: Dice, IoU, HD95 and volumes by structure.
        counts: Voxel counts by structure.
        positive: Whether the reference holds a lesion.
        score: Largest p.
        match: Candidates and lesions of ``picai``.
        candidate: Score of the best candidate, 0 without one.
        scored: Lesions and lesion-free sextants of ``sextant``.
    """

    case: str
    patient: str
    rows: tuple[Row, ...]
    counts: Mapping[str, Confusion]
    positive: bool
    score: float
    match: LesionMatch = field(default_factory=LesionMatch)
    candidate: float = 0.0
    scored: tuple[Scored, ...] = ()


def find_lesion(target: Target, name: str = "") -> Lesion:
    """Return what a name means for a target: a structure, ``cancer``, ``significant``, or the default.

    The default is cancer for the prostate, otherwise the last structure.

    Raises:
        ConfigError: The target has no such structure.
    """
    structures = {target.names[k]: Lesion(target.names[k], (k,), target.sets[k]) for k in target.structures}
    known = dict(structures)
    if "significant_cancer" in known:
        known["significant"] = known["significant_cancer"]
    if target.kind == "classes" and {"PCa", "csPCa"} <= set(structures):
        known["significant"] = structures["csPCa"]
        parts = [structures["PCa"], structures["csPCa"]]
        known["cancer"] = Lesion(
            "cancer",
            tuple(channel for part in parts for channel in part.channels),
            tuple(value for part in parts for value in part.values),
        )
    if not name:
        return known["cancer"] if "cancer" in known else structures[target.names[target.structures[-1]]]
    if name not in known:
        raise ConfigError("--lesion", why=f"'{name}' is not predicted, {did_you_mean(name, known)}")
    return known[name]


def evaluate_case(
    case: str,
    probabilities: NDArray[Any],
    reference: NDArray[Any],
    target: Target,
    lesion: Lesion,
    *,
    spacing: Sequence[float],
    affine: NDArray[np.float64],
    organ: NDArray[Any] | None = None,
    patient: str = "",
    protocols: Sequence[str] = PROTOCOLS,
    rules: Rules | None = None,
) -> CaseResult:
    """Evaluate one case.

    Args:
        case: Identifier.
        probabilities: ``(K, X, Y, Z)`` of the target's channels.
        reference: ``(X, Y, Z)`` label map.
        target: What the channels mean.
        lesion: What counts as a lesion.
        spacing: Voxel size in mm.
        affine: Voxel index to RAS millimetres, tells left from right and apex from base.
        organ: ``(X, Y, Z)`` organ mask, needed for ``sextant``.
        patient: Group of the bootstrap; the case itself if empty.
        protocols: ``picai``, ``sextant``.
        rules: Thresholds.

    Raises:
        DataError: Shapes or channels do not fit, or ``sextant`` has no organ mask.
    """
    rules = rules or Rules()
    expected = (target.channels, *reference.shape)
    if probabilities.shape != expected:
        raise DataError(
            f"case {case}",
            why=f"probabilities have shape {probabilities.shape}, expected {expected} of {target.names}",
            case=case,
        )
    counts, rows = _overlap(probabilities, reference, target, spacing)
    p = probabilities[list(lesion.channels)].sum(axis=0)
    truth = np.isin(reference, lesion.values)
    score = float(p.max(initial=0.0))
    match = LesionMatch()
    scored: tuple[Scored, ...] = ()
    if "picai" in protocols:
        match = match_lesions(p, truth, threshold=rules.threshold, min_overlap=rules.min_overlap)
    if "sextant" in protocols:
        if organ is None:
            raise DataError(
                f"case {case}", why="the sextant protocol needs an organ mask", do="--masks DIR", case=case
            )
        scored = score_sextants(p, truth, organ > 0, affine)
    return CaseResult(
        case=case,
        patient=patient or case,
        rows=tuple({"case": case, **row} for row in rows),
        counts=counts,
        positive=bool(truth.any()),
        score=score,
        match=match,
        candidate=score if score > rules.threshold else 0.0,
        scored=scored,
    )


def _overlap(
    probabilities: NDArray[Any], reference: NDArray[Any], target: Target, spacing: Sequence[float]
) -> tuple[dict[str, Confusion], list[Row]]:
    """Voxel counts and metrics of each structure."""
    hard = target.decide(torch.from_numpy(np.ascontiguousarray(probabilities))[None])[0].numpy()
    counts: dict[str, Confusion] = {}
    rows: list[Row] = []
    for k in target.structures:
        name, truth = target.names[k], np.isin(reference, target.sets[k])
        counts[name] = confusion(hard[k], truth)
        rows += case_metrics(hard[k], truth, {name: 1}, spacing, METRICS)
    return counts, rows


def score_sextants(
    p: NDArray[Any], truth: NDArray[np.bool_], organ: NDArray[np.bool_], affine: NDArray[np.float64]
) -> tuple[Scored, ...]:
    """Score every lesion and every lesion-free sextant of a case by the 90th percentile of p inside."""
    lesions, count = components(truth)
    found = [
        Scored(f"lesion {number}", float(np.percentile(p[lesions == number], PERCENTILE)), True)
        for number in range(1, count + 1)
    ]
    numbers, names = sextants(organ, affine)
    for number, name in enumerate(names, start=1):
        inside = numbers == number
        if inside.any() and not truth[inside].any():
            found.append(Scored(name, float(np.percentile(p[inside], PERCENTILE)), False))
    return tuple(found)


def sextants(
    organ: NDArray[np.bool_], affine: NDArray[np.float64]
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Divide an organ mask ``(X, Y, Z)`` into left and right, and into thirds from below.

    Left and right are told by the mean position of the mask's voxels. Of n slices, slice k from below lies in
    third ``3k // n``; a mask of fewer than three slices lacks a third.

    Returns:
        Numbers 1 to 6 (0 outside) and their names.
    """
    import nibabel as nib

    names = tuple(f"{side} {third}" for third in _THIRDS for side in ("left", "right"))
    numbers = np.zeros(organ.shape, dtype=np.uint8)
    at = np.argwhere(organ)
    if not len(at):
        return numbers, names
    turn = nib.orientations.io_orientation(affine)
    across, up = (int(np.flatnonzero(turn[:, 0] == axis)[0]) for axis in (0, 2))
    rightwards = at[:, across] * turn[across, 1]
    upwards = at[:, up] * turn[up, 1]
    low, high = upwards.min(), upwards.max()
    third = (3 * (upwards - low)) // (high - low + 1)
    right = rightwards > rightwards.mean()
    numbers[tuple(at.T)] = (1 + 2 * third + right).astype(np.uint8)
    return numbers, names


def measure(
    results: Sequence[CaseResult], protocols: Sequence[str] = PROTOCOLS, rules: Rules | None = None
) -> dict[str, float]:
    """Return every summary number over cases, by name; NaN where it is not defined.

    Names are ``pooled.<structure>.dice``, ``mean.<structure>.dice``, ``case.auroc``, ``picai.ap``,
    ``sextant.auroc`` and so on.
    """
    rules = rules or Rules()
    found: dict[str, float] = {}
    for name in results[0].counts if results else ():
        total = sum((result.counts[name] for result in results), Confusion(0, 0, 0, 0))
        found[f"pooled.{name}.dice"], found[f"pooled.{name}.iou"] = total.dice, total.iou
        rows = [row for result in results for row in result.rows if row["label"] == name]
        for metric in METRICS:
            values = [row[metric] for row in rows if math.isfinite(row[metric])]
            found[f"mean.{name}.{metric}"] = sum(values) / len(values) if values else math.nan
    positive = [result.positive for result in results]
    scores = [result.score for result in results]
    found["case.auroc"], found["case.ap"] = auroc(scores, positive), average_precision(scores, positive)
    if "picai" in protocols:
        found |= _picai(results, positive)
    if "sextant" in protocols:
        found |= _sextant(results, rules)
    return found


def _picai(results: Sequence[CaseResult], positive: Sequence[bool]) -> dict[str, float]:
    together = pool(result.match for result in results)
    area = auroc([result.candidate for result in results], positive)
    return {
        "picai.auroc": area,
        "picai.ap": together.average_precision,
        "picai.score": (area + together.average_precision) / 2.0,
        "picai.sensitivity": together.sensitivity,
        "picai.precision": together.precision,
        "picai.false_alarms_per_case": len(together.false_alarms) / len(results) if results else math.nan,
    }


def _sextant(results: Sequence[CaseResult], rules: Rules) -> dict[str, float]:
    items = [item for result in results for item in result.scored]
    scores, truth = [item.score for item in items], [item.positive for item in items]
    called = [score > rules.operating_point for score in scores]
    hits = [call for call, lesion in zip(called, truth, strict=True) if lesion]
    spared = [not call for call, lesion in zip(called, truth, strict=True) if not lesion]
    return {
        "sextant.auroc": auroc(scores, truth),
        "sextant.ap": average_precision(scores, truth),
        "sextant.sensitivity": sum(hits) / len(hits) if hits else math.nan,
        "sextant.specificity": sum(spared) / len(spared) if spared else math.nan,
    }


def bootstrap(
    results: Sequence[CaseResult],
    statistic: Callable[[Sequence[CaseResult]], Mapping[str, float]],
    *,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float, int]]:
    """Percentile intervals of every number that `statistic` returns, over resampled patients.

    Returns:
        By name: lower and upper end, and the number of resamples in which the number was defined. Both ends
        are NaN with fewer than two patients, or where it was undefined in more than half of them.
    """
    patients: dict[str, list[CaseResult]] = {}
    for result in results:
        patients.setdefault(result.patient, []).append(result)
    groups = list(patients.values())
    names = list(statistic(results)) if results else []
    if len(groups) < 2 or n < 1:
        return dict.fromkeys(names, (math.nan, math.nan, 0))
    rng = np.random.default_rng(seed)
    drawn = np.full((n, len(names)), np.nan)
    for row in drawn:
        chosen = rng.integers(len(groups), size=len(groups))
        values = statistic([result for index in chosen for result in groups[index]])
        row[:] = [values[name] for name in names]
    found: dict[str, tuple[float, float, int]] = {}
    for name, column in zip(names, drawn.T, strict=True):
        known = column[np.isfinite(column)]
        low, high = math.nan, math.nan
        if known.size > n // 2:
            low, high = (float(value) for value in np.quantile(known, ((1 - level) / 2, (1 + level) / 2)))
        found[name] = (low, high, int(known.size))
    return found
