"""Datasets of several cohorts, described by the YAML file of the original."""

from __future__ import annotations

from .dataset import LABELS, CohortDataset, open_cohorts
from .folds import Fold, other_validation_lists, read_folds, read_test
from .settings import Cohort, CohortSettings, is_cohort_file, read_settings

__all__ = [
    "LABELS",
    "Cohort",
    "CohortDataset",
    "CohortSettings",
    "Fold",
    "is_cohort_file",
    "open_cohorts",
    "other_validation_lists",
    "read_folds",
    "read_settings",
    "read_test",
]
