"""What is known of a cell: its mean, its surroundings at several scales, and nothing of where it lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int, int]

BLURS = (0.6, 1.0, 2.0, 4.0)
SPREADS = (1.0, 2.0, 4.0)
EXTREMES = (5, 9)
NAMES = (
    "mean",
    *(f"gaussian_{sigma:g}" for sigma in BLURS),
    *(f"sd_{sigma:g}" for sigma in SPREADS),
    *(f"max_{size}" for size in EXTREMES),
    *(f"min_{size}" for size in EXTREMES),
    "median",
)
COUNT = len(NAMES)
_TRUNCATE = 4.0
_MEDIAN = 3


@torch.no_grad()
def cell_features(volume: Tensor, cell: Size = (2, 2, 2)) -> Tensor:
    """Features of all cells of a volume.

    Mean; Gaussian blur of 0.6, 1, 2 and 4 cells; local standard deviation of 1, 2 and 4 cells; largest and
    least value within 5 and 9 cells; median of 3³ blocks of 2³ cells. Volumes are continued by their
    outermost voxels, up to whole cells and beyond the border.

    Args:
        volume: ``(X, Y, Z)`` float32.
        cell: Voxels of a cell.

    Returns:
        ``(13, X', Y', Z')`` float32; X' is X divided by the cell, rounded up.
    """
    cells = cell_means(volume, cell)
    found = [cells]
    found += [gaussian(cells, sigma) for sigma in BLURS]
    # About the mean of the volume, so that little is lost in the difference of squares.
    centred = cells - cells.mean()
    for sigma in SPREADS:
        spread = gaussian(centred * centred, sigma) - gaussian(centred, sigma) ** 2
        found.append(spread.clamp(min=0.0).sqrt())
    found += [largest(cells, size) for size in EXTREMES]
    found += [-largest(-cells, size) for size in EXTREMES]
    found.append(_coarse_median(cells))
    return torch.stack(found)


def cell_means(volume: Tensor, cell: Size) -> Tensor:
    """Mean of each cell, ``(X', Y', Z')``; the outermost voxels fill up the last cells."""
    whole = padded(volume.float(), cell)
    return F.avg_pool3d(whole[None, None], cell)[0, 0]


def padded(volume: Tensor, cell: Size) -> Tensor:
    """Continue a volume at its upper ends to whole cells."""
    missing = [-int(size) % step for size, step in zip(volume.shape, cell, strict=True)]
    if not any(missing):
        return volume
    pad = [value for extra in reversed(missing) for value in (0, extra)]
    return F.pad(volume[None, None], pad, mode="replicate")[0, 0]


def cell_grid(shape: Sequence[int], cell: Size) -> Size:
    """Number of cells along each axis of a volume of this shape."""
    counts = [-(-int(size) // step) for size, step in zip(shape, cell, strict=True)]
    return counts[0], counts[1], counts[2]


def to_voxels(cells: Tensor, shape: Sequence[int], cell: Size) -> Tensor:
    """Interpolate a map of cells ``(X', Y', Z')`` linearly to the voxels ``(X, Y, Z)``."""
    full = [int(size) * step for size, step in zip(cells.shape, cell, strict=True)]
    grown = F.interpolate(cells[None, None].float(), size=full, mode="trilinear", align_corners=False)[0, 0]
    return grown[: shape[0], : shape[1], : shape[2]].contiguous()


def gaussian(values: Tensor, sigma: float) -> Tensor:
    """Blur ``(X, Y, Z)`` by a Gaussian of `sigma` voxels, cut off at 4 sigma; borders are continued."""
    radius = max(1, math.ceil(_TRUNCATE * sigma))
    places = torch.arange(-radius, radius + 1, dtype=torch.float32, device=values.device)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = kernel / kernel.sum()
    found = values
    for axis in range(3):
        moved = found.movedim(axis, -1)
        lines = moved.reshape(1, -1, moved.shape[-1])
        lines = F.pad(lines, (radius, radius), mode="replicate")
        lines = F.conv1d(lines.transpose(0, 1), kernel.view(1, 1, -1))
        found = lines.view(moved.shape).movedim(-1, axis)
    return found.contiguous()


def largest(values: Tensor, size: int) -> Tensor:
    """Largest value within a cube of odd `size` about each voxel of ``(X, Y, Z)``; nothing lies outside."""
    half = size // 2
    found = values[None, None]
    for axis in range(3):
        kernel = [1, 1, 1]
        margin = [0, 0, 0]
        kernel[axis], margin[axis] = size, half
        found = F.max_pool3d(found, kernel, stride=1, padding=margin)
    return found[0, 0]


def _coarse_median(cells: Tensor) -> Tensor:
    coarse = F.avg_pool3d(padded(cells, (2, 2, 2))[None, None], 2)
    around = F.pad(coarse, [_MEDIAN // 2] * 6, mode="replicate")[0, 0]
    blocks = around.unfold(0, _MEDIAN, 1).unfold(1, _MEDIAN, 1).unfold(2, _MEDIAN, 1)
    middle = blocks.flatten(3).median(dim=-1).values
    return to_voxels(middle, cells.shape, (2, 2, 2))
