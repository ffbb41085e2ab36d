"""Metrics of segmentation: overlap, surface distance, lesions, calibration; spacing in mm.

One rule for empty masks holds for all of them, see `medrl.core.metrics.cases`.
"""

from __future__ import annotations

from .calibration import (
    Reliability,
    adaptive_calibration_error,
    brier_score,
    expected_calibration_error,
    mutual_information,
    reliability,
)
from .cases import (
    DEFAULT_METRICS,
    METRICS,
    OVERALL,
    LabelValues,
    MetricInfo,
    Row,
    Summary,
    case_metrics,
    check_metrics,
    pooled_dice,
    summarise,
    summarise_values,
    values_of,
)
from .lesions import LesionMatch, auroc, average_precision, lesion_candidates, match_lesions, pool
from .overlap import Confusion, confusion, dice, iou
from .surface import SurfaceDistances, assd, components, hausdorff, hd95, nsd, surface_distances

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "OVERALL",
    "Confusion",
    "LabelValues",
    "LesionMatch",
    "MetricInfo",
    "Reliability",
    "Row",
    "Summary",
    "SurfaceDistances",
    "adaptive_calibration_error",
    "assd",
    "auroc",
    "average_precision",
    "brier_score",
    "case_metrics",
    "check_metrics",
    "components",
    "confusion",
    "dice",
    "expected_calibration_error",
    "hausdorff",
    "hd95",
    "iou",
    "lesion_candidates",
    "match_lesions",
    "mutual_information",
    "nsd",
    "pool",
    "pooled_dice",
    "reliability",
    "summarise",
    "summarise_values",
    "surface_distances",
    "values_of",
]
