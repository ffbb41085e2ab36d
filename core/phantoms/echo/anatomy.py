"""The heart in an apical view: its shape as numbers, drawn once, and its fields on a grid of any size.

Lengths are in units of the depth of the image, angles in radians. Across is the first axis of the array (u,
0 in the middle), depth the second (v, 0 at the probe), as CAMUS stores its images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

LABELS = {"background": 0, "LV": 1, "MYO": 2}
ATRIUM = {"LA": 3}

_THINNEST = 0.9
"""Pixels of wall beyond a quarter of the cavity's half width: keeps the rules of the wall on coarse grids."""


@dataclass(frozen=True, kw_only=True)
class Heart:
    """The shape of one heart; a beating one is a function from frame to `Heart` (`beating.heart_at`).

    Attributes:
        centre: Across and depth of the middle of the left ventricle's ellipse.
        tilt: Angle of its long axis to the beam in the middle.
        long: Half of its long axis.
        wide: Half of its short axis.
        cut: Where the base cuts the ellipse, as a part of `long` beyond the centre.
        walls: Thickness of septum, lateral wall and apex.
        waves: Amplitude, number and phase of waves on the outline.
        atrium: Half length and half width of the left atrium.
        ventricle: Half length and half width of the right ventricle, and its place along the long axis; a
            width of 0 leaves the right heart out.
        valve: Opening angle of the mitral leaflets, and their length.
        papillary: Place along and across the cavity, and radius, of a papillary muscle.
    """

    centre: tuple[float, float]
    tilt: float
    long: float
    wide: float
    cut: float
    walls: tuple[float, float, float]
    waves: tuple[tuple[float, int, float], ...]
    atrium: tuple[float, float]
    ventricle: tuple[float, float, float]
    valve: tuple[float, float]
    papillary: tuple[float, float, float]


@dataclass(frozen=True, eq=False, kw_only=True)
class Anatomy:
    """Fields ``(X, Y)`` of one heart; distances are in units of depth, positive inside.

    Attributes:
        label: Values of `LABELS` and `ATRIUM`, the left atrium always drawn.
        cavity: Distance inside the left ventricle's cavity.
        wall: Distance inside the myocardium.
        atrium: Distance inside the left atrium.
        right: Distance inside the right ventricle or atrium.
        shell: Distance outside the outline of the left ventricle.
        normal: Part of the wall's normal that lies along the beam, 0 to 1.
        valve: Distance inside a leaflet of the mitral valve.
        papillary: Distance inside the papillary muscle.
    """

    label: NDArray[np.uint8]
    cavity: Array
    wall: Array
    atrium: Array
    right: Array
    shell: Array
    normal: Array
    valve: Array
    papillary: Array


def draw_heart(rng: np.random.Generator, *, shape_shift: float = 0.0) -> Heart:
    """Draw a heart; `shape_shift` in [0, 1] widens the cavity and thins its wall (dilated cardiomyopathy)."""
    long = rng.uniform(0.25, 0.31) * (1.0 + 0.06 * shape_shift)
    ratio = rng.uniform(0.44, 0.58) * (1.0 + 0.36 * shape_shift)
    wide = min(long * ratio, 0.25)
    wall = wide * rng.uniform(0.48, 0.6) / (1.0 + 0.3 * shape_shift) ** 2
    septum, lateral, apex = wall * rng.uniform((0.92, 0.92, 0.75), (1.12, 1.08, 0.95))
    waves = tuple(
        (float(rng.normal(0.0, 0.016)), number, float(rng.uniform(0.0, 2.0 * np.pi))) for number in (2, 3, 4)
    )
    top = rng.uniform(0.07, 0.13)
    right_width = rng.uniform(0.07, 0.12) if rng.random() < 0.85 else 0.0
    return Heart(
        centre=(float(rng.normal(0.02, 0.03)), float(top + apex + long)),
        tilt=float(np.clip(rng.normal(0.0, 0.11), -0.26, 0.26)),
        long=float(long),
        wide=float(wide),
        cut=float(rng.uniform(0.32, 0.66) + 0.06 * shape_shift),
        walls=(float(septum), float(lateral), float(apex)),
        waves=waves,
        atrium=(float(rng.uniform(0.11, 0.18)), float(wide * rng.uniform(0.75, 1.05))),
        ventricle=(float(long * rng.uniform(0.62, 0.9)), float(right_width), float(rng.uniform(0.1, 0.4))),
        valve=(float(rng.uniform(0.15, 1.1)), float(long * rng.uniform(0.3, 0.5))),
        papillary=(float(rng.uniform(-0.1, 0.25)), float(rng.uniform(0.6, 0.8)), float(0.15 * wide)),
    )


def grid(shape: tuple[int, int]) -> tuple[Array, Array, float]:
    """Return across u and depth v of every pixel centre, and the pixels in one unit of depth."""
    scale = min(float(shape[1]), 1.1 * shape[0])
    u = (np.arange(shape[0]) - (shape[0] - 1) / 2.0) / scale
    v = (np.arange(shape[1]) + 0.5) / scale
    across, depth = np.meshgrid(u, v, indexing="ij")
    return across, depth, scale


def rasterise(heart: Heart, shape: tuple[int, int]) -> Anatomy:
    """Evaluate a heart on a grid ``(X, Y)``.

    On coarse grids walls keep a width in pixels that the anatomical rules need: the same heart on a finer
    grid has the thickness that was drawn.
    """
    across, depth, scale = grid(shape)
    x, y = across - heart.centre[0], depth - heart.centre[1]
    cosine, sine = np.cos(heart.tilt), np.sin(heart.tilt)
    along, beside = y * cosine + x * sine, x * cosine - y * sine

    angle = np.arctan2(beside / heart.wide, along / heart.long)
    outline = 1.0 + sum(height * np.cos(number * angle + phase) for height, number, phase in heart.waves)
    least = heart.wide / 4.0 + _THINNEST / scale
    septum, lateral, apex = (max(width, least) for width in heart.walls)
    side = np.where(beside < 0.0, septum, lateral)
    inner = np.hypot(beside / heart.wide, along / heart.long) / outline
    outer = np.hypot(beside / (heart.wide + side), along / (heart.long + apex)) / outline
    base = heart.cut * heart.long - along

    cavity = np.minimum((1.0 - inner) * heart.wide, base)
    shell = (outer - 1.0) * (heart.wide + lateral)
    wall = np.minimum.reduce([-shell, base, (inner - 1.0) * heart.wide])
    atrium = _atrium(heart, along, beside, base)
    # Pixels are labelled by where they lie, so that wall and cavity share their border exactly.
    label = np.zeros(shape, dtype=np.uint8)
    label[(outer < 1.0) & (base > 0.0)] = LABELS["MYO"]
    label[(inner < 1.0) & (base > 0.0)] = LABELS["LV"]
    label[(atrium > 0.0) & (label == 0)] = ATRIUM["LA"]
    blood = (label == LABELS["LV"]) | (label == ATRIUM["LA"])
    label[ndimage.binary_fill_holes(blood) & (label == 0)] = ATRIUM["LA"]

    # The wall reflects where the beam meets it at right angles.
    slope_beside, slope_along = beside / (heart.wide + side) ** 2, along / (heart.long + apex) ** 2
    slope_x = slope_beside * cosine + slope_along * sine
    slope_y = slope_along * cosine - slope_beside * sine
    length = np.hypot(slope_x, slope_y) * np.hypot(across, depth) + 1e-9
    normal = np.abs(slope_x * across + slope_y * depth) / length
    return Anatomy(
        label=label,
        cavity=cavity,
        wall=wall,
        atrium=atrium,
        right=_right(heart, along, beside, shell, septum),
        shell=shell,
        normal=normal,
        valve=_valve(heart, along, beside),
        papillary=heart.papillary[2]
        - np.hypot(
            along - heart.papillary[0] * heart.long,
            (beside - heart.papillary[1] * heart.wide) * 1.6,
        ),
    )


def _atrium(heart: Heart, along: Array, beside: Array, base: Array) -> Array:
    """The left atrium hangs on the base with 0.85 of its width."""
    length, width = heart.atrium
    mouth = 0.85 * heart.wide * np.sqrt(1.0 - heart.cut**2)
    width = max(width, mouth)
    offset = length * np.sqrt(1.0 - (mouth / width) ** 2)
    middle = heart.cut * heart.long + offset
    inside = 1.0 - np.hypot(beside / width, (along - middle) / length)
    value: Array = np.minimum(inside * width, -base)
    return value


def _right(heart: Heart, along: Array, beside: Array, shell: Array, septum: float) -> Array:
    """The right ventricle lies beside the septum, the right atrium beyond it."""
    length, width, place = heart.ventricle
    if width == 0.0:
        return np.full(along.shape, -1.0)
    middle = -(heart.wide + septum + 0.75 * width)
    ventricle = 1.0 - np.hypot((beside - middle) / width, (along - place * heart.long) / length)
    below = heart.cut * heart.long + 0.95 * heart.atrium[0]
    atrium = 1.0 - np.hypot((beside - middle) / width, (along - below) / (0.85 * heart.atrium[0]))
    return np.minimum(np.maximum(ventricle, atrium) * width, shell - 0.012)


def _valve(heart: Heart, along: Array, beside: Array) -> Array:
    """Two leaflets hang from the base into the cavity."""
    opening, length = heart.valve
    mouth = heart.wide * np.sqrt(1.0 - heart.cut**2)
    found = np.full(along.shape, -1.0)
    for side in (-1.0, 1.0):
        down, inwards = np.cos(opening), np.sin(opening)
        a, b = heart.cut * heart.long - along, mouth - side * beside
        place = np.clip(a * down + b * inwards, 0.0, length * (0.8 if side > 0 else 1.0))
        found = np.maximum(found, 0.007 - np.hypot(a - place * down, b - place * inwards))
    return found
