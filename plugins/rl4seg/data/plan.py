"""From an image file to what the network sees, and back onto the grid of the file.

Intensities to [0, 1], resizing, CLAHE; labels joined and numbered anew. Axes keep the order of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medrl.core.adaptation.labels import join_labels, values_by_name
from medrl.core.errors import DataError
from medrl.core.types import Volume

from ..data_config import SampleConfig

Size = tuple[int, int]

FALLBACK: Size = (256, 256)
"""Size of images that do not agree in theirs (original: all images)."""


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """Everything that turns an image into a sample; resolved once from the source, kept in the checkpoint.

    Attributes:
        size: Pixels along the two axes.
        keep_aspect: Fill up with black instead of stretching.
        intensity: `range` or `percentile`.
        percentiles: Those of `percentile`.
        clahe: Clip limit of CLAHE; 0 is none.
        merge: Name of the label that each joined label becomes, labels of the target alone included.
        label_names: Values of the labels that are left, background 0 first.
        values: Value in the files of the source to value in `label_names`.
        channel_names: Channels of the images.
    """

    size: Size
    keep_aspect: bool
    intensity: str
    percentiles: tuple[float, float]
    clahe: float
    merge: Mapping[str, str]
    label_names: Mapping[str, int]
    values: Mapping[int, int]
    channel_names: tuple[str, ...]

    def values_of(self, declared: Mapping[str, int] | None) -> dict[int, int]:
        """Values in the files of another dataset to values in `label_names`, matched by name.

        Args:
            declared: Its label values by name; None if it does not name them: then as in the source.

        Raises:
            DataError: It has a label that the source does not know.
        """
        return values_by_name(declared, merge=self.merge, label_names=self.label_names, values=self.values)

    def to_meta(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "size": list(self.size),
            "keep_aspect": self.keep_aspect,
            "intensity": self.intensity,
            "percentiles": list(self.percentiles),
            "clahe": self.clahe,
            "merge": dict(self.merge),
            "label_names": dict(self.label_names),
            "values": [[old, new] for old, new in sorted(self.values.items())],
            "channel_names": list(self.channel_names),
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> SamplePlan:
        """Rebuild what `to_meta` gave."""
        height, width = (int(extent) for extent in meta["size"])
        low, high = (float(share) for share in meta["percentiles"])
        return cls(
            size=(height, width),
            keep_aspect=bool(meta["keep_aspect"]),
            intensity=str(meta["intensity"]),
            percentiles=(low, high),
            clahe=float(meta["clahe"]),
            merge={str(name): str(other) for name, other in meta["merge"].items()},
            label_names={str(name): int(value) for name, value in meta["label_names"].items()},
            values={int(old): int(new) for old, new in meta["values"]},
            channel_names=tuple(str(name) for name in meta["channel_names"]),
        )


def make_plan(
    sample: SampleConfig, *, labels: Mapping[str, int], channel_names: Sequence[str], size: Size
) -> SamplePlan:
    """Resolve the settings for a source.

    Args:
        sample: The settings.
        labels: Label values of the source by name.
        channel_names: Its channels.
        size: Size of its images; taken where the settings name none.

    Raises:
        ConfigError: Labels cannot be joined as asked for.
    """
    merge, names, values = join_labels(labels, sample.merge)
    return SamplePlan(
        size=sample.size if all(sample.size) else size,
        keep_aspect=sample.keep_aspect,
        intensity=sample.intensity,
        percentiles=sample.percentiles,
        clahe=sample.clahe_clip if sample.clahe else 0.0,
        merge=merge,
        label_names=names,
        values=values,
        channel_names=tuple(channel_names),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Placement:
    """Where the slices of a file lie on the grid of the network, and the way back.

    Attributes:
        shape: ``(X, Y, Z)`` of the file.
        axis: Axis of the file along which the slices lie.
        size: Pixels of the grid.
        inner: Pixels of a slice within the grid.
        start: Where it begins there.
        spacing_mm: Size of the grid's pixels.
    """

    shape: tuple[int, int, int]
    axis: int
    size: Size
    inner: Size
    start: Size
    spacing_mm: tuple[float, float]

    @property
    def plane(self) -> Size:
        """Pixels of a slice of the file."""
        first, second = (extent for axis, extent in enumerate(self.shape) if axis != self.axis)
        return first, second

    def labels_to_network(self, labels: NDArray[Any]) -> NDArray[np.uint8]:
        """Bring a label map ``(X, Y, Z)`` onto the grid, as `prepare_labels` does: ``(Z, H, W)``."""
        slices = torch.from_numpy(np.ascontiguousarray(np.moveaxis(labels, self.axis, 0)).astype(np.int64))
        if self.inner != self.plane:
            classes = int(slices.max()) + 1 if slices.numel() else 1
            layers = F.one_hot(slices, classes).movedim(-1, 1).float()
            slices = _resized(layers, self.inner).argmax(dim=1)
        full = torch.zeros((len(slices), *self.size), dtype=torch.uint8)
        full[:, self.rows, self.columns] = slices.to(torch.uint8)
        return full.numpy()

    def restored(self, maps: Tensor, *, mode: Literal["linear", "nearest"]) -> Tensor:
        """Bring maps ``(Z, K, H, W)`` back onto the slices of the file."""
        inner = maps[:, :, self.rows, self.columns]
        if self.inner == self.plane:
            return inner
        if mode == "nearest":
            return F.interpolate(inner, size=self.plane, mode="nearest-exact")
        return _resized(inner, self.plane)

    @property
    def rows(self) -> slice:
        """Rows of the grid that the image covers."""
        return slice(self.start[0], self.start[0] + self.inner[0])

    @property
    def columns(self) -> slice:
        """Columns of the grid that the image covers."""
        return slice(self.start[1], self.start[1] + self.inner[1])


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared(Placement):
    """An image as the network sees it.

    Attributes:
        images: ``(Z, C, H, W)`` float32 in [0, 1], one for each slice.
    """

    images: Tensor


def place(volume: Volume, plan: SamplePlan) -> Placement:
    """Say where an image of any size lies on the grid of the network; a third axis is taken as slices."""
    x, y, z = (int(extent) for extent in volume.data.shape[1:])
    axis = slice_axis((x, y, z))
    rows, columns = (extent for number, extent in enumerate((x, y, z)) if number != axis)
    inner = plan.size
    if plan.keep_aspect:
        factor = min(plan.size[0] / rows, plan.size[1] / columns)
        inner = (
            max(1, min(plan.size[0], round(rows * factor))),
            max(1, min(plan.size[1], round(columns * factor))),
        )
    first, second = (size for number, size in enumerate(volume.spacing) if number != axis)
    return Placement(
        shape=(x, y, z),
        axis=axis,
        size=plan.size,
        inner=inner,
        start=((plan.size[0] - inner[0]) // 2, (plan.size[1] - inner[1]) // 2),
        spacing_mm=(first * rows / inner[0], second * columns / inner[1]),
    )


def prepare_volume(volume: Volume, plan: SamplePlan) -> Prepared:
    """Bring an image of any size onto the grid of the network.

    Order as in the original: intensities to [0, 1], resize, CLAHE.

    Raises:
        DataError: It has other channels, or intensities that are no grey values.

    Source: upstream scripts/normalise_images.py, datamodules/ES_ED_datamodule.py.
    """
    name = str(volume.source or "image")
    if volume.data.shape[0] != len(plan.channel_names):
        raise DataError(
            name,
            why=f"{volume.data.shape[0]} channels, expected {len(plan.channel_names)} "
            f"({', '.join(plan.channel_names)})",
        )
    placed = place(volume, plan)
    slices = np.ascontiguousarray(np.moveaxis(volume.data, placed.axis + 1, 0), dtype=np.float32)
    images = torch.from_numpy(_unit_range(slices, plan, name))
    if placed.inner != placed.plane:
        images = _resized(images, placed.inner).clamp_(0.0, 1.0)
    if plan.clahe > 0:
        images = torch.from_numpy(equalise(images.numpy(), plan.clahe))
    if placed.inner != plan.size:
        full = torch.zeros((*images.shape[:2], *plan.size))
        full[:, :, placed.rows, placed.columns] = images
        images = full
    return Prepared(**vars(placed), images=images)


def prepare_labels(
    label: Volume, placed: Placement, values: Mapping[int, int], case_id: str
) -> NDArray[np.uint8]:
    """Number the labels anew and bring them onto the grid ``(Z, H, W)``.

    Deviation: resized by the largest of the linearly resized classes, not by the nearest pixel, which
    leaves jags and single pixels that the anatomical rules punish.

    Args:
        label: ``(1, X, Y, Z)`` on the grid of the image.
        placed: Where its image lies.
        values: Value in the file to value for the network.
        case_id: Named in errors.

    Raises:
        DataError: A value is not among `values`.
    """
    known = np.zeros(int(max(int(label.data.max()), *values)) + 1, dtype=np.int64) - 1
    for old, new in values.items():
        known[old] = new
    numbered = known[label.data[0]]
    if (numbered < 0).any():
        unknown = sorted({int(value) for value in np.unique(label.data[0][numbered < 0])})
        raise DataError(
            f"case {case_id}",
            why=f"label values {unknown} are unknown; known are {sorted(values)}",
            do="name them in dataset.json, or join them with sample.merge",
            case=case_id,
        )
    return placed.labels_to_network(numbered)


def restore_volume(maps: NDArray[Any], placed: Placement) -> NDArray[np.float32]:
    """Bring maps ``(Z, K, H, W)`` back onto the grid of the file ``(K, X, Y, Z)``; linear where resized.

    Probabilities still sum to 1. Where nothing was resized the values are the same, bit for bit.
    """
    found = placed.restored(torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float32)), mode="linear")
    return np.ascontiguousarray(np.moveaxis(found.numpy(), 0, placed.axis + 1))


def restore_labels(labels: NDArray[Any], placed: Placement) -> NDArray[np.uint8]:
    """Bring label maps ``(Z, H, W)`` back onto the grid of the file ``(X, Y, Z)`` by the nearest pixel."""
    maps = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.float32))[:, None]
    found = placed.restored(maps, mode="nearest")[:, 0].numpy().astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(found, 0, placed.axis))


def slice_axis(shape: tuple[int, int, int]) -> int:
    """The axis of slices or frames: the last, unless only another one has a single voxel.

    >>> slice_axis((256, 256, 1)), slice_axis((1, 256, 256)), slice_axis((256, 256, 20))
    (2, 0, 2)
    """
    single = [axis for axis, extent in enumerate(shape) if extent == 1]
    return single[0] if single and 2 not in single else 2


def equalise(images: NDArray[np.float32], clip: float) -> NDArray[np.float32]:
    """Equalise each image and channel ``(Z, C, H, W)`` in [0, 1] by CLAHE."""
    from skimage.exposure import equalize_adapthist

    result = np.array(images, dtype=np.float32)
    for item in result.reshape(-1, *result.shape[-2:]):
        if float(item.max()) > float(item.min()):
            item[...] = equalize_adapthist(item.astype(np.float64), clip_limit=clip)
    np.clip(result, 0.0, 1.0, out=result)
    return result


def _unit_range(slices: NDArray[np.float32], plan: SamplePlan, name: str) -> NDArray[np.float32]:
    """Grey values ``(Z, C, H, W)`` to [0, 1]."""
    if plan.intensity == "percentile":
        low, high = np.percentile(slices, plan.percentiles, axis=(2, 3), keepdims=True)
        unit: NDArray[np.float32] = np.clip((slices - low) / np.maximum(high - low, 1e-6), 0.0, 1.0)
        return unit.astype(np.float32)
    least, most = float(slices.min()), float(slices.max())
    if least < 0 or most > 255:
        raise DataError(
            name,
            why=f"intensities from {least:g} to {most:g}, expected grey values from 0 to 255",
            do="--set sample.intensity=percentile",
        )
    return slices / np.float32(255.0) if most > 1 else slices


def _resized(images: Tensor, size: Size) -> Tensor:
    """Linear interpolation of ``(N, C, H, W)``, over as many pixels as one of the new ones covers."""
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
