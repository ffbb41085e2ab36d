"""Datasets: layouts, case identifiers, patient-grouped splits, loading, checking, converting.

Opening a dataset lists files and reads no image; only `load_case`, `check_dataset`, `fingerprint`,
`convert` and the labels of a plain folder without ``dataset.json`` do.
"""

from __future__ import annotations

from .checking import DatasetReport, Problem, check_dataset
from .converting import convert
from .fingerprints import content_hash, fingerprint
from .inputs import list_inputs, plan_outputs
from .layouts import LAYOUTS, open_dataset
from .loading import load_case, stack_channels
from .model import Dataset, Split
from .names import patient_of, safe_case_id, safe_path
from .splits import make_splits, read_splits, write_splits

__all__ = [
    "LAYOUTS",
    "Dataset",
    "DatasetReport",
    "Problem",
    "Split",
    "check_dataset",
    "content_hash",
    "convert",
    "fingerprint",
    "list_inputs",
    "load_case",
    "make_splits",
    "open_dataset",
    "patient_of",
    "plan_outputs",
    "read_splits",
    "safe_case_id",
    "safe_path",
    "stack_channels",
    "write_splits",
]
