"""What is measured about each teacher: quality, disagreement, likeness to the student; and rewards.

Source: specification §5; train_loops_new_policy.py of the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.rl.reinforce import EmaBaseline
from medrl.plugins.graft.losses.features import cosine_distance
from medrl.plugins.graft.regions import Target, teacher_probabilities, teacher_threshold


def hard_dice(predicted: Tensor, truth: Tensor, *, smooth: float = 1e-7) -> Tensor:
    """(2I + s)/(P + G + s) of each sample and channel, ``(B, C)``; empty against empty is 1."""
    predicted, truth = predicted.float().flatten(2), truth.float().flatten(2)
    overlap = (predicted * truth).sum(dim=2)
    return (2.0 * overlap + smooth) / (predicted.sum(dim=2) + truth.sum(dim=2) + smooth)


def focus_dice(probabilities: Tensor, truth: Tensor, target: Target) -> Tensor:
    """Mean Dice ``(B,)`` of the target's focus channels of hard predictions."""
    focus = list(target.focus)
    return hard_dice(target.decide(probabilities)[:, focus], truth[:, focus]).mean(dim=1)


def teacher_quality(
    logits: Sequence[Tensor], truth: Tensor, target: Target, *, families: Sequence[str] | None = None
) -> Tensor:
    """Quality q ``(B, N)``: Dice of each teacher against the labels on the focus channels.

    Args:
        logits: One ``(B, K, D, H, W)`` for each teacher.
        truth: ``(B, C, D, H, W)`` encoded labels.
        target: What the channels mean.
        families: Convention of each teacher's logits (`teacher_probabilities`); nnU-Net's if None.
    """
    focus = list(target.focus)
    scores = []
    for i, item in enumerate(logits):
        family = families[i] if families else "nnunet"
        p = teacher_probabilities(item, target, family)
        hard = target.decide(p) if target.softmax else p > teacher_threshold(family)
        scores.append(hard_dice(hard[:, focus], truth[:, focus]).mean(dim=1))
    return torch.stack(scores, dim=1)


def disagreement(probabilities: Sequence[Tensor], channels: Sequence[int]) -> Tensor:
    """d_i = mean |p_i − mean_j p_j| over the channels and voxels, ``(B, N)``."""
    stacked = torch.stack([p[:, list(channels)].float() for p in probabilities], dim=1)
    return (stacked - stacked.mean(dim=1, keepdim=True)).abs().flatten(2).mean(dim=2)


def similarity(projected: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """c_i = cosine of the flattened projected student and teacher features, ``(B, N)``."""
    return torch.stack(
        [1.0 - 0.5 * cosine_distance(s.detach(), t) for s, t in zip(projected, teachers, strict=True)], dim=1
    )


def ensemble(probabilities: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """Mean probability ``(B, C, D, H, W)`` of the teachers, or weighted by ``(B, N)``."""
    stacked = torch.stack([p.float() for p in probabilities], dim=1)
    if weights is None:
        return stacked.mean(dim=1)
    return (stacked * weights.view(*weights.shape, 1, 1, 1, 1)).sum(dim=1)


def reward_ce(logits: Tensor, truth: Tensor, target: Target) -> Tensor:
    """Cross-entropy part of the reward ``(B,)``: BCE × foreground × channel weight, mean over elements.

    Weights are (1, 10) and (1, 5) for two prostate regions, (1, 5, 10) and (1, 3, 5) for three; other
    targets have none. Exclusive classes use cross-entropy.
    """
    if target.softmax:
        return F.cross_entropy(logits.float(), truth.argmax(dim=1), reduction="none").flatten(1).mean(dim=1)
    weights = {"binary": ((1.0, 10.0), (1.0, 5.0)), "3class": ((1.0, 5.0, 10.0), (1.0, 3.0, 5.0))}
    ones = (1.0,) * target.channels
    positive, channel = (
        torch.tensor(w, device=logits.device).view(1, -1, 1, 1, 1)
        for w in weights.get(target.kind, (ones, ones))
    )
    truth = truth.float()
    bce = F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none")
    return (bce * (positive * truth + 1.0 - truth) * channel).flatten(1).mean(dim=1)


def composite_reward(
    student_dice: Tensor | float, ensemble_dice: Tensor | float, ce: Tensor | float, *, alpha: float = 0.7
) -> Tensor:
    """α·100·(Dice of the student − Dice of the ensemble) − (1 − α)·CE.

    >>> composite_reward(0.60, 0.55, 1.2)
    tensor(3.1400)
    """
    gain = torch.as_tensor(student_dice) - torch.as_tensor(ensemble_dice)
    return alpha * 100.0 * gain - (1.0 - alpha) * torch.as_tensor(ce)


class TerminalReward:
    """R_T = 100·(D − running mean of D): the end of an episode is worth what it improves.

    The first measurement only sets the mean and is worth 0. The original uses 100·D itself.
    """

    def __init__(self, momentum: float = 0.9, *, legacy: bool = False) -> None:
        self.mean = EmaBaseline(momentum)
        self.legacy = legacy

    def __call__(self, dice: float) -> float:
        """Take in the Dice of the reward split and return the terminal reward."""
        if self.legacy:
            return 100.0 * dice
        reward = 100.0 * (dice - self.mean.value) if self.mean.updates else 0.0
        self.mean.update(dice)
        return reward

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return self.mean.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.mean.load_state_dict(state)
