"""Evaluation of probability maps by structure, by case and by lesion, and its files."""

from __future__ import annotations

from .evaluation import (
    METRICS,
    PROTOCOLS,
    CaseResult,
    Lesion,
    Rules,
    Scored,
    bootstrap,
    evaluate_case,
    find_lesion,
    measure,
    score_sextants,
    sextants,
)
from .files import Reference, evaluate_folders
from .report import LesionEvaluation, lines, summarise_results, write_results

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "CaseResult",
    "Lesion",
    "LesionEvaluation",
    "Reference",
    "Rules",
    "Scored",
    "bootstrap",
    "evaluate_case",
    "evaluate_folders",
    "find_lesion",
    "lines",
    "measure",
    "score_sextants",
    "sextants",
    "summarise_results",
    "write_results",
]
