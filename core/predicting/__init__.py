"""Prediction of many cases: one that fails is recorded and the others go on."""

from __future__ import annotations

from .outputs import entropy, label_volumes_ml
from .record import REPORT_NAME, CaseRecord, PredictReport, read_report
from .running import PredictOutcome, run

__all__ = [
    "REPORT_NAME",
    "CaseRecord",
    "PredictOutcome",
    "PredictReport",
    "entropy",
    "label_volumes_ml",
    "read_report",
    "run",
]
