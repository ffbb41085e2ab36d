"""Evaluation: what is measured, the threshold, and what reports must say."""

from __future__ import annotations

import json
import math

import pytest
import torch

from medrl.core.errors import DataError
from medrl.plugins.spars import evaluate
from medrl.plugins.spars.measuring import (
    by_patient,
    choose_by_images,
    choose_by_masks,
    mean_of,
    measure,
    presence_auc,
)
from medrl.plugins.spars.play_config import MapConfig


def box(*corners, shape=(16, 16, 8)):
    found = torch.zeros(shape, dtype=torch.bool)
    for (x, y, z), size in corners:
        found[x : x + size, y : y + size, z : z + size] = True
    return found


def one(mask, truth, **kwargs):
    given = {"case": "a", "patient": "p", "spacing_mm": (1.0, 1.0, 1.0), "window": (4, 4, 4), **kwargs}
    return measure(mask, truth, **given)


def test_half_of_two_lesions_is_a_recall_of_one_half():
    truth = box(((0, 0, 0), 3), ((10, 10, 4), 3))
    row = one(box(((0, 0, 0), 1)), truth)
    assert row.recall == 0.5
    assert row.dice == pytest.approx(2 / (1 + 54))


def test_both_empty_is_a_dice_of_one_and_no_false_positive():
    row = one(box(), box())
    assert (row.dice, row.marked, row.present) == (1.0, 0, False)
    assert by_patient([row], "dice") == {}
    assert by_patient([row], "empty_dice") == {"p": 1.0}
    assert by_patient([row], "false_positive") == {"p": 0.0}
    assert math.isnan(row.recall)
    assert math.isnan(row.hd95_mm)


def test_a_marked_volume_without_a_lesion_is_a_false_positive():
    assert mean_of([one(box(((0, 0, 0), 2)), box())], "false_positive") == 1.0


def test_the_bound_is_that_of_a_window_with_the_whole_lesion():
    assert one(box(), box(((4, 4, 2), 2))).bound == pytest.approx(2 * 8 / (8 + 64))


def test_hits_count_last_windows_that_touch_a_lesion():
    finals = torch.tensor([[3, 3, 1], [8, 8, 0], [5, 5, 3], [12, 12, 4]])
    assert one(box(), box(((4, 4, 2), 2)), finals=finals).hit == 0.5


def test_metrics_are_means_over_patients_not_volumes():
    truth = box(((0, 0, 0), 2))
    rows = [one(truth, truth, patient="p"), one(truth, truth, patient="p"), one(box(), truth, patient="q")]
    assert mean_of(rows, "dice") == 0.5


def test_the_confidence_tells_volumes_apart():
    truth = box(((0, 0, 0), 2))
    high, low = torch.full((16, 16, 8), 0.9), torch.full((16, 16, 8), 0.2)
    rows = [one(truth, truth, score_map=high), one(truth, box(), score_map=low)]
    assert presence_auc(rows) == 1.0
    assert math.isnan(presence_auc(rows[:1]))


def maps(*peaks):
    found = []
    for peak in peaks:
        one_map = torch.zeros(8, 8, 8)
        one_map[2:5, 2:5, 2:5] = peak
        found.append(one_map)
    return found


CFG = MapConfig(smallest=0)


def test_image_labels_choose_the_middle_of_the_thresholds_that_make_no_mistake():
    found = choose_by_images(maps(0.9, 0.8, 0.35), [True, True, False], CFG, (0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
    assert (found.by, found.value) == ("image", 0.5)
    assert found.worth[0.3] == pytest.approx(-1 / 3)
    assert found.worth[0.5] == 0.0


def test_image_labels_that_cannot_decide_leave_the_threshold_of_the_findings():
    assert choose_by_images(maps(0.9, 0.0), [True, False], CFG, (0.3, 0.45, 0.6)).value == 0.45


def test_masks_choose_the_best_dice():
    one_map = torch.zeros(8, 8, 8)
    one_map[0:4], one_map[4:6] = 0.4, 0.8
    truth = one_map > 0.5
    found = choose_by_masks([one_map], [truth], CFG, (0.3, 0.5, 0.9))
    assert (found.by, found.value) == ("mask", 0.5)
    assert found.worth[0.5] == 1.0


def test_an_evaluation_names_label_source_bound_scan_and_greedy(manager, play_run, tmp_path):
    found = evaluate.run(manager, [play_run], tmp_path / "out", policies=["self-play"], device="cpu")
    assert list(found.summary["policies"]) == ["scan", "greedy", "self-play"]
    notes = " ".join(found.summary["notes"])
    assert "image labels alone" in notes
    assert "Dice of at most" in notes
    assert "Threshold" in notes
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written["runs"]["run"]["label_source"] == "image"
    assert written["policies"]["scan"]["dice"]["n"] == 3
    report = found.report.read_text()
    assert "exhaustive scan" in report
    assert "</i>tumour</li>" in report
    assert "</i>label 1</li>" not in report
    assert len((tmp_path / "out" / "cases.csv").read_text().splitlines()) == 1 + 3 * 3


def test_patients_of_the_training_are_refused_as_test(manager, play_run, phantoms, tmp_path):
    import shutil

    root = tmp_path / "data"
    shutil.copytree(phantoms, root)
    for kind, end in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
        for path in (root / f"{kind}Ts").glob("*.nii.gz"):
            path.unlink()
        source = root / f"{kind}Tr" / f"abdomen_000{end}"
        shutil.move(source, root / f"{kind}Ts" / source.name)
    with pytest.raises(DataError, match="trained on or watched"):
        evaluate.run(manager, [play_run], tmp_path / "out", data=root, split="test", device="cpu")


def test_in_image_mode_training_needs_no_mask(make_job, phantoms, tmp_path):
    """Specification §11.15: delete all masks, and training runs."""
    import shutil

    from medrl.plugins.spars import running

    root = tmp_path / "data"
    shutil.copytree(phantoms, root)
    shutil.rmtree(root / "labelsTr")
    shutil.rmtree(root / "labelsTs")
    running.run(make_job(tmp_path / "run", {"data": {"root": str(root)}}))
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()
