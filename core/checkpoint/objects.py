"""Objects with a state: modules, optimisers, generators of random numbers, and a method's own."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn


def has_state(item: object) -> bool:
    """Whether an object can be saved and restored."""
    if isinstance(item, (torch.Generator, np.random.Generator, random.Random)):
        return True
    return hasattr(item, "state_dict") and hasattr(item, "load_state_dict")


def same_on_all_ranks(item: object) -> bool:
    """Whether the state is the same on every rank, so that it is stored once."""
    return isinstance(
        item, (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
    )


def state_of(item: Any) -> Any:
    """Return the state of an object."""
    if isinstance(item, torch.Generator):
        return item.get_state()
    if isinstance(item, np.random.Generator):
        return dict(item.bit_generator.state)
    if isinstance(item, random.Random):
        version, words, gauss = item.getstate()
        return [version, list(words), gauss]
    return item.state_dict()


def load_state(item: Any, state: Any) -> None:
    """Set an object to a state from `state_of`."""
    if isinstance(item, torch.Generator):
        item.set_state(state)
    elif isinstance(item, np.random.Generator):
        item.bit_generator.state = state
    elif isinstance(item, random.Random):
        item.setstate((state[0], tuple(state[1]), state[2]))
    else:
        item.load_state_dict(state)
