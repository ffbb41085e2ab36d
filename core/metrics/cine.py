"""The beating left ventricle: cycles, area curve, ED and ES, ejection fraction, mitral landmarks.

Label maps are ``(X, Y, T)`` as stored in the file, the apex at small y; see `medrl.core.metrics.landmarks`.
Lengths are in mm, areas in mm², volumes in ml. What cannot be measured is NaN, and None in plain values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError

from .landmarks import apex_point, base_points, distance_mm

Series = NDArray[np.float64]

LIMITS = (
    "area-length estimate from one apical plane: assumes an ellipsoid of revolution, wrong with regional "
    "wall motion or a foreshortened apex",
    "made from a segmentation that nobody has checked; no medical device, not for diagnosis",
)
"""What holds for every estimate of the ejection fraction here."""

_PAD = 10
_DISTANCE = 10
_PROMINENCE = 0.15


@dataclass(frozen=True)
class Cycles:
    """Heart beats found in an area curve.

    Attributes:
        count: Number of beats, at least 1.
        peaks: Frames of largest area.
        valleys: Frames of least area.
    """

    count: int
    peaks: tuple[int, ...]
    valleys: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CineReport:
    """What a sequence of label maps says about the left ventricle.

    Attributes:
        lv_area_mm2: ``(T,)`` area of the cavity.
        lv_length_mm: ``(T,)`` from the middle of the base to the apex.
        base_width_mm: ``(T,)`` between both ends of the mitral annulus.
        volume_ml: ``(T,)`` area-length volume.
        base_points: ``(T, 2, 2)`` left and right end, x and y in pixels.
        cycles: Heart beats.
        ed_frame: Frame of largest area; None without a cavity.
        es_frame: Frame of least area.
        edv_ml: Volume at `ed_frame`.
        esv_ml: Volume at `es_frame`.
        ejection_fraction: In [0, 1]; NaN if a volume is missing, or there is one frame only.
        heart_rate_bpm: From the time between equal phases of different beats; NaN without the frame time, or
            with fewer than two beats.
        limits: What to bear in mind about the ejection fraction.
    """

    lv_area_mm2: Series
    lv_length_mm: Series
    base_width_mm: Series
    volume_ml: Series
    base_points: Series
    cycles: Cycles
    ed_frame: int | None
    es_frame: int | None
    edv_ml: float
    esv_ml: float
    ejection_fraction: float
    heart_rate_bpm: float
    limits: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; NaN becomes None."""
        return {
            "lv_area_mm2": _plain(self.lv_area_mm2),
            "lv_length_mm": _plain(self.lv_length_mm),
            "mitral_width_mm": _plain(self.base_width_mm),
            "volume_ml": _plain(self.volume_ml),
            "cycles": self.cycles.count,
            "peaks": list(self.cycles.peaks),
            "valleys": list(self.cycles.valleys),
            "ed_frame": self.ed_frame,
            "es_frame": self.es_frame,
            "edv_ml": _number(self.edv_ml),
            "esv_ml": _number(self.esv_ml),
            "ejection_fraction": _number(self.ejection_fraction),
            "heart_rate_bpm": _number(self.heart_rate_bpm),
            "limits": list(self.limits),
        }


@dataclass(frozen=True, eq=False)
class LandmarkReport:
    """Errors of both ends of the mitral annulus over a sequence; left and right as seen in the image.

    Attributes:
        errors_mm: ``(T, 2)`` left and right; NaN in frames whose reference has no such points.
        errors_px: ``(T, 2)`` likewise in pixels.
        mean_mm: Mean of both ends over the frames.
        mse_px2: Mean squared error of a coordinate in pixels².
        mistakes_per_cycle: For each limit in mm, frames in which either end is further away, over beats.
        mistakes_left: For the left end.
        mistakes_right: For the right end.
        cycles: Beats of the reference.
        failed: Frames in which the prediction has no such points: counted as an error of the image's width.
        unjudged: Frames whose reference has none.
    """

    errors_mm: Series
    errors_px: Series
    mean_mm: float
    mse_px2: float
    mistakes_per_cycle: Mapping[float, float]
    mistakes_left: Mapping[float, float]
    mistakes_right: Mapping[float, float]
    cycles: int
    failed: int
    unjudged: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return plain values; the names without a unit are those of the original, in pixels."""
        left, right = _mean(self.errors_px[:, 0]), _mean(self.errors_px[:, 1])
        values: dict[str, float | int | None] = {
            "mae_mm": _number(self.mean_mm),
            "mae_mm_L": _number(_mean(self.errors_mm[:, 0])),
            "mae_mm_R": _number(_mean(self.errors_mm[:, 1])),
            "mae": _number((left + right) / 2.0),
            "mae_L": _number(left),
            "mae_R": _number(right),
            "mse": _number(self.mse_px2),
            "cycles": self.cycles,
            "failed_frames": self.failed,
            "unjudged_frames": self.unjudged,
        }
        sides = (("", self.mistakes_per_cycle), ("_L", self.mistakes_left), ("_R", self.mistakes_right))
        for suffix, mistakes in sides:
            for limit, value in mistakes.items():
                values[f"mistake_per_cycle_{limit:g}mm{suffix}"] = _number(value)
        return values


def describe(
    labels: Any,
    spacing_mm: Sequence[float],
    frame_time_s: float | None = None,
    *,
    lv: int = 1,
    myo: int = 2,
) -> CineReport:
    """Measure the left ventricle through a sequence.

    The volume is that of the area-length method, V = 8 A² / (3 π L).

    Args:
        labels: ``(X, Y, T)`` whole numbers, array or tensor.
        spacing_mm: ``(2,)`` pixel size along X and Y.
        frame_time_s: Time from frame to frame; None if the file does not tell.
        lv: Label of the cavity.
        myo: Label of the wall.

    Raises:
        DataError: The labels have other than three axes or no frame, or the spacing does not fit.

    Source: area-length method: Lang et al. 2015, "Recommendations for cardiac chamber quantification".
    """
    frames = _sequence("the sequence", labels)
    size = _spacing(spacing_mm)
    count = frames.shape[2]
    pixels = np.asarray((frames == lv).sum(axis=(0, 1)), dtype=np.float64)
    area = pixels * (size[0] * size[1])
    points = np.stack([base_points(frames[..., t], lv=lv, myo=myo) for t in range(count)])
    length, width = np.full(count, np.nan), np.full(count, np.nan)
    for t in range(count):
        if np.isfinite(points[t]).all():
            width[t] = distance_mm(points[t, 0], points[t, 1], size)
            apex = apex_point(frames[..., t], lv=lv)
            length[t] = distance_mm(points[t].mean(axis=0), apex, size)
    with np.errstate(divide="ignore", invalid="ignore"):
        volume = np.where(length > 0, 8.0 * area**2 / (3.0 * math.pi * length), np.nan) / 1000.0
    cycles = find_cycles(pixels)
    seen = np.flatnonzero(pixels > 0)
    ed = int(seen[pixels[seen].argmax()]) if seen.size else None
    es = int(seen[pixels[seen].argmin()]) if seen.size else None
    edv = float(volume[ed]) if ed is not None else math.nan
    esv = float(volume[es]) if es is not None else math.nan
    return CineReport(
        lv_area_mm2=area,
        lv_length_mm=length,
        base_width_mm=width,
        volume_ml=volume,
        base_points=points,
        cycles=cycles,
        ed_frame=ed,
        es_frame=es,
        edv_ml=edv,
        esv_ml=esv,
        ejection_fraction=(edv - esv) / edv if edv > 0 and count > 1 else math.nan,
        heart_rate_bpm=_heart_rate(cycles, frame_time_s),
        limits=(*LIMITS, *_own_limits(count, pixels, cycles, length)),
    )


def find_cycles(area: Sequence[float] | NDArray[Any]) -> Cycles:
    """Count the heart beats in an area curve.

    The curve is continued by its mirror image over 10 frames at both ends, one pixel lower, so that an
    extremum at an end counts. Extrema lie at least 10 frames apart, beyond half of the range, and stand out
    by 15 % of it.

    Args:
        area: ``(T,)`` in pixels.

    Source: RL4Seg3D, `estimate_num_cycles` (specification §7): the number of valleys, at least 1.

    >>> import numpy as np
    >>> find_cycles(5000 + 1500 * np.cos(2 * np.pi * np.arange(40) / 20)).count
    2
    """
    from scipy.signal import find_peaks

    curve = np.asarray(area, dtype=np.float64).ravel()
    if curve.size == 0:
        return Cycles(1, (), ())
    spread = float(curve.max() - curve.min())
    if spread == 0.0:
        return Cycles(1, (), ())
    padded = np.pad(curve, _PAD, mode="reflect")
    padded[:_PAD] -= 1.0
    padded[-_PAD:] -= 1.0
    middle = float(curve.min()) + 0.5 * spread
    prominence = _PROMINENCE * spread
    peaks, _ = find_peaks(padded, distance=_DISTANCE, height=middle, prominence=prominence)
    valleys, _ = find_peaks(-padded, distance=_DISTANCE, height=-middle, prominence=prominence)
    inside = [
        tuple(int(frame) for frame in found - _PAD if 0 <= frame < curve.size) for found in (peaks, valleys)
    ]
    return Cycles(max(len(inside[1]), 1), inside[0], inside[1])


def landmark_errors(
    pred: Any,
    ref: Any,
    spacing_mm: Sequence[float],
    *,
    limits_mm: Sequence[float] = (5.0, 7.5),
    lv: int = 1,
    myo: int = 2,
) -> LandmarkReport:
    """Compare both ends of the mitral annulus with those of a reference.

    Args:
        pred: ``(X, Y, T)`` whole numbers, array or tensor.
        ref: Reference of the same shape.
        spacing_mm: ``(2,)`` pixel size along X and Y, as tuple, list, array or tensor; they may differ.
        limits_mm: Distances from which on an error is a mistake.
        lv: Label of the cavity.
        myo: Label of the wall.

    Raises:
        DataError: The shapes differ or have other than three axes, or the spacing does not fit.

    Source: RL4Seg3D, `mitral_valve_distance` (specification §7). Deviations: millimetres beside pixels, any
    spacing, an error counted once (§10.10); frames whose reference has no landmarks are left out, where the
    original counts them as errors of the prediction.
    """
    found, wanted = _sequence("the prediction", pred), _sequence("the reference", ref)
    if found.shape != wanted.shape:
        raise DataError("mitral landmarks", why=f"prediction {found.shape}, reference {wanted.shape}")
    size = _spacing(spacing_mm)
    count = found.shape[2]
    width = float(found.shape[0])
    difference = np.full((count, 2, 2), np.nan)
    lost, judged = np.zeros(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_)
    for t in range(count):
        true = base_points(wanted[..., t], lv=lv, myo=myo)
        judged[t] = np.isfinite(true).all()
        if not judged[t]:
            continue
        own = base_points(found[..., t], lv=lv, myo=myo)
        lost[t] = not np.isfinite(own).all()
        difference[t] = (width, 0.0) if lost[t] else own - true
    in_mm = np.hypot(difference[..., 0] * size[0], difference[..., 1] * size[1])
    in_px = np.hypot(difference[..., 0], difference[..., 1])
    cycles = find_cycles((wanted == lv).sum(axis=(0, 1))).count
    mistakes: list[dict[float, float]] = [{}, {}, {}]
    for limit in limits_mm:
        over = in_mm > limit
        for store, hits in zip(mistakes, (over.any(axis=1), over[:, 0], over[:, 1]), strict=True):
            store[float(limit)] = int(hits.sum()) / cycles
    return LandmarkReport(
        errors_mm=in_mm,
        errors_px=in_px,
        mean_mm=_mean(in_mm),
        mse_px2=_mean(np.where(lost[:, np.newaxis, np.newaxis], width**2, difference**2)),
        mistakes_per_cycle=mistakes[0],
        mistakes_left=mistakes[1],
        mistakes_right=mistakes[2],
        cycles=cycles,
        failed=int(lost.sum()),
        unjudged=count - int(judged.sum()),
    )


def _heart_rate(cycles: Cycles, frame_time_s: float | None) -> float:
    if frame_time_s is None or not frame_time_s > 0:
        return math.nan
    marks = max((cycles.peaks, cycles.valleys), key=len)
    if len(marks) < 2:
        return math.nan
    return 60.0 * (len(marks) - 1) / ((marks[-1] - marks[0]) * frame_time_s)


def _own_limits(count: int, pixels: Series, cycles: Cycles, length: Series) -> list[str]:
    """What else is wrong with the ejection fraction of this very sequence."""
    found = []
    if not (pixels > 0).any():
        found.append("no left ventricle was found")
    elif count < 2 or not cycles.valleys or not cycles.peaks:
        found.append("no whole beat was found: ED and ES are the largest and the smallest area seen")
    missing = int((~np.isfinite(length)).sum())
    if missing:
        found.append(f"base or apex was not found in {missing} of {count} frames")
    return found


def _sequence(what: str, labels: Any) -> NDArray[Any]:
    array = np.asarray(labels.detach().cpu().numpy() if hasattr(labels, "detach") else labels)
    if array.ndim != 3 or array.shape[2] < 1:
        raise DataError(what, why=f"has shape {array.shape}, expected (X, Y, T) with T frames")
    return array


def _spacing(spacing_mm: Any) -> tuple[float, float]:
    values = [float(value) for value in spacing_mm]
    if len(values) != 2 or not all(math.isfinite(value) and value > 0 for value in values):
        raise DataError("the spacing", why=f"is {values}, expected two positive numbers in mm")
    return values[0], values[1]


def _mean(values: Series) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(series: Series) -> list[float | None]:
    return [_number(float(value)) for value in series]
