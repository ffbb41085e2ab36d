"""Prediction of many cases: one that fails is recorded and the others go on."""

from __future__ import annotations

from .loop import CaseLoop, Clock, PredictOutcome, check_part, limited_threads
from .outputs import entropy, label_volumes_ml
from .parts import Merged, merge_parts, part_name
from .record import REPORT_NAME, CaseRecord, PredictReport, read_report
from .running import run

__all__ = [
    "REPORT_NAME",
    "CaseLoop",
    "CaseRecord",
    "Clock",
    "Merged",
    "PredictOutcome",
    "PredictReport",
    "check_part",
    "entropy",
    "label_volumes_ml",
    "limited_threads",
    "merge_parts",
    "part_name",
    "read_report",
    "run",
]
