"""Advantages and returns of a rollout: generalised advantage estimation and discounted sums."""

from __future__ import annotations

import torch
from torch import Tensor


def generalised_advantage(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    last_value: Tensor,
    *,
    gamma: float,
    lam: float,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Advantages and returns by GAE.

    .. math::
        \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \delta_t + \gamma\lambda A_{t+1}

    A termination at step t makes the value after it zero. A truncation (a time limit) at step t keeps
    the value of the observation that the cut left behind, `final_values[t]`. Both stop the sum.

    Args:
        rewards: ``(T, E)``.
        values: ``(T, E)``, the value of the observation *before* each step.
        dones: ``(T, E)``; ``dones[t]`` is 1 where the episode ended *at* step t by termination.
        last_value: ``(E,)``, the value after the last step, used where the rollout was cut.
        gamma: Discount in [0, 1].
        lam: Trace decay λ in [0, 1].
        truncated: ``(T, E)``; 1 where a time limit ended the episode at step t.
        final_values: ``(T, E)``, read only where `truncated` is 1 and `dones` is 0.

    Returns:
        Advantages ``(T, E)`` and returns ``(T, E)`` = advantages + values; both without a graph.

    Raises:
        ValueError: If shapes differ, or `truncated` comes without `final_values`.

    Source: Schulman et al. 2016, eq. 16; bootstrapping at truncation after Pardo et al. 2018.
    """
    if rewards.shape != values.shape or rewards.shape != dones.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)} and dones {tuple(dones.shape)} "
            "must have one shape (T, E)"
        )
    if last_value.shape != rewards.shape[1:]:
        raise ValueError(f"last_value {tuple(last_value.shape)} must be (E,) = {tuple(rewards.shape[1:])}")
    if truncated is not None and final_values is None:
        raise ValueError("truncated needs final_values, the values of the observations left behind")
    with torch.no_grad():
        kind = torch.promote_types(values.dtype, torch.float32)
        rewards, values, last = rewards.to(kind), values.to(kind), last_value.to(kind)
        alive = 1.0 - dones.to(kind)
        following = torch.cat([values[1:], last.unsqueeze(0)])
        go_on = alive
        if truncated is not None and final_values is not None:
            cut = truncated.to(torch.bool)
            following = torch.where(cut, final_values.to(kind), following)
            go_on = alive * (~cut).to(kind)
        # `where`, not a product: the value after a termination has no meaning and may be non-finite.
        following = torch.where(alive > 0, following, torch.zeros_like(following))
        delta = rewards + gamma * following - values
        advantages = torch.empty_like(delta)
        running = torch.zeros_like(last)
        for t in range(delta.shape[0] - 1, -1, -1):
            running = delta[t] + gamma * lam * go_on[t] * running
            advantages[t] = running
        return advantages, advantages + values


def discounted_returns(rewards: Tensor, *, gamma: float, terminal: Tensor | float = 0.0) -> Tensor:
    r"""Returns of one episode: :math:`G_t = r_t + \gamma G_{t+1}` with :math:`G_T` given.

    Args:
        rewards: ``(T,)`` or ``(T, ...)``.
        gamma: Discount in [0, 1].
        terminal: The return after the last step, a number or a tensor of shape ``rewards.shape[1:]``.

    Returns:
        ``(T, ...)``, without a graph; in float32, or float64 if the rewards are.

    Source: Williams 1992; Sutton and Barto, eq. 3.9.

    >>> discounted_returns(torch.tensor([1.0, -2.0, 0.5]), gamma=0.5, terminal=60.0)
    tensor([ 7.6250, 13.2500, 30.5000])
    """
    with torch.no_grad():
        kind = torch.promote_types(rewards.dtype, torch.float32)
        rewards = rewards.to(kind)
        running = torch.as_tensor(terminal, dtype=kind, device=rewards.device).expand(rewards.shape[1:])
        returns = torch.empty_like(rewards)
        for t in range(rewards.shape[0] - 1, -1, -1):
            running = rewards[t] + gamma * running
            returns[t] = running
        return returns
