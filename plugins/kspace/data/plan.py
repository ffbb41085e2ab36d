"""From a scan to k-space, target and labels, and back onto the grid of its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medrl.core.errors import DataError

from ..coils import combine
from ..data_config import SampleConfig
from ..fourier import fftc, ifft2c, ifftc
from ..simulate import Simulation, simulate_scan
from .scans import RawScan

Size = tuple[int, int]

_P99 = 99.0


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """Everything that turns a scan into a sample; kept in the checkpoint.

    Attributes:
        shape: Rows and columns; None keeps the measured size.
        spacing: Between rows and columns in mm, to resample images to.
        downsample: Rows and columns of which the mean is taken.
        norm: `slice` or `volume_p99`.
        simulation: Phase, noise and displacement of images.
        seed: Of the simulation.
        label_names: Label values by name, background 0 first.
    """

    shape: Size | None
    spacing: tuple[float, float] | None = None
    downsample: int = 1
    norm: str = "slice"
    simulation: Simulation = field(default_factory=Simulation)
    seed: int = 0
    label_names: Mapping[str, int]

    def to_meta(self) -> dict[str, Any]:
        """Plain values for a checkpoint and for the keys of the cache."""
        drawn = self.simulation
        return {
            "shape": None if self.shape is None else list(self.shape),
            "spacing": None if self.spacing is None else list(self.spacing),
            "downsample": self.downsample,
            "norm": self.norm,
            "simulation": {
                "phase": drawn.phase,
                "amplitude": drawn.amplitude,
                "noise_std": drawn.noise_std,
                "shift_k": drawn.shift_k,
                "scope": drawn.scope,
            },
            "seed": self.seed,
            "label_names": dict(self.label_names),
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> SamplePlan:
        """Rebuild what `to_meta` gave."""
        return cls(
            shape=None if meta["shape"] is None else (int(meta["shape"][0]), int(meta["shape"][1])),
            spacing=None
            if meta["spacing"] is None
            else (float(meta["spacing"][0]), float(meta["spacing"][1])),
            downsample=int(meta["downsample"]),
            norm=str(meta["norm"]),
            simulation=Simulation(**meta["simulation"]),
            seed=int(meta["seed"]),
            label_names={str(name): int(value) for name, value in meta["label_names"].items()},
        )


def make_plan(sample: SampleConfig, label_names: Mapping[str, int]) -> SamplePlan:
    """Resolve the settings for a dataset with these labels."""
    return SamplePlan(
        shape=sample.shape if all(sample.shape) else None,
        spacing=sample.spacing,
        downsample=sample.downsample,
        norm=sample.norm,
        simulation=Simulation(
            phase=sample.phase,
            amplitude=sample.phase_amplitude,
            noise_std=sample.noise_std,
            shift_k=sample.shift_k,
            scope=sample.phase_scope,
        ),
        seed=sample.seed,
        label_names=dict(label_names),
    )


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where the images of a file lie on the grid of the network, and the way back.

    Attributes:
        plane: Rows and columns of the file.
        inner: After resampling.
        grid: Of the network, before the mean over `downsample` pixels is taken.
        downsample: Rows and columns of which the mean was taken.
    """

    plane: Size
    inner: Size
    grid: Size
    downsample: int = 1

    def restored(self, maps: Tensor, *, mode: str = "linear", outside: Tensor | None = None) -> Tensor:
        """Bring maps ``(N, K, H, W)`` back onto the rows and columns of the file.

        Args:
            maps: On the grid of the network.
            mode: `linear` or `nearest`.
            outside: ``(K,)`` values where the network saw nothing; zeros by default.
        """
        full = maps.float()
        if self.downsample > 1:
            full = _resized(full, self.grid, mode)
        outer = torch.zeros(maps.shape[1]) if outside is None else outside.float()
        # One more channel tells what was seen from what was not.
        seen = torch.ones_like(full[:, :1])
        back = _fitted(torch.cat([full, seen], dim=1), self.inner)
        values, inside = back[:, :-1], back[:, -1:]
        values = torch.where(inside > 0.5, values, outer.to(maps.device).view(1, -1, 1, 1))
        return values if self.inner == self.plane else _resized(values, self.plane, mode)

    def restored_probabilities(self, maps: Tensor) -> Tensor:
        """Probabilities ``(N, K, H, W)`` on the file's grid; background where the network saw nothing."""
        outside = torch.zeros(maps.shape[1])
        outside[0] = 1.0
        return self.restored(maps, outside=outside)

    def restored_labels(self, labels: Tensor) -> Tensor:
        """Label maps ``(N, H, W)`` on the file's grid, by the nearest pixel, uint8."""
        return self.restored(labels.unsqueeze(1), mode="nearest")[:, 0].to(torch.uint8)


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """A scan as environments see it.

    Attributes:
        kspace: ``(N, [C], H, W)`` complex64.
        target: ``(N, H, W)`` float32, magnitude of the reconstruction from all columns.
        labels: ``(N, H, W)`` uint8, or None.
        sensitivities: As `kspace`, or None.
        padding: ``(W,)`` bool, columns that hold no measurement.
        scale: ``(N,)`` float32; intensities of the file are `target` times this plus `offset`.
        offset: ``(N,)`` float32.
        spacing_mm: Between rows, columns and slices; NaN where unknown.
        placed: The way back; None for measured k-space, whose results lie on this very grid.
    """

    kspace: Tensor
    target: Tensor
    labels: Tensor | None
    sensitivities: Tensor | None
    padding: Tensor
    scale: Tensor
    offset: Tensor
    spacing_mm: tuple[float, float, float]
    placed: Placed | None


def prepare(raw: RawScan, plan: SamplePlan, case: str) -> Prepared:
    """Bring a scan onto the grid of the network; images become k-space, the same in every run.

    Images: resample, pad and crop, average, scale to [0, 1], phase, displacement, transform, noise. Measured
    k-space: rows are cropped in the image, columns in k-space, then everything is divided by one number a
    slice or frame.

    The target is the reconstruction from all columns, noise included, for both.

    Args:
        raw: The scan.
        plan: How.
        case: Its name, which the simulation depends on.

    Raises:
        DataError: The scan does not allow what the plan asks for; the case is named.
    """
    try:
        if raw.images is not None:
            return _from_images(raw, raw.images, plan, case)
        if raw.kspace is not None:
            return _from_kspace(raw, raw.kspace, plan)
        raise DataError("scan", why="it holds neither images nor k-space")
    except DataError as error:
        raise DataError(f"case {case}", why=f"{error.what}: {error.why}", do=error.do, case=case) from error


def _from_images(raw: RawScan, stored: NDArray[np.float32], plan: SamplePlan, case: str) -> Prepared:
    images = torch.from_numpy(np.array(stored, dtype=np.float32))[:, None]
    plane = (int(images.shape[2]), int(images.shape[3]))
    inner = _inner(raw, plan, plane)
    times = plan.downsample
    shape = plan.shape or (inner[0] // times, inner[1] // times)
    grid = (shape[0] * times, shape[1] * times)
    images = _fitted(images if inner == plane else _resized(images, inner, "linear"), grid)
    labels = None if raw.labels is None else torch.from_numpy(np.array(raw.labels))[:, None]
    if labels is not None:
        labels = labels if inner == plane else _resized(labels.float(), inner, "nearest").to(torch.uint8)
        labels = _fitted(labels, grid)
    if times > 1:
        images = F.avg_pool2d(images, times)
        labels = None if labels is None else _most_frequent(labels, times)
    magnitude = images[:, 0]
    scale, offset = _scales(magnitude, raw.frames, plan.norm)
    span = torch.where(scale > 0, scale, 1.0)
    magnitude = (magnitude - offset.view(-1, 1, 1)) / span.view(-1, 1, 1)
    kspace = simulate_scan(
        magnitude,
        plan.simulation,
        seed=plan.seed,
        case=case,
        frames=raw.frames,
        slices=_numbers(raw),
        shift=raw.shift_k,
    )
    target = magnitude if plan.simulation.noise_std == 0 else ifft2c(kspace).abs()
    rows, columns, between = raw.spacing_mm
    return Prepared(
        kspace=kspace,
        target=target.contiguous(),
        labels=None if labels is None else labels[:, 0].contiguous(),
        sensitivities=None,
        padding=torch.zeros(shape[1], dtype=torch.bool),
        scale=scale,
        offset=offset,
        spacing_mm=(rows * plane[0] / inner[0] * times, columns * plane[1] / inner[1] * times, between),
        placed=Placed(plane=plane, inner=inner, grid=grid, downsample=times),
    )


def _from_kspace(raw: RawScan, stored: NDArray[np.complex64], plan: SamplePlan) -> Prepared:
    kspace = torch.from_numpy(np.array(stored, dtype=np.complex64))
    rows, columns = int(kspace.shape[-2]), int(kspace.shape[-1])
    shape = plan.shape or (rows, columns)
    missing = np.zeros(columns, dtype=np.bool_) if raw.missing is None else raw.missing
    kspace = kspace * torch.from_numpy(~missing)
    if shape[0] != rows:
        kspace = fftc(_fitted(ifftc(kspace, (-2,)), (shape[0], columns)), (-2,))
    kspace = _fitted(kspace, shape)
    padding = ~(_fitted(torch.from_numpy(~missing)[None, None, None, :].float(), (1, shape[1]))[0, 0, 0] > 0)
    sensitivities = None
    if raw.sensitivities is not None:
        if shape[1] != columns:
            raise DataError(
                "sensitivities",
                why=f"{columns} columns cannot become {shape[1]} with them",
                do=f"sample.shape with {columns} columns, or 0 and 0",
            )
        sensitivities = _fitted(torch.from_numpy(np.array(raw.sensitivities)), shape)
    image = ifft2c(kspace)
    image = (combine(image, sensitivities) if image.ndim == 4 else image).abs()
    scale, _ = _scales(image, raw.frames, plan.norm, subtract=False)
    span = torch.where(scale > 0, scale, 1.0).view(-1, *[1] * (kspace.ndim - 1))
    high, wide, between = raw.spacing_mm
    return Prepared(
        kspace=(kspace / span).contiguous(),
        target=(image / span.view(-1, 1, 1)).float().contiguous(),
        labels=None,
        sensitivities=None if sensitivities is None else sensitivities.contiguous(),
        padding=padding,
        scale=scale,
        offset=torch.zeros_like(scale),
        spacing_mm=(high, wide * columns / shape[1], between),
        placed=None,
    )


def _inner(raw: RawScan, plan: SamplePlan, plane: Size) -> Size:
    if plan.spacing is None:
        return plane
    rows, columns = raw.spacing_mm[:2]
    if not np.isfinite([rows, columns]).all():
        raise DataError(
            "spacing", why="it is unknown, so that the images cannot be resampled", do="--set sample.spacing="
        )
    return (
        max(1, round(plane[0] * rows / plan.spacing[0])),
        max(1, round(plane[1] * columns / plan.spacing[1])),
    )


def _scales(
    images: Tensor, frames: Sequence[str], norm: str, *, subtract: bool = True
) -> tuple[Tensor, Tensor]:
    """What ``(N, H, W)`` are divided by, and what is subtracted before: ``(N,)`` each."""
    flat = images.flatten(1)
    if norm == "slice":
        offset = flat.amin(dim=1) if subtract else torch.zeros(len(flat))
        return flat.amax(dim=1) - offset, offset
    scale = torch.zeros(len(flat))
    for frame in set(frames):
        of_frame = torch.tensor([name == frame for name in frames])
        scale[of_frame] = float(np.percentile(flat[of_frame].numpy(), _P99))
    return scale, torch.zeros(len(flat))


def _numbers(raw: RawScan) -> list[int]:
    """Numbers of the slices; where unknown, their order within the file."""
    return [number if number >= 0 else place for place, number in enumerate(raw.slices)]


def _fitted(values: Tensor, size: Size) -> Tensor:
    """Pad with zeros and crop the last two axes so that the centres, at half of each size, agree."""
    for axis, wanted in ((-2, size[0]), (-1, size[1])):
        extent = int(values.shape[axis])
        start = extent // 2 - wanted // 2
        if start < 0 or start + wanted > extent:
            before, after = max(0, -start), max(0, start + wanted - extent)
            pad = (before, after, 0, 0) if axis == -1 else (0, 0, before, after)
            values = F.pad(values, pad)
            start = max(start, 0)
        values = values.narrow(axis, start, wanted)
    return values


def _resized(values: Tensor, size: Size, mode: str) -> Tensor:
    """Resample ``(N, C, H, W)`` by the nearest pixel, or linearly over all that a new pixel covers."""
    if mode == "nearest":
        return F.interpolate(values, size=size, mode="nearest-exact")
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False, antialias=True)


def _most_frequent(labels: Tensor, times: int) -> Tensor:
    """The label that most pixels of each square have; of equal ones the lowest."""
    layers = F.one_hot(labels[:, 0].long()).movedim(-1, 1).float()
    return F.avg_pool2d(layers, times).argmax(dim=1, keepdim=True).to(torch.uint8)
