"""Checkpoints: atomic saving, digest-verified loading, resuming. The only place that calls `torch.load`."""

from medrl.core.checkpoint.compare import config_difference
from medrl.core.checkpoint.file import (
    SCHEMA,
    Checkpoint,
    Written,
    find_checkpoint,
    is_checkpoint,
    load_checkpoint,
    read_meta,
    write_checkpoint,
)
from medrl.core.checkpoint.foreign import load_foreign, load_into
from medrl.core.checkpoint.peers import Alone, Peers
from medrl.core.checkpoint.store import CheckpointStore

__all__ = [
    "SCHEMA",
    "Alone",
    "Checkpoint",
    "CheckpointStore",
    "Peers",
    "Written",
    "config_difference",
    "find_checkpoint",
    "is_checkpoint",
    "load_checkpoint",
    "load_foreign",
    "load_into",
    "read_meta",
    "write_checkpoint",
]
