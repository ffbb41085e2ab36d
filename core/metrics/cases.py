"""The metrics of one case, label by label, and their summary over cases.

The rule for empty masks, the same for every metric:

- Neither prediction nor reference holds the label: the value is NaN, left out of means and counted
  (`Summary.excluded`). A score of 1 would reward labels that are rarely there.
- Only one of them holds it: overlap and surface scores are 0 and distances infinite. Infinite distances
  stay out of the mean, which would be infinite, and are counted beside it (`Summary.infinite`); the
  median and every ranking test see them as worse than any other value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medrl.core.errors import ConfigError, DataError, did_you_mean

from .lesions import match_lesions
from .overlap import Confusion, confusion
from .surface import Elements, SurfaceDistances, surface_distances

Row = dict[str, Any]
"""One label of one case: ``label``, the metrics, ``ref_ml``, ``pred_ml``; `evaluation` adds ``case``."""

LabelValues = int | Sequence[int]
"""One label value, or the values that make up a region."""

OVERALL = "overall"
"""Label of the summary over labels: each case counts with the mean of its labels."""


@dataclass(frozen=True)
class MetricInfo:
    """What a metric is called and which way is better.

    Attributes:
        unit: ``mm`` or nothing.
        higher_is_better: False for distances and errors; None where zero is best.
        explain: One sentence for a stranger.
    """

    title: str
    unit: str
    higher_is_better: bool | None
    explain: str


METRICS: dict[str, MetricInfo] = {
    "dice": MetricInfo("Dice", "", True, "Overlap of prediction and reference: 0 is none, 1 is perfect."),
    "iou": MetricInfo(
        "IoU", "", True, "Shared voxels over all voxels of both: stricter than Dice, 1 is perfect."
    ),
    "hd95": MetricInfo(
        "HD95", "mm", False, "95 of 100 surface points are nearer to the other surface than this."
    ),
    "hd": MetricInfo(
        "HD", "mm", False, "The largest distance between the two surfaces; one stray voxel decides."
    ),
    "nsd": MetricInfo(
        "NSD", "", True, "Part of both surfaces that agrees within the tolerance: 1 is perfect."
    ),
    "assd": MetricInfo("ASSD", "mm", False, "Mean distance between the two surfaces."),
    "sensitivity": MetricInfo("Sensitivity", "", True, "Part of the reference that was found."),
    "precision": MetricInfo("Precision", "", True, "Part of the prediction that is right."),
    "volume_difference": MetricInfo(
        "Volume diff.", "", None, "Predicted minus true volume, over the true volume: 0 is perfect."
    ),
    "lesion_sensitivity": MetricInfo(
        "Lesion sens.", "", True, "Part of the reference lesions that was found."
    ),
    "lesion_precision": MetricInfo(
        "Lesion prec.", "", True, "Part of the predicted lesions that are lesions."
    ),
    "lesion_f1": MetricInfo(
        "Lesion F1", "", True, "Found lesions against misses and false alarms; 1 is perfect."
    ),
}
"""Every metric that `case_metrics` knows."""

DEFAULT_METRICS = ("dice", "hd95", "nsd")

_SURFACE = {"hd95", "hd", "nsd", "assd"}
_LESION = {"lesion_sensitivity", "lesion_precision", "lesion_f1"}


def check_metrics(names: Iterable[str]) -> tuple[str, ...]:
    """Return the metric names without repetition.

    Raises:
        ConfigError: A name is unknown, or none is given.
    """
    found = tuple(dict.fromkeys(name.strip().lower() for name in names if name.strip()))
    problems = [f"'{name}': {did_you_mean(name, METRICS)}" for name in found if name not in METRICS]
    if problems:
        raise ConfigError("unknown metrics", problems=problems)
    if not found:
        raise ConfigError("no metric is chosen", do="choose from " + ", ".join(METRICS))
    return found


def case_metrics(
    pred: NDArray[Any],
    ref: NDArray[Any],
    labels: Mapping[str, LabelValues],
    spacing: Sequence[float],
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    tolerance_mm: float = 1.0,
) -> list[Row]:
    """Compare two label maps, label by label.

    Args:
        pred: `(X, Y, Z)` or `(1, X, Y, Z)` integer label map.
        ref: Label map of the same shape.
        labels: Value of each label, or several values that make a region; background (0) is skipped.
        spacing: Voxel size in mm.
        metrics: Names from `METRICS`.
        tolerance_mm: Tolerance of ``nsd``.

    Returns:
        One row for each label, in the order of `labels`.

    Raises:
        DataError: The shapes differ or an array is no label map.
        ConfigError: A metric is unknown.
    """
    names = check_metrics(metrics)
    pred, ref = _label_map(pred), _label_map(ref)
    if pred.shape != ref.shape:
        raise DataError(
            "two label maps cannot be compared", why=f"their shapes are {pred.shape} and {ref.shape}"
        )
    voxel_ml = float(np.prod(np.asarray(spacing, dtype=np.float64))) / 1000.0
    boxes_pred, boxes_ref = ndimage.find_objects(pred), ndimage.find_objects(ref)
    rows: list[Row] = []
    for label, value in labels.items():
        values = (value,) if isinstance(value, int) else tuple(value)
        if values == (0,):
            continue
        box = _union([_box(boxes, v) for boxes in (boxes_pred, boxes_ref) for v in values])
        mask_pred, mask_ref = _mask(pred, values, box), _mask(ref, values, box)
        rows.append(
            {
                "label": label,
                **_values(names, mask_pred, mask_ref, spacing, tolerance_mm),
                "ref_ml": float(np.count_nonzero(mask_ref)) * voxel_ml,
                "pred_ml": float(np.count_nonzero(mask_pred)) * voxel_ml,
            }
        )
    return rows


def _values(
    names: Sequence[str],
    pred: NDArray[np.bool_],
    ref: NDArray[np.bool_],
    spacing: Sequence[float],
    tolerance_mm: float,
) -> dict[str, float]:
    counts: Confusion = confusion(pred, ref)
    surfaces: dict[Elements, SurfaceDistances] = {}

    def surface(elements: Elements) -> SurfaceDistances:
        if elements not in surfaces:
            surfaces[elements] = surface_distances(pred, ref, spacing, elements=elements)
        return surfaces[elements]

    lesion = match_lesions(pred, ref) if _LESION & set(names) else None
    found: dict[str, float] = {}
    for name in names:
        if name == "nsd":
            found[name] = surface("surfels").nsd(tolerance_mm)
        elif name == "hd95":
            found[name] = surface("voxels").hausdorff(95.0)
        elif name == "hd":
            found[name] = surface("voxels").hausdorff()
        elif name == "assd":
            found[name] = surface("voxels").assd()
        elif lesion is not None and name in _LESION:
            found[name] = float(getattr(lesion, name.removeprefix("lesion_")))
        else:
            found[name] = float(getattr(counts, name))
    return found


@dataclass(frozen=True)
class Summary:
    """One metric of one label over cases.

    Attributes:
        n: Cases with a value, infinite ones included.
        mean: Mean of the finite values; NaN without any.
        std: Sample standard deviation of the finite values; NaN with fewer than two.
        median: Median of all values, infinite ones included.
        excluded: Cases where neither prediction nor reference holds the label.
        infinite: Cases where only one of them does (distances only).
        low: Lower end of the confidence interval of the mean, if it was asked for.
        high: Upper end.
    """

    n: int
    mean: float
    std: float
    median: float
    minimum: float
    maximum: float
    excluded: int
    infinite: int
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name; the interval only if it is there."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def summarise_values(values: Iterable[float]) -> Summary:
    """Summarise the values of one metric over cases by the rule for empty masks."""
    array = np.asarray(list(values), dtype=np.float64)
    known = array[~np.isnan(array)]
    finite = known[np.isfinite(known)]
    nan = math.nan
    return Summary(
        n=known.size,
        mean=float(finite.mean()) if finite.size else nan,
        std=float(finite.std(ddof=1)) if finite.size > 1 else nan,
        median=_median(known),
        minimum=float(known.min()) if known.size else nan,
        maximum=float(known.max()) if known.size else nan,
        excluded=int(array.size - known.size),
        infinite=int(known.size - finite.size),
    )


def summarise(rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, dict[str, Summary]]:
    """Return ``{label: {metric: Summary}}`` over cases, with ``overall`` last.

    Args:
        rows: Rows of `case_metrics`; with ``case`` in them, ``overall`` counts each case with the mean of
            its labels.
        metrics: Metric names; all that are in the rows if left out.
    """
    names = list(metrics) if metrics is not None else _metrics_of(rows)
    labels = list(dict.fromkeys(str(row["label"]) for row in rows))
    found = {
        label: {name: summarise_values(values_of(rows, label, name).values()) for name in names}
        for label in labels
    }
    found[OVERALL] = {name: summarise_values(values_of(rows, OVERALL, name).values()) for name in names}
    return found


def values_of(rows: Sequence[Row], label: str, metric: str) -> dict[str, float]:
    """Return ``{case: value}`` of one metric of one label, or of the mean over labels for ``overall``.

    Rows without ``case`` count as one case each. The mean over labels leaves out NaN; it is NaN if every
    label is.
    """
    found: dict[str, list[float]] = {}
    for number, row in enumerate(rows):
        if label in (OVERALL, row["label"]):
            key = str(row["case"]) if "case" in row else f"#{number}"
            found.setdefault(key, []).append(float(row[metric]))
    return {
        case: _mean([value for value in values if not math.isnan(value)]) for case, values in found.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _metrics_of(rows: Sequence[Row]) -> list[str]:
    return [name for name in METRICS if any(name in row for row in rows)]


def _median(values: NDArray[np.float64]) -> float:
    """Return the median; infinity between infinities, where NumPy would subtract them."""
    if values.size == 0:
        return math.nan
    ordered = np.sort(values)
    low, high = float(ordered[(values.size - 1) // 2]), float(ordered[values.size // 2])
    return low if low == high else (low + high) / 2


def _label_map(array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind not in "iu":
        raise DataError("a label map holds no integers", why=f"its type is {array.dtype}")
    return array


def _box(boxes: Sequence[tuple[slice, ...] | None], value: int) -> tuple[slice, ...] | None:
    return boxes[value - 1] if 0 < value <= len(boxes) else None


def _union(boxes: Sequence[tuple[slice, ...] | None]) -> tuple[slice, ...] | None:
    known = [box for box in boxes if box is not None]
    if not known:
        return None
    return tuple(
        slice(min(part.start for part in parts), max(part.stop for part in parts))
        for parts in zip(*known, strict=True)
    )


def _mask(array: NDArray[Any], values: Sequence[int], box: tuple[slice, ...] | None) -> NDArray[np.bool_]:
    if box is None:
        return np.zeros((1,) * array.ndim, dtype=np.bool_)
    part = array[box]
    mask: NDArray[np.bool_] = part == values[0]
    for value in values[1:]:
        mask |= part == value
    return mask


def pooled_dice(rows: Sequence[Row]) -> dict[str, float]:
    """Return Dice over the summed volumes of all cases, by label: large structures count more than small.

    NaN where no case holds the label.
    """
    above: dict[str, float] = {}
    below: dict[str, float] = {}
    for row in rows:
        total = float(row["ref_ml"]) + float(row["pred_ml"])
        label = str(row["label"])
        below[label] = below.get(label, 0.0) + total
        above[label] = above.get(label, 0.0) + (float(row["dice"]) * total if total else 0.0)
    return {label: above[label] / below[label] if below[label] else math.nan for label in below}
