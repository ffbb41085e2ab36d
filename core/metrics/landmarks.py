"""Landmarks of the left ventricle in an apical view: both ends of the mitral annulus, and the apex.

Label maps are ``(X, Y)`` as stored in the file: columns along x, rows along y, the apex at small y. Points
are ``(x, y)`` in pixels; what has no such point gives NaN, never an exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Points = NDArray[np.float64]

_SMOOTHING = 0.05
"""Standard deviation of the smoothing of a contour's radius, as a part of its number of points."""
_LEVEL = 0.9
"""Where between outside (0) and inside (1) a contour runs: close to the inside."""
_SQUARE = np.ones((3, 3), dtype=np.bool_)


def base_points(labels: NDArray[Any], *, lv: int = 1, myo: int = 2) -> Points:
    """Return both ends of the base of the left ventricle, where cavity, wall and background meet.

    Candidates are pixels of the cavity with both wall and background among their eight neighbours. They are
    split at their mean column, and the lowest one of each half is taken.

    Args:
        labels: ``(X, Y)`` whole numbers.
        lv: Label of the cavity.
        myo: Label of the wall.

    Returns:
        ``(2, 2)``: left and right point, x and y of each; NaN where there are no two such pixels.

    Source: `vital.utils.image.us.measure.EchoMeasure._endo_base`. As there, the edge of the image is no
    background, and candidates that all lie in one column are split into a lower and an upper half.
    """
    missing = np.full((2, 2), np.nan)
    mask = np.ascontiguousarray(labels.T)
    cavity, wall = mask == lv, mask == myo
    box = _box(cavity)
    if box is None:
        return missing
    cavity, wall = cavity[box], wall[box]
    near_wall = ndimage.binary_dilation(wall, _SQUARE)
    near_rest = ndimage.binary_dilation(~(cavity | wall), _SQUARE)
    y, x = np.nonzero(cavity & near_wall & near_rest)
    if y.size < 2:
        return missing
    if np.all(x == x[0]):
        half = y > y.mean()
        places = (y[half].argmin(), y[~half].argmax())
    else:
        half = x < x.mean()
        places = (y[half].argmax(), y[~half].argmax())
    found = [
        (x[side][place] + box[1].start, y[side][place] + box[0].start)
        for side, place in zip((half, ~half), places, strict=True)
    ]
    return np.asarray(found, dtype=np.float64)


def apex_point(labels: NDArray[Any], *, lv: int = 1) -> Points:
    """Return the apex of the left ventricle with the precision of a contour.

    The radius of the contour about the cavity's centre, smoothed over 5 % of its points, is searched for
    peaks above the centre; the highest one is the apex.

    Args:
        labels: ``(X, Y)`` whole numbers.
        lv: Label of the cavity.

    Returns:
        ``(2,)`` x and y; NaN if there is no cavity or its contour has no peak.

    Source: `ContourMeasure._extract_landmarks_from_polar_contour` of vital. Deviation: of several contours
    the longest is taken, not the first, and a cavity at the edge of the image has a closed contour.
    """
    from skimage.measure import find_contours

    missing = np.full(2, np.nan)
    cavity: NDArray[np.bool_] = np.equal(labels.T, lv)
    box = _box(cavity)
    if box is None:
        return missing
    mask = np.pad(cavity[box], 1)
    contours = find_contours(mask.astype(np.float64), _LEVEL)
    if not contours:
        return missing
    contour = max(contours, key=len)
    y, x = (contour - ndimage.center_of_mass(mask)).T
    angle, radius = np.arctan2(y, x), np.hypot(y, x)
    order = np.argsort(angle)
    smoothed = ndimage.gaussian_filter1d(radius[order], _SMOOTHING * len(contour))
    top = _highest_peak(smoothed, angle[order] < 0)
    if top is None:
        return missing
    row, column = contour[order[top]]
    return np.array([column - 1 + box[1].start, row - 1 + box[0].start])


def base_width_mm(labels: NDArray[Any], spacing_mm: Sequence[float], *, lv: int = 1, myo: int = 2) -> float:
    """Return the distance between the `base_points` in mm; NaN without them.

    Args:
        labels: ``(X, Y)`` whole numbers.
        spacing_mm: ``(2,)`` pixel size along x and y.
        lv: Label of the cavity.
        myo: Label of the wall.
    """
    left, right = base_points(labels, lv=lv, myo=myo)
    return distance_mm(left, right, spacing_mm)


def length_mm(labels: NDArray[Any], spacing_mm: Sequence[float], *, lv: int = 1, myo: int = 2) -> float:
    """Return the distance from the middle of the base to the apex in mm; NaN if either is missing.

    Arguments as in `base_width_mm`.
    """
    middle = base_points(labels, lv=lv, myo=myo).mean(axis=0)
    return distance_mm(middle, apex_point(labels, lv=lv), spacing_mm)


def distance_mm(first: Points, second: Points, spacing_mm: Sequence[float]) -> float:
    """Return the distance of two points ``(2,)`` in mm; NaN if one is missing."""
    size = np.asarray(spacing_mm, dtype=np.float64)
    return float(np.hypot(*((first - second) * size)))


def _highest_peak(values: Points, allowed: NDArray[np.bool_]) -> int | None:
    """Index of the highest peak among the allowed ones; the first of equals."""
    from scipy.signal import find_peaks

    peaks, found = find_peaks(values, height=0)
    usable = allowed[peaks]
    if not usable.any():
        return None
    return int(peaks[usable][found["peak_heights"][usable].argmax()])


def _box(mask: NDArray[np.bool_]) -> tuple[slice, slice] | None:
    """Bounding box of a mask with a border of one pixel where the image has one; None if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return None
    sides = []
    for hit, size in zip((rows, columns), mask.shape, strict=True):
        sides.append(slice(max(int(hit[0]) - 1, 0), min(int(hit[-1]) + 2, size)))
    return sides[0], sides[1]
