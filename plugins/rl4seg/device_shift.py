"""Another ultrasound machine, simulated on real echocardiograms: a target domain with known labels.

A machine has a gain curve, a beam, a speckle grain, a compression and a sector of its own; all its images
share them, and each varies a little. Nothing moves, so that the labels of an image stay right. What was never
recorded cannot come back: this is a simulation, and no other machine's image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medrl.core.adaptation.dividing import PartedDataset
from medrl.core.dataset import Dataset, load_case
from medrl.core.errors import ConfigError, DataError
from medrl.core.rng import numpy_generator
from medrl.core.types import Case, Volume
from medrl.core.volume import write_volume
from medrl.core.volume.write import write_bytes

from .data import open_domain
from .data.plan import slice_axis
from .data_config import SourceConfig

Array = NDArray[np.float64]

_EDGE = 0.02
"""Grey value above which a pixel belongs to the sector."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one machine does to a grey image in [0, 1]; lengths are parts of the sector's depth.

    Attributes:
        blur: Width of the beam's point spread along and across, at full depth.
        grain: Standard deviation of the speckle that is added to the log-compressed image.
        cell: Size of a speckle cell along and across.
        attenuation: Grey values lost from the probe to full depth.
        focus: Depth, width and height of the brighter zone around the focus.
        haze: Clutter near the probe, and how deep it reaches.
        contrast: Factor on the distance to the mean grey value.
        gain: Added to every grey value.
        gamma: Exponent of the grey values.
        angle: Part of the sector's angle that is left.
        reach: Part of its depth that is left.
        steps: Gain of equal ranges of depth, as the sliders of time-gain compensation give it.
    """

    blur: tuple[float, float]
    grain: float
    cell: tuple[float, float]
    attenuation: float
    focus: tuple[float, float, float]
    haze: tuple[float, float]
    contrast: float
    gain: float
    gamma: float
    angle: float
    reach: float
    steps: tuple[float, ...]


@dataclass(frozen=True)
class DeviceShift:
    """The shift from the machine of the images to another one.

    The same seed is the same machine; the same seed and key give the same bytes, on any machine and in any
    order of calls.

    Attributes:
        strength: 0 changes nothing, 1 is the largest shift.
        seed: Number of the machine.
        depth_axis: Axis of the array that runs away from the probe (1 in CAMUS: files are stored (x, y)).
        probe: Whether the probe lies at the `first` or the `last` index of that axis.

    Raises:
        ConfigError: A value is out of its range.
    """

    strength: float = 0.7
    seed: int = 0
    depth_axis: Literal[0, 1] = 1
    probe: Literal["first", "last"] = "first"

    def __post_init__(self) -> None:
        wrong = (
            not 0.0 <= self.strength <= 1.0
            or self.depth_axis not in (0, 1)
            or self.probe not in ("first", "last")
        )
        if wrong:
            raise ConfigError(
                "device shift",
                why=f"strength {self.strength}, depth_axis {self.depth_axis}, probe {self.probe}",
                do="strength is 0 to 1, depth_axis 0 or 1, probe first or last",
            )

    @property
    def machine(self) -> Machine:
        """What all images of this shift have in common."""
        rng, s = numpy_generator(self.seed, "rl4seg", "device"), self.strength
        return Machine(
            blur=(float(0.0022 * s * rng.uniform(0.6, 1.4)), float(0.011 * s * rng.uniform(0.7, 1.3))),
            grain=float(0.085 * s * rng.uniform(0.8, 1.2)),
            cell=(float(rng.uniform(0.0035, 0.006)), float(rng.uniform(0.009, 0.014))),
            attenuation=float(0.30 * s * rng.uniform(0.7, 1.3)),
            focus=(float(rng.uniform(0.3, 0.6)), float(rng.uniform(0.1, 0.2)), float(0.09 * s)),
            haze=(float(0.32 * s * rng.uniform(0.4, 1.2)), float(rng.uniform(0.15, 0.3))),
            contrast=float(1.0 - 0.42 * s * rng.uniform(0.8, 1.2)),
            gain=float(0.13 * s * rng.uniform(-0.4, 1.2)),
            gamma=float(1.0 - 0.3 * s * rng.uniform(-0.3, 1.0)),
            angle=float(1.0 - 0.10 * s * rng.uniform(0.3, 1.0)),
            reach=float(1.0 - 0.06 * s * rng.uniform(0.0, 1.0)),
            steps=tuple(float(level) for level in rng.normal(0.0, 0.035 * s, size=8)),
        )

    def __call__(self, image: NDArray[Any], key: str = "") -> NDArray[np.float32]:
        """Return the image as the other machine shows it.

        Args:
            image: ``(X, Y)`` grey values in [0, 1], or in [0, 255] if one exceeds 1.
            key: Name of the image, from which its own variation is drawn.

        Returns:
            ``(X, Y)`` float32 in the same range; black where the image is black.

        Raises:
            DataError: The array is no grey image.
        """
        if image.ndim != 2 or min(image.shape) < 8 or float(image.min()) < 0 or float(image.max()) > 255:
            raise DataError(
                f"image {key}",
                why=f"shape {image.shape}, values {float(image.min()):g} to {float(image.max()):g}; expected "
                "two axes and grey values from 0 to 255",
            )
        scale = 255.0 if float(image.max()) > 1 else 1.0
        grey = np.asarray(image, dtype=np.float64) / scale
        if self.strength == 0.0 or not (grey > _EDGE).any():
            return np.asarray(image, dtype=np.float32)
        upright = self._upright(grey)
        changed = _through(upright, self.machine, numpy_generator(self.seed, "rl4seg", "device", key))
        turned: NDArray[np.float32] = np.ascontiguousarray(self._upright(changed), dtype=np.float32)
        return turned * np.float32(scale)

    def _upright(self, image: Array) -> Array:
        """Bring depth to the second axis with the probe first; twice gives the image back."""
        if self.depth_axis == 1:
            return image[:, ::-1] if self.probe == "last" else image
        return image[::-1, ::-1].T if self.probe == "last" else image.T


def shift_device(
    image: NDArray[Any], *, seed: int = 0, key: str = "", strength: float = 0.7
) -> NDArray[np.float32]:
    """Return an image stored as CAMUS ``(across, depth)`` as another machine shows it; see `DeviceShift`."""
    return DeviceShift(strength=strength, seed=seed)(image, key)


def write_shifted(
    source: Path,
    output: Path,
    shift: DeviceShift | None,
    *,
    train: Sequence[str] | None = None,
    test: Sequence[str] = (),
) -> Path:
    """Write cases of a dataset in nnU-Net raw layout, images shifted, labels and grids kept.

    Args:
        source: Dataset of any layout that rl4seg reads.
        output: Folder to make; it must not exist, or be empty.
        shift: What the images go through; None copies them.
        train: Cases for ``imagesTr``; None takes all that are not in `test`.
        test: Cases for ``imagesTs``.

    Raises:
        ConfigError: A case does not exist or is named twice, or `output` holds something.
        DataError: A file is damaged.
    """
    dataset = open_domain(SourceConfig(root=source), "data")
    known = {case.id: case for case in (*dataset.cases, *dataset.test_cases)}
    chosen = [name for name in sorted(known) if name not in test] if train is None else list(train)
    names = [*chosen, *test]
    wrong = [name for name in names if name not in known] or [n for n in names if names.count(n) > 1]
    if wrong:
        raise ConfigError("write_shifted", why=f"case {wrong[0]} does not exist, or is named twice")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output}", why="the folder is not empty", do="choose a new folder")
    for suffix, part in (("Tr", chosen), ("Ts", list(test))):
        for name in part:
            image, label = _read(dataset, known[name])
            for channel, layer in enumerate(image.data):
                data = layer if shift is None else _shifted(layer, shift, f"{name}/{channel}")
                write_volume(
                    output / f"images{suffix}" / f"{name}_{channel:04d}.nii.gz", data, image, kind="image"
                )
            if label is not None:
                write_volume(
                    output / f"labels{suffix}" / f"{name}.nii.gz", label.data[0], image, kind="label"
                )
    record: dict[str, Any] = {
        "name": f"{dataset.name}-shifted" if shift else dataset.name,
        "channel_names": {str(k): name for k, name in enumerate(dataset.channel_names or ("echo",))},
        "labels": dict(dataset.labels),
        "numTraining": len(chosen),
        "numTest": len(test),
        "file_ending": ".nii.gz",
        "patients": {name: known[name].patient or name for name in names},
        "device_shift": None if shift is None else vars(shift),
    }
    write_bytes(output / "dataset.json", (json.dumps(record, indent=2) + "\n").encode())
    return output


def split_by_patient(
    cases: Sequence[Case], *, seed: int = 0, shares: Sequence[float] = (0.5, 0.5)
) -> tuple[tuple[Case, ...], ...]:
    """Deal whole patients to parts, shuffled by `seed`.

    Args:
        cases: Their order does not matter.
        seed: The same seed and patients give the same parts.
        shares: Part of the patients in each; together at most 1.

    Raises:
        ConfigError: The shares are not positive, exceed 1 together, or leave a part without patient.

    >>> from medrl.core.types import Case
    >>> cases = [Case(id=f"p{k}_{t}", images=(), patient=f"p{k}") for k in range(4) for t in ("ED", "ES")]
    >>> [len(part) for part in split_by_patient(cases)]
    [4, 4]
    """
    patients = sorted({case.patient or case.id for case in cases})
    ends = [round(sum(shares[: number + 1]) * len(patients)) for number in range(len(shares))]
    bounds = [0, *ends]
    if min(shares, default=0.0) <= 0 or sum(shares) > 1 + 1e-9 or len(set(bounds)) < len(bounds):
        raise ConfigError(
            "split_by_patient",
            why=f"shares {list(shares)} of {len(patients)} patients",
            do="each part needs at least one patient",
        )
    order = numpy_generator(seed, "rl4seg", "patients").permutation(len(patients))
    part_of = {
        patients[index]: number
        for number in range(len(shares))
        for index in order[bounds[number] : bounds[number + 1]]
    }
    ordered = sorted(cases, key=lambda case: case.id)
    return tuple(
        tuple(case for case in ordered if part_of.get(case.patient or case.id) == number)
        for number in range(len(shares))
    )


# --- one image -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sector:
    """The fan of an image ``(across, depth)``, as far as it shows.

    Attributes:
        inside: Pixels that were recorded.
        reach: Distance from the apex in parts of the fan's depth.
        angle: Direction in parts of the half angle, -1 to 1.
        scale: Pixels of the fan's depth.
        half: Half angle in radians.
    """

    inside: NDArray[np.bool_]
    reach: Array
    angle: Array
    scale: float
    half: float


def _through(image: Array, machine: Machine, rng: np.random.Generator) -> Array:
    """Send one upright image through a machine."""
    fan = _sector(image)
    own = replace(
        machine,
        attenuation=machine.attenuation * rng.uniform(0.8, 1.2),
        gain=machine.gain * rng.uniform(0.6, 1.4),
        grain=machine.grain * rng.uniform(0.85, 1.15),
        haze=(machine.haze[0] * rng.uniform(0.7, 1.3), machine.haze[1]),
    )
    value = _blurred(image, fan, own)
    mean = float(value[fan.inside].mean())
    value = mean + own.contrast * (value - mean) + own.grain * _grain(rng, fan, own)
    value -= own.attenuation * (fan.reach - 0.35)
    depth, width, height = own.focus
    value += height * np.exp(-(((fan.reach - depth) / width) ** 2))
    places = np.linspace(0.0, 1.0, len(own.steps))
    value += np.interp(fan.reach, places, own.steps) + own.gain
    clutter = own.haze[0] * np.exp(-((fan.reach / own.haze[1]) ** 2))
    value = np.clip(value, 0.0, 1.0)
    value = (1.0 - (1.0 - value) * (1.0 - clutter)) ** own.gamma
    soft = 1.5 / fan.scale
    edge = np.minimum(
        (own.angle - np.abs(fan.angle)) * fan.half * np.maximum(fan.reach, 0.02), own.reach - fan.reach
    )
    if own.angle == 1.0 and own.reach == 1.0:
        edge = np.ones_like(edge)
    result: Array = value * fan.inside * np.clip(edge / soft + 0.5, 0.0, 1.0)
    return result


def _sector(image: Array) -> _Sector:
    """Find the fan: what is not black, its apex where its straight sides meet.

    An image without such sides (a rectangle, a cropped fan) gets the apex that its corners suggest.
    """
    bright = ndimage.binary_closing(np.pad(image > _EDGE, 4), iterations=3)[4:-4, 4:-4]
    parts, count = ndimage.label(bright | (image > _EDGE))
    if count > 1:
        bright = parts == int(np.bincount(parts.ravel())[1:].argmax()) + 1
    inside = ndimage.binary_fill_holes(bright)
    rows = np.flatnonzero(inside.any(axis=0))
    first, last = int(rows[0]), int(rows[-1])
    left = inside.argmax(axis=0).astype(np.float64)
    right = inside.shape[0] - 1 - inside[::-1].argmax(axis=0).astype(np.float64)
    use = np.arange(first + int(0.1 * (last - first)), first + int(0.55 * (last - first)) + 2)
    use = use[
        (use <= last)
        & (left[np.minimum(use, last)] > 0)
        & (right[np.minimum(use, last)] < inside.shape[0] - 1)
    ]
    across, depth = np.meshgrid(np.arange(inside.shape[0]), np.arange(inside.shape[1]), indexing="ij")
    apex, half = ((float(left[first] + right[first]) / 2.0), float(first)), 0.0
    if len(use) >= 8:
        (slope_l, at_l), (slope_r, at_r) = np.polyfit(use, left[use], 1), np.polyfit(use, right[use], 1)
        if slope_r - slope_l > 0.2:
            top = (at_l - at_r) / (slope_r - slope_l)
            apex, half = (slope_l * top + at_l, top), float(np.arctan(slope_r) - np.arctan(slope_l)) / 2.0
    x, y = across - apex[0], depth - apex[1]
    distance, direction = np.hypot(x, y), np.arctan2(x, np.maximum(y, 1e-6))
    if half <= 0.0:
        half = float(np.abs(direction[inside & (distance > 0.3 * (last - first))]).max())
        middle = 0.0
    else:
        middle = float(np.arctan(slope_r) + np.arctan(slope_l)) / 2.0
    scale = max(float(np.quantile(distance[inside], 0.999)), 1.0)
    return _Sector(inside, distance / scale, (direction - middle) / max(half, 0.05), scale, max(half, 0.05))


def _blurred(image: Array, fan: _Sector, machine: Machine) -> Array:
    """Blur across more with depth; the black outside does not bleed in."""
    weight = fan.inside.astype(np.float64)
    found = np.zeros_like(image)
    share = np.clip(fan.reach, 0.0, 1.0)
    for part, factor in ((1.0 - share, 0.3), (share, 1.0)):
        sigma = (machine.blur[1] * fan.scale * factor, machine.blur[0] * fan.scale)
        smooth = ndimage.gaussian_filter(image * weight, sigma, truncate=3.0)
        found += part * smooth / np.maximum(ndimage.gaussian_filter(weight, sigma, truncate=3.0), 1e-3)
    return found


def _grain(rng: np.random.Generator, fan: _Sector, machine: Machine) -> Array:
    """Log-compressed Rayleigh speckle of mean 0 and deviation 1, along the beams of the fan."""
    rows, columns = max(int(fan.scale), 16), max(int(2.0 * fan.half * fan.scale), 16)
    sigma = (machine.cell[0] * rows, machine.cell[1] * columns / (2.0 * fan.half))
    noise = rng.standard_normal((2, rows, columns))
    smooth = np.stack([ndimage.gaussian_filter(part, sigma, truncate=3.0, mode="wrap") for part in noise])
    level = np.log(np.hypot(smooth[0], smooth[1]) + 1e-3 * smooth.std())
    level = np.maximum((level - level.mean()) / level.std(), -3.0)
    places = (fan.reach * (rows - 1), (fan.angle + 1.0) / 2.0 * (columns - 1))
    found: Array = ndimage.map_coordinates(level, places, order=1, mode="reflect")
    return found


def _shifted(layer: NDArray[Any], shift: DeviceShift, key: str) -> NDArray[np.float32]:
    """Shift the slices of ``(X, Y, Z)``."""
    axis = slice_axis((layer.shape[0], layer.shape[1], layer.shape[2]))
    slices = np.moveaxis(layer, axis, 0)
    found = np.stack([shift(item, f"{key}/{number}") for number, item in enumerate(slices)])
    return np.ascontiguousarray(np.moveaxis(found, 0, axis))


def _read(dataset: Dataset, case: Case) -> tuple[Volume, Volume | None]:
    with_label = case.label is not None
    if isinstance(dataset, PartedDataset):
        return dataset.read(case, with_label=with_label)
    return load_case(dataset, case, with_label=with_label)
