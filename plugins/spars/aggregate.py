"""From a map of scores to a mask, and what a window lets one expect of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medrl.core.errors import ConfigError


def normalised(score_map: Tensor) -> Tensor:
    """The map divided by its maximum; a map without a positive value stays 0.

    >>> normalised(torch.zeros(2, 2, 2)).sum().item()
    0.0
    """
    largest = float(score_map.max())
    return score_map / largest if largest > 0.0 else torch.zeros_like(score_map)


def segment(
    score_map: Tensor,
    *,
    threshold: float = 0.5,
    normalise: bool = True,
    floor: float = 0.0,
    smallest: int = 0,
    largest: bool = False,
    organ: Tensor | None = None,
) -> Tensor:
    """Make a mask of a map.

    Args:
        score_map: ``(X, Y, Z)``, none negative.
        threshold: Voxels above it belong to the mask, strictly.
        normalise: Divide by the maximum first.
        floor: A map whose maximum is not above it gives an empty mask.
        smallest: Components with fewer voxels are dropped; neighbours share a face.
        largest: Keep only the largest component; the first of equals.
        organ: ``(X, Y, Z)`` bool; nothing outside it is kept.

    Returns:
        ``(X, Y, Z)`` bool.

    Raises:
        ConfigError: The organ has another shape.
    """
    if organ is not None and organ.shape != score_map.shape:
        raise ConfigError("organ mask", why=f"shape {list(organ.shape)}, the map has {list(score_map.shape)}")
    if not float(score_map.max()) > floor:
        return torch.zeros_like(score_map, dtype=torch.bool)
    mask = (normalised(score_map) if normalise else score_map) > threshold
    if organ is not None:
        mask = mask & organ.to(mask.device, torch.bool)
    if smallest > 1 or largest:
        mask = components(mask, smallest=smallest, largest=largest)
    return mask


def components(mask: Tensor, *, smallest: int = 0, largest: bool = False) -> Tensor:
    """Keep components of a mask ``(X, Y, Z)`` by their number of voxels; neighbours share a face."""
    labels, count = ndimage.label(mask.cpu().numpy())
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    keep = sizes >= max(smallest, 1)
    if largest:
        keep &= np.arange(count + 1) == int(sizes.argmax())
    return torch.from_numpy(keep[labels]).to(mask.device)


def dice(a: Tensor, b: Tensor) -> float:
    """Dice of two masks; 1 if both are empty.

    >>> dice(torch.zeros(2, 2, 2), torch.zeros(2, 2, 2))
    1.0
    """
    first, second = a.bool(), b.bool()
    total = int(first.sum()) + int(second.sum())
    return 1.0 if total == 0 else 2.0 * int((first & second).sum()) / total


def dice_bound(voxels: int, window: Sequence[int]) -> float:
    """The largest Dice that one window can reach against an object of so many voxels.

    A window that contains the whole object has 2V / (V + w); one inside the object 2w / (V + w).

    >>> round(dice_bound(4169, (48, 48, 24)), 4)
    0.1402
    """
    size = prod(window)
    if voxels < 1:
        raise ConfigError("dice_bound", why=f"an object of {voxels} voxels")
    return 2.0 * min(voxels, size) / (voxels + size)
