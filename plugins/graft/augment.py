"""Random changes of training samples: intensities, and with live teachers also places.

Every draw is from the global stream, which the loader seeds for each sample; so it is the same with any
number of workers and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .config_data import AugmentConfig

AXES = ("depth", "height", "width")


def augmented(
    images: Sequence[Tensor], label: Tensor, mask: Tensor, cfg: AugmentConfig
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Change one sample: the same draws for all its images, and the same places for label and mask.

    Args:
        images: ``(C, D, H, W)`` each, one case in several normalisations.
        label: ``(D, H, W)`` integers.
        mask: ``(D, H, W)`` integers.
        cfg: How much.
    """
    found = list(images)
    if cfg.moves:
        found, label, mask = _moved(found, label, mask, cfg)
    return jitter(found, cfg), label, mask


def jitter(images: Sequence[Tensor], cfg: AugmentConfig) -> list[Tensor]:
    """Change intensities: gain, offset and white noise for each channel, the same for every image."""
    size = (images[0].shape[0], 1, 1, 1)
    gain = 1.0 + cfg.scale * (2.0 * torch.rand(size) - 1.0)
    offset = cfg.shift * (2.0 * torch.rand(size) - 1.0)
    noise = cfg.noise * torch.randn(images[0].shape) if cfg.noise > 0 else None
    changed = [image * gain + offset for image in images]
    return changed if noise is None else [image + noise for image in changed]


def _moved(
    images: list[Tensor], label: Tensor, mask: Tensor, cfg: AugmentConfig
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Mirror, rotate and magnify; what comes from outside the window is 0, as padding is."""
    angle, zoom, *coins = (2.0 * torch.rand(5) - 1.0).tolist()
    chosen = [name in cfg.mirror and coin > 0 for name, coin in zip(AXES, coins, strict=True)]
    stack = [*images, label[None], mask[None]]
    if cfg.rotate > 0 or cfg.zoom > 0:
        grid = _grid(label.shape, math.radians(cfg.rotate * angle), 1.0 + cfg.zoom * zoom)
        modes = ["bilinear"] * len(images) + ["nearest"] * 2
        stack = [
            F.grid_sample(item[None].float(), grid, mode=mode, align_corners=False)[0].to(item.dtype)
            for item, mode in zip(stack, modes, strict=True)
        ]
    if any(chosen):
        axes = [1 + axis for axis, turned in enumerate(chosen) if turned]
        stack = [torch.flip(item, axes) for item in stack]
    *found, label, mask = stack
    return found, label[0], mask[0]


def _grid(shape: Sequence[int], angle: float, zoom: float) -> Tensor:
    """Where each voxel comes from: rotated in plane about the centre, in voxels of equal size."""
    _, height, width = shape
    cos, sin, aspect = math.cos(angle) / zoom, math.sin(angle) / zoom, height / width
    across = [cos, -sin * aspect, 0.0, 0.0]
    down = [sin / aspect, cos, 0.0, 0.0]
    theta = torch.tensor([[across, down, [0.0, 0.0, 1.0, 0.0]]])
    return F.affine_grid(theta, [1, 1, *shape], align_corners=False)
