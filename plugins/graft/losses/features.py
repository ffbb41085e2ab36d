"""Feature distillation: per-sample distances between student and teacher features, and where to trust them.

Every distance takes ``(B, C, D, H, W)`` student (projected) and teacher features and returns ``(B,)`` in
float32. Sums over teachers are taken by `weighted_sum`.

Source: specification §4; distiller_zoo/normalized_feature_losses.py and train_loops_new_policy.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.errors import ConfigError, DataError, did_you_mean

FeatureLoss = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Squared distance of normalised features, :math:`2(1-\cos)\in[0,4]`.

    Without a mask the whole sample is one vector; with a mask ``(B, 1, D, H, W)`` each voxel is one, and
    the distance is averaged over the mask.
    """
    student, teacher = _pair(student, teacher)
    if mask is None:
        s, t = F.normalize(student.flatten(1), dim=1), F.normalize(teacher.flatten(1), dim=1)
        return ((s - t) ** 2).sum(dim=1)
    s, t = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return _masked_mean(((s - t) ** 2).sum(dim=1), mask)


def mse_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference to the teacher's features standardised channel by channel."""
    student, teacher = _pair(student, teacher)
    squared = ((student - standardised(teacher)) ** 2).mean(dim=1)
    return squared.flatten(1).mean(dim=1) if mask is None else _masked_mean(squared, mask)


def smooth_l1_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Smooth L1 (β = 1) difference to the teacher's features standardised channel by channel."""
    student, teacher = _pair(student, teacher)
    error = F.smooth_l1_loss(student, standardised(teacher), reduction="none").mean(dim=1)
    return error.flatten(1).mean(dim=1) if mask is None else _masked_mean(error, mask)


def kl_distance(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 4.0
) -> Tensor:
    """KL divergence of each channel's softmax over voxels, times T², mean over channels."""
    student, teacher = _pair(student, teacher)
    s, t = student.flatten(2) / temperature, teacher.flatten(2) / temperature
    if mask is not None:
        outside = mask.flatten(2) < 0.5
        s, t = s.masked_fill(outside, -1e4), t.masked_fill(outside, -1e4)
    log_s, log_t = torch.log_softmax(s, dim=-1), torch.log_softmax(t, dim=-1)
    return (log_t.exp() * (log_t - log_s)).sum(dim=-1).mean(dim=-1) * temperature**2


FEATURE_LOSSES: dict[str, FeatureLoss] = {
    "cosine": cosine_distance,
    "mse": mse_distance,
    "kl": kl_distance,
    "smooth_l1": smooth_l1_distance,
}


def feature_loss(kind: str) -> FeatureLoss:
    """Return the distance of a name: ``cosine``, ``mse``, ``kl`` or ``smooth_l1``.

    Raises:
        ConfigError: The name is unknown.
    """
    if kind not in FEATURE_LOSSES:
        raise ConfigError(f"feature loss '{kind}'", why=did_you_mean(kind, FEATURE_LOSSES))
    return FEATURE_LOSSES[kind]


def standardised(features: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Give each channel of each sample mean 0 and variance 1 over its voxels; float32."""
    features = features.float()
    axes = (2, 3, 4)
    centred = features - features.mean(dim=axes, keepdim=True)
    return centred / (centred.square().mean(dim=axes, keepdim=True) + eps).sqrt()


def correctness_mask(predicted: Tensor, truth: Tensor, *, radius: int = 3) -> Tensor:
    """Where a teacher may be trusted: 1 − FP − FN outside the neighbourhood of its true positives.

    Args:
        predicted: ``(B, C, D, H, W)`` hard predictions of the channels that matter.
        truth: The same shape.
        radius: Voxels of cubic dilation around true positives; misses inside it are forgiven.

    Returns:
        ``(B, 1, D, H, W)`` float32, 1 where every channel allows it.
    """
    predicted, truth = predicted.float(), truth.float()
    hit = predicted * truth
    near = F.max_pool3d(hit, 2 * radius + 1, stride=1, padding=radius) if radius else hit
    wrong = predicted * (1.0 - truth)
    missed = (1.0 - predicted) * truth * (1.0 - near)
    return (1.0 - wrong - missed).clamp_min(0.0).amin(dim=1, keepdim=True)


def resized_mask(mask: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Resize a mask ``(B, 1, D, H, W)`` to features of another resolution by nearest neighbour."""
    if tuple(mask.shape[2:]) == tuple(size):
        return mask
    return F.interpolate(mask.float(), size=size, mode="nearest")


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Sum over teachers of the batch mean of weight × loss; both ``(B, N)``; weights are constants."""
    return (losses * weights.detach()).mean(dim=0).sum()


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32; the teacher without a graph.

    Raises:
        DataError: Their shapes differ.
    """
    if student.shape != teacher.shape:
        raise DataError(
            "features of a teacher",
            why=f"shape {tuple(teacher.shape)}, but the projected student has {tuple(student.shape)}",
            do="project the student's features to the teacher's first",
        )
    return student.float(), teacher.detach().float()


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over mask voxels of ``(B, D, H, W)``; the denominator is at least 1."""
    inside = resized_mask(mask, (values.shape[1], values.shape[2], values.shape[3]))[:, 0].float()
    return (values * inside).flatten(1).sum(dim=1) / inside.flatten(1).sum(dim=1).clamp_min(1.0)
