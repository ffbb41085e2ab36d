"""Pixel-wise policy arithmetic as pure functions; everything in float32 at least, also under autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.rl.ppo import ppo_loss
from medrl.core.rl.reinforce import reinforce_loss


def categorical_log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities ``(N, K, *S)`` of K exclusive labels from logits of that shape, in float32."""
    return torch.log_softmax(_full(logits), dim=1)


def binary_log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities ``(N, 2, *S)`` of background and foreground from one logit ``(N, 1, *S)``."""
    if logits.shape[1] != 1:
        raise ValueError(f"a binary policy has one channel, got {logits.shape[1]}")
    logits = _full(logits)
    return torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=1)


def action_log_probs(log_probs: Tensor, actions: Tensor) -> Tensor:
    """Log-probability of the labels taken.

    Args:
        log_probs: ``(N, K, *S)``.
        actions: ``(N·G, *S)``; rows n·G to n·G + G - 1 are G actions for image n.

    Returns:
        ``(N·G, *S)``.
    """
    count = log_probs.shape[0]
    index = actions.to(torch.int64).reshape(count, -1, *actions.shape[1:])
    return log_probs.gather(1, index).flatten(0, 1)


def most_probable(log_probs: Tensor) -> Tensor:
    """The most probable labels ``(N, *S)``, int64, from ``(N, K, *S)``; the first of equals."""
    # Ten times faster than argmax over this dimension on a CPU, with the same result.
    return log_probs.max(dim=1).indices


def pixel_entropy(log_probs: Tensor) -> Tensor:
    """Entropy ``(N, *S)`` in nats of the distribution of each pixel, from ``(N, K, *S)``."""
    return -(log_probs.exp() * log_probs).sum(dim=1)


def categorical_kl(log_probs: Tensor, reference: Tensor) -> Tensor:
    """KL(π ‖ π_ref) ``(N, *S)`` in nats of each pixel, from two ``(N, K, *S)``."""
    return (log_probs.exp() * (log_probs - reference)).sum(dim=1)


class PPOTerms(NamedTuple):
    """The losses of one inner step and what is logged beside them.

    Attributes:
        actor: L_π, a scalar with a graph of the actor's alone.
        critic: L_V, a scalar with a graph of the critic's alone; None for a baseline that is a number.
        advantages: ``(M, *S)``, no graph.
        ratio: ρ ``(M, *S)``, no graph.
        approx_kl: Mean of log π(a) - log π_ref(a), no graph.
        clip_fraction: Share of the pixels whose ratio is outside 1 ± ε, no graph.
    """

    actor: Tensor
    critic: Tensor | None
    advantages: Tensor
    ratio: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def ppo_terms(
    log_probs: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor,
    rewards: Tensor,
    values: Tensor | Sequence[Tensor] | float,
    *,
    clip: float = 0.2,
    kl: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    forced: Tensor | None = None,
    forced_target: Literal["reward", "one"] = "reward",
) -> PPOTerms:
    r"""The clipped surrogate and the error of the critic for one-step episodes in every pixel.

    .. math::
        \tilde r = r - \beta\,(\log\pi(a) - \log\pi_{ref}(a)), \qquad A = \tilde r - V, \qquad
        \rho = \pi(a) / \pi_{old}(a)

    .. math::
        L_\pi = -\overline{\min(A\rho,\ A\,\mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon))} - c_H \overline{H},
        \qquad L_V = \overline{(V - r)^2}

    Forced actions have :math:`\tilde r = 1`. The advantage is a constant: nothing of the actor's loss reaches
    the critic, and nothing of the penalty reaches the actor but through the advantage.

    Args:
        log_probs: ``(M, *S)`` of the actions taken, under the present policy, with a graph.
        old_log_probs: ``(M, *S)`` under the policy that acted.
        ref_log_probs: ``(M, *S)`` under the fixed reference.
        rewards: r ``(M, *S)``.
        values: V with a graph: ``(M, *S)``, ``(M, 1, …, 1)`` for one value of an image, or several maps of
            falling resolution of which the first is V; or a number.
        clip: ε.
        kl: β.
        entropy: H ``(M, *S)`` or of any shape, with a graph; needed if `entropy_coef` is not 0.
        entropy_coef: c_H.
        forced: ``(M,)`` boolean, the rows whose action was given instead of drawn.
        forced_target: Whether the critic learns the ``reward`` of forced actions, or ``one``.

    Raises:
        ValueError: If shapes differ, or the entropy is missing.

    Source: Judge et al. 2024 (RL4Seg), PPO.py. Deviation: the original leaves V in the graph of L_π and
    clips the norm of actor and critic together.
    """
    shapes = {tuple(item.shape) for item in (log_probs, old_log_probs, ref_log_probs, rewards)}
    if len(shapes) != 1:
        raise ValueError(f"log-probabilities and rewards have the shapes {sorted(shapes)}")
    with torch.no_grad():
        gap = log_probs - ref_log_probs
        shaped = rewards - kl * gap if kl != 0.0 else rewards
        targets = rewards
        if forced is not None:
            where = forced.to(rewards.device).view(-1, *(1,) * (rewards.ndim - 1))
            shaped = torch.where(where, torch.ones_like(shaped), shaped)
            targets = (
                torch.where(where, torch.ones_like(targets), targets) if forced_target == "one" else targets
            )
        advantages = (shaped - _first(values)).to(log_probs.dtype)
        ratio = (log_probs - old_log_probs).exp()
    surrogate = ppo_loss(
        log_probs, old_log_probs, advantages, clip=clip, entropy=entropy, entropy_coef=entropy_coef
    )
    critic = None if isinstance(values, (float, int)) else value_loss(values, targets)
    return PPOTerms(surrogate.total, critic, advantages, ratio, gap.mean(), surrogate.clip_fraction)


def value_loss(values: Tensor | Sequence[Tensor], targets: Tensor) -> Tensor:
    r"""Mean squared error of values, at their own resolution.

    Args:
        values: ``(M, *S)`` against the targets; ``(M, 1, …, 1)`` against the mean of the image; or a sequence
            of maps of falling resolution ``(M, *S')``, each against the targets at the nearest pixel,
            weighted by halves: :math:`\sum_i 2^{-i} L_i / \sum_i 2^{-i}`.
        targets: ``(M, *S)``; constants.

    >>> value_loss(torch.zeros(1, 1, 1), torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]))  # the target is 0.75
    tensor(0.5625)
    """
    targets = targets.detach()
    if not isinstance(values, Tensor):
        weights = [0.5**level for level in range(len(values))]
        losses = [weight * value_loss(part, targets) for weight, part in zip(weights, values, strict=True)]
        return torch.stack(losses).sum() / sum(weights)
    if values.shape != targets.shape:
        if values.ndim != targets.ndim or len(values) != len(targets):
            raise ValueError(f"values {tuple(values.shape)} do not fit rewards {tuple(targets.shape)}")
        if all(size == 1 for size in values.shape[1:]):
            targets = targets.mean(dim=tuple(range(1, targets.ndim)), keepdim=True)
        else:
            targets = F.interpolate(targets[:, None], size=values.shape[1:], mode="nearest")[:, 0]
    return (_full(values) - targets).square().mean()


def group_mean(rewards: Tensor, samples: int) -> Tensor:
    """The mean ``(N·G, *S)`` of the rewards of the G actions of each image, pixel by pixel.

    Args:
        rewards: ``(N·G, *S)``; rows n·G to n·G + G - 1 belong to image n.
        samples: G.
    """
    groups = rewards.reshape(-1, samples, *rewards.shape[1:])
    return groups.mean(dim=1, keepdim=True).expand_as(groups).flatten(0, 1)


def policy_gradient_loss(log_probs: Tensor, rewards: Tensor, *, least_spread: float = 1e-6) -> Tensor:
    r"""Plain policy gradient: :math:`-\overline{\frac{r - \bar r}{\mathrm{std}\,r}\,\log\pi(a)}`.

    Args:
        log_probs: ``(M, *S)`` of the actions taken, with a graph.
        rewards: ``(M, *S)``; mean and unbiased standard deviation are over all of them.
        least_spread: Rewards with a smaller standard deviation count as equal: nothing can be learned from
            them, and the loss is 0 with a gradient of 0. Deviation: the original gives NaN.

    Source: Judge et al. 2024 (RL4Seg), PolicyGradient.py; Williams 1992.
    """
    # In float64, since the rounded mean of equal float32 numbers may differ from them.
    exact = rewards.detach().double()
    centred = exact - exact.mean()
    spread = exact.std() if exact.numel() > 1 else torch.zeros_like(exact.sum())
    scaled = torch.where(spread > least_spread, centred / spread.clamp_min(least_spread), 0.0)
    return reinforce_loss(log_probs, scaled.to(log_probs.dtype))


def _first(values: Tensor | Sequence[Tensor] | float) -> Tensor | float:
    """V itself, without a graph."""
    if isinstance(values, (float, int)):
        return float(values)
    first = values if isinstance(values, Tensor) else values[0]
    return _full(first.detach())


def _full(values: Tensor) -> Tensor:
    """Raise half precision to float32; keep float32 and float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
