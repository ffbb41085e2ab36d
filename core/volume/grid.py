"""Voxel grids: whether two are the same, resampling onto another, canonical orientation."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.types import Volume

SAME_GRID_TOLERANCE = 0.2
"""Two grids are one if no corner differs by more than this part of the smallest voxel edge.

Real label maps drift by a tenth of a voxel when their orientation was stored as a rounded quaternion."""


def voxel_volume_mm3(volume: Volume) -> float:
    """Return the volume of one voxel in mm³, the absolute determinant of the affine."""
    return float(abs(np.linalg.det(volume.affine[:3, :3])))


def grid_difference(a: Volume, b: Volume) -> str:
    """Say in which way two grids differ; an empty string if they are the same."""
    if a.data.shape[1:] != b.data.shape[1:]:
        return f"shape {_text(a.data.shape[1:])} against {_text(b.data.shape[1:])}"
    ends = [(0, size - 1) for size in a.data.shape[1:]]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], dtype=np.float64)
    shift = float(np.linalg.norm((corners @ (a.affine - b.affine).T)[:, :3], axis=1).max())
    if shift <= SAME_GRID_TOLERANCE * min(*a.spacing, *b.spacing):
        return ""
    if not np.allclose(a.spacing, b.spacing, rtol=0.01):
        return f"voxel size {_text(a.spacing)} mm against {_text(b.spacing)} mm"
    return f"position or orientation: a corner lies {shift:.3g} mm apart"


def same_grid(a: Volume, b: Volume) -> bool:
    """Whether two volumes have the same shape and lie on the same voxels in space."""
    return not grid_difference(a, b)


def turn_like(volume: Volume, reference: Volume) -> Volume | None:
    """Turn and flip the axes of a volume onto the grid of another, exactly, if that is all they differ in.

    Returns:
        The same voxels in the order of `reference`, or None where interpolation would be needed.
    """
    import nibabel as nib

    turn = nib.orientations.io_orientation(np.linalg.inv(reference.affine) @ volume.affine)
    if np.isnan(turn).any():
        return None
    data = np.stack([nib.orientations.apply_orientation(image, turn) for image in volume.data])
    affine = volume.affine @ nib.orientations.inv_ornt_aff(turn, volume.data.shape[1:])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    turned = Volume(
        data=np.ascontiguousarray(data),
        affine=affine,
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        source=volume.source,
    )
    if not same_grid(turned, reference):
        return None
    return replace(turned, affine=reference.affine, spacing=reference.spacing, header=reference.header)


def overlap_fraction(volume: Volume, reference: Volume) -> float:
    """Return the part of the voxels of `reference` whose centres lie inside `volume`, from a coarse grid."""
    axes = [np.linspace(0, size - 1, min(size, 32)) for size in reference.data.shape[1:]]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    change = np.linalg.inv(volume.affine) @ reference.affine
    index = points @ change[:3, :3].T + change[:3, 3]
    upper = np.array(volume.data.shape[1:]) - 0.5
    return float(((index >= -0.5) & (index <= upper)).all(axis=1).mean())


def resample_like(volume: Volume, reference: Volume, *, order: int = 1) -> Volume:
    """Interpolate a volume onto the grid of another; 0 outside its field of view.

    Args:
        volume: Image to move, `(C, X, Y, Z)`.
        reference: Gives shape, affine and header of the result.
        order: 1 for images, 0 (nearest voxel) for labels.
    """
    from scipy import ndimage

    change = np.linalg.inv(volume.affine) @ reference.affine
    shape = reference.data.shape[1:]
    geometry: dict[str, Any] = {"matrix": change[:3, :3], "offset": change[:3, 3], "output_shape": shape}
    # Within half a voxel of its edge an image still has a value; beyond it, it has none.
    seen = np.ones(volume.data.shape[1:], dtype=np.uint8)
    inside = ndimage.affine_transform(seen, **geometry, order=0, mode="grid-constant", cval=0)
    data = np.empty((volume.data.shape[0], *shape), dtype=volume.data.dtype)
    for channel, image in enumerate(volume.data):
        moved = ndimage.affine_transform(image, **geometry, order=order, mode="nearest", prefilter=False)
        data[channel] = moved * inside
    return Volume(
        data=data,
        affine=reference.affine,
        spacing=reference.spacing,
        header=reference.header,
        source=volume.source,
    )


def to_ras(
    data: NDArray[Any], affine: NDArray[np.float64]
) -> tuple[NDArray[Any], tuple[float, float, float]]:
    """Turn and flip ``(X, Y, Z)`` voxels so that the axes run nearest to right, anterior, superior.

    Returns:
        The turned array (a view) and its voxel size in mm.
    """
    import nibabel as nib

    turn = nib.orientations.io_orientation(affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    turned = np.empty(3)
    turned[turn[:, 0].astype(int)] = spacing
    result: NDArray[Any] = nib.orientations.apply_orientation(data, turn)
    return result, (float(turned[0]), float(turned[1]), float(turned[2]))


def _text(values: Any) -> str:
    return " × ".join(f"{value:g}" for value in values)
