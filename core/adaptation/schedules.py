"""Learning rates as functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

import torch

RISE = 0.3
"""Part of a one-cycle schedule in which the rate rises."""
FIRST, LAST = 1.0 / 25.0, 1.0 / 250_000.0
"""First and last rate of a one-cycle schedule, as parts of the largest."""


def one_cycle(step: int, steps: int) -> float:
    """Factor of the rate at a step from 1 to `steps`: up to 1 and down again, along half cosines.

    Source: Smith and Topin 2018, with the numbers of `torch.optim.lr_scheduler.OneCycleLR`; momentum stays.

    >>> [round(one_cycle(step, 10), 3) for step in (1, 3, 10)]
    [0.04, 1.0, 0.0]
    """
    at, peak = step - 1, max(0.0, RISE * steps - 1.0)
    if at <= peak:
        return _between(FIRST, 1.0, at / peak if peak else 1.0)
    return _between(1.0, LAST, (at - peak) / (steps - 1 - peak))


def warm_and_decay(step: int, steps: int, warmup: int, *, linear: bool) -> float:
    """Factor of the rate at a step from 1: a linear rise over `warmup` steps, then constant or down to 0.

    >>> [round(warm_and_decay(step, 10, 3, linear=True), 3) for step in (1, 3, 4, 10)]
    [0.25, 0.75, 1.0, 0.143]
    """
    if step <= warmup:
        return step / (warmup + 1)
    return (steps - step + 1) / max(1, steps - warmup) if linear else 1.0


def factor(schedule: str, step: int, steps: int) -> float:
    """Factor of the rate of a supervised stage; `plateau` is the caller's."""
    return one_cycle(step, steps) if schedule == "one_cycle" else 1.0


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set and return the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _between(start: float, end: float, part: float) -> float:
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * part))
