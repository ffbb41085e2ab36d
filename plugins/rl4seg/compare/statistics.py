"""Means, intervals and gains over seeds and patients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medrl.core.stats import Interval

from ..scoring import Scores

RESAMPLES = 4000

BySeed = Mapping[int, Mapping[str, float]]
"""A number of every patient, for each seed."""


@dataclass(frozen=True)
class Gain:
    """How much better one method is than another on the same patients with the same seeds.

    Attributes:
        interval: Mean difference with its interval over seeds and patients.
        better: Seeds whose mean difference is above 0.
        seeds: Seeds that have both.
    """

    interval: Interval
    better: int
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the whole interval is above 0."""
        return math.isfinite(self.interval.low) and self.interval.low > 0.0

    @property
    def lost(self) -> bool:
        """Whether the whole interval is below 0."""
        return math.isfinite(self.interval.high) and self.interval.high < 0.0

    def text(self) -> str:
        """Return the gain in one cell: ``+0.012 [+0.004, +0.019], 5/5``."""
        found = self.interval
        if not math.isfinite(found.mean):
            return "–"
        if not math.isfinite(found.low):
            return f"{found.mean:+.3f}"
        return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], {self.better}/{self.seeds}"


def gain(method: Mapping[int, Scores], other: Mapping[int, Scores], name: str = "dice") -> Gain:
    """Compare two methods by a number: mean over seeds of the mean over patients of the difference.

    Args:
        method: Scores by seed.
        other: Scores by seed; only seeds that both have count.
        name: The number; only patients for whom both are finite count.
    """
    differences: dict[int, dict[str, float]] = {}
    for seed in sorted(set(method) & set(other)):
        one, two = method[seed].by_subject(name), other[seed].by_subject(name)
        found = {key: one[key] - two[key] for key in sorted(set(one) & set(two))}
        known = {key: value for key, value in found.items() if math.isfinite(value)}
        if known:
            differences[seed] = known
    means = [sum(by.values()) / len(by) for by in differences.values()]
    return Gain(two_level(differences), sum(mean > 0.0 for mean in means), len(means))


def level_of(method: Mapping[int, Scores], name: str = "dice") -> Interval:
    """Return the mean over seeds and patients of a number of `Scores`, with its interval."""
    values = {seed: scores.by_subject(name) for seed, scores in method.items()}
    finite = {
        seed: {key: value for key, value in by.items() if math.isfinite(value)} for seed, by in values.items()
    }
    return two_level({seed: by for seed, by in finite.items() if by})


def two_level(values: BySeed, *, n: int = RESAMPLES, seed: int = 0, level: float = 0.95) -> Interval:
    """Return the mean over seeds of the means over patients, with a percentile bootstrap interval.

    A resample draws seeds and patients, both with replacement. Where every seed has the same patients, one
    draw of patients serves all its seeds; otherwise each seed draws among its own. With one seed only
    patients are drawn.

    Source: Davison and Hinkley 1997, §3.8, for two factors.
    """
    seeds = sorted(values)
    count = sum(len(by) for by in values.values())
    if not seeds or not count:
        return Interval(math.nan, math.nan, math.nan, level, 0, "none")
    means = [float(np.mean(list(values[key].values()))) for key in seeds]
    mean = float(np.mean(means))
    if count < 2:
        return Interval(mean, math.nan, math.nan, level, count, "none")
    rng = np.random.default_rng(seed)
    patients = [sorted(values[key]) for key in seeds]
    if all(names == patients[0] for names in patients):
        table = np.array([[values[key][name] for name in patients[0]] for key in seeds])
        drawn = _crossed(table, n, rng)
    else:
        drawn = _nested(
            [np.array([values[key][name] for name in sorted(values[key])]) for key in seeds], n, rng
        )
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return Interval(mean, float(low), float(high), level, count, "two-level")


def _crossed(table: NDArray[np.float64], n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of resamples of rows (seeds) and columns (patients)."""
    rows, columns = table.shape
    by_row = rng.multinomial(rows, [1.0 / rows] * rows, size=n) / rows
    by_column = rng.multinomial(columns, [1.0 / columns] * columns, size=n) / columns
    return np.asarray(((by_row @ table) * by_column).sum(1), dtype=np.float64)


def _nested(groups: Sequence[NDArray[np.float64]], n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of resamples of groups (seeds), each with a resample of its own members."""
    total = np.zeros(n)
    for _ in groups:
        chosen = rng.integers(0, len(groups), size=n)
        for at, members in enumerate(groups):
            mine = np.flatnonzero(chosen == at)
            total[mine] += members[rng.integers(0, members.size, size=(mine.size, members.size))].mean(1)
    return total / len(groups)
