"""Changes of complex slices in image space, before their k-space is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import AugmentConfig
from .simulate import smooth_phase


def augmented(
    images: Tensor, labels: Tensor | None, cfg: AugmentConfig, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor | None]:
    """Mirror, turn, scale, displace, change contrast, phase and noise.

    Args:
        images: ``(B, H, W)`` complex.
        labels: ``(B, H, W)`` integers, or None; they move with the images.
        cfg: How far.
        generators: One CPU generator for each slice, so that a slice does not depend on its neighbours.

    Returns:
        Images and labels of the same shapes.
    """
    drawn = torch.stack([torch.rand(8, generator=generator) for generator in generators])
    moved = torch.view_as_real(images).movedim(-1, 1)
    if cfg.flip or cfg.rotation or cfg.scale or cfg.shift:
        grid = _grid(drawn, cfg, images.shape[-2:]).to(images.device)
        moved = F.grid_sample(moved, grid, mode="bilinear", align_corners=False)
        if labels is not None:
            flat = labels.unsqueeze(1).to(moved.dtype)
            placed = F.grid_sample(flat, grid, mode="nearest", align_corners=False)
            labels = placed[:, 0].round().to(labels.dtype)
    result = torch.view_as_complex(moved.movedim(1, -1).contiguous())
    if cfg.gamma:
        exponent = torch.exp((2.0 * drawn[:, 4] - 1.0) * cfg.gamma).view(-1, 1, 1).to(images.device)
        top = result.abs().flatten(1).amax(dim=1).clamp_min(1e-12).view(-1, 1, 1)
        size = result.abs().clamp_min(1e-12)
        result = result * ((size / top) ** (exponent - 1.0))
    if cfg.phase:
        shape = (int(images.shape[-2]), int(images.shape[-1]))
        phase = torch.cat([smooth_phase(1, shape, cfg.phase, generator) for generator in generators])
        result = result * torch.polar(torch.ones_like(phase), phase).to(images.device)
    if cfg.noise:
        noise = torch.stack(
            [torch.randn(2, *images.shape[1:], generator=generator) for generator in generators]
        ).to(images.device)
        size = (drawn[:, 5] * cfg.noise).view(-1, 1, 1).to(images.device)
        result = result + size * torch.complex(noise[:, 0], noise[:, 1])
    return result, labels


def _grid(drawn: Tensor, cfg: AugmentConfig, shape: torch.Size) -> Tensor:
    """Sampling places ``(B, H, W, 2)`` of changed slices; angles are those of pixels."""
    turn = (2.0 * drawn[:, 0] - 1.0) * math.radians(cfg.rotation)
    size = 1.0 + (2.0 * drawn[:, 1] - 1.0) * cfg.scale
    across = torch.where(drawn[:, 2] < cfg.flip, -1.0, 1.0)
    along = torch.where(drawn[:, 3] < cfg.flip, -1.0, 1.0)
    height, width = int(shape[0]), int(shape[1])
    cosine, sine = torch.cos(turn) / size, torch.sin(turn) / size
    theta = torch.zeros(len(drawn), 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cosine * across, -sine * (height / width) * along
    theta[:, 1, 0], theta[:, 1, 1] = sine * (width / height) * across, cosine * along
    theta[:, :, 2] = (2.0 * drawn[:, 6:8] - 1.0) * 2.0 * cfg.shift
    return F.affine_grid(theta, [len(drawn), 1, height, width], align_corners=False)
