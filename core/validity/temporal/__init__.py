"""Temporal validity: do the attributes of a structure move smoothly from frame to frame?

Example::

    report = check_sequence(labels, (0.37, 0.37))  # labels (X, Y, T), as stored in the file
    report.valid, report.frames_with_error, report.errors["lv_area"]
"""

from medrl.core.validity.temporal.checking import (
    TemporalReport,
    check_sequence,
    jump_errors,
    jumps_of,
    neighbour_hausdorff_mm,
)
from medrl.core.validity.temporal.rules import (
    Attribute,
    TemporalRules,
    builtin_temporal_rules,
    load_temporal_rules,
)

__all__ = [
    "Attribute",
    "TemporalReport",
    "TemporalRules",
    "builtin_temporal_rules",
    "check_sequence",
    "jump_errors",
    "jumps_of",
    "load_temporal_rules",
    "neighbour_hausdorff_mm",
]
