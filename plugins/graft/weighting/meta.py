"""Meta-optimised weights: a few projected gradient steps on the simplex, or a softmax of likeness.

Source: specification §5; meta_teacher_optimizer.py of the original, where no flag reaches it. Deviations: the
per-teacher losses are taken once and without a graph (there the inner backward pollutes the student's
gradients); momentum starts afresh at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.plugins.graft.weighting.rules import project_simplex


@dataclass(frozen=True)
class MetaSettings:
    """Settings of the inner optimisation.

    Attributes:
        steps: Inner steps.
        lr: Their length.
        momentum: m ← momentum·m + g.
        regularisation: g = per-teacher loss + 2·regularisation·w.
        temperature: τ of the final softmax(log(w + 1e-8)/τ); 1 changes nothing but rounding.
    """

    steps: int = 5
    lr: float = 0.1
    momentum: float = 0.9
    regularisation: float = 0.01
    temperature: float = 1.0


def adaptive_settings(epoch: int, *, steps: int = 3, lr: float = 0.05) -> MetaSettings:
    """Settings of the adaptive mode at an epoch: lr·0.95^(e//10), fewer steps and a lower τ later.

    Source: `AdaptiveMetaOptimizer.update_hyperparams`.
    """
    count = max(1, steps - 2) if epoch > 100 else max(2, steps - 1) if epoch > 50 else steps
    temperature = 2.0 if epoch < 20 else 1.5 if epoch < 50 else 1.0
    return MetaSettings(steps=count, lr=lr * 0.95 ** (epoch // 10), temperature=temperature)


def meta_weights(losses: Tensor, settings: MetaSettings | None = None) -> Tensor:
    """Weights ``(N,)`` that favour small losses: from uniform, w ← Proj_Δ(w − lr·m).

    Args:
        losses: ``(N,)`` or ``(B, N)`` (its batch mean is taken), without a graph.
        settings: Of the inner optimisation.
    """
    settings = settings or MetaSettings()
    losses = losses.detach().float()
    losses = losses.mean(dim=0) if losses.dim() == 2 else losses
    weights = torch.full_like(losses, 1.0 / losses.numel())
    moment = torch.zeros_like(weights)
    for _ in range(settings.steps):
        moment = settings.momentum * moment + losses + 2.0 * settings.regularisation * weights
        weights = project_simplex(weights - settings.lr * moment)
    if settings.temperature == 1.0:
        return weights
    return torch.softmax((weights + 1e-8).log() / settings.temperature, dim=0)


def context_weights(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, temperature: float = 1.0
) -> Tensor:
    """Weights ``(B, N)`` by likeness: softmax of the cosine of pooled student and teacher features."""
    scores = [
        F.cosine_similarity(s.detach().float().flatten(2).mean(2), t.float().flatten(2).mean(2), dim=1)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.softmax(torch.stack(scores, dim=1) / temperature, dim=1)
