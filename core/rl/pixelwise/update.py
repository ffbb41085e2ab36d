"""The inner steps of pixel-wise PPO, and the single step of plain policy gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.core.rl.pixelwise.arithmetic import (
    PPOTerms,
    action_log_probs,
    group_mean,
    pixel_entropy,
    policy_gradient_loss,
    ppo_terms,
)
from medrl.core.rl.pixelwise.rollout import Autocast, PixelPolicy, Rollout
from medrl.core.rl.pixelwise.settings import PixelwisePPOConfig
from medrl.core.rl.ppo import plain_step

PixelCritic: TypeAlias = Callable[[Tensor], Tensor | Sequence[Tensor]]
"""Gives values of images ``(N, C, *S)``: ``(N, *S)``, ``(N, 1, …, 1)``, or maps of falling resolution."""

Step: TypeAlias = Callable[[str, Tensor], object]
"""``step("actor" or "critic", loss)`` goes backward and steps the optimiser of that part."""


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """Means over pixels and inner steps, except where said.

    Attributes:
        loss: L_π.
        critic_loss: L_V; 0 without a critic.
        reward: r.
        value: V, or the baseline in its place.
        advantage: A.
        entropy: H.
        log_prob: log π(a).
        ratio: ρ.
        ratio_error: Largest |ρ - 1| of the first inner step; not 0 if policy and rollout disagree, as with
            batch statistics that drift.
        approx_kl: log π(a) - log π_ref(a).
        kl: KL(π ‖ π_ref) when acting.
        clip_fraction: Share of the pixels outside 1 ± ε.
        foreground: Share of the pixels whose most probable label is not 0, when acting.
    """

    loss: float
    critic_loss: float
    reward: float
    value: float
    advantage: float
    entropy: float
    log_prob: float
    ratio: float
    ratio_error: float
    approx_kl: float
    kl: float
    clip_fraction: float
    foreground: float

    def as_dict(self) -> dict[str, float]:
        """Numbers for a log."""
        return asdict(self)


def update(
    actor: PixelPolicy,
    critic: PixelCritic | None,
    batch: Rollout,
    config: PixelwisePPOConfig,
    *,
    step: Step,
    autocast: Autocast = nullcontext,
) -> UpdateStats:
    """Improve actor and critic on one rollout, ``config.inner_steps`` times.

    The acting pass serves as the first inner step if the rollout kept its graph, so that k inner steps cost k
    passes of the actor and one of the reference altogether. Actor and critic get separate losses and separate
    calls of `step`; neither's gradient reaches the other.

    Args:
        actor: The policy that acted, unchanged since.
        critic: Needed with ``config.baseline`` ``critic``; otherwise not used.
        batch: From `rollout`.
        config: Numbers.
        step: Steps one part; see `Step`.
        autocast: Context of the forward passes, such as ``rt.autocast``.

    Raises:
        ConfigError: The baseline needs a critic, or several actions of an image.

    Source: Judge et al. 2024 (RL4Seg), PPO.py.
    """
    learns = config.baseline == "critic"
    if learns and critic is None:
        raise ConfigError(
            "pixel-wise ppo", why="the baseline is the critic and there is none", do="baseline: constant"
        )
    if config.baseline == "group" and batch.samples < 2:
        raise ConfigError("pixel-wise ppo", why="a group is one action", do="samples: 4")
    sums: list[Tensor] = []
    first: Tensor | None = None
    for _ in range(config.inner_steps):
        maps = batch.take_fresh()
        if maps is None:
            with autocast():
                maps = actor.log_probs(batch.images)
        values: Tensor | Sequence[Tensor] | float = config.constant
        if learns and critic is not None:
            with autocast():
                values = _rows(critic(batch.images), batch.samples)
        elif config.baseline == "group":
            values = group_mean(_effective(batch), batch.samples)
        log_probs = action_log_probs(maps, batch.actions)
        with torch.set_grad_enabled(config.entropy != 0.0):
            entropy = pixel_entropy(maps)
        terms = ppo_terms(
            log_probs,
            batch.log_probs,
            batch.ref_log_probs,
            batch.rewards,
            values,
            clip=config.clip,
            kl=config.kl,
            entropy=entropy,
            entropy_coef=config.entropy,
            forced=batch.forced,
            forced_target=config.forced_target,
        )
        sums.append(_numbers(terms, values, entropy, log_probs, learns=learns))
        if first is None:
            first = (terms.ratio - 1.0).abs().max()
        del maps, log_probs, entropy
        step("actor", terms.actor)
        if learns and terms.critic is not None:
            step("critic", terms.critic)
    return _stats(batch, sums, first)


def policy_gradient_update(
    actor: PixelPolicy, batch: Rollout, *, step: Step, autocast: Autocast = nullcontext
) -> UpdateStats:
    """Improve the actor on one rollout by one step of plain policy gradient, without reference and critic.

    Source: Judge et al. 2024 (RL4Seg), PolicyGradient.py. Deviation: the reward of given actions is their
    own (`rollout` computes it), not that of the actions they replaced.
    """
    maps = batch.take_fresh()
    if maps is None:
        with autocast():
            maps = actor.log_probs(batch.images)
    log_probs = action_log_probs(maps, batch.actions)
    loss = policy_gradient_loss(log_probs, batch.rewards)
    with torch.no_grad():
        now = log_probs.detach()
        ratio = (now - batch.log_probs).exp()
        terms = PPOTerms(
            loss.detach(),
            None,
            batch.rewards - batch.rewards.mean(),
            ratio,
            (now - batch.ref_log_probs).mean(),
            torch.zeros_like(loss),
        )
        sums = [_numbers(terms, batch.rewards.mean(), pixel_entropy(maps.detach()), now, learns=False)]
    step("actor", loss)
    return _stats(batch, sums, (ratio - 1.0).abs().max())


def plain_steps(
    optimizers: Mapping[str, torch.optim.Optimizer], clip_norms: Mapping[str, float] | None = None
) -> Step:
    """Make a `Step` of optimisers by part; each part is clipped by itself.

    Args:
        optimizers: ``{"actor": …, "critic": …}``.
        clip_norms: Norm that the gradient of each part is clipped to; 0 or absent is no clipping.

    The step raises RuntimeFault if a loss or gradient is not finite.
    """
    norms = clip_norms or {}
    steps = {part: plain_step(optimizer, norms.get(part, 0.0)) for part, optimizer in optimizers.items()}
    return lambda part, loss: steps[part](loss)


def _rows(values: Tensor | Sequence[Tensor], samples: int) -> Tensor | list[Tensor]:
    """Values of the rows from values of the images."""
    if not isinstance(values, Tensor):
        return [part.repeat_interleave(samples, dim=0) for part in values]
    return values.repeat_interleave(samples, dim=0) if samples > 1 else values


def _effective(batch: Rollout) -> Tensor:
    """Rewards in which given actions count as right everywhere."""
    where = batch.forced.view(-1, *(1,) * (batch.rewards.ndim - 1))
    return torch.where(where, torch.ones_like(batch.rewards), batch.rewards)


@torch.no_grad()
def _numbers(
    terms: PPOTerms,
    values: Tensor | Sequence[Tensor] | float,
    entropy: Tensor,
    log_probs: Tensor,
    *,
    learns: bool,
) -> Tensor:
    """What is logged of one inner step, as one tensor: no waiting for the device."""
    first = values if isinstance(values, (Tensor, float)) else values[0]
    like = terms.actor.detach().float()
    critic = terms.critic.detach().float() if learns and terms.critic is not None else torch.zeros_like(like)
    value = first.detach().float().mean() if isinstance(first, Tensor) else torch.full_like(like, first)
    return torch.stack(
        [
            like,
            critic,
            value,
            terms.advantages.mean(),
            entropy.detach().mean(),
            log_probs.detach().mean(),
            terms.ratio.mean(),
            terms.approx_kl,
            terms.clip_fraction,
        ]
    )


def _stats(batch: Rollout, sums: Sequence[Tensor], first: Tensor | None) -> UpdateStats:
    names = (
        "loss",
        "critic_loss",
        "value",
        "advantage",
        "entropy",
        "log_prob",
        "ratio",
        "approx_kl",
        "clip_fraction",
    )
    means = dict(zip(names, torch.stack(list(sums)).double().mean(dim=0).tolist(), strict=True))
    return UpdateStats(
        reward=float(batch.rewards.mean()),
        ratio_error=0.0 if first is None else float(first),
        kl=float(batch.kl),
        foreground=1.0 - float(batch.shares[0, 0]),
        **means,
    )
