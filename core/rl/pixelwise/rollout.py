"""Acting once on a batch of images, and everything about it that stays fixed during the inner steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from medrl.core.errors import RuntimeFault
from medrl.core.rl.pixelwise.arithmetic import action_log_probs, categorical_kl, most_probable
from medrl.core.rl.pixelwise.sampling import correlated_categorical
from medrl.core.rl.pixelwise.settings import PixelwisePPOConfig

RewardFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``reward(actions (M, *S), images (M, C, *S))`` gives ``(M, *S)`` in [0, 1], or ``(M, 1, …, 1)``."""

Autocast: TypeAlias = Callable[[], AbstractContextManager[Any]]


class PixelPolicy(Protocol):
    """A distribution over labels in every pixel."""

    def log_probs(self, images: Tensor) -> Tensor:
        """Log-probabilities ``(N, K, *S)``, float32, of images ``(N, C, *S)``."""
        ...


@dataclass(eq=False, kw_only=True)
class Rollout:
    """What one policy did on N images; M = N·G rows, where rows n·G to n·G + G - 1 belong to image n.

    Attributes:
        images: ``(N, C, *S)``.
        actions: ``(M, *S)``, int64.
        log_probs: ``(M, *S)`` of the actions, under the policy that acted.
        ref_log_probs: ``(M, *S)`` of the actions, under the reference.
        rewards: ``(M, *S)``.
        forced: ``(M,)`` boolean; true where the action was given instead of drawn.
        samples: G.
        shares: ``(2, K)``; the shares of the labels in the most probable actions of the policy (first row)
            and of the reference.
        kl: Mean KL(π ‖ π_ref) of a pixel, a scalar.
        fresh: The log-probabilities ``(N, K, *S)`` of the policy that acted with their graph, for the first
            inner step; None once they are used.
    """

    images: Tensor
    actions: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    rewards: Tensor
    forced: Tensor
    samples: int
    shares: Tensor
    kl: Tensor
    fresh: Tensor | None = None

    def take_fresh(self) -> Tensor | None:
        """Hand the graph of the acting pass over; the second call gives None."""
        fresh, self.fresh = self.fresh, None
        return fresh


def rollout(
    actor: PixelPolicy,
    reference: PixelPolicy | None,
    images: Tensor,
    reward_fn: RewardFn,
    config: PixelwisePPOConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    forced: Tensor | None = None,
    forced_actions: Tensor | None = None,
    greedy: bool = False,
    keep_graph: bool = True,
    autocast: Autocast = nullcontext,
) -> Rollout:
    """Let the policy act on images and reward it; one pass of the actor and one of the reference.

    Of an image that is forced, the first of its actions is the given one.

    Args:
        actor: The policy that acts; its mode (training or evaluation) is left as it is.
        reference: The fixed policy of the KL penalty; None takes the actor as it is now.
        images: ``(N, C, *S)``.
        reward_fn: Rewards actions; called once, without a graph.
        config: Numbers: how many actions, how correlated, how greedy.
        generator: Of all draws; it may live on the CPU whatever the device of the images.
        forced: ``(N,)`` boolean; the images whose action is given (the original's ``use_gt``).
        forced_actions: ``(N, *S)``; read where `forced`.
        greedy: Take the most probable labels instead of drawing.
        keep_graph: Keep the graph of the actor's pass, so that `update` need not repeat it for its first
            inner step. The memory of that pass is then held while the reward is computed.
        autocast: Context of the passes, such as ``rt.autocast``.

    Raises:
        RuntimeFault: A probability or reward is not finite, or rewards have the wrong shape.
        ValueError: `forced` comes without `forced_actions`.
    """
    config = config or PixelwisePPOConfig()
    with torch.set_grad_enabled(keep_graph and torch.is_grad_enabled()), autocast():
        fresh = actor.log_probs(images)
    with torch.no_grad():
        now = fresh.detach()
        if not bool(torch.isfinite(now).all()):
            raise RuntimeFault(
                "pixel-wise policy",
                why="a log-probability is not finite",
                do="lower the learning rate of the policy or clip its gradient",
            )
        with autocast():
            fixed = now if reference is None else reference.log_probs(images)
        best = most_probable(now)
        drawn = _actions(now, best, config, generator, greedy=greedy)
        rows = images.repeat_interleave(config.samples, dim=0) if config.samples > 1 else images
        actions, given = _force(drawn, forced, forced_actions, config.samples)
        judged = actions if config.recompute_forced else drawn
        with autocast():
            rewards = reward_fn(judged, rows)
        return Rollout(
            images=images,
            actions=actions,
            log_probs=action_log_probs(now, actions),
            ref_log_probs=action_log_probs(fixed, actions),
            rewards=_checked(rewards, actions),
            forced=given,
            samples=config.samples,
            shares=torch.stack([_shares(best, now.shape[1]), _shares(most_probable(fixed), now.shape[1])]),
            kl=categorical_kl(now, fixed).mean(),
            fresh=fresh if fresh.requires_grad else None,
        )


def _actions(
    log_probs: Tensor,
    best: Tensor,
    config: PixelwisePPOConfig,
    generator: torch.Generator | None,
    *,
    greedy: bool,
) -> Tensor:
    """Draw G actions for each image ``(N·G, *S)``."""
    count = config.samples
    modes = best.repeat_interleave(count, dim=0) if count > 1 else best
    if greedy:
        return modes
    probs = log_probs.exp()
    probs = probs.repeat_interleave(count, dim=0) if count > 1 else probs
    drawn = correlated_categorical(probs, config.sigma_px, generator)
    if config.eps_greedy == 0.0:
        return drawn
    place = generator.device if generator is not None else probs.device
    lots = torch.rand(len(drawn), generator=generator, device=place).to(drawn.device)
    chosen = (lots < config.eps_greedy).view(-1, *(1,) * (drawn.ndim - 1))
    return torch.where(chosen, modes, drawn)


def _force(
    drawn: Tensor, forced: Tensor | None, forced_actions: Tensor | None, samples: int
) -> tuple[Tensor, Tensor]:
    """Put given actions into the first row of the forced images; say which rows were given."""
    given = torch.zeros(len(drawn), dtype=torch.bool, device=drawn.device)
    if forced is None:
        return drawn, given
    if forced_actions is None:
        raise ValueError("forced images need forced_actions")
    given[::samples] = forced.to(device=drawn.device, dtype=torch.bool)
    actions = drawn.clone()
    actions[given] = forced_actions.to(device=drawn.device, dtype=drawn.dtype)[given[::samples]]
    return actions, given


def _shares(labels: Tensor, classes: int) -> Tensor:
    """The share of each label ``(K,)``."""
    return torch.stack([(labels == label).float().mean() for label in range(classes)])


def _checked(rewards: Tensor, actions: Tensor) -> Tensor:
    """Rewards as float32 in the shape of the actions."""
    if rewards.ndim != actions.ndim or any(
        have not in (1, want) for have, want in zip(rewards.shape[1:], actions.shape[1:], strict=True)
    ):
        raise RuntimeFault(
            "reward",
            why=f"it has the shape {tuple(rewards.shape)} for actions {tuple(actions.shape)}",
            do="return one number for each pixel, or for each image with dimensions of size 1",
        )
    rewards = rewards.detach().float().expand(actions.shape)
    finite = torch.isfinite(rewards).flatten(1).all(dim=1)
    if not bool(finite.all()):
        rows = torch.nonzero(~finite).flatten().tolist()
        raise RuntimeFault(
            "reward",
            why=f"it is not finite for action {rows[0]} of the batch",
            do="look at the reward function for that image",
        )
    return rewards
