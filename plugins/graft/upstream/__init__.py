"""Feature files of the original: read, placed in the student's window, and imported once.

`medrl.plugins.graft.upstream.importing` is not imported here: it needs the dataset, which needs this package.
"""

from __future__ import annotations

from .features import (
    FORMATS,
    VALID,
    UpstreamTeacher,
    family_of,
    find_file,
    fitted,
    outside_logits,
    read_upstream,
    student_logits,
)
from .windows import ALIGNMENTS, Align, Place, find_place, placed, refuse

__all__ = [
    "ALIGNMENTS",
    "FORMATS",
    "VALID",
    "Align",
    "Place",
    "UpstreamTeacher",
    "family_of",
    "find_file",
    "find_place",
    "fitted",
    "outside_logits",
    "placed",
    "read_upstream",
    "refuse",
    "student_logits",
]
