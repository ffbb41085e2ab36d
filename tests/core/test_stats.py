"""Intervals and paired tests against hand-counted values and theory."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medrl.core.errors import DataError
from medrl.core.stats import (
    bootstrap_ci,
    compare_paired,
    holm,
    paired_difference,
    paired_wilcoxon,
    t_interval,
)


def test_interval_agrees_with_the_normal_theory_for_many_values():
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    found = bootstrap_ci(values, n=4000, seed=1)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert found.mean == values.mean()
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)
    assert found.method == "bca"


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.exponential(1.0, (120, 40))
    covered = sum(
        found.low <= 1.0 <= found.high
        for found in (bootstrap_ci(sample, n=500, seed=k, level=0.9) for k, sample in enumerate(samples))
    )
    assert 96 <= covered <= 118


def test_interval_is_the_same_for_the_same_seed_and_another_for_another():
    values = [0.2, 0.5, 0.9, 0.7, 0.4]
    assert bootstrap_ci(values, n=500, seed=4) == bootstrap_ci(values, n=500, seed=4)
    assert bootstrap_ci(values, n=500, seed=4) != bootstrap_ci(values, n=500, seed=5)


def test_interval_leaves_out_what_is_not_finite():
    assert bootstrap_ci([0.1, math.nan, 0.5, math.inf], n=200) == bootstrap_ci([0.1, 0.5], n=200)


def test_interval_of_equal_one_and_no_values_is_defined():
    same = bootstrap_ci([0.5, 0.5, 0.5], n=100)
    assert (same.low, same.high) == (0.5, 0.5)
    one = bootstrap_ci([0.5], n=100)
    assert one.mean == 0.5
    assert math.isnan(one.low)
    assert math.isnan(bootstrap_ci([math.nan], n=100).mean)


def test_wilcoxon_of_six_pairs_on_one_side_is_2_of_64():
    a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    b = [0.9, 1.8, 2.7, 3.6, 4.5, 5.4]
    assert paired_wilcoxon(a, b) == pytest.approx(2 / 64, abs=1e-12)
    assert paired_wilcoxon(b, a) == pytest.approx(2 / 64, abs=1e-12)


def test_wilcoxon_of_equal_pairs_is_1_and_of_none_not_a_number():
    assert paired_wilcoxon([0.3, 0.4], [0.3, 0.4]) == 1.0
    assert paired_wilcoxon([math.inf, 1.0], [math.inf, 1.0]) == 1.0
    assert math.isnan(paired_wilcoxon([math.nan], [0.2]))


def test_wilcoxon_ranks_an_infinite_distance_above_all_others():
    a = [1.0, 2.0, 3.0, 4.0, 5.0, math.inf]
    b = [0.9, 1.8, 2.7, 3.6, 4.5, 6.0]
    assert paired_wilcoxon(a, b) == pytest.approx(2 / 64, abs=1e-12)


def test_paired_difference_sees_what_separate_intervals_do_not():
    rng = np.random.default_rng(1)
    hard = rng.normal(0.7, 0.2, 30)
    better = hard + rng.normal(0.02, 0.01, 30)
    apart = bootstrap_ci(better, n=1000), bootstrap_ci(hard, n=1000)
    assert apart[0].low < apart[1].high
    found = paired_difference(better, hard, n=1000)
    assert found.low > 0
    assert found.mean == pytest.approx(float((better - hard).mean()))


def test_comparison_counts_pairs_and_leaves_out_undefined_ones():
    found = compare_paired([1.0, 2.0, math.nan, math.inf, 3.0], [1.0, 1.0, 5.0, 2.0, 4.0], n=200)
    assert (found.n, found.larger, found.equal, found.smaller, found.infinite) == (4, 2, 1, 1, 1)
    assert found.difference.mean == 0.0
    assert found.difference.n == 3


def test_comparison_of_different_numbers_of_cases_is_refused():
    with pytest.raises(DataError, match="2 and 3 values"):
        compare_paired([1.0, 2.0], [1.0, 2.0, 3.0])


def test_holm_multiplies_by_the_number_of_tests_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, math.nan, 0.9])[0] == 1.0
    assert math.isnan(holm([0.5, math.nan])[1])


def test_the_interval_of_few_values_is_students():
    found = t_interval([1.0, 2.0, 3.0, math.nan])
    # t(0.975, 2) = 4.30265; standard deviation 1, three values
    assert (found.mean, found.n, found.method) == (2.0, 3, "t")
    assert found.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    assert found.low == pytest.approx(4.0 - found.high, abs=1e-12)
    alone = t_interval([1.5])
    assert (alone.mean, alone.method) == (1.5, "none")
    assert math.isnan(alone.low)
