"""Lesions implanted into real organs, for tests and benchmarks where real ones are not at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medrl.core.errors import DataError

_EDGE = 0.7
"""Voxels by which the surface of a lesion is blurred."""
_BUMPS = 0.12
"""Relative height of bumps of the surface."""


def implant_lesions(
    volume: NDArray[Any],
    organ: NDArray[Any],
    rng: np.random.Generator,
    *,
    count: tuple[int, int] = (1, 2),
    radius: tuple[float, float] = (3.0, 8.0),
    contrast: tuple[float, float] = (-65.0, -40.0),
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Add bumpy lesions inside an organ; texture and noise of the image stay.

    These are not real lesions: results on them say nothing of patients.

    Args:
        volume: ``(X, Y, Z)``, in the units of `contrast`.
        organ: ``(X, Y, Z)`` mask; lesions end at its surface.
        rng: Source of everything random.
        count: Lowest and highest number.
        radius: Lowest and highest, in voxels.
        contrast: What is added inside a lesion; negative is darker, as hypodense lesions of the liver are.

    Returns:
        The changed volume and the mask of the lesions.

    Raises:
        DataError: The organ is empty, or of another shape.
    """
    inside = np.asarray(organ) > 0
    if inside.shape != volume.shape or not inside.any():
        raise DataError("implanted lesions", why="the organ is empty or of another shape than the volume")
    depth = ndimage.distance_transform_edt(inside)
    found = np.array(volume, dtype=np.float32)
    mask = np.zeros(inside.shape, dtype=np.bool_)
    for _ in range(int(rng.integers(count[0], count[1] + 1))):
        size = float(rng.uniform(*radius))
        deep = np.flatnonzero((depth >= min(size, 0.7 * float(depth.max()))) & ~mask)
        if not len(deep):
            continue
        centre = np.unravel_index(int(deep[rng.integers(len(deep))]), inside.shape)
        lesion = _bumpy(rng, inside.shape, np.asarray(centre, dtype=float), size) & inside & ~mask
        soft = ndimage.gaussian_filter(lesion.astype(np.float32), _EDGE) * inside
        found += np.float32(rng.uniform(*contrast)) * soft
        mask |= lesion
    return found, mask


def _bumpy(
    rng: np.random.Generator, shape: tuple[int, ...], centre: NDArray[np.float64], radius: float
) -> NDArray[np.bool_]:
    """A ball whose surface has smooth bumps."""
    axes = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij", sparse=True)
    distance = np.sqrt(sum((axis - at) ** 2 for axis, at in zip(axes, centre, strict=True)))
    field = ndimage.gaussian_filter(rng.standard_normal(shape), max(1.0, radius / 2))
    field /= max(float(field.std()), 1e-9)
    inside: NDArray[np.bool_] = np.asarray(distance <= radius * (1.0 + _BUMPS * field))
    return inside
