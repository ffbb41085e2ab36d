"""Pseudo-masks: what a map of presence points at, cut out of the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

if TYPE_CHECKING:
    from medrl.plugins.spars.data_config import PseudoConfig

SMOOTH = 0.6
"""Voxels by which the image is blurred before it is split, because noise makes single voxels change sides."""
_FEW = 8
"""Voxels that a threshold is not sought among."""


def pseudo_mask(volume: Tensor, presence: Tensor, config: PseudoConfig) -> Tensor:
    """Cut an object out of a volume ``(X, Y, Z)`` where a map of presence points at it.

    The surroundings of what is likely are split in two by Otsu's threshold, each part by its own; the side of
    the seeds stays, where it hangs together with a seed. Small pieces are dropped.

    Returns:
        ``(X, Y, Z)`` bool on the CPU.
    """
    chance = presence.detach().cpu().numpy()
    image = ndimage.gaussian_filter(volume.detach().cpu().numpy(), SMOOTH)
    seeds = chance > config.seed
    kept = np.zeros(chance.shape, dtype=np.bool_)
    if not seeds.any():
        return torch.from_numpy(kept)
    region = chance > config.region
    if config.dilate:
        region = ndimage.binary_dilation(region, iterations=config.dilate)
    parts, _ = ndimage.label(region)
    for number, box in enumerate(ndimage.find_objects(parts), start=1):
        part = parts[box] == number
        inner = seeds[box] & part
        if not inner.any():
            continue
        side = _side(image[box], part, inner) if config.otsu else part
        kept[box] |= _holding(side, inner)
    return torch.from_numpy(_large(kept, config.smallest))


def otsu(values: NDArray[Any], bins: int = 128) -> float:
    """Otsu's threshold: the one that best splits values in two."""
    from skimage.filters import threshold_otsu

    low, high = float(values.min()), float(values.max())
    return low if low == high else float(threshold_otsu(values, nbins=bins))


def _side(image: NDArray[Any], part: NDArray[np.bool_], seeds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    values = image[part]
    if len(values) < _FEW:
        return part
    threshold = otsu(values)
    above = float(np.median(image[seeds])) > threshold
    side: NDArray[np.bool_] = part & ((image > threshold) if above else (image <= threshold))
    return side


def _holding(mask: NDArray[np.bool_], seeds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Components of a mask that hold a seed."""
    parts, count = ndimage.label(mask)
    if not count:
        return mask
    wanted = np.zeros(count + 1, dtype=np.bool_)
    wanted[np.unique(parts[seeds & mask])] = True
    wanted[0] = False
    found: NDArray[np.bool_] = wanted[parts]
    return found


def _large(mask: NDArray[np.bool_], smallest: int) -> NDArray[np.bool_]:
    """Components of at least so many voxels."""
    parts, count = ndimage.label(mask)
    if smallest <= 1 or not count:
        return mask
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    found: NDArray[np.bool_] = (sizes >= smallest)[parts]
    return found
