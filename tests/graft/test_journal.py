"""What a run writes at a validation: overlap by voxels and by case, the table of the original, pictures."""

from __future__ import annotations

import csv
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from medrl.core.report import build_report
from medrl.core.volume import read_volume
from medrl.plugins.graft import data, train
from medrl.plugins.graft.config import GraftConfig
from medrl.plugins.graft.journal import COLUMNS, TABLE
from medrl.plugins.graft.panels import FOLDER, PICTURE, coloured, grey, heat, picture, telling_slice
from medrl.plugins.graft.regions import BINARY, make_target
from medrl.plugins.graft.validation import CaseCounts, EarlyStopping, Validation


def fit(job, change=None):
    with job.runtime() as rt:
        found = data.load(rt, job.config)
        if change is not None:
            change(found)
        train.fit(rt, job.config, found)
    return job.run_dir


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table(run):
    with (run / TABLE).open(newline="") as file:
        return list(csv.DictReader(file))


def with_agent(features, **over):
    return {
        "teachers": {"features": [str(features)]},
        "weighting": {"mode": "reinforce", "prior": "uniform"},
        "distill": {"logit_weight": 1.0},
        "agent": {"interval": 2, "terminal": True},
        "split": {"reward": 0.4},
        "train": {"max_steps": 6, "validate_every": 2, "checkpoint_every": 2},
        **over,
    }


# -- numbers ---------------------------------------------------------------------------------------

COUNTS = {
    "a": CaseCounts(((8, 2, 0), (1, 1, 2)), loss=1.0, score=0.9, positive=True, hd95=(1.0, 3.0)),
    "b": CaseCounts(((4, 0, 4), (0, 0, 0)), loss=3.0, score=0.4, positive=False, hd95=(2.0, math.nan)),
    "c": CaseCounts(((0, 0, 0), (0, 3, 0)), loss=2.0, score=0.6, positive=False, hd95=(math.nan, math.inf)),
}


def test_overlap_is_pooled_over_voxels_and_averaged_over_cases_that_have_any():
    found = Validation(COUNTS, ("prostate", "cancer"), (1,))
    assert found.pooled() == {"prostate": 24 / 30, "cancer": 2 / 8}
    assert found.pooled("iou") == {"prostate": 12 / 18, "cancer": 1 / 7}
    assert found.per_case()["c"] == {"prostate": None, "cancer": 0.0}
    assert found.mean() == {"prostate": (16 / 18 + 8 / 12) / 2, "cancer": (2 / 5 + 0) / 2}
    assert found.mean("iou") == {"prostate": (8 / 10 + 4 / 8) / 2, "cancer": (1 / 4 + 0) / 2}
    assert found.excluded() == {"prostate": 1, "cancer": 1}
    assert found.focus_dice() == 2 / 8


def test_the_log_holds_pooled_and_case_numbers_detection_and_loss():
    found = Validation(COUNTS, ("prostate", "cancer"), (1,)).metrics()
    assert found["val_dice"] == pytest.approx((24 / 30 + 2 / 8) / 2)
    assert found["val_iou"] == pytest.approx((12 / 18 + 1 / 7) / 2)
    assert found["val_dice_case"] == pytest.approx(((16 / 18 + 8 / 12) / 2 + 0.2) / 2)
    assert found["val_iou_case"] == pytest.approx((0.65 + 0.125) / 2)
    assert found["val_loss"] == 2.0
    assert (found["val_auroc"], found["val_ap"]) == (1.0, 1.0)
    assert found["val_hd95"] == pytest.approx((1.5 + 3.0) / 2)


def test_detection_is_left_out_where_every_case_is_of_one_kind():
    alike = {name: CaseCounts(case.voxels, 1.0, 0.5, True) for name, case in COUNTS.items()}
    found = Validation(alike, ("prostate", "cancer"), (1,)).metrics()
    assert "val_auroc" not in found
    assert "val_hd95" not in found


def test_a_pooled_structure_that_nobody_has_scores_zero():
    assert Validation({"a": CaseCounts(((0, 0, 0),))}, ("organ",)).pooled() == {"organ": 0.0}


def test_distances_are_in_mm_of_the_case(make_job, tmp_path):
    run = fit(make_job(tmp_path / "run", {"validation": {"hd95": True, "panels": 0}}))
    rows = [row for row in records(run) if "val_dice" in row]
    assert all(row["val_hd95"] > 0 for row in rows if "val_hd95" in row)
    assert any("val_hd95" in row for row in rows)


def test_the_summary_counts_what_is_left_out(make_job, tmp_path):
    run = fit(make_job(tmp_path / "run", {"train": {"max_steps": 2}}))
    found = json.loads((run / "val" / "summary.json").read_text())
    assert set(found) >= {"pooled", "mean", "pooled_iou", "mean_iou", "cases_without", "cases", "cases_iou"}
    assert set(found["cases_without"]) == {"prostate", "cancer"}
    assert found["val_loss"] == pytest.approx(found["val_loss"])
    assert set(found["cases"]) == set(found["cases_iou"])


@pytest.mark.parametrize(
    ("over", "count"), [({}, 2), ({"max_cases": 1}, 1), ({"mode": "subset"}, 2), ({"mode": "train"}, 4)]
)
def test_what_is_validated_can_be_chosen(make_job, tmp_path, over, count):
    job = make_job(tmp_path / "run", {"validation": {"panels": 0, **over}, "train": {"max_steps": 1}})
    kept = []
    run = fit(job, kept.append)
    found = set(json.loads((run / "val" / "summary.json").read_text())["cases"])
    pool = kept[0].labelled if over.get("mode") == "train" else kept[0].val
    assert found == {case.id for case in pool[:count]}
    assert len(found) == count


# -- table -----------------------------------------------------------------------------------------


def test_the_table_has_the_columns_of_the_original_in_its_order(make_job, tmp_path, features):
    run = fit(make_job(tmp_path / "run", with_agent(features)))
    with (run / TABLE).open(newline="") as file:
        head = next(csv.reader(file))
    assert tuple(head[:10]) == COLUMNS
    assert head[:10] == [
        "epoch",
        "train_loss",
        "train_loss_cls",
        "train_loss_kd",
        "train_loss_feat",
        "train_metric",
        "val_loss",
        "val_dice",
        "val_iou",
        "learning_rate",
    ]
    assert {"weights_neg1/teacher_0", "entropy_neg1", "reward", "terminal_reward"} <= set(head)


def test_rows_are_means_of_the_steps_since_the_row_before(make_job, tmp_path, features):
    run = fit(make_job(tmp_path / "run", with_agent(features)))
    rows, logged = table(run), records(run)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    steps = {row["step"]: row for row in logged if "loss" in row}
    checked = [row for row in logged if "val_dice" in row]
    assert len(rows) == len(checked) == 3
    for number, (row, check) in enumerate(zip(rows, checked, strict=True)):
        pair = [steps[2 * number + 1], steps[2 * number + 2]]
        for column, key in (
            ("train_loss", "loss"),
            ("train_loss_cls", "loss_supervised"),
            ("train_loss_kd", "loss_logits"),
            ("train_loss_feat", "loss_features"),
            ("train_metric", "train_dice"),
            ("entropy_neg1", "entropy_neg1"),
            ("weights_logits/teacher_1", "weights_logits/teacher_1"),
        ):
            assert float(row[column]) == pytest.approx(sum(item[key] for item in pair) / 2)
        for column in ("val_loss", "val_dice", "val_iou"):
            assert float(row[column]) == pytest.approx(check[column])
        assert float(row["learning_rate"]) == pair[-1]["lr"]


def test_without_teachers_the_distillation_columns_are_zero(make_job, tmp_path):
    rows = table(fit(make_job(tmp_path / "run", {"train": {"max_steps": 4, "batch_size": 2}})))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {row["train_loss_kd"] for row in rows} == {row["train_loss_feat"] for row in rows} == {"0.0"}
    assert all(0.0 <= float(row["train_metric"]) <= 1.0 for row in rows)


def test_a_resumed_run_goes_on_with_the_table_of_its_beginning(make_job, tmp_path, features, monkeypatch):
    straight = fit(make_job(tmp_path / "straight", with_agent(features)))
    original = train.set_rate

    def fall(optimizer, cfg, step):
        if step == 5:
            raise KeyboardInterrupt
        return original(optimizer, cfg, step)

    with monkeypatch.context() as patch:
        patch.setattr(train, "set_rate", fall)
        with pytest.raises(KeyboardInterrupt):
            fit(make_job(tmp_path / "fell", with_agent(features)))
    for path in (tmp_path / "fell" / "checkpoints").glob("*.pt"):
        if path.name != "step_000002.pt":
            path.unlink()
    fell = fit(make_job(tmp_path / "fell", with_agent(features)))
    assert (fell / TABLE).read_text() == (straight / TABLE).read_text()


# -- early stopping --------------------------------------------------------------------------------


def stopping(**over):
    values = {"early_stopping": True, "patience": 2, "min_delta": 0.01, **over}
    return EarlyStopping(GraftConfig.model_validate({"method": "graft", "validation": values}))


def test_patience_is_counted_from_the_last_rise_of_at_least_the_delta():
    found = stopping()
    over = []
    for value in (0.2, 0.205, 0.22, 0.225, 0.229, 0.9):
        found.update(value)
        over.append(found.over)
    assert over == [False, False, False, False, True, False]
    assert not stopping(early_stopping=False, patience=1).over
    again = stopping()
    again.load_state_dict(found.state_dict())
    assert again.state_dict() == found.state_dict() == {"best": 0.9, "waited": 0}


def test_a_run_that_no_longer_improves_ends_and_stays_ended(make_job, tmp_path):
    over = {
        "validation": {"early_stopping": True, "patience": 2, "min_delta": 1.0, "panels": 0},
        "train": {"max_steps": 20, "validate_every": 2, "checkpoint_every": 5},
    }
    run = fit(make_job(tmp_path / "run", over))
    assert max(row["step"] for row in records(run)) == 4
    before = (run / "metrics.jsonl").read_text()
    fit(make_job(tmp_path / "run", over))
    assert (run / "metrics.jsonl").read_text() == before


# -- pictures --------------------------------------------------------------------------------------


def size_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert [round(value) for value in image.info["dpi"]] == [150, 150]
        return image.size


@pytest.mark.parametrize("kind", ["binary", "3class"])
def test_pictures_show_training_and_validation_cases(make_job, tmp_path, kind):
    over = {"target": {"kind": kind}, "validation": {"panels": 2}, "train": {"max_steps": 4, "batch_size": 2}}
    run = fit(make_job(tmp_path / "run", over))
    found = sorted(path.relative_to(run / FOLDER) for path in (run / FOLDER).rglob("*.png"))
    folders = {f"epoch_00{epoch}_{mode}" for epoch in range(2) for mode in ("train", "val")}
    assert {path.parts[0] for path in found} == folders
    assert len(found) == 8
    assert all(re.fullmatch(r"case_prostate_\d+", path.parts[1]) for path in found)
    assert {path.name for path in found} == {PICTURE}
    sizes = {size_of(run / FOLDER / path) for path in found}
    assert len(sizes) == 1


def test_each_teacher_has_a_row_where_its_files_show_the_case(make_job, tmp_path, features):
    plain = fit(make_job(tmp_path / "a", {"validation": {"panels": 1}, "train": {"max_steps": 1}}))
    over = {"teachers": {"features": [str(features)]}, "validation": {"panels": 1}, "train": {"max_steps": 1}}
    taught = fit(make_job(tmp_path / "b", over))

    def heights(run):
        paths = {path.parts[-3].rpartition("_")[2]: path for path in (run / FOLDER).rglob("*.png")}
        return {mode: size_of(path)[1] for mode, path in paths.items()}

    bare, rows = heights(plain), heights(taught)
    assert bare["train"] == bare["val"] == rows["val"]  # the files hold the training fold only
    assert rows["train"] - 4 == 2 * (bare["train"] - 4)  # image, student; then two teachers


def test_live_teachers_have_rows_for_validation_cases_too(make_job, tmp_path, teacher_runs):
    over = {"features": [str(teacher_runs)], "source": "live"}
    run = fit(make_job(tmp_path / "run", {"teachers": over, "validation": {"panels": 1}}))
    assert len({size_of(path) for path in (run / FOLDER).rglob("*.png")}) == 1


def test_drawing_changes_nothing_of_the_run(make_job, tmp_path, features):
    over = {"teachers": {"features": [str(features)]}}
    runs = [
        fit(make_job(tmp_path / str(count), {**over, "validation": {"panels": count}})) for count in (0, 2)
    ]
    assert (runs[0] / "metrics.jsonl").read_text() == (runs[1] / "metrics.jsonl").read_text()
    assert not (runs[0] / "visualizations").exists()


def test_pictures_can_be_drawn_less_often(make_job, tmp_path):
    over = {
        "validation": {"panels": 1, "panels_every": 2},
        "train": {"max_steps": 6, "batch_size": 2},
    }
    run = fit(make_job(tmp_path / "run", over))
    assert sorted(path.name for path in (run / FOLDER).iterdir()) == [
        "epoch_001_train",
        "epoch_001_val",
        "epoch_002_train",
        "epoch_002_val",
    ]


def test_volumes_lie_on_the_grid_of_the_case(make_job, tmp_path, phantoms):
    run = fit(
        make_job(tmp_path / "run", {"validation": {"panels": 1, "nifti": True}, "train": {"max_steps": 1}})
    )
    (folder,) = (run / FOLDER / "epoch_000_val").iterdir()
    case = folder.name.removeprefix("case_")
    truth = read_volume(phantoms / "labelsTr" / f"{case}.nii.gz", kind="label")
    shown = read_volume(folder / "reference.nii.gz", kind="label")
    assert np.array_equal(shown.affine, truth.affine)
    assert shown.data.shape == truth.data.shape
    inside = shown.data > 0
    assert np.array_equal(shown.data[inside], truth.data[inside])
    assert inside.any()
    assert read_volume(folder / "student.nii.gz", kind="label").data.shape == truth.data.shape


def test_the_report_shows_the_newest_pictures(make_job, tmp_path):
    run = fit(make_job(tmp_path / "run", {"validation": {"panels": 1}, "train": {"max_steps": 4}}))
    text = build_report(run).read_text()
    assert text.count("data:image/png;base64") >= 2
    assert "validation case prostate_" in text
    assert "training case prostate_" in text


def test_the_slice_with_most_cancer_is_shown_else_most_prostate_else_the_middle():
    truth = np.zeros((2, 5, 4, 4))
    mask = np.zeros((5, 4, 4))
    assert telling_slice(truth, mask, BINARY) == 2
    mask[3, 1, 1] = 1
    assert telling_slice(truth, mask, BINARY) == 3
    truth[0, 1] = 1
    assert telling_slice(truth, mask, BINARY) == 1
    truth[1, 4, :2] = 1
    assert telling_slice(truth, mask, BINARY) == 4
    classes = make_target("classes", {"background": 0, "organ": 1})
    assert telling_slice(np.ones((2, 3, 2, 2)), np.ones((3, 2, 2)), classes) == 0


def test_colours_are_those_of_the_original():
    shown = coloured(np.array([[0, 1, 2, 3]]))[0]
    names = [tuple(int(part > 120) for part in pixel) for pixel in shown]
    assert names == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 1, 0)]
    assert coloured(np.array([[9, 10]])).shape == (1, 2, 3)
    assert heat(np.array([[0.0, 1.0]])).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    assert grey(np.zeros((2, 2))).max() == 0


def test_tiles_stand_in_rows_of_their_own_height():
    tile = np.full((40, 50, 3), 7, dtype=np.uint8)
    sheet = picture([[("one", tile), ("two", tile)], [("a caption much longer than its tile is wide", tile)]])
    factor = 4
    assert sheet.shape == (2 * (40 * factor + 20) + 4, 2 * (50 * factor + 4) + 4, 3)
    assert (sheet[20 : 20 + 160, 4 : 4 + 200] == 7).all()
    assert (sheet[-20:, -100:] == 255).all()
