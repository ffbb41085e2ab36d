"""The sequences that rl4seg3d trains on: reading, division by patient, windows, the wall around labels."""

from __future__ import annotations

from ..windows import WINDOW as FRAMES
from .loading import load_source, load_target
from .plan import SequencePlan, label_on_grid, make_plan
from .readers import open_original
from .sets import Domain, SequenceSet
from .splitting import divided_source, divided_target, open_domain

__all__ = [
    "FRAMES",
    "Domain",
    "SequencePlan",
    "SequenceSet",
    "divided_source",
    "divided_target",
    "label_on_grid",
    "load_source",
    "load_target",
    "make_plan",
    "open_domain",
    "open_original",
]
