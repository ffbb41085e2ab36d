"""Learning rates as functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

import torch

FLOOR = 0.01
"""Last rate of the cosine of the supervised stages, as a part of the largest."""
IMITATION_FLOOR = 0.05


def cosine(step: int, steps: int, *, warmup: float = 0.0, floor: float = FLOOR) -> float:
    """Factor of the rate at a step from 1: a linear rise, then half a cosine down to `floor`.

    >>> [round(cosine(step, 11, warmup=0.1), 3) for step in (1, 6, 11)]
    [1.0, 0.505, 0.01]
    """
    rising = round(warmup * steps)
    if step <= rising:
        return step / rising
    first = max(rising, 1)
    part = (step - first) / max(1, steps - first)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * part))


def stepwise(step: int, per_epoch: int, epochs: int, by: float = 0.1) -> float:
    """Factor of the rate that falls to a tenth after every so many epochs.

    >>> [round(stepwise(step, 10, 3), 3) for step in (1, 30, 31, 61)]
    [1.0, 1.0, 0.1, 0.01]
    """
    done: float = by ** ((step - 1) // (per_epoch * epochs))
    return done


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set and return the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
