"""Maps from the student's features to a teacher's, one for each teacher and tap.

Source: specification §4; models/util.py of the original, whose orthogonal map could not learn because it
treated a ``(32, 32, 1, 1, 1)`` kernel as 1×1 matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from medrl.core.errors import ConfigError, did_you_mean

PROJECTIONS = ("conv", "orthogonal", "linear")


class Projection(nn.Module):
    """Resize, then map channels.

    - ``conv``: 1×1×1 convolution → instance normalisation → ReLU.
    - ``orthogonal``: W x · scale with orthonormal W (columns if the teacher has at least as many channels
      as the student, else rows) and a learnable scale for each channel.
    - ``linear``: 1×1×1 convolution with bias; the partner of the `mse` distance.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, kind: str = "conv") -> None:
        super().__init__()
        self.kind = kind
        self.norm: nn.Module | None = None
        if kind == "orthogonal":
            linear = nn.Linear(student_channels, teacher_channels, bias=False)
            nn.init.orthogonal_(linear.weight)
            self.map: nn.Module = parametrizations.orthogonal(linear, orthogonal_map="matrix_exp")
            self.scale = nn.Parameter(torch.ones(teacher_channels))
        elif kind in ("conv", "linear"):
            self.map = nn.Conv3d(student_channels, teacher_channels, 1)
            if kind == "conv":
                self.norm = nn.InstanceNorm3d(teacher_channels, affine=True)
        else:
            raise ConfigError(f"projection '{kind}'", why=did_you_mean(kind, PROJECTIONS))

    @property
    def matrix(self) -> Tensor:
        """The channel map as a matrix ``(teacher, student)``, without the scale."""
        weight = cast("Tensor", self.map.weight)
        return weight.flatten(1) if weight.dim() > 2 else weight

    def forward(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """Map ``(B, Cs, D, H, W)`` to ``(B, Ct, *size)``."""
        features = resized(features, size)
        if self.kind == "orthogonal":
            kernel = (self.matrix * self.scale[:, None])[:, :, None, None, None]
            return F.conv3d(features, kernel)
        mapped: Tensor = self.map(features)
        return mapped if self.norm is None else F.relu(self.norm(mapped))


def resized(features: Tensor, size: Sequence[int]) -> Tensor:
    """Resize ``(B, C, D, H, W)``: average pooling if every axis shrinks or stays, else trilinear."""
    have = tuple(features.shape[2:])
    want = (int(size[0]), int(size[1]), int(size[2]))
    if have == want:
        return features
    if all(a >= b for a, b in zip(have, want, strict=True)):
        return F.adaptive_avg_pool3d(features, want)
    return F.interpolate(features, size=want, mode="trilinear", align_corners=True)


class Projections(nn.Module):
    """All projections of a run, built before the optimiser: ``tap → one for each teacher``.

    Args:
        student_channels: The student's `feature_channels` of the taps in use.
        teacher_channels: For each teacher the channels of its taps.
    """

    def __init__(
        self,
        student_channels: Mapping[str, int],
        teacher_channels: Sequence[Mapping[str, int]],
        *,
        taps: Sequence[str] = ("neg1",),
        kind: str = "conv",
    ) -> None:
        super().__init__()
        self.taps = tuple(taps)
        missing = [
            f"teacher {i} has no '{tap}'"
            for tap in self.taps
            for i, channels in enumerate(teacher_channels)
            if tap not in channels
        ]
        missing += [f"the student has no '{tap}'" for tap in self.taps if tap not in student_channels]
        if missing:
            raise ConfigError(
                "feature distillation",
                why="a tap is missing",
                do="choose other taps, or extract the features again with this tap",
                problems=missing,
            )
        self.maps = nn.ModuleDict(
            {
                tap: nn.ModuleList(
                    [Projection(student_channels[tap], c[tap], kind=kind) for c in teacher_channels]
                )
                for tap in self.taps
            }
        )

    def forward(
        self, tap: str, features: Tensor, sizes: Sequence[Sequence[int]], weights: Tensor | None = None
    ) -> list[Tensor]:
        """Project the student's features of one tap for every teacher.

        Args:
            tap: Its name.
            features: ``(B, C, D, H, W)``.
            sizes: Spatial size of each teacher's features.
            weights: ``(B, N)``; with them, the student's gradient is multiplied by N·w while the
                projections' is not, so that a mean over teachers gives the student the weighted sum and
                lets every projection learn at one speed (see `equal_speed_loss`).
        """
        group = self.maps[tap]
        count = len(sizes)
        projected = []
        for i, size in enumerate(sizes):
            given = features
            if weights is not None:
                given = scale_gradient(features, count * weights[:, i].detach())
            projected.append(group[i](given, size))  # type: ignore[index]
        return projected


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by one factor for each sample."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        gradient: Tensor = gradients[0]
        shape = (-1, *[1] * (gradient.dim() - 1))
        return gradient * factor.to(gradient.dtype).view(shape), None


def scale_gradient(values: Tensor, factor: Tensor) -> Tensor:
    """Return `values` unchanged; going back, each sample's gradient is multiplied by its factor ``(B,)``."""
    result: Tensor = _ScaleGradient.apply(values, factor)  # type: ignore[no-untyped-call]
    return result


def equal_speed_loss(losses: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The loss to go back through when projections were given `weights`, and the value to report.

    Args:
        losses: ``(B, N)`` of each sample and teacher.
        weights: ``(B, N)`` given to `Projections`.

    Returns:
        The mean over samples and teachers (its gradient is Σ w·∇ℓ for the student and (1/N)·Σ ∇ℓ for the
        projections), and Σ_i mean_b(w·ℓ) without a graph.
    """
    return losses.mean(dim=0).mean(), (losses.detach() * weights.detach()).mean(dim=0).sum()
