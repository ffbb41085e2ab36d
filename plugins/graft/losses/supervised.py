"""Losses against labels: pure functions, and small records that bind their settings.

Every loss takes logits ``(B, C, D, H, W)`` and targets of the same shape (0 or 1; one-hot in class mode),
computes in float32 and returns a scalar.

Source: specification §4; distiller_zoo/segmentation_3d_losses.py of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.errors import ConfigError, did_you_mean
from medrl.plugins.graft.regions import Target

Loss = Callable[[Tensor, Tensor], Tensor]
Weights = Sequence[float] | None

SMOOTH = 1e-5


def focal(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    pos_weight: Weights = None,
    channel_weight: Weights = None,
) -> Tensor:
    r"""Binary focal loss :math:`\mathrm{mean}[(1-p_t)^\gamma\,BCE\,(w_+y+1-y)\,w_c]\cdot C/\sum w_c`.

    Args:
        logits: ``(B, C, D, H, W)``.
        target: The same shape, 0 or 1.
        gamma: Focusing; 0 is weighted binary cross-entropy.
        pos_weight: Weight of foreground voxels for each channel.
        channel_weight: Weight of each channel.
    """
    logits, target = logits.float(), target.float()
    p = torch.sigmoid(logits)
    p_t = p * target + (1.0 - p) * (1.0 - target)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = loss * (1.0 - p_t).clamp_min(0.0) ** gamma
    positive, channel = _weights(pos_weight, logits), _weights(channel_weight, logits)
    loss = loss * (positive * target + 1.0 - target) * channel
    return loss.mean() * (logits.shape[1] / channel.sum())


def soft_dice(
    probabilities: Tensor,
    target: Tensor,
    *,
    channel_weight: Weights = None,
    batch_dice: bool = False,
    smooth: float = SMOOTH,
) -> Tensor:
    r"""Weighted mean over channels of :math:`(2I+s)/(P+G+s)`; higher is better.

    Args:
        probabilities: ``(B, C, D, H, W)``.
        target: The same shape, 0 or 1.
        channel_weight: Weight of each channel.
        smooth: s.
        batch_dice: Sum I, P and G over the batch, else one Dice for each sample. The original sums
            whatever its flag says; the preset `legacy` sets it.
    """
    overlap, predicted, true = _sums(probabilities.float(), target.float(), batch_dice)
    dice = (2.0 * overlap + smooth) / (predicted + true + smooth)
    channel = _vector(channel_weight, probabilities)
    return (dice * channel).sum(dim=-1).mean() / channel.sum()


def soft_iou(
    probabilities: Tensor, target: Tensor, *, batch_dice: bool = False, smooth: float = SMOOTH
) -> Tensor:
    r"""Mean over channels of :math:`(I+s)/(P+G-I+s)`; higher is better."""
    overlap, predicted, true = _sums(probabilities.float(), target.float(), batch_dice)
    return ((overlap + smooth) / (predicted + true - overlap + smooth)).mean()


def tversky(
    probabilities: Tensor,
    target: Tensor,
    *,
    false_negative: float = 0.7,
    false_positive: float = 0.3,
    batch_dice: bool = False,
    smooth: float = SMOOTH,
) -> Tensor:
    r"""Tversky loss :math:`1-(TP+s)/(TP+a\,FN+b\,FP+s)`, mean over channels."""
    overlap, predicted, true = _sums(probabilities.float(), target.float(), batch_dice)
    missed, wrong = true - overlap, predicted - overlap
    index = (overlap + smooth) / (overlap + false_negative * missed + false_positive * wrong + smooth)
    return 1.0 - index.mean()


def softmax_focal(
    logits: Tensor, target: Tensor, *, gamma: float = 2.0, class_weight: Weights = None
) -> Tensor:
    r"""Focal loss of exclusive classes :math:`\mathrm{mean}[(1-p_t)^\gamma\,CE]`.

    The original fails without an ignored label; here there is none.
    """
    log_p = torch.log_softmax(logits.float(), dim=1)
    target = target.float()
    log_pt = (log_p * target).sum(dim=1)
    weight = (target * _weights(class_weight, logits)).sum(dim=1)
    return -((1.0 - log_pt.exp()).clamp_min(0.0) ** gamma * log_pt * weight).mean()


def cross_entropy(logits: Tensor, target: Tensor, *, class_weight: Weights = None) -> Tensor:
    """Cross-entropy with one-hot targets, each voxel weighted by its class; normalised by these weights."""
    weight = None if class_weight is None else _vector(class_weight, logits)
    return F.cross_entropy(logits.float(), target.argmax(dim=1), weight=weight)


@dataclass(frozen=True, kw_only=True)
class FocalDice:
    """The loss of region mode: w_F·Focal + w_D·(−Dice), every channel included."""

    focal_weight: float = 1.0
    dice_weight: float = 1.0
    gamma: float = 2.0
    pos_weight: tuple[float, ...] | None = None
    channel_weight: tuple[float, ...] | None = None
    batch_dice: bool = False

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss."""
        hard = focal(
            logits, target, gamma=self.gamma, pos_weight=self.pos_weight, channel_weight=self.channel_weight
        )
        overlap = soft_dice(
            torch.sigmoid(logits.float()),
            target,
            channel_weight=self.channel_weight,
            batch_dice=self.batch_dice,
        )
        return self.focal_weight * hard - self.dice_weight * overlap


@dataclass(frozen=True, kw_only=True)
class BceDice:
    """Binary cross-entropy − Dice: the published 3-class loss, and nnU-Net's region loss without weights."""

    bce_weight: float = 1.0
    dice_weight: float = 1.0
    pos_weight: tuple[float, ...] | None = None
    channel_weight: tuple[float, ...] | None = None
    batch_dice: bool = False
    smooth: float = SMOOTH

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss."""
        bce = focal(logits, target, gamma=0.0, pos_weight=self.pos_weight, channel_weight=self.channel_weight)
        overlap = soft_dice(
            torch.sigmoid(logits.float()),
            target,
            channel_weight=self.channel_weight,
            batch_dice=self.batch_dice,
            smooth=self.smooth,
        )
        return self.bce_weight * bce - self.dice_weight * overlap


@dataclass(frozen=True, kw_only=True)
class DiceCrossEntropy:
    """The loss of class mode: w_D·(1 − Dice of the foreground) + w_C·CE.

    Args:
        dice_weight: 0.7 in the original, 1 in nnU-Net.
        ce_weight: 0.3 in the original, 1 in nnU-Net.
        foreground_weight: Dice weight of each foreground class.
        class_weight: Cross-entropy weight of each class, the background first.
    """

    dice_weight: float = 0.7
    ce_weight: float = 0.3
    foreground_weight: tuple[float, ...] | None = None
    class_weight: tuple[float, ...] | None = None
    batch_dice: bool = False
    smooth: float = SMOOTH

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss."""
        overlap = soft_dice(
            torch.softmax(logits.float(), dim=1)[:, 1:],
            target[:, 1:],
            channel_weight=self.foreground_weight,
            batch_dice=self.batch_dice,
            smooth=self.smooth,
        )
        ce = cross_entropy(logits, target, class_weight=self.class_weight)
        return self.dice_weight * (1.0 - overlap) + self.ce_weight * ce


@dataclass(frozen=True, kw_only=True)
class IoULoss:
    """1 − IoU; sigmoid channels, or the foreground of a softmax."""

    softmax: bool = False
    batch_dice: bool = False
    smooth: float = SMOOTH

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss."""
        p, y = _activated(logits, target, self.softmax)
        return 1.0 - soft_iou(p, y, batch_dice=self.batch_dice, smooth=self.smooth)


@dataclass(frozen=True, kw_only=True)
class TverskyLoss:
    """1 − TP/(TP + 0.7 FN + 0.3 FP); sigmoid channels, or the foreground of a softmax."""

    false_negative: float = 0.7
    false_positive: float = 0.3
    softmax: bool = False
    batch_dice: bool = False
    smooth: float = SMOOTH

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss."""
        p, y = _activated(logits, target, self.softmax)
        return tversky(
            p,
            y,
            false_negative=self.false_negative,
            false_positive=self.false_positive,
            batch_dice=self.batch_dice,
            smooth=self.smooth,
        )


@dataclass(frozen=True, kw_only=True)
class SoftmaxFocal:
    """Focal loss of exclusive classes."""

    gamma: float = 2.0
    class_weight: tuple[float, ...] | None = None

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss."""
        return softmax_focal(logits, target, gamma=self.gamma, class_weight=self.class_weight)


def nnunet_loss(*, softmax: bool = False, batch_dice: bool = False) -> Loss:
    """nnU-Net's own loss: Dice + BCE for regions, Dice (foreground) + CE for classes, weights 1."""
    if softmax:
        return DiceCrossEntropy(dice_weight=1.0, ce_weight=1.0, batch_dice=batch_dice)
    return BceDice(batch_dice=batch_dice)


def brats_loss(*, batch_dice: bool = False) -> Loss:
    """BCE + Dice with foreground weights 3, 7, 15 for whole tumour, tumour core, enhancing tumour."""
    return BceDice(pos_weight=(3.0, 7.0, 15.0), batch_dice=batch_dice)


@dataclass(frozen=True, kw_only=True)
class NnunetLoss:
    """nnU-Net's own loss, as `nnunet_loss` chooses it."""

    softmax: bool = False
    batch_dice: bool = False

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss."""
        return nnunet_loss(softmax=self.softmax, batch_dice=self.batch_dice)(logits, target)


@dataclass(frozen=True, kw_only=True)
class BratsLoss:
    """The loss for three tumour regions, `brats_loss`."""

    batch_dice: bool = False

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss."""
        return brats_loss(batch_dice=self.batch_dice)(logits, target)


PROFILES: dict[str, tuple[float, float, float, tuple[float, ...], tuple[float, ...]]] = {
    "default": (1.0, 1.0, 2.0, (1.0, 10.0), (1.0, 1.0)),
    "mild": (1.0, 1.0, 2.0, (1.0, 10.0), (1.0, 1.5)),
    "sharp": (2.0, 1.0, 1.5, (1.0, 10.0), (1.0, 2.0)),
    "high_sensitivity": (1.0, 1.5, 2.0, (1.0, 30.0), (1.0, 3.0)),
}
"""Weights of focal and Dice, γ, foreground weights, channel weights for prostate and cancer."""


def profile_of(*, high_sensitivity: bool = False, mild: bool = False, sharp: bool = False) -> str:
    """Return the profile that the original's flags choose: high sensitivity before mild before sharp."""
    if high_sensitivity:
        return "high_sensitivity"
    return "mild" if mild else "sharp" if sharp else "default"


def supervised_loss(target: Target, *, profile: str = "default", batch_dice: bool = False) -> Loss:
    """Choose the published loss of a target.

    Binary prostate regions take the focal profile; three prostate regions BCE + Dice with foreground
    weights 1, 5, 10 and channel weights 1, 3, 5; prostate classes (background, prostate, cancer) the
    published class weights. Other label sets take the same losses with equal weights, as no published
    weight belongs to them; the focal profile then only sets γ and the weights of focal and Dice.

    Raises:
        ConfigError: The profile is unknown.
    """
    if profile not in PROFILES:
        raise ConfigError(f"focal profile '{profile}'", why=did_you_mean(profile, PROFILES))
    focal_weight, dice_weight, gamma, positive, channel = PROFILES[profile]
    if target.softmax:
        prostate = target.prostate and target.channels == 3
        return DiceCrossEntropy(
            foreground_weight=(10.0, 30.0) if prostate else None,
            class_weight=(1.0, 10.0, 30.0) if prostate else None,
            batch_dice=batch_dice,
        )
    if target.kind == "3class":
        return BceDice(pos_weight=(1.0, 5.0, 10.0), channel_weight=(1.0, 3.0, 5.0), batch_dice=batch_dice)
    weighted = target.prostate and target.channels == 2
    return FocalDice(
        focal_weight=focal_weight,
        dice_weight=dice_weight,
        gamma=gamma,
        pos_weight=positive if weighted else None,
        channel_weight=channel if weighted else None,
        batch_dice=batch_dice,
    )


def deep_supervision_weights(outputs: int) -> list[float]:
    """Weights 0.5^i from high to low resolution, the last 0, normalised; one output gets 1.

    >>> [round(w, 4) for w in deep_supervision_weights(6)]
    [0.5161, 0.2581, 0.129, 0.0645, 0.0323, 0.0]
    """
    if outputs == 1:
        return [1.0]
    raw = [0.5**i for i in range(outputs - 1)] + [0.0]
    return [weight / sum(raw) for weight in raw]


def deep_supervised(loss: Loss, logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """Weighted sum of a loss over resolutions; targets are resized to each by nearest neighbour.

    Args:
        loss: Of one resolution.
        logits: From high to low resolution, ``(B, C, D', H', W')``.
        target: ``(B, C, D, H, W)`` at full resolution.
    """
    total = logits[0].new_zeros((), dtype=torch.float32)
    for weight, output in zip(deep_supervision_weights(len(logits)), logits, strict=True):
        if weight == 0.0:
            continue
        resized = target
        if output.shape[2:] != target.shape[2:]:
            resized = F.interpolate(target.float(), size=tuple(output.shape[2:]), mode="nearest")
        total = total + weight * loss(output, resized)
    return total


def _activated(logits: Tensor, target: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    if softmax:
        return torch.softmax(logits.float(), dim=1)[:, 1:], target[:, 1:]
    return torch.sigmoid(logits.float()), target


def _sums(probabilities: Tensor, target: Tensor, batch_dice: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of overlap, prediction and truth: ``(B, C)``, or ``(C,)`` over the batch."""
    axes = [0, 2, 3, 4] if batch_dice else [2, 3, 4]
    return (probabilities * target).sum(axes), probabilities.sum(axes), target.sum(axes)


def _vector(weights: Weights, like: Tensor) -> Tensor:
    """One weight for each channel ``(C,)``.

    Raises:
        ConfigError: Their number is not the number of channels.
    """
    if weights is None:
        return torch.ones(like.shape[1], device=like.device)
    if len(weights) != like.shape[1]:
        raise ConfigError(
            "weights of the supervised loss",
            why=f"{len(weights)} weights for {like.shape[1]} channels",
            do="give one weight for each channel",
        )
    return torch.tensor(list(weights), dtype=torch.float32, device=like.device)


def _weights(weights: Weights, like: Tensor) -> Tensor:
    """One weight for each channel, ``(1, C, 1, 1, 1)``."""
    return _vector(weights, like).view(1, -1, 1, 1, 1)
