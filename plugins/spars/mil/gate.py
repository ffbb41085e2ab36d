"""The gate: parts of a map that are no likelier than what volumes without the object show are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

Statistic: TypeAlias = Literal["share", "peak"]
"""What is asked of a component: share of its voxels with a presence above `PRESENT`, or the largest one."""

PRESENT = 0.3
_FAINT = 2
"""Voxels around a kept component in which the map stays."""


def gated(
    fraction: Tensor,
    presence: Tensor,
    level: float,
    *,
    component: float = 0.3,
    statistic: Statistic = "peak",
) -> Tensor:
    """Keep the components above `component` whose presence reaches a level, and their fringe.

    All else becomes 0, so that a volume without a kept component has an empty map.

    Args:
        fraction: ``(X, Y, Z)`` map that is gated.
        presence: ``(X, Y, Z)`` map that decides.
        level: Of the statistic of `presence`.
        component: Of `fraction`.
        statistic: Of the presence in a component.
    """
    values = fraction.detach().cpu().numpy()
    parts, count = ndimage.label(values > component)
    if not count:
        return torch.zeros_like(fraction)
    told = _told(presence, parts, count, statistic)
    kept = np.concatenate([[False], told >= level])[parts]
    if not kept.any():
        return torch.zeros_like(fraction)
    near = ndimage.binary_dilation(kept, iterations=_FAINT) & ~((parts > 0) & ~kept)
    return fraction * torch.from_numpy(near).to(fraction.device)


def component_statistics(
    fraction: Tensor,
    presence: Tensor,
    *,
    component: float = 0.3,
    statistic: Statistic = "share",
    smallest: int = 0,
) -> list[float]:
    """The statistic of every component that has so many voxels; arguments as of `gated`."""
    parts, count = ndimage.label(fraction.detach().cpu().numpy() > component)
    if not count:
        return []
    sizes = np.bincount(parts.ravel())[1:]
    return [float(value) for value in _told(presence, parts, count, statistic)[sizes >= smallest]]


def gate_level(
    peaks: Sequence[float], *, margin: float = 0.02, limits: tuple[float, float] = (0.15, 0.6)
) -> float:
    """The level from what validation volumes without the object show.

    Args:
        peaks: Statistics of their components; none gives the lower limit.
        margin: Added to the largest.
        limits: Between which the level lies.
    """
    highest = max(peaks) + margin if peaks else limits[0]
    return min(max(highest, limits[0]), limits[1])


def _told(
    presence: Tensor, parts: NDArray[np.int32], count: int, statistic: Statistic
) -> NDArray[np.float64]:
    values = presence.detach().cpu().numpy()
    every = range(1, count + 1)
    if statistic == "share":
        return np.asarray(ndimage.mean((values > PRESENT).astype(np.float64), parts, every), dtype=np.float64)
    return np.asarray(ndimage.maximum(values, parts, every), dtype=np.float64)
