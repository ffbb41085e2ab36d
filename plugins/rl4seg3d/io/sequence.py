"""One sequence of frames with the grid of its file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Volume
from medrl.core.volume import image_suffix, is_dicom_file, read_volume
from medrl.core.volume.ultrasound import read_cine

_log = logging.getLogger("medrl.rl4seg3d")
_SECONDS = {8: 1.0, 16: 1e-3, 24: 1e-6}
"""Codes of the time unit in a NIfTI header."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EchoSequence:
    """Frames as stored, and where they come from.

    Attributes:
        frames: `(X, Y, T)` float32.
        spacing_mm: Pixel size along X and Y.
        frame_time_s: Time from frame to frame; None where the file does not say.
        volume: The file as it was read; a result is written on its grid.
        time_axis: Axis of `volume.data` that is time: 0 to 3, where 0 is the channel axis of (x, y, 1, t).
        notes: What a person should know about this file.
    """

    frames: NDArray[np.float32]
    spacing_mm: tuple[float, float]
    frame_time_s: float | None
    volume: Volume
    time_axis: int
    notes: tuple[str, ...] = ()


def read_sequence(
    path: Path, *, time_axis: int = -1, pixel_size_mm: tuple[float, float] | None = None
) -> EchoSequence:
    """Read (x, y, t), (x, y, 1, t), one frame (x, y), or an ultrasound DICOM file.

    Args:
        path: The file.
        time_axis: Which of the three axes of a file is time; -1 is the last.
        pixel_size_mm: Replaces the pixel size that the file gives.

    Raises:
        DataError: Damaged, not of two or three axes, or without a pixel size.
        ConfigError: No such axis.
    """
    if time_axis not in (-1, 0, 1, 2):
        raise ConfigError(
            f"--time-axis {time_axis}", why="a sequence has the axes 0, 1 and 2; -1 is the last"
        )
    if image_suffix(path) == ".dcm" or (not image_suffix(path) and is_dicom_file(path)):
        return _of_dicom(path, pixel_size_mm)
    volume = read_volume(path)
    channels, *shape = volume.data.shape
    notes: list[str] = []
    if channels > 1:
        if shape[2] != 1:
            raise DataError(
                str(path),
                why=f"its shape is {(*shape, channels)}; a sequence is (x, y, t), (x, y, 1, t) or (x, y)",
                do="save one slice, or one channel, as a file of its own",
            )
        axis, frames = 0, np.moveaxis(volume.data[..., 0], 0, -1)
        first, second = 0, 1
    else:
        axis = 1 + time_axis % 3
        frames = np.moveaxis(volume.data[0], axis - 1, -1)
        first, second = (k for k in range(3) if k != axis - 1)
    spacing = pixel_size_mm or (volume.spacing[first], volume.spacing[second])
    width, height, length = frames.shape
    if length > max(width, height):
        notes.append(
            f"{length} frames of {width} × {height} pixels: is axis {axis - 1 if axis else 3} time? "
            "--time-axis names another"
        )
        _log.warning("%s: %s", path.name, notes[-1])
    return EchoSequence(
        frames=np.ascontiguousarray(frames, dtype=np.float32),
        spacing_mm=(float(spacing[0]), float(spacing[1])),
        frame_time_s=_frame_time(volume.header, axis),
        volume=volume,
        time_axis=axis,
        notes=tuple(notes),
    )


def to_grid(values: NDArray[Any], sequence: EchoSequence) -> NDArray[Any]:
    """Bring `(X, Y, T)` to the axes of the file, `(C, X, Y, Z)`."""
    if sequence.time_axis == 0:
        return np.moveaxis(values, -1, 0)[..., np.newaxis]
    return np.moveaxis(values, -1, sequence.time_axis - 1)[np.newaxis]


def _of_dicom(path: Path, pixel_size_mm: tuple[float, float] | None) -> EchoSequence:
    try:
        cine = read_cine(path)
    except OSError as error:
        raise DataError(str(path), why=f"cannot be read: {error.strerror or error}") from error
    spacing = pixel_size_mm or cine.spacing_mm
    if spacing is None:
        raise DataError(
            str(path),
            why="the file does not say how large a pixel is (PixelSpacing, or a region in cm)",
            do="--pixel-size 0.3,0.3 (mm) if you know it",
        )
    affine = np.diag([spacing[0], spacing[1], 1.0, 1.0])
    volume = Volume(
        data=cine.frames[np.newaxis], affine=affine, spacing=(spacing[0], spacing[1], 1.0), source=path
    )
    return EchoSequence(
        frames=cine.frames,
        spacing_mm=(float(spacing[0]), float(spacing[1])),
        frame_time_s=cine.frame_time_s,
        volume=volume,
        time_axis=3,
    )


def _frame_time(header: Any, axis: int) -> float | None:
    """Return the step of the time axis, where the header gives it a unit of time."""
    try:
        unit = _SECONDS.get(int(header["xyzt_units"]) & 0x38)
        step = float(header["pixdim"][axis or 4])
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    if unit is None or not np.isfinite(step) or step <= 0.0:
        return None
    return step * unit
