"""What the method must beat: adaptation without reinforcement learning, at matched optimiser steps.

Every function takes a starting network and `ImageSet`s and returns another network, or label maps; the
starting network is left as it was. None of them looks at target labels, except the two upper bounds.
"""

from __future__ import annotations

from .adaptation import adapt_batch_norm, minimise_entropy
from .budget import Budget, draw, frozen_batch_norm, optimise
from .refining import Refiner
from .self_training import self_train, self_train_sure, supervise

__all__ = [
    "Budget",
    "Refiner",
    "adapt_batch_norm",
    "draw",
    "frozen_batch_norm",
    "minimise_entropy",
    "optimise",
    "self_train",
    "self_train_sure",
    "supervise",
]
