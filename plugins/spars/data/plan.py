"""From a file to a volume in [0, 1], and back onto the grid of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Volume
from medrl.core.volume import to_ras

from ..data_config import SampleConfig

if TYPE_CHECKING:
    from ..config import SparsConfig

Size = tuple[int, int, int]
Kind = Literal["linear", "nearest"]

_RAS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True, kw_only=True)
class VolumePlan:
    """How a volume was prepared, and the way back.

    Attributes:
        stored: Voxels of the file, in its order.
        turn: Axis and direction of each stored axis in RAS order, as nibabel's orientations.
        canonical: Voxels in RAS order.
        size: Voxels of the prepared volume.
        spacing_mm: Voxel size of the prepared volume.
        low: Value that became 0.
        high: Value that became 1.
    """

    stored: Size
    turn: tuple[tuple[int, int], ...]
    canonical: Size
    size: Size
    spacing_mm: tuple[float, float, float]
    low: float
    high: float

    def to_meta(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "stored": list(self.stored),
            "turn": [list(item) for item in self.turn],
            "canonical": list(self.canonical),
            "size": list(self.size),
            "spacing_mm": list(self.spacing_mm),
            "low": self.low,
            "high": self.high,
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> VolumePlan:
        """Rebuild what `to_meta` gave."""
        x, y, z = (float(value) for value in meta["spacing_mm"])
        return cls(
            stored=_triple(meta["stored"]),
            turn=tuple((int(axis), int(flip)) for axis, flip in meta["turn"]),
            canonical=_triple(meta["canonical"]),
            size=_triple(meta["size"]),
            spacing_mm=(x, y, z),
            low=float(meta["low"]),
            high=float(meta["high"]),
        )


def prepare_volume(
    volume: Volume, cfg: SparsConfig | SampleConfig, *, channel: int = 0
) -> tuple[Tensor, VolumePlan]:
    """Bring a file's voxels into RAS order, the size asked for, and [0, 1].

    With `hu_window` values are clipped to it; without, to percentiles of the foreground, the voxels above the
    mean of the volume. Resampling is trilinear and comes after.

    Args:
        volume: From `medrl.core.volume.read_volume`.
        cfg: Of the method, or its block `sample`.
        channel: Which channel.

    Returns:
        ``(X, Y, Z)`` float32 in [0, 1], and the way back.

    Raises:
        ConfigError: There is no such channel.
        DataError: The volume is flat in an axis beyond use.
    """
    sample = cfg if isinstance(cfg, SampleConfig) else cfg.sample
    if not 0 <= channel < volume.data.shape[0]:
        raise ConfigError("channel", why=f"{channel} of {volume.data.shape[0]} channels")
    plan = _plan(volume, sample, volume.data[channel])
    turned, _ = to_ras(volume.data[channel], volume.affine)
    values = torch.from_numpy(np.ascontiguousarray(turned, dtype=np.float32))
    span = plan.high - plan.low
    scaled = ((values - plan.low) / span).clamp_(0.0, 1.0) if span > 0 else torch.zeros_like(values)
    return _resized(scaled, plan.size, "linear").contiguous(), plan


def prepare_mask(mask: NDArray[Any], affine: NDArray[np.float64], plan: VolumePlan) -> Tensor:
    """Bring a mask in the order of its file ``(X, Y, Z)`` onto the grid of its prepared volume, bool.

    Raises:
        DataError: The mask has another shape than the file.
    """
    if tuple(mask.shape) != plan.stored:
        raise DataError("mask", why=f"shape {tuple(mask.shape)}, expected {plan.stored}")
    turned, _ = to_ras(mask, affine)
    values = torch.from_numpy(np.ascontiguousarray(turned).astype(np.float32))
    return _resized(values, plan.size, "nearest") > 0.5


def restore(array: Tensor | NDArray[Any], plan: VolumePlan, kind: Kind = "linear") -> NDArray[Any]:
    """Bring a map or mask of a prepared volume back onto the grid of its file.

    Args:
        array: ``(X, Y, Z)`` on the prepared grid.
        plan: Of the volume.
        kind: `linear` for maps (float32), `nearest` for masks and labels (type kept).

    Raises:
        DataError: The array has another shape than the prepared volume.
    """
    values = torch.as_tensor(array).detach().cpu()
    if tuple(values.shape) != plan.size:
        raise DataError("map", why=f"shape {tuple(values.shape)}, expected {plan.size}")
    dtype = torch.float32 if kind == "linear" else values.dtype
    back = _resized(values.float(), plan.canonical, kind).to(dtype).numpy()
    turn = nib.orientations.ornt_transform(_RAS, np.array(plan.turn))
    result: NDArray[Any] = nib.orientations.apply_orientation(back, turn)
    return np.ascontiguousarray(result)


# -- private -----------------------------------------------------------------------------------------


def _plan(volume: Volume, sample: SampleConfig, stored: NDArray[Any]) -> VolumePlan:
    turn = nib.orientations.io_orientation(volume.affine).astype(int)
    turned, spacing = to_ras(stored, volume.affine)
    canonical = _triple(turned.shape)
    size = canonical
    if sample.volume_size is not None:
        size = sample.volume_size
    elif sample.spacing_mm is not None:
        sizes = [
            max(1, round(count * have / want))
            for count, have, want in zip(canonical, spacing, sample.spacing_mm, strict=True)
        ]
        size = _triple(sizes)
    low, high = sample.hu_window or _percentiles(stored, sample.percentiles)
    x, y, z = (have * a / b for have, a, b in zip(spacing, canonical, size, strict=True))
    return VolumePlan(
        stored=_triple(stored.shape),
        turn=tuple((int(axis), int(flip)) for axis, flip in turn),
        canonical=canonical,
        size=size,
        spacing_mm=(x, y, z),
        low=float(low),
        high=float(high),
    )


def _percentiles(values: NDArray[Any], percentiles: tuple[float, float]) -> tuple[float, float]:
    """Percentiles of what is brighter than the mean; of everything where that is nothing."""
    inside = values[values > values.mean()]
    low, high = np.percentile(inside if inside.size else values, percentiles)
    return float(low), float(high)


def _resized(values: Tensor, size: Size, kind: Kind) -> Tensor:
    if tuple(values.shape) == tuple(size):
        return values
    whole = values[None, None].float()
    if kind == "linear":
        return F.interpolate(whole, size=size, mode="trilinear", align_corners=False)[0, 0]
    return F.interpolate(whole, size=size, mode="nearest-exact")[0, 0]


def _triple(values: Sequence[int]) -> Size:
    x, y, z = (int(value) for value in values)
    return x, y, z
