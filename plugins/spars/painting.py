"""Painting scores along a path: sums, counts and maxima of all windows over each voxel.

A window is painted by its eight corners; three cumulative sums make the map. The cost does not depend on the
size of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.plugins.spars.lattice import Lattice

Aggregate: TypeAlias = Literal["sum", "mean", "max"]
AGGREGATES: tuple[Aggregate, ...] = ("sum", "mean", "max")
_FEW = 20
"""Voxels of all windows, as a multiple of those of the volume, up to which laying them is faster."""


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """What windows painted on a volume.

    Attributes:
        sum: ``(X, Y, Z)`` float32, A: sum of the scores of the windows over each voxel.
        count: ``(X, Y, Z)`` int32, C: number of windows over each voxel.
        maximum: ``(X, Y, Z)`` float32, M: largest score of the windows over each voxel; 0 without any.
    """

    sum: Tensor
    count: Tensor
    maximum: Tensor

    def of(self, kind: Aggregate) -> Tensor:
        """A, A/C or M ``(X, Y, Z)`` float32; 0 where no window was.

        Raises:
            ConfigError: Unknown kind.
        """
        if kind == "sum":
            return self.sum
        if kind == "mean":
            return self.sum / self.count.clamp(min=1)
        if kind == "max":
            return self.maximum
        raise ConfigError("map.aggregate", why=f"unknown: {kind!r}", do=", ".join(AGGREGATES))


def paint(shape: Sequence[int], window: Sequence[int], corners: Tensor, values: Tensor) -> ScoreMap:
    """Paint windows with values.

    Args:
        shape: (X, Y, Z) of the volume.
        window: In voxels.
        corners: ``(M, 3)`` minimum corners inside ``[0, S - w]``.
        values: ``(M,)``, none negative.

    Raises:
        ConfigError: A window is not inside the volume.
    """
    check_inside(shape, window, corners)
    size = [int(length) for length in shape]
    found = ScoreMap(
        torch.zeros(size, device=values.device),
        torch.zeros(size, dtype=torch.int32, device=values.device),
        torch.zeros(size, device=values.device),
    )
    if not len(corners):
        return found
    # Only the box that holds all windows is computed.
    low = corners.amin(dim=0)
    ends = corners.amax(dim=0) + corners.new_tensor(list(window))
    part = tuple(slice(a, b) for a, b in zip(low.tolist(), ends.tolist(), strict=True))
    inner, places = (ends - low).tolist(), corners - low
    count = visit_count(inner, window, places)
    sums = paint_sum(inner, window, places, values.double())
    # Rounding of cumulative sums leaves 1e-17 where nothing was painted.
    found.sum[part] = torch.where(count > 0, sums, 0.0).clamp(min=0.0).float()
    found.count[part] = count
    found.maximum[part] = paint_max(inner, window, places, values)
    return found


def paint_sum(shape: Sequence[int], window: Sequence[int], corners: Tensor, values: Tensor) -> Tensor:
    """Sums of values ``(M,)`` over the windows that cover each voxel ``(X, Y, Z)``, of the values' type."""
    x, y, z = (int(size) for size in shape)
    edges = torch.zeros(x + 1, y + 1, z + 1, dtype=values.dtype, device=values.device)
    size = corners.new_tensor(list(window))
    flat = edges.view(-1)
    for bits in range(8):
        upper = corners.new_tensor([bits & 1, bits >> 1 & 1, bits >> 2 & 1])
        at = corners + upper * size
        where = (at[:, 0] * (y + 1) + at[:, 1]) * (z + 1) + at[:, 2]
        flat.index_add_(0, where, values if int(upper.sum()) % 2 == 0 else -values)
    for axis in range(3):
        torch.cumsum(edges, axis, out=edges)
    return edges[:x, :y, :z].contiguous()


def visit_count(shape: Sequence[int], window: Sequence[int], corners: Tensor) -> Tensor:
    """Number of windows over each voxel ``(X, Y, Z)`` int32."""
    ones = torch.ones(len(corners), dtype=torch.int32, device=corners.device)
    return paint_sum(shape, window, corners, ones).to(torch.int32)


def paint_max(shape: Sequence[int], window: Sequence[int], corners: Tensor, values: Tensor) -> Tensor:
    """Largest value of the windows over each voxel ``(X, Y, Z)`` float32; 0 where there is none.

    Few windows are laid over each other, the largest value last. Of many, the values stand at the corners,
    and a running maximum along each axis, of the window's length, spreads them.
    """
    x, y, z = (int(size) for size in shape)
    wx, wy, wz = (int(size) for size in window)
    if len(corners) * wx * wy * wz < _FEW * x * y * z:
        found = torch.zeros(x, y, z, device=values.device)
        for (i, j, k), value in zip(*_rising(corners, values), strict=True):
            found[i : i + wx, j : j + wy, k : k + wz] = value
        return found
    line = torch.full((x * y * z,), -torch.inf, device=values.device)
    where = (corners[:, 0] * y + corners[:, 1]) * z + corners[:, 2]
    line.scatter_reduce_(0, where, values.float(), "amax")
    grid = line.view(x, y, z)
    for axis, length in enumerate((wx, wy, wz)):
        grid = _running_max(grid, axis, length)
    return grid.masked_fill(grid == -torch.inf, 0.0)


def _rising(corners: Tensor, values: Tensor) -> tuple[list[list[int]], list[float]]:
    order = torch.argsort(values, stable=True)
    return corners[order].tolist(), values[order].tolist()


def nested(
    lattice: Lattice, corners: Tensor, fine: Lattice, scores: Tensor, kind: Aggregate = "mean"
) -> Tensor:
    """Paint the scores of finer windows, of those that lie inside a visited window ``(X, Y, Z)`` float32.

    Args:
        lattice: Of the visited windows.
        corners: ``(M, 3)`` of the visited windows.
        fine: Of the finer windows.
        scores: ``(Lx, Ly, Lz)`` of the finer windows.
        kind: What becomes of several finer windows over a voxel.

    Raises:
        ConfigError: The finer window is larger than the other.
    """
    room = [w - f + 1 for w, f in zip(lattice.window, fine.window, strict=True)]
    if min(room) < 1:
        raise ConfigError(
            f"map.fine {list(fine.window)}", why=f"it does not fit in the window {list(lattice.window)}"
        )
    # A fine corner c is inside the window at C where C <= c <= C + w - f: a box of corners.
    seen = visit_count(lattice.shape, room, torch.unique(corners, dim=0)) > 0
    inside = fine.corners(corners.device)
    inside = inside[seen[inside[:, 0], inside[:, 1], inside[:, 2]]]
    values = scores.flatten()[fine.flat(fine.node(inside))]
    return paint(fine.shape, fine.window, inside, values).of(kind)


def check_inside(shape: Sequence[int], window: Sequence[int], corners: Tensor) -> None:
    """Refuse windows that are not inside the volume.

    Raises:
        ConfigError: There is one.
    """
    most = corners.new_tensor([s - w for s, w in zip(shape, window, strict=True)])
    if len(corners) and bool(((corners < 0) | (corners > most)).any()):
        raise ConfigError("painting", why="a window is not inside the volume")


def _running_max(grid: Tensor, axis: int, length: int) -> Tensor:
    """Maximum over the last `length` places up to each, by doubling."""
    reach = 1
    while reach < length:
        by = min(reach, length - reach)
        later = torch.maximum(
            grid.narrow(axis, by, grid.shape[axis] - by), grid.narrow(axis, 0, grid.shape[axis] - by)
        )
        grid = torch.cat([grid.narrow(axis, 0, by), later], dim=axis)
        reach += by
    return grid
