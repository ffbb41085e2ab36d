"""Confidence intervals and paired tests for metrics over cases.

Values that are NaN (a label that neither side holds) are left out first, pairs with them as a whole. A
resample draws cases, or patients where the caller has averaged each patient before.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError

EXACT_UP_TO = 25
"""Up to this many pairs without ties the Wilcoxon test is exact; beyond, it uses the normal distribution."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        n: Values that took part.
        method: ``bca``, ``percentile`` or ``t``; ``none`` if there are too few values.
    """

    mean: float
    low: float
    high: float
    level: float
    n: int
    method: str


@dataclass(frozen=True)
class PairedTest:
    """Two methods on the same cases: the difference is the first minus the second.

    Attributes:
        n: Pairs that took part.
        difference: Mean difference with its bootstrap interval, over pairs of finite values.
        p_value: Two-sided Wilcoxon signed-rank test; 1 if all pairs are equal.
        larger: Pairs in which the first value is the larger one.
        equal: Pairs of equal values.
        smaller: Pairs in which the first value is the smaller one.
        infinite: Pairs that the mean difference leaves out because one value is infinite.
    """

    n: int
    difference: Interval
    p_value: float
    larger: int
    equal: int
    smaller: int
    infinite: int


def bootstrap_ci(values: Iterable[float], n: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return the mean of the finite values with its bootstrap interval.

    Bias-corrected and accelerated (BCa); where that is not defined, because the values are (nearly) all
    equal, the percentile interval. With fewer than two values both ends are NaN.

    Args:
        values: One value for each case.
        n: Number of resamples.
        seed: The same seed and values give the same interval.
        level: Confidence level.

    Source: Efron 1987, through `scipy.stats.bootstrap`.
    """
    array = np.asarray(list(values), dtype=np.float64)
    array = array[np.isfinite(array)]
    if array.size == 0:
        return Interval(math.nan, math.nan, math.nan, level, 0, "none")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, math.nan, math.nan, level, 1, "none")
    if np.ptp(array) == 0.0:
        return Interval(mean, mean, mean, level, array.size, "percentile")
    for method in ("bca", "percentile"):
        low, high = _bootstrap(array, n, seed, level, method)
        if math.isfinite(low) and math.isfinite(high):
            break
    return Interval(mean, low, high, level, array.size, method)


def t_interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """Return the mean of the finite values with Student's t interval, for few values such as seeds.

    With fewer than two values both ends are NaN.
    """
    array = np.asarray(list(values), dtype=np.float64)
    array = array[np.isfinite(array)]
    if array.size < 2:
        mean = float(array.mean()) if array.size else math.nan
        return Interval(mean, math.nan, math.nan, level, array.size, "none")
    from scipy import stats  # half a second, which no training needs

    mean = float(array.mean())
    half = float(stats.t.ppf((1 + level) / 2, array.size - 1) * array.std(ddof=1) / math.sqrt(array.size))
    return Interval(mean, mean - half, mean + half, level, array.size, "t")


def paired_wilcoxon(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the two-sided p-value of the Wilcoxon signed-rank test.

    Pairs with NaN are left out. Equal pairs, among them two infinite values, take part in the ranking and
    are then dropped (Pratt). One infinite value in a pair counts as the largest difference. If all pairs
    are equal, p is 1; without pairs it is NaN.

    Source: Wilcoxon 1945, Pratt 1959, through `scipy.stats.wilcoxon`.
    """
    difference = _differences(*_pairs(a, b))
    if difference.size == 0:
        return math.nan
    if not difference.any():
        return 1.0
    from scipy import stats

    ranks = np.sign(difference) * stats.rankdata(np.abs(difference), method="dense")
    ties = len(np.unique(np.abs(difference))) < difference.size or not difference.all()
    exact = not ties and difference.size <= EXACT_UP_TO
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.wilcoxon(
            ranks, zero_method="pratt", correction=False, method="exact" if exact else "asymptotic"
        )
    return min(1.0, float(found.pvalue))


def paired_difference(
    a: Sequence[float], b: Sequence[float], n: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return the mean of ``a - b`` over pairs of finite values with its bootstrap interval over pairs."""
    difference = _differences(*_pairs(a, b))
    return bootstrap_ci(difference[np.isfinite(difference)], n, seed, level)


def compare_paired(
    a: Sequence[float], b: Sequence[float], n: int = 10_000, seed: int = 0, level: float = 0.95
) -> PairedTest:
    """Compare two methods on the same cases: bootstrap interval of the difference and Wilcoxon test.

    Raises:
        DataError: The two sequences have different lengths.
    """
    first, second = _pairs(a, b)
    difference = _differences(first, second)
    return PairedTest(
        n=difference.size,
        difference=paired_difference(first.tolist(), second.tolist(), n, seed, level),
        p_value=paired_wilcoxon(first.tolist(), second.tolist()),
        larger=int((difference > 0).sum()),
        equal=int((difference == 0).sum()),
        smaller=int((difference < 0).sum()),
        infinite=int((~np.isfinite(difference)).sum()),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for testing many things at once; NaN stays NaN and does not count.

    Source: Holm 1979.
    """
    known = [(p, i) for i, p in enumerate(p_values) if not math.isnan(p)]
    corrected = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(sorted(known)):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        corrected[i] = highest
    return corrected


def _bootstrap(
    array: NDArray[np.float64], n: int, seed: int, level: float, method: str
) -> tuple[float, float]:
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = stats.bootstrap(
            (array,),
            np.mean,
            n_resamples=n,
            confidence_level=level,
            method="BCa" if method == "bca" else method,
            batch=max(1, 2_000_000 // array.size),
            rng=np.random.default_rng(seed),
        )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _pairs(a: Sequence[float], b: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise DataError(
            "a paired test needs the same cases on both sides", why=f"{first.size} and {second.size} values"
        )
    known = ~(np.isnan(first) | np.isnan(second))
    return first[known], second[known]


def _differences(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``a - b``; two infinite values are equal."""
    with np.errstate(invalid="ignore"):
        difference = a - b
    difference[np.isnan(difference)] = 0.0
    return difference
