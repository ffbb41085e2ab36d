"""Distances between the surfaces of two masks: Hausdorff, mean surface distance, surface Dice.

Two definitions of a surface are in use, and published numbers differ by which one was taken:

- ``voxels``: the voxels of a mask that touch its outside by a face, each counted once, at their centres.
  MONAI, nnU-Net's evaluation and MetricsReloaded use it. Default of `hausdorff`, `hd95` and `assd`.
- ``surfels``: elements of the surface between the voxel centres, at the corners of the voxels, each
  weighted by its area in mm² (by its length in mm in two dimensions). Default of `nsd`, as in its paper.

All distances are in mm and Euclidean, unless ``norm="taxicab"`` asks for the sum over the axes. An axis
of length 1 is dropped, so that a single slice is measured in two dimensions. Voxels beyond the edge of
the image count as outside.

Empty masks: both empty gives NaN (not defined, left out of means and counted). One empty gives infinite
distances and a surface Dice of 0.

MONAI owns these numbers, and the table of surface elements is MONAI's. The distances are computed here by
a k-d tree over the surface alone, where MONAI makes distance transforms of the whole box. On one thread it
takes between an eighth and three quarters of MONAI's time with equal values; for two balls of radius 90
voxels, HD95 0.18 s against 0.33 s and NSD 0.35 s against 1.37 s (``benchmarks/surface_distance.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from medrl.core.errors import DataError

from .overlap import as_masks

Elements = Literal["voxels", "surfels"]
Norm = Literal["euclidean", "taxicab"]


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances from each surface to the other.

    Attributes:
        pred_to_ref_mm: `(N,)` distance of each element of the predicted surface to the reference surface.
        ref_to_pred_mm: `(M,)` the other way.
        pred_weights: `(N,)` area (mm²) or length (mm) of the elements; ones for ``voxels``.
        ref_weights: `(M,)` likewise.
    """

    pred_to_ref_mm: NDArray[np.float64]
    ref_to_pred_mm: NDArray[np.float64]
    pred_weights: NDArray[np.float64]
    ref_weights: NDArray[np.float64]

    @cached_property
    def empty(self) -> float | None:
        """NaN if both surfaces are empty, infinity if one is, None if none is."""
        if self.pred_weights.size and self.ref_weights.size:
            return None
        return math.inf if self.pred_weights.size or self.ref_weights.size else math.nan

    def hausdorff(self, percentile: float = 100.0) -> float:
        """Return the larger of the two directed percentiles, in mm.

        Voxel elements take the percentile of their distances by linear interpolation (as MONAI), weighted
        ones the first distance that reaches this part of the area (as Nikolov et al.).
        """
        if self.empty is not None:
            return self.empty
        return max(
            _percentile(self.pred_to_ref_mm, self.pred_weights, percentile),
            _percentile(self.ref_to_pred_mm, self.ref_weights, percentile),
        )

    def mean(self) -> tuple[float, float]:
        """Return the mean distance from prediction to reference and from reference to prediction, in mm."""
        if self.empty is not None:
            return self.empty, self.empty
        return (
            float(np.average(self.pred_to_ref_mm, weights=self.pred_weights)),
            float(np.average(self.ref_to_pred_mm, weights=self.ref_weights)),
        )

    def assd(self) -> float:
        """Return the average symmetric surface distance in mm: the mean over the elements of both."""
        if self.empty is not None:
            return self.empty
        distances = np.concatenate([self.pred_to_ref_mm, self.ref_to_pred_mm])
        return float(np.average(distances, weights=np.concatenate([self.pred_weights, self.ref_weights])))

    def nsd(self, tolerance_mm: float) -> float:
        """Return the part of both surfaces that lies within the tolerance of the other."""
        if self.empty is not None:
            return math.nan if math.isnan(self.empty) else 0.0
        near = float(self.pred_weights[self.pred_to_ref_mm <= tolerance_mm].sum())
        near += float(self.ref_weights[self.ref_to_pred_mm <= tolerance_mm].sum())
        return near / float(self.pred_weights.sum() + self.ref_weights.sum())


def surface_distances(
    pred: NDArray[Any],
    ref: NDArray[Any],
    spacing: Sequence[float],
    *,
    elements: Elements = "voxels",
    norm: Norm = "euclidean",
) -> SurfaceDistances:
    """Measure the distances between the surfaces of two masks.

    Args:
        pred: `(X, Y, Z)` or `(X, Y)` mask.
        ref: Mask of the same shape.
        spacing: Voxel size in mm, one number for each axis.
        elements: ``voxels`` or ``surfels``, see the module.
        norm: How a distance is measured.

    Raises:
        DataError: Shapes differ, or the spacing does not fit or is not positive.
    """
    pred, ref = as_masks(pred, ref)
    size = np.asarray(spacing, dtype=np.float64)
    if size.shape != (pred.ndim,) or not (np.isfinite(size).all() and (size > 0).all()):
        raise DataError(
            "surface distance",
            why=f"spacing {tuple(spacing)} does not fit an image of {pred.ndim} dimensions",
        )
    keep = [axis for axis in range(pred.ndim) if pred.shape[axis] > 1] or [0]
    drop = tuple(axis for axis in range(pred.ndim) if axis not in keep)
    pred, ref, size = np.squeeze(pred, drop), np.squeeze(ref, drop), size[keep]
    pred, ref = _crop(pred, ref)
    find = _voxels if elements == "voxels" or pred.ndim == 1 else _surfels
    pred_points, pred_weights = find(pred, size)
    ref_points, ref_weights = find(ref, size)
    return SurfaceDistances(
        pred_to_ref_mm=_nearest(pred_points, ref_points, norm),
        ref_to_pred_mm=_nearest(ref_points, pred_points, norm),
        pred_weights=pred_weights,
        ref_weights=ref_weights,
    )


def hausdorff(
    pred: NDArray[Any], ref: NDArray[Any], spacing: Sequence[float], *, elements: Elements = "voxels"
) -> float:
    """Return the Hausdorff distance in mm: the largest distance of a surface element to the other surface."""
    return surface_distances(pred, ref, spacing, elements=elements).hausdorff()


def hd95(
    pred: NDArray[Any], ref: NDArray[Any], spacing: Sequence[float], *, elements: Elements = "voxels"
) -> float:
    """Return the 95th percentile Hausdorff distance in mm, the larger of both directions."""
    return surface_distances(pred, ref, spacing, elements=elements).hausdorff(95.0)


def assd(
    pred: NDArray[Any], ref: NDArray[Any], spacing: Sequence[float], *, elements: Elements = "voxels"
) -> float:
    """Return the average symmetric surface distance in mm."""
    return surface_distances(pred, ref, spacing, elements=elements).assd()


def nsd(
    pred: NDArray[Any],
    ref: NDArray[Any],
    spacing: Sequence[float],
    *,
    tolerance_mm: float = 1.0,
    elements: Elements = "surfels",
) -> float:
    """Return the normalised surface Dice at a tolerance in mm, in [0, 1].

    Source: Nikolov et al. 2021, "Clinically applicable segmentation of head and neck anatomy".
    """
    return surface_distances(pred, ref, spacing, elements=elements).nsd(tolerance_mm)


def _crop(pred: NDArray[np.bool_], ref: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Cut both masks to the box that holds them, with one voxel of outside around it."""
    union = pred | ref
    box: list[slice] = []
    for axis in range(union.ndim):
        others = tuple(other for other in range(union.ndim) if other != axis)
        hit = np.flatnonzero(union.any(axis=others))
        if hit.size == 0:
            empty = np.zeros((0,) * union.ndim, dtype=np.bool_)
            return empty, empty
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return np.pad(pred[tuple(box)], 1), np.pad(ref[tuple(box)], 1)


def _voxels(
    mask: NDArray[np.bool_], size: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the positions in mm of the voxels with a face to the outside, and unit weights."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        low = tuple(slice(None, -1) if a == axis else slice(None) for a in range(mask.ndim))
        high = tuple(slice(1, None) if a == axis else slice(None) for a in range(mask.ndim))
        inner[low] &= mask[high]
        inner[high] &= mask[low]
    points = np.argwhere(mask & ~inner) * size
    return points, np.ones(len(points))


def _surfels(
    mask: NDArray[np.bool_], size: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return positions in mm and areas (or lengths) of the surface elements at the corners of the voxels."""
    if mask.size == 0:
        return np.zeros((0, mask.ndim)), np.zeros(0)
    table, kernel = _element_table(tuple(float(value) for value in size))
    code = np.zeros(tuple(n - 1 for n in mask.shape), dtype=np.uint8)
    for offset in np.ndindex(*kernel.shape):
        window = tuple(slice(o, o + n) for o, n in zip(offset, code.shape, strict=True))
        code |= np.where(mask[window], np.uint8(kernel[offset]), np.uint8(0))
    at = np.nonzero((code != 0) & (code != len(table) - 1))
    return np.stack(at, axis=1) * size, table[code[at]]


@lru_cache(maxsize=32)
def _element_table(spacing: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return sizes of surface elements by the code of their 2 × 2 (× 2) voxels, and the code's kernel."""
    from monai.metrics.utils import get_code_to_measure_table

    table, kernel = get_code_to_measure_table(spacing)
    return (
        table.numpy().astype(np.float64),
        kernel.reshape((2,) * len(spacing)).numpy().astype(np.int64),
    )


def _nearest(points: NDArray[np.float64], others: NDArray[np.float64], norm: Norm) -> NDArray[np.float64]:
    """Return the distance of each point to the nearest of the others: infinite where there is none."""
    if len(points) == 0 or len(others) == 0:
        return np.full(len(points), np.inf)
    tree = cKDTree(others, balanced_tree=False, compact_nodes=False)
    distances: NDArray[np.float64] = np.asarray(
        tree.query(points, p=2.0 if norm == "euclidean" else 1.0)[0], dtype=np.float64
    )
    return distances


def _percentile(values: NDArray[np.float64], weights: NDArray[np.float64], percentile: float) -> float:
    if (weights == weights[0]).all() and weights[0] == 1.0:
        return float(np.percentile(values, percentile))
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    at = min(int(np.searchsorted(reached, percentile / 100.0)), len(values) - 1)
    return float(values[order][at])


def components(mask: NDArray[Any]) -> tuple[NDArray[np.int32], int]:
    """Label the connected components of a mask; voxels that touch by a corner belong together (26 in 3D)."""
    labels, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    return np.asarray(labels, dtype=np.int32), int(count)
