r"""Gradient alignment: which teacher's loss falls when the student moves as the reward wants.

For every teacher :math:`d_i = (\ell_i(θ+εv) - \ell_i(θ-εv))/2ε`, where v is the unit gradient of the
supervised loss on the reward cases, preconditioned like the optimiser. Two forward passes serve all teachers.
A positive d means that going down the reward loss also goes down the teacher's loss.

Source: experiments recorded beside the specification; not part of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from medrl.core.errors import CheckpointError


def descent_direction(parameters: Iterable[Tensor], optimizer: Optimizer | None = None) -> list[Tensor]:
    """Unit direction v from the gradients that the parameters hold, one tensor for each.

    Args:
        parameters: With `.grad` of the reward loss; a missing gradient counts as zero.
        optimizer: With Adam's second moments, gradients are divided by their root first.

    Returns:
        Float32 tensors whose joint norm is 1, or all zero where every gradient is zero or not finite.
    """
    directions = []
    for parameter in parameters:
        gradient = parameter.grad
        direction = torch.zeros_like(parameter) if gradient is None else gradient.detach().clone()
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        if "exp_avg_sq" in state:
            direction = direction / (state["exp_avg_sq"].to(direction).sqrt() + 1e-8)
        directions.append(direction.float())
    norm = torch.sqrt(torch.stack([d.square().sum() for d in directions]).sum())
    if not bool(torch.isfinite(norm)) or float(norm) == 0.0:
        return [torch.zeros_like(d) for d in directions]
    return [d / norm for d in directions]


@torch.no_grad()
def alignment(
    losses: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    *,
    epsilon: float = 0.02,
) -> Tensor:
    """Finite difference of every teacher's loss along a direction, ``(N,)`` float32.

    Args:
        losses: One forward pass in float32 that returns ``(N,)``; its randomness must be the same twice.
        parameters: Changed during the call, and restored to the last bit afterwards, also on an error.
        direction: From `descent_direction`.
        epsilon: Length of the step.
    """
    saved = [parameter.detach().clone() for parameter in parameters]
    values: list[Tensor] = []
    try:
        for sign in (1.0, -1.0):
            for parameter, start, step in zip(parameters, saved, direction, strict=True):
                parameter.copy_(start + sign * epsilon * step.to(start.dtype))
            values.append(losses().float())
    finally:
        for parameter, start in zip(parameters, saved, strict=True):
            parameter.copy_(start)
    return (values[0] - values[1]) / (2.0 * epsilon)


class AlignmentScores:
    """Running score S = EMA(d)/√EMA(d²) of each teacher, and the weights softmax(S/τ) on a prior.

    Args:
        teachers: N.
        momentum: Memory of both means.
        temperature: τ.
    """

    def __init__(self, teachers: int, *, momentum: float = 0.9, temperature: float = 0.25) -> None:
        self.momentum, self.temperature = momentum, temperature
        self.mean = torch.zeros(teachers)
        self.square = torch.zeros(teachers)
        self.updates = 0

    def update(self, difference: Tensor) -> None:
        """Take in d ``(N,)``, as all ranks agree on it; non-finite values change nothing."""
        d = difference.detach().float().cpu()
        if not bool(torch.isfinite(d).all()):
            return
        m = self.momentum
        self.mean, self.square = m * self.mean + (1 - m) * d, m * self.square + (1 - m) * d.square()
        self.updates += 1

    @property
    def scores(self) -> Tensor:
        """S ``(N,)`` in [−1, 1]; 0 before the first update.

        Both means start at zero, and their start-up factors cancel but for a root; it is divided out.
        """
        if self.updates == 0:
            return torch.zeros_like(self.mean)
        seen = 1.0 - self.momentum**self.updates
        return (self.mean / seen) / ((self.square / seen).sqrt() + 1e-12)

    def weights(self, prior: Tensor | None = None) -> Tensor:
        """Weights ``(N,)``: softmax(log prior + S/τ); the prior is uniform if None."""
        base = (
            torch.zeros_like(self.mean)
            if prior is None
            else prior.detach().float().cpu().clamp_min(1e-8).log()
        )
        return torch.softmax(base + self.scores / self.temperature, dim=-1)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        return {"mean": self.mean, "square": self.square, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: A key is missing, or the number of teachers differs.
        """
        try:
            mean, square, updates = state["mean"], state["square"], int(state["updates"])
        except KeyError as error:
            raise CheckpointError("alignment scores", why=f"the checkpoint lacks {error}") from error
        if mean.shape != self.mean.shape:
            raise CheckpointError(
                "alignment scores", why=f"the checkpoint has {mean.numel()} teachers, not {self.mean.numel()}"
            )
        self.mean, self.square, self.updates = mean.clone().cpu(), square.clone().cpu(), updates
