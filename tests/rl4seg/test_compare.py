"""The comparison: its statistics, its claims, and that shared stages are made once."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from medrl.core.errors import ConfigError
from medrl.plugins.rl4seg.compare import catalogue
from medrl.plugins.rl4seg.compare.outcome import Outcome
from medrl.plugins.rl4seg.compare.statistics import gain, level_of, two_level
from medrl.plugins.rl4seg.scoring import Scores


def scores(dice: list[float], valid: float = 1.0, subjects: list[str] | None = None) -> Scores:
    names = subjects or [f"p{k}" for k in range(len(dice))]
    return Scores(
        ids=tuple(f"{name}_{k}" for k, name in enumerate(names)),
        subjects=tuple(names),
        values={
            "dice": tuple(dice),
            "hd": tuple(2.0 for _ in dice),
            "hd95": tuple(1.0 for _ in dice),
            "valid": tuple(valid for _ in dice),
        },
    )


def many(mean: float, seeds: int = 5, patients: int = 40, spread: float = 0.01, stream: int = 0) -> dict:
    rng = np.random.default_rng(stream)
    return {
        seed: scores((mean + spread * rng.normal(size=patients)).clip(0, 1).tolist()) for seed in range(seeds)
    }


def test_the_mean_counts_seeds_equally_and_patients_within_a_seed():
    found = two_level({0: {"a": 1.0, "b": 0.0}, 1: {"c": 1.0}})
    assert found.mean == 0.75


def test_the_interval_of_one_seed_is_that_over_patients():
    values = np.random.default_rng(0).normal(0.5, 0.1, 200)
    found = two_level({3: {str(k): float(v) for k, v in enumerate(values)}})
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    assert found.low == pytest.approx(values.mean() - half, abs=0.002)
    assert found.high == pytest.approx(values.mean() + half, abs=0.002)


def test_seeds_that_differ_widen_the_interval_where_patients_agree():
    same = {seed: {str(k): 0.5 + 0.1 * seed for k in range(20)} for seed in range(5)}
    found = two_level(same)
    assert found.mean == pytest.approx(0.7)
    assert found.high - found.low > 0.15
    nested = {seed: {f"{seed}_{k}": 0.5 + 0.1 * seed for k in range(20)} for seed in range(5)}
    other = two_level(nested)
    assert other.high - other.low == pytest.approx(found.high - found.low, abs=0.03)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(150):
        seeds, patients = rng.normal(0, 0.02, 6), rng.normal(0, 0.1, 30)
        table = 0.3 + seeds[:, None] + patients[None] + rng.normal(0, 0.05, (6, 30))
        values = {s: {str(p): float(table[s, p]) for p in range(30)} for s in range(6)}
        found = two_level(values, n=800, seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 132 <= covered <= 150


def test_intervals_repeat_and_are_undefined_without_values():
    values = {0: {"a": 0.1, "b": 0.4}, 1: {"a": 0.3, "b": 0.2}}
    assert two_level(values) == two_level(values)
    assert math.isnan(two_level({}).mean)
    assert math.isnan(two_level({0: {"a": 0.5}}).low)


def test_a_gain_pairs_patients_and_leaves_out_infinite_distances():
    one = {0: Scores(("a", "b"), ("p", "q"), {"hd": (3.0, math.inf)})}
    two = {0: Scores(("a", "b"), ("p", "q"), {"hd": (1.0, 5.0)})}
    found = gain(one, two, "hd")
    assert found.interval.mean == 2.0
    assert (found.better, found.seeds) == (1, 1)


def test_a_gain_counts_the_seeds_that_both_have():
    one, two = many(0.9, seeds=3), many(0.8, seeds=5, stream=1)
    found = gain(one, two)
    assert (found.better, found.seeds) == (3, 3)
    assert found.clear
    assert found.interval.mean == pytest.approx(0.1, abs=0.01)
    assert gain(two, one).lost
    assert not gain(one, one).clear


def test_patients_with_several_images_count_once():
    found = level_of({0: scores([1.0, 0.0, 0.5], subjects=["p", "p", "q"])})
    assert found.mean == 0.5
    assert found.n == 2


def outcome(**means: float) -> Outcome:
    found = Outcome()
    for number, (key, mean) in enumerate(means.items()):
        found.scores[key.replace("_", "-")] = many(mean, stream=number)
    return found


def test_a_claim_is_met_only_if_every_rival_with_the_same_knowledge_is_beaten():
    all_three = outcome(
        source=0.7, style_ppo=0.9, style_steps=0.85, style_self_refined=0.86, style_posthoc_both=0.87
    )
    words = all_three.claims()
    assert "beats 3 of 3: met." in words[-1]
    tie = outcome(
        source=0.7, style_ppo=0.87, style_steps=0.85, style_self_refined=0.86, style_posthoc_both=0.87
    )
    assert "beats 2 of 3: not met." in tie.claims()[-1]
    assert any("against source-only (source): Dice +0.1" in line for line in tie.claims())
    assert any("no clear difference" in line for line in tie.claims())


def test_a_method_that_loses_is_said_to_be_worse():
    found = outcome(ppo=0.7, source=0.8)
    assert ": worse" in found.claims()[0]


def test_rows_come_in_the_order_of_the_catalogue_with_iterations_before_the_final_result():
    found = outcome(target=0.9, style_ppo=0.9, source=0.7)
    found.scores["style-ppo@1"] = many(0.88, stream=7)
    found.scores["style-ppo@2"] = many(0.9, stream=8)
    rows = found.rows()
    assert [row.key for row in rows] == ["source", "style-ppo@1", "style-ppo@2", "style-ppo", "target"]
    assert rows[1].title == "rl4seg, iteration 1"
    assert rows[0].gains == {}
    assert set(rows[3].gains) == {"source"}


def test_results_are_written_as_strict_json(tmp_path):
    found = outcome(source=0.7, style_ppo=0.9)
    found.trust["reward"] = {0: {"ece": 0.1, "nmi": math.nan}}
    content = json.loads(found.write(tmp_path / "results.json").read_text())
    assert content["methods"]["style-ppo"]["gains"]["source"]["dice"]["of"] == 5
    assert content["confidence"]["reward"]["by_seed"]["0"]["nmi"] is None
    assert content["methods"]["source"]["valid"]["mean"] == 1.0


def test_methods_are_chosen_by_name_and_group_in_the_order_of_the_tables():
    assert [m.key for m in catalogue.chosen(["style", "source"])] == ["source", "style"]
    assert {m.key for m in catalogue.chosen(["core"])} == set(catalogue.CORE)
    assert len(catalogue.chosen(["all"])) == len(catalogue.METHODS)
    assert not [m for m in catalogue.chosen(["unlabelled"]) if m.role == "bound"]
    with pytest.raises(ConfigError, match="did you mean 'style-ppo'"):
        catalogue.chosen(["style-pp0"])
    with pytest.raises(ConfigError, match="none is named"):
        catalogue.chosen([])


def test_only_the_upper_bounds_ask_for_target_labels():
    for method in catalogue.METHODS:
        asks = bool(method.values.get("target", {}).get("allow_labels")) or method.kind == "supervised"
        assert asks == (method.role == "bound"), method.key
