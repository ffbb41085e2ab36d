"""Evaluation of segmentations against references: rows, summaries, intervals, paired comparison."""

from __future__ import annotations

from .comparing import Comparison, compare_rows, group_by_patient, with_intervals
from .labels import read_labels
from .result import Evaluation, read_evaluation
from .running import evaluate_folders

__all__ = [
    "Comparison",
    "Evaluation",
    "compare_rows",
    "evaluate_folders",
    "group_by_patient",
    "read_evaluation",
    "read_labels",
    "with_intervals",
]
