"""A sequence on the grid of the network, and what the network says back on the grid of the file.

Only the plane is resampled, never time. Both grids have one centre; values are interpolated linearly on
each axis, at the centres of the pixels that are wanted. So what is centred stays centred, and frames of the
network's pixel size come through unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import ConfigError

from .sequence import EchoSequence

Equalise = Literal["auto", "on", "off"]

CLIP_LIMIT = 0.01
"""Of the adaptive histogram equalisation, as in the original."""

SAME_SIZE = 1e-5
"""Pixel sizes that differ by less are one: headers store 32 bits."""


@dataclass(frozen=True)
class Plan:
    """How a sequence is prepared.

    Attributes:
        spacing_mm: Pixel size of the network along X and Y; None keeps that of the file.
        multiple: Frames are padded with zeros to multiples of this.
        least: Sides are padded to this at least.
        equalise: CLAHE of each frame: `on`, `off`, or `auto`, which leaves images alone whose values
            already lie in [0, 1], because those were equalised when they were made.
    """

    spacing_mm: tuple[float, float] | None = (0.37, 0.37)
    multiple: int = 32
    least: int = 0
    equalise: Equalise = "auto"


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """A sequence on the grid of the network.

    Attributes:
        images: `(X', Y', T)` float32 in [0, 1].
        inner: `(X, Y)` where the image lies in the padded frame.
        back: For X and Y of the file: lower pixel and share of the next one, inside the image.
        spacing_mm: Pixel size of this grid.
        equalised: Whether CLAHE was used.
    """

    images: NDArray[np.float32]
    inner: tuple[slice, slice]
    back: tuple[tuple[NDArray[np.int64], NDArray[np.float32]], ...]
    spacing_mm: tuple[float, float]
    equalised: bool


def prepare(sequence: EchoSequence, plan: Plan) -> Prepared:
    """Scale, equalise, resample in the plane and pad.

    Raises:
        ConfigError: The pixel size would make frames of no pixel or of far too many.
    """
    wanted = plan.spacing_mm or sequence.spacing_mm
    sizes, forth, back = [], [], []
    for axis in (0, 1):
        size, own, new = sequence.frames.shape[axis], sequence.spacing_mm[axis], wanted[axis]
        if abs(own / new - 1.0) < SAME_SIZE:
            own = new
        count = max(1, round(size * own / new))
        if count > 16384:
            raise ConfigError(
                "--spacing", why=f"{size} pixels of {own:g} mm would become {count} of {new:g} mm"
            )
        sizes.append(count)
        forth.append(_at(count, size, new / own))
        back.append(_at(size, count, own / new))
    images = scaled(sequence.frames)
    used = _is_raw(sequence.frames) if plan.equalise == "auto" else plan.equalise == "on"
    full = [-(-max(count, plan.least) // plan.multiple) * plan.multiple for count in sizes]
    before = [(whole - count) // 2 for whole, count in zip(full, sizes, strict=True)]
    inner = (slice(before[0], before[0] + sizes[0]), slice(before[1], before[1] + sizes[1]))
    result = np.zeros((full[0], full[1], images.shape[2]), dtype=np.float32)
    for index in range(images.shape[2]):
        frame = equalise(images[..., index]) if used else images[..., index]
        result[(*inner, index)] = _resampled(frame, (forth[0], forth[1]))
    return Prepared(
        images=result,
        inner=inner,
        back=(back[0], back[1]),
        spacing_mm=(float(wanted[0]), float(wanted[1])),
        equalised=used,
    )


def restore(values: NDArray[np.float32], prepared: Prepared) -> NDArray[np.float32]:
    """Bring `(…, X', Y')` back to the pixels of the file `(…, X, Y)`, linearly."""
    result: NDArray[np.float32] = _resampled(values[(..., *prepared.inner)], prepared.back)
    return result


def scaled(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return values in [0, 1]: divided by the largest; negative ones shift the sequence up first.

    A blank sequence stays blank.
    """
    low, high = float(frames.min()), float(frames.max())
    low = min(low, 0.0)
    if high <= low:
        return np.zeros_like(frames)
    return ((frames - np.float32(low)) / np.float32(high - low)).clip(0.0, 1.0)


def equalise(frame: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return CLAHE of one frame `(X, Y)` in [0, 1]; a frame of one value stays as it is.

    Deviation: the original makes an empty frame white.
    """
    if float(frame.max()) == float(frame.min()) or min(frame.shape) < 2:
        return frame
    from skimage.exposure import equalize_adapthist

    result: NDArray[np.float32] = equalize_adapthist(frame, clip_limit=CLIP_LIMIT).astype(np.float32)
    return result


def _is_raw(frames: NDArray[np.float32]) -> bool:
    return float(frames.max()) > 1.0 or float(frames.min()) < 0.0


def _at(count: int, size: int, step: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return where `count` centres, `step` pixels apart, lie among `size` pixels with the same centre."""
    place = (np.arange(count) - (count - 1) / 2) * step + (size - 1) / 2
    place = np.clip(place, 0.0, size - 1.0)
    nearest = np.round(place)
    place = np.where(np.abs(place - nearest) < 1e-9, nearest, place)
    lower = np.minimum(np.floor(place).astype(np.int64), max(size - 2, 0))
    return lower, (place - lower).astype(np.float32)


def _resampled(
    values: NDArray[np.float32], axes: tuple[tuple[NDArray[np.int64], NDArray[np.float32]], ...]
) -> NDArray[np.float32]:
    """Interpolate the last two axes linearly; sums over other axes are kept."""
    for (lower, share), axis in zip(axes, (-2, -1), strict=True):
        size = values.shape[axis]
        if (
            len(lower) == size
            and not share[: size - 1].any()
            and np.array_equal(lower[:-1], np.arange(size - 1))
        ):
            continue  # the same pixels
        upper = np.minimum(lower + 1, size - 1)
        weight = share[:, None] if axis == -2 else share
        below, above = values.take(lower, axis=axis), values.take(upper, axis=axis)
        values = below + (above - below) * weight
    return values
