"""A heart that beats: its shape at each phase, and noise that stays coherent from frame to frame."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .anatomy import Heart

_RELAXED = 0.68
"""Phase at which the early filling ends and diastasis begins."""
_KICK = 0.86
"""Phase at which the atrium begins to contract."""
_DIASTASIS = 0.18
"""Contraction that is left between early filling and the atrium's contraction."""
_CLOSED, _OPEN = 1.4, 0.2
"""Opening angles of the mitral leaflets."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """How a heart moves; parts are of the size at end-diastole.

    Attributes:
        period: Frames of one beat.
        start: Phase of the first frame, 0 at end-diastole.
        systole: Part of the beat in which the ventricle contracts.
        narrowing: Part by which the cavity becomes narrower.
        shortening: Part by which the ventricle becomes shorter; the apex stays, the base comes down to it.
        thickening: Part by which the wall becomes thicker.
        sway: Displacement of the whole heart over a beat, in units of depth.
    """

    period: float
    start: float
    systole: float
    narrowing: float
    shortening: float
    thickening: float
    sway: float


def draw_beat(rng: np.random.Generator, *, period: tuple[float, float] = (18.0, 26.0)) -> Beat:
    """Draw a beat whose ejection fraction lies between about 0.35 and 0.65.

    Args:
        rng: Generator.
        period: Least and greatest number of frames of one beat.
    """
    effort = rng.uniform(0.7, 1.1)
    return Beat(
        period=float(rng.uniform(*period)),
        start=float(rng.uniform(0.0, 1.0)),
        systole=float(rng.uniform(0.36, 0.44)),
        narrowing=float(effort * rng.uniform(0.22, 0.28)),
        shortening=float(effort * rng.uniform(0.12, 0.17)),
        thickening=float(effort * rng.uniform(0.25, 0.4)),
        sway=float(rng.uniform(0.002, 0.006)),
    )


def contraction(phase: float, systole: float = 0.4) -> float:
    """How far the ventricle has contracted at a phase of the beat: 0 at end-diastole, 1 at end-systole.

    It contracts, fills quickly, rests (diastasis) and is filled up by the atrium, smoothly throughout.

    >>> [round(contraction(phase), 2) for phase in (0.0, 0.2, 0.4, 0.75, 1.0)]
    [0.0, 0.5, 1.0, 0.18, 0.0]
    """
    phase = phase % 1.0
    if phase < systole:
        return _ramp(phase / systole)
    if phase < _RELAXED:
        return 1.0 - (1.0 - _DIASTASIS) * _ramp((phase - systole) / (_RELAXED - systole))
    if phase < _KICK:
        return _DIASTASIS
    return _DIASTASIS * (1.0 - _ramp((phase - _KICK) / (1.0 - _KICK)))


def heart_at(heart: Heart, beat: Beat, frame: int) -> Heart:
    """Return the shape of a heart in a frame; `heart` itself is its shape at end-diastole."""
    phase = (beat.start + frame / beat.period) % 1.0
    degree = contraction(phase, beat.systole)
    long = heart.long * (1.0 - beat.shortening * degree)
    # The apex stays where it is.
    lift = heart.long - long
    swing = beat.sway * math.sin(2.0 * math.pi * phase)
    across = heart.centre[0] - lift * math.sin(heart.tilt) + swing
    depth = heart.centre[1] - lift * math.cos(heart.tilt) + 0.5 * swing
    septum, lateral, apex = (wall * (1.0 + beat.thickening * degree) for wall in heart.walls)
    length, width, place = heart.ventricle
    return replace(
        heart,
        centre=(across, depth),
        long=long,
        wide=heart.wide * (1.0 - beat.narrowing * degree),
        walls=(septum, lateral, apex),
        atrium=(heart.atrium[0] * (1.0 + 0.3 * degree), heart.atrium[1] * (1.0 + 0.05 * degree)),
        ventricle=(length * (1.0 - 0.5 * beat.shortening * degree), width * (1.0 - 0.2 * degree), place),
        valve=(_leaflets(phase, beat.systole), heart.valve[1]),
    )


class CoherentNormals:
    r"""Normal numbers for one frame after another; those of the echoes change slowly.

    The k-th draw of a frame follows the k-th draw of the frame before by
    :math:`z_t = \rho z_{t-1} + \sqrt{1 - \rho^2}\,\varepsilon_t`, so that every single frame has exactly the
    statistics of independent draws. Draws with less than three axes, the texture of tissue, stay the same.

    Args:
        rng: Generator.
        coherence: ρ in [0, 1].
    """

    def __init__(self, rng: np.random.Generator, coherence: float = 0.8) -> None:
        self._rng = rng
        self._coherence = coherence
        self._kept: list[NDArray[Any]] = []
        self._next = 0

    def next_frame(self) -> None:
        """Begin a frame: draws repeat from the first."""
        self._next = 0

    def normal(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> Any:
        """Draw once; every further frame gives the same."""
        if self._next == len(self._kept):
            self._kept.append(np.asarray(self._rng.normal(loc, scale, size)))
        return self._take()

    def standard_normal(self, size: Any = None, dtype: Any = np.float64) -> Any:
        """Draw, changing slowly from frame to frame if there are three axes or more."""
        if self._next == len(self._kept):
            self._kept.append(self._rng.standard_normal(size, dtype=dtype))
        elif self._kept[self._next].ndim > 2:
            fresh = self._rng.standard_normal(size, dtype=dtype)
            rho = self._coherence
            mixed = rho * self._kept[self._next] + math.sqrt(1.0 - rho**2) * fresh
            self._kept[self._next] = mixed.astype(dtype)
        return self._take()

    def _take(self) -> Any:
        self._next += 1
        return self._kept[self._next - 1]


def _leaflets(phase: float, systole: float) -> float:
    """Opening angle of the leaflets: closed in systole, open while the ventricle fills."""
    if phase < systole:
        return _CLOSED
    early = _bump((phase - systole) / (_RELAXED - systole))
    late = _bump((phase - _KICK) / (1.0 - _KICK))
    return _CLOSED - (_CLOSED - _OPEN) * max(early, 0.75 * late, 0.35 if phase < 0.97 else 0.0)


def _ramp(part: float) -> float:
    """From 0 to 1, without a kink at either end."""
    return 0.5 - 0.5 * math.cos(math.pi * min(max(part, 0.0), 1.0))


def _bump(part: float) -> float:
    """0 outside (0, 1), 1 in its middle."""
    return math.sin(math.pi * part) if 0.0 < part < 1.0 else 0.0
