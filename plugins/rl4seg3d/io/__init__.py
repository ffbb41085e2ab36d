"""Sequences from files to the grid of the network and back: reading, preparing, listing, naming."""

from .listing import list_sequences, plan_sequences
from .preparing import Plan, Prepared, equalise, prepare, restore, scaled
from .sequence import EchoSequence, read_sequence, to_grid

__all__ = [
    "EchoSequence",
    "Plan",
    "Prepared",
    "equalise",
    "list_sequences",
    "plan_sequences",
    "prepare",
    "read_sequence",
    "restore",
    "scaled",
    "to_grid",
]
