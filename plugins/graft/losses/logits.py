"""Logit distillation: per-sample distances between the student's and a teacher's predictions.

Source: specification §4; distiller_zoo/contrastive_kd.py and train_loops_new_policy.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.errors import ConfigError, did_you_mean

LogitLoss = Callable[[Tensor, Tensor], Tensor]


def probability_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean |σ(s) − σ(t)| of each sample, the loss of region mode."""
    gap = torch.sigmoid(student.float()) - torch.sigmoid(teacher.detach().float())
    return gap.abs().flatten(1).mean(dim=1)


def kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """KL of softened class probabilities, times T², summed over classes and averaged over voxels."""
    log_s = torch.log_softmax(student.float() / temperature, dim=1)
    log_t = torch.log_softmax(teacher.detach().float() / temperature, dim=1)
    return (log_t.exp() * (log_t - log_s)).sum(dim=1).flatten(1).mean(dim=1) * temperature**2


def contrastive(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T²·relu((t₁ − t₂) − (s₁ − s₂)) over the teacher's two most probable classes.

    The `margin` of the original is not used there either.
    """
    s = torch.softmax(student.float() / temperature, dim=1)
    t = torch.softmax(teacher.detach().float() / temperature, dim=1)
    values, index = t.topk(2, dim=1)
    chosen = s.gather(1, index)
    gap = F.relu((values[:, 0] - values[:, 1]) - (chosen[:, 0] - chosen[:, 1]))
    return gap.flatten(1).mean(dim=1) * temperature**2


def relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the batch's cosine matrices of pooled logits; zero for a batch of one."""
    s = F.normalize(student.float().flatten(2).mean(dim=2), dim=1)
    t = F.normalize(teacher.detach().float().flatten(2).mean(dim=2), dim=1)
    return ((s @ s.T - t @ t.T) ** 2).mean(dim=1)


def angular(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """What the original calls angular: plain KL·T², without an angular term."""
    return kl_divergence(student, teacher, temperature=temperature)


LOGIT_LOSSES = ("l1", "kl", "contrastive", "relation", "angular")


def logit_loss(kind: str, *, softmax: bool, temperature: float = 4.0, legacy: bool = False) -> LogitLoss:
    """Choose a logit loss; it maps student and teacher logits ``(B, C, D, H, W)`` to ``(B,)``.

    With regions, each channel is read as two classes (its logit against 0) for ``kl``, ``contrastive``
    and ``angular``.

    Args:
        kind: ``l1``, ``kl``, ``contrastive``, ``relation`` or ``angular``.
        softmax: Exclusive classes; else regions.
        temperature: T.
        legacy: Region mode uses ``l1`` whatever `kind` says, as the original does.

    Raises:
        ConfigError: The kind is unknown, or ``l1`` is asked for exclusive classes.
    """
    if kind not in LOGIT_LOSSES:
        raise ConfigError(f"logit loss '{kind}'", why=did_you_mean(kind, LOGIT_LOSSES))
    if kind == "l1" and softmax:
        raise ConfigError("logit loss 'l1'", why="it compares regions, and this target has exclusive classes")
    if kind == "l1" or (legacy and not softmax):
        return probability_distance
    if kind == "relation":
        return relation
    functions = {"kl": kl_divergence, "contrastive": contrastive, "angular": angular}
    function = functions[kind]

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        if softmax:
            return function(student, teacher, temperature=temperature)
        pairs = [
            function(_as_classes(student[:, c]), _as_classes(teacher[:, c]), temperature=temperature)
            for c in range(student.shape[1])
        ]
        return torch.stack(pairs).mean(dim=0)

    return loss


def _as_classes(channel: Tensor) -> Tensor:
    """Read one sigmoid channel ``(B, D, H, W)`` as two classes ``(B, 2, D, H, W)``."""
    return torch.stack((torch.zeros_like(channel), channel), dim=1)
