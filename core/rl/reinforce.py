"""REINFORCE: the score-function loss, its baseline across episodes, and standardised returns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from medrl.core.errors import CheckpointError


def reinforce_loss(
    log_probs: Tensor, advantages: Tensor, entropy: Tensor | None = None, beta: float = 0.0
) -> Tensor:
    r"""The REINFORCE loss :math:`-\frac1n\sum \hat A\,\log\pi(a) - \beta\,\frac1n\sum H`.

    Args:
        log_probs: ``(...)`` log-probability of each action taken, with a graph.
        advantages: ``(...)`` of the same shape; treated as constants.
        entropy: ``(...)`` entropy of the policy at each step, if `beta` is not 0.
        beta: Weight of the entropy bonus.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes differ, or `beta` is not 0 and `entropy` is missing.

    Source: Williams 1992; entropy bonus after Mnih et al. 2016.
    """
    if log_probs.shape != advantages.shape:
        raise ValueError(
            f"log_probs {tuple(log_probs.shape)} and advantages {tuple(advantages.shape)} differ"
        )
    loss = -(advantages.detach().to(log_probs.dtype) * log_probs).mean()
    if beta == 0.0:
        return loss
    if entropy is None:
        raise ValueError("an entropy bonus needs the entropy of the policy")
    return loss - beta * entropy.mean()


def standardise(values: Tensor, *, centre: Tensor | float | None = None, eps: float = 1e-8) -> Tensor:
    """Subtract a centre and divide by the standard deviation (unbiased) plus `eps`.

    Args:
        values: ``(n,)`` or any shape; taken as one population.
        centre: What is subtracted, such as a baseline; the mean of the values if None.
        eps: Guards equal values; they give zeros when the centre is their mean.

    Returns:
        The same shape. One value has no spread and is only centred, so that an episode of one step
        gives return minus baseline and not NaN.

    >>> standardise(torch.tensor([50.99375, 52.625, 57.5]))
    tensor([-0.8013, -0.3194,  1.1207])
    """
    middle = values.mean() if centre is None else centre
    centred = values - middle
    if values.numel() < 2:
        return centred
    return centred / (values.std() + eps)


class EmaBaseline:
    """A running mean of returns across episodes, used as the baseline of REINFORCE.

    The first update sets the value; each later one moves it: ``value = m * value + (1 - m) * new``.

    Args:
        momentum: m in [0, 1).

    Attributes:
        value: The baseline; 0 before the first update.
        updates: How many updates it has seen.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        self.momentum = momentum
        self.value = 0.0
        self.updates = 0

    def update(self, returns: Tensor | float) -> float:
        """Take in the mean of `returns` and give the new value; a non-finite mean changes nothing."""
        new = float(torch.as_tensor(returns, dtype=torch.float64).mean())
        if math.isfinite(new):
            self.value = (
                new if self.updates == 0 else self.momentum * self.value + (1.0 - self.momentum) * new
            )
            self.updates += 1
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"momentum": self.momentum, "value": self.value, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: If a key is missing.
        """
        try:
            momentum, value, updates = float(state["momentum"]), float(state["value"]), int(state["updates"])
        except KeyError as error:
            raise CheckpointError("reward baseline", why=f"the checkpoint lacks {error}") from error
        self.momentum, self.value, self.updates = momentum, value, updates
