"""Verdicts on sequences: attributes measured in each frame, and the frames in which they jump."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError
from medrl.core.metrics.landmarks import base_width_mm, length_mm
from medrl.core.metrics.surface import hausdorff

from .rules import DISTANCE, Attribute, TemporalRules, load_temporal_rules

Series = NDArray[np.float64]
Flags = NDArray[np.bool_]

_LEGACY = {"center_column": "center_row", "center_row": "center_column"}


@dataclass(frozen=True, eq=False)
class TemporalReport:
    """The verdict on one sequence of T frames.

    Attributes:
        valid: Whether no frame has an error; with `relaxed`, at most one attribute in one frame has.
        errors: ``(T,)`` for each attribute, which frames are wrong in it.
        values: ``(T,)`` for each attribute: mm², mm, or the mean Hausdorff distance to both neighbours in mm.
        jumps: ``(T,)`` for each attribute that is limited by its jump, see `jumps_of`.
        frames_with_error: Number of frames with any error.
    """

    valid: bool
    errors: Mapping[str, Flags]
    values: Mapping[str, Series]
    jumps: Mapping[str, Series] = field(default_factory=dict)
    frames_with_error: int = 0

    @property
    def error_count(self) -> int:
        """Number of errors, each attribute counted in each frame."""
        return int(sum(int(flags.sum()) for flags in self.errors.values()))

    @property
    def wrong_frames(self) -> tuple[int, ...]:
        """Frames with any error."""
        return tuple(int(frame) for frame in np.flatnonzero(_any(self.errors)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; what is not finite becomes None."""
        return {
            "valid": self.valid,
            "frames_with_error": self.frames_with_error,
            "wrong_frames": list(self.wrong_frames),
            "errors": {name: np.flatnonzero(flags).tolist() for name, flags in self.errors.items()},
            "values": {name: _plain(series) for name, series in self.values.items()},
        }


def check_sequence(
    labels: Any,
    spacing_mm: Sequence[float],
    rules: str | Path | TemporalRules = "echo_temporal",
    legacy_axes: bool = False,
    relaxed: bool = False,
    *,
    only: Collection[str] | None = None,
) -> TemporalReport:
    """Measure every attribute through a sequence.

    An attribute that cannot be measured in a frame is an error of that frame, and its neighbours are not
    compared with it. The first and the last frame lack a neighbour and have no jump.

    Args:
        labels: ``(X, Y, T)`` whole numbers, array or tensor.
        spacing_mm: ``(2,)`` pixel size along X and Y, as tuple, list, array or tensor.
        rules: From `load_temporal_rules`, or what it takes.
        legacy_axes: Measure ``center_column`` along rows and ``center_row`` along columns, as the original
            does against its names.
        relaxed: Accept one error in one attribute (`relaxed_factor` of the original).
        only: Names of the attributes to measure; left out, all.

    Raises:
        DataError: The labels have other than three axes or no frame, or the spacing does not fit.
        ConfigError: The rules are not valid.

    Source: RL4Seg3D, `utils/temporal_metrics.py`; specification §7. Deviations: errors where nothing can be
    measured, in place of NaN or 1, 0, 1, 0 …, which passed (§10.9); corrected axes.
    """
    if not isinstance(rules, TemporalRules):
        rules = _loaded(str(rules))
    frames = _frames(labels, rules)
    spacing = _spacing(spacing_mm, rules)
    values: dict[str, Series] = {}
    jumps: dict[str, Series] = {}
    errors: dict[str, Flags] = {}
    for item in rules.attributes:
        if only is not None and item.name not in only:
            continue
        series = _measure(frames, item, spacing, legacy=legacy_axes)
        values[item.name] = series
        if item.measure == DISTANCE:
            errors[item.name] = ~(series <= item.limit)
        else:
            jumps[item.name] = jumps_of(series)
            errors[item.name] = jump_errors(series, item.limit)
    any_error = _any(errors) if errors else np.zeros(frames.shape[2], dtype=np.bool_)
    count = int(sum(int(flags.sum()) for flags in errors.values()))
    return TemporalReport(
        valid=count <= int(relaxed),
        errors=errors,
        values=values,
        jumps=jumps,
        frames_with_error=int(any_error.sum()),
    )


def jumps_of(series: Sequence[float] | NDArray[Any]) -> Series:
    r"""Return how far each frame lies from the mean of its neighbours, in units of the range.

    .. math:: s_t = \frac{a_t - 0.99 \min a}{1.01 \max a - 0.99 \min a}, \qquad
              e_t = s_t - \frac{s_{t-1} + s_{t+1}}{2}

    Args:
        series: ``(T,)`` values that are not negative; NaN where nothing could be measured.

    Returns:
        ``(T,)``: 0 in the first and last frame and beside a frame without a value, NaN in such a frame, and
        NaN everywhere if all values are 0.

    Source: vital, `metrics/evaluate/attribute.py`; RL4Seg3D's bounds.

    >>> jumps_of([1000, 1000, 1010, 1000, 1000]).round(3).tolist()
    [0.0, -0.166, 0.332, -0.166, 0.0]
    """
    values = np.asarray(series, dtype=np.float64)
    known = np.isfinite(values)
    found = np.where(known, 0.0, np.nan)
    if not known.any():
        return found
    low, high = 0.99 * values[known].min(), 1.01 * values[known].max()
    if high == low:  # the range of positive values is never 0: all are 0
        return np.full(values.shape, np.nan)
    scaled = (values - low) / (high - low)
    jump = scaled[1:-1] - (scaled[:-2] + scaled[2:]) / 2.0
    inner = known[1:-1]
    found[1:-1] = np.where(inner, np.where(np.isfinite(jump), jump, 0.0), np.nan)
    return found


def jump_errors(series: Sequence[float] | NDArray[Any], limit: float) -> Flags:
    """Return which frames ``(T,)`` jump further than a limit, or have nothing to measure."""
    return ~(np.abs(jumps_of(series)) <= limit)


def neighbour_hausdorff_mm(masks: NDArray[Any], spacing_mm: Sequence[float]) -> Series:
    """Return the mean Hausdorff distance of each frame to its two neighbours in mm.

    Args:
        masks: ``(X, Y, T)``; every value but 0 is inside.
        spacing_mm: ``(2,)``.

    Returns:
        ``(T,)``: 0 in the first and last frame, infinite where one of the masks is empty and NaN where the
        frame and a neighbour are.

    Source: RL4Seg3D, `get_temporal_hd_metric`. Deviation: an empty mask is an error, where the original puts
    1, 0, 1, 0 … for the whole sequence, which passes.
    """
    count = masks.shape[2]
    steps = np.array([hausdorff(masks[..., t], masks[..., t + 1], spacing_mm) for t in range(count - 1)])
    found = np.zeros(count)
    if count > 2:
        found[1:-1] = (steps[:-1] + steps[1:]) / 2.0
    return found


def _measure(frames: NDArray[Any], item: Attribute, spacing: Sequence[float], *, legacy: bool) -> Series:
    """Values ``(T,)`` of one attribute on frames ``(columns, rows, T)``."""
    mask = _is_any(frames, item.labels)
    kind = _LEGACY.get(item.measure, item.measure) if legacy else item.measure
    if kind == "area":
        return np.asarray(mask.sum(axis=(0, 1)) * (spacing[0] * spacing[1]), dtype=np.float64)
    if kind in ("center_column", "center_row"):
        axis = 0 if kind == "center_column" else 1
        counts = mask.sum(axis=1 - axis).astype(np.float64)
        with np.errstate(invalid="ignore"):
            center = (np.arange(counts.shape[0]) @ counts) / counts.sum(axis=0)
        return np.asarray(center * spacing[axis], dtype=np.float64)
    if kind == DISTANCE:
        return neighbour_hausdorff_mm(mask, spacing)
    named = np.where(mask, np.uint8(1), np.where(_is_any(frames, item.wall), np.uint8(2), np.uint8(0)))
    measure = base_width_mm if kind == "base_width" else length_mm
    return np.array([measure(named[..., t], spacing) for t in range(named.shape[2])])


def _is_any(frames: NDArray[Any], labels: tuple[int, ...]) -> Flags:
    found: Flags = frames == labels[0]
    for label in labels[1:]:
        found |= frames == label
    return found


def _frames(labels: Any, rules: TemporalRules) -> NDArray[Any]:
    """Labels as ``(columns, rows, T)``."""
    array = np.asarray(labels.detach().cpu().numpy() if hasattr(labels, "detach") else labels)
    if array.ndim != 3 or array.shape[2] < 1:
        raise DataError("the sequence", why=f"has shape {array.shape}, expected (X, Y, T) with T frames")
    return array if rules.rows == "y" else array.transpose(1, 0, 2)


def _spacing(spacing_mm: Any, rules: TemporalRules) -> tuple[float, float]:
    values = [float(value) for value in spacing_mm]
    if len(values) != 2 or not all(np.isfinite(value) and value > 0 for value in values):
        raise DataError("the spacing", why=f"is {values}, expected two positive numbers in mm")
    return (values[0], values[1]) if rules.rows == "y" else (values[1], values[0])


def _any(errors: Mapping[str, Flags]) -> Flags:
    found: Flags = np.logical_or.reduce(list(errors.values()))
    return found


def _plain(series: Series) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in series]


@cache
def _loaded(name: str) -> TemporalRules:
    return load_temporal_rules(name)
