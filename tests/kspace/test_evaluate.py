"""Evaluation over budgets: measures, summaries, files, masks, and the commands that write them."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch

from medrl.core.errors import CheckpointError, ConfigError
from medrl.plugins.kspace import evaluate, study
from medrl.plugins.kspace.evaluate import area, by_patient, spread
from medrl.plugins.kspace.measuring import hearts, mean_of, slice_dice

NAMES = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}


@pytest.fixture(scope="module")
def found(manager, policy_run, tmp_path_factory):
    """A study of the policy and all rivals on test patients."""
    folder = tmp_path_factory.mktemp("study")
    result = study.run(manager, [policy_run], folder, against=["all"], device="cpu")
    return folder, result


def test_every_policy_is_measured_at_every_budget_and_all_lines_once(found):
    _, result = found
    policies = result.summary["policies"]
    rivals = (*evaluate.BASELINES, *evaluate.ORACLES)
    assert list(policies) == ["policy", *rivals, "full"]
    assert all(list(policies[name]["budgets"]) == ["2", "3"] for name in ("policy", *rivals))
    assert [row["lines"] for row in policies["low-to-high"]["budgets"].values()] == [4, 5]
    assert policies["full"]["budgets"]["0"]["lines"] == 16
    assert policies["full"]["budgets"]["0"]["slice_nmse"]["mean"] == pytest.approx(0.0, abs=1e-10)
    assert policies["full"]["budgets"]["0"]["slice_ssim"]["mean"] == pytest.approx(1.0, abs=1e-5)


def test_all_policies_start_from_the_same_initial_lines(found):
    _, result = found
    for by_budget in result.curves.masks.values():
        for mask in by_budget.values():
            assert bool(mask[:, 7:9].all())


def test_a_short_acquisition_of_the_oracle_is_the_beginning_of_a_long_one(found):
    _, result = found
    lines = result.curves.lines["greedy-oracle"]
    assert torch.equal(lines[3][:, :2], lines[2])


def test_the_files_hold_a_row_for_every_slice_volume_and_heart(found):
    folder, result = found
    rows = list(csv.DictReader((folder / "slices.csv").open()))
    # 2 patients × 2 frames × 2 slices, eight policies at two budgets, and all lines.
    assert len(rows) == 8 * (8 * 2 + 1)
    volumes = list(csv.DictReader((folder / "volumes.csv").open()))
    assert len(volumes) == 4 * 17
    assert {"dice", "hd95", "dice_LV", "hd95_MYO"} <= set(volumes[0])
    assert len(list(csv.DictReader((folder / "hearts.csv").open()))) <= 2 * 17
    content = json.loads((folder / "summary.json").read_text())
    assert content["part"] == "test"
    assert any("inverse crime" in note for note in content["notes"])
    assert any("smooth phase" in note for note in content["notes"])
    masks = json.loads((folder / "masks.json").read_text())
    assert len(masks["lines"]["policy"]["3"]) == 8
    assert sum(masks["share_of_cases"]["low-to-high"]["3"]) == pytest.approx(5)
    assert "<svg" in (folder / "report.html").read_text()
    assert result.lines()[0].split() == ["policy", "lines", "Dice", "SSIM"]


def test_differences_are_paired_and_of_patients(found):
    _, result = found
    pair = result.summary["differences"]["policy - low-to-high"]["ssim"]["2"]
    own, other = (
        by_patient(result.curves.measured[name][2].slices, "ssim") for name in ("policy", "low-to-high")
    )
    assert pair["patients"] == 2
    assert pair["mean"] == pytest.approx(np.mean([own[name] - other[name] for name in own]))


def test_the_reward_model_alone_serves_baselines_but_not_a_policy(manager, reward_run, tmp_path):
    result = study.run(
        manager, [reward_run], tmp_path / "b", against=["low-to-high"], with_policy=False, device="cpu",
        budgets=(2,), cases=3,
    )  # fmt: skip
    assert list(result.summary["policies"]) == ["low-to-high", "full"]
    assert result.summary["cases"] == 3
    with pytest.raises(CheckpointError, match="no policy"):
        study.run(manager, [reward_run], tmp_path / "c", device="cpu")


def test_unknown_rivals_are_refused(manager, policy_run, tmp_path):
    with pytest.raises(ConfigError, match="unknown"):
        study.run(manager, [policy_run], tmp_path, against=["best"], device="cpu")


def test_masks_are_exported_in_the_order_of_acquisition(manager, policy_run, tmp_path):
    assert study.export_masks(manager, policy_run, tmp_path, lines=3, device="cpu") == 8
    masks = np.load(tmp_path / "masks.npy", allow_pickle=False)
    assert masks.shape == (8, 16)
    assert masks.sum(axis=1).tolist() == [5] * 8
    rows = list(csv.DictReader((tmp_path / "lines.csv").open()))
    assert [row["place"] for row in rows[:3]] == ["0", "1", "2"]
    assert all(int(row["offset"]) == int(row["line"]) - 8 for row in rows)
    names = (tmp_path / "cases.txt").read_text().split()
    assert masks[names.index(rows[0]["case"]), int(rows[0]["line"])]


# -- numbers -----------------------------------------------------------------------------------------------


def test_dice_of_a_slice_leaves_out_labels_that_are_absent():
    right = np.zeros((4, 4), dtype=np.uint8)
    right[0, :2] = 3
    guess = np.zeros_like(right)
    guess[0, 0] = 3
    guess[3, 3] = 1
    row = slice_dice(guess, right, NAMES)
    assert math.isnan(row["dice_RV"])
    assert math.isnan(row["dice_MYO"])
    assert row["dice_LV"] == pytest.approx(2 * 1 / 3)
    assert row["dice"] == pytest.approx(2 * 1 / 3)


def test_the_ejection_fraction_is_that_of_both_frames():
    sizes = {
        ("p", "ED"): {"LV": (110.0, 100.0)},
        ("p", "ES"): {"LV": (44.0, 50.0)},
        ("q", "ED"): {"LV": (90.0, 100.0)},
    }
    (row,) = hearts(sizes)
    assert row["edv_error_ml"] == pytest.approx(10.0)
    assert row["esv_error_ml"] == pytest.approx(-6.0)
    assert row["ef_error"] == pytest.approx(60.0 - 50.0)


def test_the_area_under_a_curve_is_its_mean_height():
    assert area({2: 0.5, 4: 0.7, 8: 0.9}) == pytest.approx((0.6 * 2 + 0.8 * 4) / 6)
    assert area({4: 0.7}) == 0.7
    assert math.isnan(area({0: 1.0}))
    assert area({2: 0.5, 4: math.nan, 6: 0.7}) == pytest.approx(0.6)


def test_cases_are_spread_evenly_and_means_leave_out_what_is_not_there():
    assert spread(10, 4).tolist() == [0, 3, 6, 9]
    assert spread(3, 4).tolist() == [0, 1, 2]
    assert mean_of([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(mean_of([]))
    rows = [{"patient": "a", "dice": 1.0}, {"patient": "a", "dice": math.nan}, {"patient": "b", "dice": 0.5}]
    assert by_patient(rows, "dice") == {"a": 1.0, "b": 0.5}
    assert torch.equal(spread(5, 5), torch.arange(5))
