"""Teachers: trained one for each fold, read out into feature files, or asked while the student trains."""

from __future__ import annotations

from .extraction import Extracted, extract
from .networks import Teacher, find_teachers, open_network, restore
from .seen import TrainedOn, seen_cases, unseen_means, unseen_only
from .training import train_teachers

__all__ = [
    "Extracted",
    "Teacher",
    "TrainedOn",
    "extract",
    "find_teachers",
    "open_network",
    "restore",
    "seen_cases",
    "train_teachers",
    "unseen_means",
    "unseen_only",
]
