"""Teacher weights from numbers: pure functions on the simplex.

All weights are ``(B, N)`` or ``(N,)`` over N teachers, non-negative, summing to one.

Source: specification §5; models/policy.py and meta_teacher_optimizer.py of the original.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medrl.core.errors import ConfigError

QUALITY_TEMPERATURE = 0.1
PROBE_TEMPERATURE = 0.03


def uniform(teachers: int, *, batch: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """Equal weights ``(B, N)``."""
    return torch.full((batch, teachers), 1.0 / teachers, device=device)


def from_quality(quality: Tensor, *, temperature: float = QUALITY_TEMPERATURE) -> Tensor:
    """Softmax of quality over temperature, ``(..., N)``; 0.1 suits Dice of logits, 0.03 the probe.

    >>> from_quality(torch.tensor([0.7, 0.3, 0.2]))
    tensor([0.9756, 0.0179, 0.0066])
    """
    if temperature <= 0:
        raise ConfigError("quality temperature", why=f"it must be positive, got {temperature}")
    return torch.softmax(quality.float() / temperature, dim=-1)


def with_floor(weights: Tensor, floor: float) -> Tensor:
    """Share a part of the weight equally: (1 − floor)·w + floor/N, so that no teacher is lost."""
    return (1.0 - floor) * weights + floor / weights.shape[-1]


def diversity(similarity: Tensor) -> Tensor:
    """V = softmax(−c): teachers unlike the student."""
    return torch.softmax(-similarity.float(), dim=-1)


def gated_diversity(quality_weights: Tensor, diversity_weights: Tensor) -> Tensor:
    """A = Q·V normalised: unlike the student and accurate."""
    product = quality_weights * diversity_weights
    return product / (product.sum(dim=-1, keepdim=True) + 1e-8)


def legacy_weights(
    learned: Tensor,
    quality: Tensor,
    similarity: Tensor,
    *,
    gated: bool = True,
    factors: Tensor | None = None,
    temperature: float = QUALITY_TEMPERATURE,
) -> Tensor:
    """The published weights w = (h + Q + A)/3, or (h + Q)/2 without gating.

    Args:
        learned: h ``(B, N)``, the policy's softmax.
        quality: q ``(B, N)``.
        similarity: c ``(B, N)``, cosine of student and teacher features.
        gated: With A.
        factors: Three learnable numbers whose softmax weighs h, Q and A (`--dynamic`).
        temperature: Of Q.

    Returns:
        ``(B, N)``; it sums to one up to the 1e-8 of the gating.
    """
    q = from_quality(quality, temperature=temperature)
    share = (
        torch.full((3,), 1.0 / 3.0, device=learned.device) if factors is None else torch.softmax(factors, 0)
    )
    if not gated:
        return (share[0] * learned + share[1] * q) / (share[0] + share[1])
    return share[0] * learned + share[1] * q + share[2] * gated_diversity(q, diversity(similarity))


def warmup_alpha(step: float, warmup: float, *, total: float | None = None, legacy: bool = False) -> float:
    """α = min(1, step/warmup); 1 without a warm-up.

    Args:
        step: Epoch or step, in the unit of `warmup`.
        warmup: Length of the warm-up; 0 = none.
        total: Length of the run. With `warmup` ≥ `total` the agent is off: α stays 0.
        legacy: Keep ramping there, as the original does.
    """
    if warmup <= 0:
        return 1.0
    if not legacy and agent_is_off(warmup, total):
        return 0.0
    return min(1.0, step / warmup)


def agent_is_off(warmup: float, total: float | None) -> bool:
    """True where the warm-up lasts as long as the run or longer: exactly the starting weights, no policy."""
    return total is not None and 0 < total <= warmup


def warmup_blend(
    weights: Tensor, alpha: float, *, start: Tensor | None = None, legacy: bool = False
) -> Tensor:
    """Blend from the starting weights to the given: (1 − α)·start + α·w.

    Args:
        weights: ``(B, N)`` or ``(N,)``.
        alpha: From `warmup_alpha`.
        start: Starting weights, broadcast against `weights`; uniform if None.
        legacy: Start from ones, so that the weights sum to N at first (the original's mistake).

    Returns:
        `weights` itself at α = 1, the start itself at α = 0.
    """
    if alpha >= 1.0:
        return weights
    if legacy:
        begin = torch.ones_like(weights)
    elif start is None:
        begin = torch.full_like(weights, 1.0 / weights.shape[-1])
    else:
        begin = start.to(weights).expand_as(weights)
    return begin if alpha <= 0.0 else (1.0 - alpha) * begin + alpha * weights


def project_simplex(values: Tensor) -> Tensor:
    """Euclidean projection of ``(N,)`` onto the simplex.

    Source: Duchi et al. 2008.

    >>> project_simplex(torch.tensor([0.5, 0.8, -0.2]))
    tensor([0.3500, 0.6500, 0.0000])
    """
    ordered = values.sort(descending=True).values
    over = ordered.cumsum(0) - 1.0
    rank = torch.arange(1, values.numel() + 1, device=values.device, dtype=values.dtype)
    support = int((ordered - over / rank > 0).sum())
    projected = (values - over[support - 1] / support).clamp_min(0.0)
    return projected / projected.sum()


def entropy(weights: Tensor) -> Tensor:
    """Entropy in nats over the last axis; log N when equal, 0 on one teacher."""
    terms: Tensor = torch.special.entr(weights)
    return terms.sum(dim=-1)
