"""Proximal policy optimisation: the loss as a pure function, and the update over minibatches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.rl.rollout import ActorCritic, RolloutBatch


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Numbers of PPO; the defaults are those of Stable-Baselines3.

    Attributes:
        gamma: Discount in [0, 1].
        lam: Trace decay λ of GAE in [0, 1].
        clip: ε, the ratio is clipped to [1 - ε, 1 + ε].
        epochs: Passes over each rollout.
        minibatch: Steps in one minibatch.
        value_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        value_clip: Values move at most so far from the old ones in one update; 0 is no limit.
        pessimistic_value: With `value_clip`, take the worse of the clipped and the unclipped error
            (Schulman's own code) instead of the clipped one (Stable-Baselines3).
        max_grad_norm: Norm that gradients are clipped to; 0 is no clipping.
        target_kl: The update stops before a step whose approximate KL exceeds 1.5 times this; 0 is never.
        normalise_advantages: Standardise the advantages of each minibatch.

    Raises:
        ConfigError: Listing every number out of its range.
    """

    gamma: float = 0.99
    lam: float = 0.95
    clip: float = 0.2
    epochs: int = 10
    minibatch: int = 64
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    value_clip: float = 0.0
    pessimistic_value: bool = False
    max_grad_norm: float = 0.5
    target_kl: float = 0.0
    normalise_advantages: bool = True

    def __post_init__(self) -> None:
        checks = {
            "gamma": 0.0 <= self.gamma <= 1.0,
            "lam": 0.0 <= self.lam <= 1.0,
            "clip": 0.0 < self.clip < 1.0,
            "epochs": self.epochs >= 1,
            "minibatch": self.minibatch >= 1,
            "value_coef": 0.0 <= self.value_coef < math.inf,
            "entropy_coef": 0.0 <= self.entropy_coef < math.inf,
            "value_clip": 0.0 <= self.value_clip < math.inf,
            "max_grad_norm": 0.0 <= self.max_grad_norm < math.inf,
            "target_kl": 0.0 <= self.target_kl < math.inf,
        }
        problems = [
            f"{name}: {getattr(self, name)} is out of range" for name, good in checks.items() if not good
        ]
        if problems:
            raise ConfigError("ppo", why="numbers out of range", problems=problems)


class PPOLoss(NamedTuple):
    """The loss and its parts, all scalars; `total` has a graph, the rest have none."""

    total: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


@dataclass(frozen=True, kw_only=True)
class PPOStats:
    """Means over the minibatches of one update.

    Attributes:
        updates: Optimiser steps taken.
        stopped: Whether the KL limit ended the update.
        explained_variance: 1 - Var(returns - values) / Var(returns), before the update.
    """

    loss: float
    policy_loss: float
    value_loss: float
    entropy: float
    approx_kl: float
    clip_fraction: float
    explained_variance: float
    updates: int
    stopped: bool

    def as_dict(self) -> dict[str, float]:
        """Numbers for a log."""
        return {name: float(value) for name, value in asdict(self).items()}


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    values: Tensor | None = None,
    returns: Tensor | None = None,
    value_coef: float = 0.5,
    old_values: Tensor | None = None,
    value_clip: float = 0.0,
    pessimistic_value: bool = False,
) -> PPOLoss:
    r"""The clipped surrogate loss with value error and entropy bonus.

    .. math::
        L = -\overline{\min(\rho A,\ \mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon) A)}
            + c_v \overline{(R - V)^2} - c_e \overline{H}, \qquad \rho = \pi(a) / \pi_{old}(a)

    All tensors have one shape: ``(N,)``, or ``(B, ...)`` for a policy in every pixel or voxel.

    Args:
        log_probs: Of the actions taken, under the present policy, with a graph.
        old_log_probs: Under the policy that acted.
        advantages: Constants.
        clip: ε.
        entropy: Of the present policy; needed if `entropy_coef` is not 0, otherwise only reported.
        entropy_coef: c_e.
        values: Present values, with a graph; without them there is no value error.
        returns: Targets of the values.
        value_coef: c_v.
        old_values: Values when acting; needed if `value_clip` is not 0.
        value_clip: Limit of the movement of values; 0 is none.
        pessimistic_value: Take the larger of clipped and unclipped squared error.

    Raises:
        ValueError: If shapes differ or a needed tensor is missing.

    Source: Schulman et al. 2017, eq. 7 and 9.
    """
    shapes = {tuple(item.shape) for item in (log_probs, old_log_probs, advantages)}
    if len(shapes) != 1:
        raise ValueError(f"log_probs, old_log_probs and advantages have the shapes {sorted(shapes)}")
    advantages = advantages.detach()
    log_ratio = log_probs - old_log_probs.detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    policy = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    total = policy

    value = torch.zeros_like(policy)
    if values is not None:
        if returns is None or values.shape != returns.shape:
            raise ValueError("values need returns of the same shape")
        value = _value_error(values, returns.detach(), old_values, value_clip, pessimistic_value)
        total = total + value_coef * value

    bonus = torch.zeros_like(policy) if entropy is None else entropy.mean()
    if entropy_coef != 0.0:
        if entropy is None:
            raise ValueError("an entropy bonus needs the entropy of the policy")
        total = total - entropy_coef * bonus

    with torch.no_grad():
        approx_kl = ((ratio - 1.0) - log_ratio).mean()
        clip_fraction = ((ratio - 1.0).abs() > clip).to(ratio.dtype).mean()
    return PPOLoss(total, policy.detach(), value.detach(), bonus.detach(), approx_kl, clip_fraction)


def _value_error(
    values: Tensor, returns: Tensor, old_values: Tensor | None, limit: float, pessimistic: bool
) -> Tensor:
    error = (returns - values).square()
    if limit == 0.0:
        return error.mean()
    if old_values is None:
        raise ValueError("value_clip needs old_values")
    old = old_values.detach()
    clipped = (returns - (old + (values - old).clamp(-limit, limit))).square()
    return (torch.maximum(error, clipped) if pessimistic else clipped).mean()


def ppo_update(
    policy: ActorCritic,
    optimizer: torch.optim.Optimizer,
    batch: RolloutBatch,
    config: PPOConfig,
    *,
    generator: torch.Generator,
    step: Callable[[Tensor], object] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> PPOStats:
    """Improve the policy on one rollout.

    Args:
        policy: Gives log-probabilities, entropies and values of actions.
        optimizer: Of its parameters.
        batch: From `RolloutBuffer.compute`; ranks must bring batches of equal length.
        config: Numbers.
        generator: CPU generator for the order of the minibatches.
        step: Takes the loss, goes backward and steps; given by who trains through the runtime:
            ``lambda loss: (rt.backward(loss), rt.step(optimizer, clip_norm=config.max_grad_norm))``.
            Without it the optimiser is stepped here, and a non-finite loss or gradient is an error.
        reduce: Mean over ranks, so that all of them stop at the same minibatch.

    Raises:
        RuntimeFault: If the batch is empty, or (without `step`) a loss or gradient is not finite.

    Source: Schulman et al. 2017, algorithm 1; details as in Stable-Baselines3.
    """
    if len(batch) == 0:
        raise RuntimeFault("ppo", why="the rollout is empty")
    advance = step if step is not None else plain_step(optimizer, config.max_grad_norm)
    sums = torch.zeros(6, dtype=torch.float64)
    seen = updates = 0
    stopped = False
    for _ in range(config.epochs):
        for part in batch.minibatches(config.minibatch, generator):
            log_probs, entropy, values = policy.evaluate_actions(part.observations, part.actions, part.masks)
            loss = ppo_loss(
                log_probs,
                part.log_probs,
                _normalised(part.advantages) if config.normalise_advantages else part.advantages,
                clip=config.clip,
                entropy=entropy,
                entropy_coef=config.entropy_coef,
                values=values,
                returns=part.returns,
                value_coef=config.value_coef,
                old_values=part.values,
                value_clip=config.value_clip,
                pessimistic_value=config.pessimistic_value,
            )
            sums += torch.stack([item.detach().double().cpu() for item in loss])
            seen += 1
            if config.target_kl > 0.0:
                kl = loss.approx_kl if reduce is None else reduce(loss.approx_kl)
                stopped = float(kl) > 1.5 * config.target_kl
                if stopped:
                    break
            advance(loss.total)
            updates += 1
        if stopped:
            break
    total, policy_loss, value_loss, mean_entropy, approx_kl, clip_fraction = (sums / seen).tolist()
    return PPOStats(
        loss=total,
        policy_loss=policy_loss,
        value_loss=value_loss,
        entropy=mean_entropy,
        approx_kl=approx_kl,
        clip_fraction=clip_fraction,
        explained_variance=explained_variance(batch.values, batch.returns),
        updates=updates,
        stopped=stopped,
    )


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Part of the variance of the returns that the values explain: 1 is all; NaN for equal returns."""
    spread = float(returns.var(correction=0))
    if spread == 0.0:
        return math.nan
    return 1.0 - float((returns - values).var(correction=0)) / spread


def _normalised(advantages: Tensor) -> Tensor:
    """Standardise; one advantage alone is left as it is."""
    if advantages.numel() < 2:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def plain_step(optimizer: torch.optim.Optimizer, max_norm: float) -> Callable[[Tensor], None]:
    """Make a function that takes a loss, goes backward, clips the gradient's norm (0: not) and steps.

    The function raises RuntimeFault if the loss or the gradient is not finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def advance(loss: Tensor) -> None:
        if not bool(torch.isfinite(loss)):
            raise RuntimeFault("ppo", why=f"the loss is {float(loss.detach())}", do="lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0.0 else math.inf)
        if not bool(torch.isfinite(norm)):
            raise RuntimeFault("ppo", why="a gradient is not finite", do="lower the learning rate")
        optimizer.step()

    return advance
