"""From anatomy to an ultrasound image: echo levels, beams, speckle, and what a worse machine adds.

The image is made as a scanner makes it: echo levels in decibels are sampled along beams, multiplied by
complex Gaussian noise, smeared by a point spread that widens with depth, converted back from beams to pixels
and compressed logarithmically. The magnitude of that noise is Rayleigh speckle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from scipy import ndimage

from .anatomy import Anatomy, Array, grid

Style = Literal["haze", "outside"]

_BLOOD, _TISSUE, _WALL = -40.0, -15.0, -21.0
_FLOOR = -52.0
"""Echo levels in decibels below the brightest echo."""
_MARGIN = 1.08
"""Half angle of the beams that are drawn, in half angles of the sector."""
_DEFOCUS = 1.4
"""Widening of the beam at full depth, in widths at its focus."""


class Normals(Protocol):
    """What painting draws from: a `numpy.random.Generator`, or one that stays coherent between frames."""

    def normal(self, loc: Any = ..., scale: Any = ..., size: Any = ...) -> Any:
        """Draw normal numbers."""

    def standard_normal(self, size: Any = ..., dtype: Any = ...) -> Any:
        """Draw standard normal numbers."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How one image is taken; levels in decibels, angles in radians, lengths in units of depth.

    Attributes:
        half_angle: Half of the sector's angle.
        radius: Depth of the sector.
        turn: Direction of its middle.
        spread: Point spread along and across the beam.
        contrast: Factor on the differences of echo levels.
        attenuation: Loss from the probe to full depth.
        haze: Level of diffuse clutter, and how much of it lies near the probe.
        shadows: Direction, half width, depth of begin and loss of each shadow.
        noise: Level of electronic noise at full depth.
        gain: Added to every level.
        span: Decibels between black and white.
        gamma: Exponent of the grey values.
        bands: Depth, half width and level of reverberation, and the loss from one echo to the next.
        steps: Gain of each of a row of equal ranges of depth, as misset sliders give it.
        bars: Gain of each of a row of equal ranges of direction.
        dropouts: Place (across, depth), radius and loss of each gap in the walls.
        ghost: Weight and displacement (across, depth) of a second exposure.
    """

    half_angle: float
    radius: float
    turn: float
    spread: tuple[float, float]
    contrast: float
    attenuation: float
    haze: tuple[float, float]
    shadows: tuple[tuple[float, float, float, float], ...]
    noise: float
    gain: float
    span: float
    gamma: float
    bands: tuple[tuple[float, float, float, float], ...] = ()
    steps: tuple[float, ...] = ()
    bars: tuple[float, ...] = ()
    dropouts: tuple[tuple[float, float, float, float], ...] = ()
    ghost: tuple[float, float, float] = (0.0, 0.0, 0.0)


def draw_look(
    rng: np.random.Generator, anatomy: Anatomy, *, shift: float = 0.0, style: Style = "haze"
) -> Look:
    """Draw how an image is taken, at a distance `shift` in [0, 1.25] from the machine of the source."""
    haze = shift if style == "haze" else 0.0
    strength = haze * rng.uniform(0.85, 1.15, size=6)
    half_angle = rng.uniform(0.64, 0.77)
    shadows = []
    for _ in range(int(rng.random() < 0.15) + int(rng.binomial(6, 0.8 * haze))):
        direction = rng.uniform(-0.9, 0.9) * half_angle
        width = rng.uniform(0.035, 0.07)
        loss = rng.uniform(5.0, 9.0) + 19.0 * haze * rng.uniform(0.4, 1.0)
        shadows.append((float(direction), float(width), float(rng.uniform(0.02, 0.3)), float(loss)))
    look = Look(
        half_angle=float(half_angle),
        radius=float(rng.uniform(0.93, 0.985)),
        turn=float(rng.normal(0.0, 0.03)),
        spread=(
            float(rng.uniform(0.0028, 0.0042) * (1.0 + 0.7 * strength[0])),
            float(rng.uniform(0.0075, 0.0105) * (1.0 + 0.8 * strength[0])),
        ),
        contrast=float(rng.uniform(0.92, 1.08) * (1.0 - 0.2 * strength[1])),
        attenuation=float(rng.uniform(0.0, 6.0) + 10.0 * strength[2]),
        haze=(float(rng.uniform(-44.0, -36.0) + 6.0 * strength[3]), float(rng.uniform(0.5, 1.0))),
        shadows=tuple(shadows),
        noise=float(_FLOOR + rng.uniform(0.0, 4.0) + 4.0 * strength[4]),
        gain=float(rng.normal(0.0, 1.5)),
        span=float(rng.uniform(54.0, 62.0)),
        gamma=float(rng.uniform(1.3, 1.6) * (1.0 - 0.36 * strength[5])),
    )
    return look if style == "haze" else _outside(rng, look, anatomy, shift)


def _outside(rng: np.random.Generator, look: Look, anatomy: Anatomy, shift: float) -> Look:
    """Add artefacts that no blur, shadow, noise, gamma or smooth bias of an augmentation imitates."""
    if shift == 0.0:
        return look
    period = rng.uniform(0.09, 0.17)
    bands = ((float(period), float(rng.uniform(0.006, 0.012)), float(6.0 + 12.0 * shift), 1.5),)
    places = np.argwhere(anatomy.label == 2)
    across, depth, _ = grid(anatomy.label.shape)
    dropouts = []
    for _ in range(int(rng.integers(1, 3)) + int(rng.random() < shift)):
        i, j = places[rng.integers(len(places))]
        dropouts.append(
            (
                float(across[i, j]),
                float(depth[i, j]),
                float(rng.uniform(0.04, 0.09)),
                float(22.0 * shift),
            )
        )
    wide = rng.random() < 0.5
    return replace(
        look,
        bands=bands,
        steps=tuple(float(level) for level in rng.normal(0.0, 5.5 * shift, size=8)),
        bars=tuple(float(level) for level in rng.normal(0.0, 3.5 * shift, size=int(rng.integers(4, 9)))),
        dropouts=tuple(dropouts),
        span=float(look.span * (1.0 + 0.5 * shift if wide else 1.0 - 0.32 * shift)),
        ghost=(
            float(0.55 * shift * rng.uniform(0.6, 1.0)),
            float(rng.normal(0.0, 0.05)),
            float(rng.uniform(0.02, 0.06) * rng.choice((-1.0, 1.0))),
        ),
    )


def paint(rng: Normals, anatomy: Anatomy, look: Look) -> Array:
    """Paint an image ``(X, Y)`` in [0, 1]; black outside the sector."""
    shape = (anatomy.label.shape[0], anatomy.label.shape[1])
    across, depth, scale = grid(shape)
    level = _levels(rng, anatomy, look, scale)
    reach = np.hypot(across, depth)
    direction = np.arctan2(across, depth) - look.turn

    # Rows along the beam, columns across the beams, 1.5 for each pixel at full depth.
    rows, columns = max(int(1.5 * scale), 32), max(int(1.5 * look.half_angle * scale), 32)
    distance = ((np.arange(rows) + 0.5) / rows)[:, np.newaxis]
    beam = (np.linspace(-_MARGIN, _MARGIN, columns) * look.half_angle)[np.newaxis]
    places = (
        distance * np.sin(beam + look.turn) * scale + (shape[0] - 1) / 2.0,
        distance * np.cos(beam + look.turn) * scale - 0.5,
    )
    echo = ndimage.map_coordinates(level, places, order=1, mode="nearest")
    echo += _along_beams(look, beam, distance) - look.attenuation * distance**1.5

    clutter = 4.0 * _texture(rng, (rows, columns), (rows / 9.0, columns / 7.0))
    clutter += look.haze[0] + 9.0 * look.haze[1] * np.exp(-distance / 0.22)
    signal = _speckle(rng, _amplitude(echo), look, distance)
    signal += _speckle(rng, _amplitude(clutter), look, distance)
    hiss = _amplitude(look.noise + 8.0 * (distance - 1.0)) / np.sqrt(2.0)
    signal += hiss * rng.standard_normal((2, rows, columns), dtype=np.float32)
    decibels = 10.0 * np.log10(signal[0] ** 2 + signal[1] ** 2 + 1e-12)

    places = (reach * rows - 0.5, (direction / (_MARGIN * look.half_angle) + 1.0) / 2.0 * (columns - 1))
    seen = ndimage.map_coordinates(decibels, places, order=1, mode="nearest")
    if look.ghost[0] > 0.0:
        moved = ndimage.shift(seen, (look.ghost[1] * scale, look.ghost[2] * scale), order=1, mode="nearest")
        seen += look.ghost[0] * (np.maximum(seen, moved) - seen)
    grey = np.clip((seen + look.gain + look.span) / look.span, 0.0, 1.0) ** look.gamma
    edge = np.minimum((look.half_angle - np.abs(direction)) * reach, look.radius - reach)
    value: Array = grey * np.clip(edge * scale + 0.5, 0.0, 1.0)
    return value


def _levels(rng: Normals, anatomy: Anatomy, look: Look, scale: float) -> Array:
    """Echo level of every pixel in decibels, without anything that depends on the beam's path."""
    shape = anatomy.label.shape
    soft = 0.7 / scale
    coarse = _texture(rng, shape, (0.06 * scale, 0.035 * scale))
    fine = _texture(rng, shape, (0.018 * scale, 0.012 * scale))
    level = _TISSUE + 6.0 * coarse + 2.5 * fine

    def lay(level: Array, inside: Array, value: Array | float, width: float = soft) -> Array:
        weight = 1.0 / (1.0 + np.exp(np.clip(-inside / width * 3.0, -40.0, 40.0)))
        mixed: Array = level + weight * (value - level)
        return mixed

    levels = rng.normal((_BLOOD, _BLOOD, _BLOOD, _WALL), (2.5, 3.0, 3.0, 2.0))
    # The right heart and the left atrium have thin bright walls.
    level = lay(level, anatomy.right + 0.022, -14.0 + 3.0 * fine)
    level = lay(level, anatomy.right, levels[1] + 2.0 * coarse)
    level = lay(level, anatomy.atrium + 0.02, -13.0 + 3.0 * fine)
    level = lay(level, anatomy.atrium, levels[2] + 2.0 * coarse)
    wall = levels[3] + 3.0 * coarse + 2.5 * fine + 6.0 * (anatomy.normal - 0.55)
    # Both borders of the wall are brighter than its middle; outside lies the pericardium.
    border = np.exp(-((anatomy.shell / 0.016) ** 2)) * (0.5 + 0.5 * anatomy.normal)
    level = lay(level, anatomy.wall, wall)
    level = level + border * np.where(anatomy.cavity > -0.2, 13.0, 0.0) * (anatomy.atrium < 0.0)
    blood = levels[0] + 2.0 * coarse
    level = lay(level, anatomy.cavity, blood + 5.0 * np.exp(np.minimum(anatomy.cavity, 0.0) / 0.02))
    level = lay(level, anatomy.cavity - 0.012, blood)
    level = lay(level, np.minimum(anatomy.papillary, anatomy.cavity + 0.01), -23.0 + 2.0 * fine)
    level = lay(level, anatomy.valve, -14.0 + 3.0 * fine)
    if look.dropouts:
        across, depth, _ = grid((shape[0], shape[1]))
        for u, v, radius, loss in look.dropouts:
            level = level - loss * np.exp(-((across - u) ** 2 + (depth - v) ** 2) / (2.0 * radius**2))
    value: Array = -26.0 + (level + 26.0) * look.contrast
    return value


def _along_beams(look: Look, beam: Array, distance: Array) -> Array:
    """Shadows, reverberation and gain by direction ``(1, B)`` and depth ``(R, 1)``, in decibels."""
    change = np.zeros((distance.shape[0], beam.shape[1]))
    for direction, width, begin, loss in look.shadows:
        profile = loss * np.exp(-(((beam - direction) / width) ** 4))
        change -= profile * np.clip((distance - begin) / 0.08, 0.0, 1.0)
    for period, width, level, loss in look.bands:
        profile = np.cos(beam / look.half_angle) ** 2
        for number in range(1, int(1.0 / period) + 1):
            echo = np.exp(-(((distance - number * period) / width) ** 2))
            change += (level - loss * number) * echo * profile
    if look.steps:
        change += _stairs(look.steps, distance)
    if look.bars:
        change += _stairs(look.bars, (beam / (_MARGIN * look.half_angle) + 1.0) / 2.0)
    return change


def _stairs(levels: tuple[float, ...], place: Array) -> Array:
    """The level of each place in [0, 1], equal ranges for all."""
    value: Array = np.asarray(levels)[np.clip((place * len(levels)).astype(int), 0, len(levels) - 1)]
    return value


def _speckle(rng: Normals, amplitude: Array, look: Look, distance: Array) -> Array:
    """Complex echoes ``(2, R, B)`` of random scatterers of this amplitude ``(R, B)``, smeared by the beam."""
    rows, columns = amplitude.shape
    along = look.spread[0] * rows
    width = look.spread[1] * columns / (2.0 * _MARGIN * look.half_angle)
    noise = rng.standard_normal((2, rows, columns), dtype=np.float32) * amplitude
    near = ndimage.gaussian_filter(noise, (0.0, along, width), truncate=3.0)
    # Away from its focus the beam is wider: two widths are blended by depth.
    far = ndimage.gaussian_filter1d(near, _DEFOCUS * width, axis=2, truncate=3.0)
    weight = np.clip((distance - 0.35) / 0.6, 0.0, 1.0)
    # Smearing takes power away; it is given back, so that levels stay what they are.
    gain = np.sqrt(max(2.0 * np.sqrt(np.pi) * along, 1.0) * max(2.0 * np.sqrt(np.pi) * width, 1.0))
    value: Array = near * (gain * (1.0 - weight)) + far * (gain * (1.0 + _DEFOCUS**2) ** 0.25 * weight)
    return value


def _amplitude(level: Array) -> Array:
    """Amplitude of a level in decibels."""
    value: Array = 10.0 ** (level / 20.0)
    return value


def _texture(rng: Normals, shape: tuple[int, ...], sigma: tuple[float, ...]) -> Array:
    """Smooth Gaussian noise of mean 0 and deviation 1; `sigma` in pixels."""
    noise = rng.standard_normal(shape, dtype=np.float32).astype(np.float64)
    field = ndimage.gaussian_filter(noise, sigma, truncate=2.5, mode="wrap")
    value: Array = (field - field.mean()) / (field.std() + 1e-12)
    return value
