"""Data of kspace: readers of images and of measured k-space, preparation, sets of slices.

A reader lists the scans of a folder (`ScanDataset`) without reading images; `load_parts` prepares them, split
by patient, as memory-mapped `SliceSet`; `as_cases` makes of these what an environment plays.
"""

from __future__ import annotations

from .assemble import as_cases
from .loading import Parts, load_data, load_parts, load_set, named_scans
from .plan import Placed, Prepared, SamplePlan, prepare
from .png import export_png
from .reading import READERS, find_reader, open_scans, read_scan
from .scans import LABELS, RawScan, ScanDataset
from .sets import SliceSet, Stacked

__all__ = [
    "LABELS",
    "READERS",
    "Parts",
    "Placed",
    "Prepared",
    "RawScan",
    "SamplePlan",
    "ScanDataset",
    "SliceSet",
    "Stacked",
    "as_cases",
    "export_png",
    "find_reader",
    "load_data",
    "load_parts",
    "load_set",
    "named_scans",
    "open_scans",
    "prepare",
    "read_scan",
]
