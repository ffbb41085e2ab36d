"""Sums over boxes in constant time: integral volumes, and the mean of a dense map in every window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medrl.plugins.spars.lattice import Lattice


def integral(volume: Tensor) -> Tensor:
    """Sums of everything below each voxel: ``(X, Y, Z)`` to ``(X + 1, Y + 1, Z + 1)`` float64.

    >>> integral(torch.ones(2, 2, 2))[2, 2, 2].item()
    8.0
    """
    x, y, z = volume.shape
    sums = torch.zeros(x + 1, y + 1, z + 1, dtype=torch.float64, device=volume.device)
    inner = sums[1:, 1:, 1:]
    inner.copy_(volume)
    for axis in range(3):
        torch.cumsum(inner, axis, out=inner)
    return sums


def box_sums(sums: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Sums ``(...)`` float64 over boxes from corners `low` to `high` ``(..., 3)``, `high` not included.

    Args:
        sums: From `integral`.
        low: Corners in voxels; parts outside the volume add nothing.
        high: Corners in voxels.
    """
    most = torch.tensor(sums.shape, device=low.device) - 1
    a, b = low.clamp(min=0).minimum(most), high.clamp(min=0).minimum(most)
    total = torch.zeros(low.shape[:-1], dtype=sums.dtype, device=sums.device)
    for bits in range(8):
        upper = [bool(bits & (1 << axis)) for axis in range(3)]
        x, y, z = ((b if up else a)[..., axis] for axis, up in enumerate(upper))
        total += (-1.0) ** (3 - sum(upper)) * sums[x, y, z]
    return total


def window_means(sums: Tensor, corners: Tensor, window: Sequence[int]) -> Tensor:
    """Means ``(...)`` float32 in windows with minimum corners ``(..., 3)`` inside the volume."""
    size = corners.new_tensor(list(window))
    return (box_sums(sums, corners, corners + size) / float(size.prod())).float()


def lattice_means(sums: Tensor, lattice: Lattice, window: Sequence[int] | None = None) -> Tensor:
    """Means in all windows of a lattice at once ``(Lx, Ly, Lz)`` float32.

    Args:
        sums: From `integral`.
        lattice: Whose windows.
        window: Another size about the same centres, in voxels; outside the volume it counts as 0.
    """
    size = list(lattice.window if window is None else window)
    found = sums
    for axis in range(3):
        low = torch.arange(lattice.counts[axis], device=sums.device) * lattice.stride[axis]
        low = low + lattice.offset[axis] + (lattice.window[axis] - size[axis]) // 2
        most = sums.shape[axis] - 1
        high = (low + size[axis]).clamp(0, most)
        found = found.index_select(axis, high) - found.index_select(axis, low.clamp(0, most))
    return (found / float(size[0] * size[1] * size[2])).float()


def scaled_window(window: Sequence[int], scale: float) -> tuple[int, int, int]:
    """A window of another size, at least one voxel wide.

    >>> scaled_window((16, 16, 8), 0.5)
    (8, 8, 4)
    """
    x, y, z = (max(1, round(size * scale)) for size in window)
    return x, y, z
