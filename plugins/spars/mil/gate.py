"""The gate: parts of a map that are no likelier than what volumes without the object show are dropped."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

_FAINT = 2
"""Voxels around a kept component in which the map stays."""


def gated(fraction: Tensor, presence: Tensor, level: float, *, component: float = 0.3) -> Tensor:
    """Keep the components above `component` whose largest presence reaches a level, and their fringe.

    All else becomes 0, so that a volume without a kept component has an empty map.

    Args:
        fraction: ``(X, Y, Z)`` map that is gated.
        presence: ``(X, Y, Z)`` map that decides.
        level: Of `presence`.
        component: Of `fraction`.
    """
    values = fraction.detach().cpu().numpy()
    parts, count = ndimage.label(values > component)
    if not count:
        return torch.zeros_like(fraction)
    peaks = ndimage.maximum(presence.detach().cpu().numpy(), parts, range(1, count + 1))
    kept = np.concatenate([[False], np.asarray(peaks) >= level])[parts]
    if not kept.any():
        return torch.zeros_like(fraction)
    near = ndimage.binary_dilation(kept, iterations=_FAINT) & ~((parts > 0) & ~kept)
    return fraction * torch.from_numpy(near).to(fraction.device)


def gate_level(
    peaks: list[float], *, margin: float = 0.02, limits: tuple[float, float] = (0.15, 0.6)
) -> float:
    """The level from the largest presence of each validation volume without the object.

    Args:
        peaks: One for each such volume; none gives the lower limit.
        margin: Added to the largest.
        limits: Between which the level lies.
    """
    highest = max(peaks) + margin if peaks else limits[0]
    return min(max(highest, limits[0]), limits[1])
