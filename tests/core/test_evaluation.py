"""Evaluating folders: pairing, labels, units, intervals, comparison, files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medrl.core.errors import ConfigError, DataError
from medrl.core.evaluation import evaluate_folders, group_by_patient, read_evaluation, read_labels
from medrl.core.metrics import OVERALL, dice, hd95

SPACING = (0.5, 0.5, 3.0)


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(
        nib.Nifti1Image(data.astype(np.uint8), np.diag([*SPACING, 1.0]) if affine is None else affine), path
    )
    return path


def reference(number: int) -> np.ndarray:
    data = np.zeros((10, 9, 6), np.uint8)
    data[2:7, 2:6, 1:5] = 1
    data[4:6, 3:5, 2:4] = 2
    return np.roll(data, number % 3, axis=0)


def shifted(number: int, by: int) -> np.ndarray:
    return np.roll(reference(number), by, axis=1)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """References, good predictions, worse predictions: four cases of two patients."""
    for number, case in enumerate(["p1_ED", "p1_ES", "p2_ED", "p2_ES"]):
        save(tmp_path / "refs" / f"{case}.nii.gz", reference(number))
        save(tmp_path / "good" / f"{case}.nii.gz", shifted(number, number % 2))
        save(tmp_path / "bad" / f"{case}.nii.gz", shifted(number, 1 + number % 2))
    return tmp_path / "refs", tmp_path / "good", tmp_path / "bad"


def test_rows_hold_the_metrics_of_each_case_and_label(folders):
    refs, good, _ = folders
    found = evaluate_folders(good, refs, metrics=("dice", "hd95"))
    assert found.labels == {"label_1": 1, "label_2": 2}
    assert len(found.rows) == 8
    row = next(row for row in found.rows if (row["case"], row["label"]) == ("p1_ES", "label_2"))
    pred, ref = shifted(1, 1) == 2, reference(1) == 2
    assert row["dice"] == dice(pred, ref)
    assert row["hd95"] == hd95(pred, ref, SPACING)
    assert row["patient"] == "p1"
    assert found.problems == {}


def test_pooled_dice_is_that_of_all_voxels_together(folders):
    refs, good, _ = folders
    found = evaluate_folders(good, refs, metrics=("dice",))
    pred = np.stack([shifted(k, k % 2) == 2 for k in range(4)])
    ref = np.stack([reference(k) == 2 for k in range(4)])
    assert found.pooled_dice["label_2"] == pytest.approx(dice(pred, ref))


def test_a_missing_prediction_is_named_and_the_others_are_done(folders):
    refs, good, _ = folders
    (good / "p2_ED.nii.gz").unlink()
    found = evaluate_folders(good, refs, metrics=("dice",))
    assert found.problems == {"p2_ED": "it has no prediction"}
    assert found.cases == ("p1_ED", "p1_ES", "p2_ES")
    assert evaluate_folders(good, refs, metrics=("dice",), missing_ok=True).problems == {}


def test_a_prediction_on_another_grid_or_damaged_is_named_and_the_others_are_done(folders):
    refs, good, _ = folders
    save(good / "p1_ED.nii.gz", reference(0), np.diag([1.0, 1.0, 3.0, 1.0]))
    save(good / "p1_ES.nii.gz", reference(0)[:5])
    path = good / "p2_ED.nii.gz"
    path.write_bytes(path.read_bytes()[:-6])
    found = evaluate_folders(good, refs, labels={"a": 1}, metrics=("dice",))
    assert set(found.problems) == {"p1_ED", "p1_ES", "p2_ED"}
    assert "voxel size" in found.problems["p1_ED"]
    assert "shape" in found.problems["p1_ES"]
    assert found.cases == ("p2_ES",)


def test_a_prediction_without_reference_is_listed_and_left_out(folders):
    refs, good, _ = folders
    save(good / "other.nii.gz", reference(0))
    found = evaluate_folders(good, refs, metrics=("dice",))
    assert found.extra == ("other",)
    assert "other" not in found.cases
    assert found.problems == {}


def test_folders_without_a_common_name_are_refused(folders, tmp_path):
    refs, good, _ = folders
    save(tmp_path / "else" / "x.nii.gz", reference(0))
    with pytest.raises(DataError, match="no prediction belongs"):
        evaluate_folders(tmp_path / "else", refs)
    with pytest.raises(DataError, match="no such file"):
        evaluate_folders(tmp_path / "nowhere", refs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no label map"):
        evaluate_folders(tmp_path / "empty", good)


def test_two_files_are_compared_whatever_their_names(folders):
    refs, good, _ = folders
    found = evaluate_folders(good / "p1_ES.nii.gz", refs / "p1_ED.nii.gz", metrics=("dice",))
    assert found.cases == ("p1_ED",)
    assert found.problems == {}


# -- labels -----------------------------------------------------------------------------------------------


def dataset(root: Path, refs: Path) -> Path:
    for path in refs.iterdir():
        save(root / "imagesTr" / path.name.replace(".nii.gz", "_0000.nii.gz"), reference(0))
        (root / "labelsTr").mkdir(exist_ok=True)
        (root / "labelsTr" / path.name).write_bytes(path.read_bytes())
    content = {
        "channel_names": {"0": "T2"},
        "labels": {"background": 0, "gland": 1, "lesion": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("part", ["", "labelsTr"])
def test_label_names_come_from_the_dataset_of_the_references(folders, tmp_path, part):
    refs, good, _ = folders
    root = dataset(tmp_path / "Dataset001", refs)
    found = evaluate_folders(good, root / part, metrics=("dice",))
    assert found.labels == {"gland": 1, "lesion": 2}
    assert len(found.rows) == 8


def test_a_value_that_the_dataset_does_not_know_is_a_problem_of_its_case(folders, tmp_path):
    refs, good, _ = folders
    root = dataset(tmp_path / "Dataset001", refs)
    save(good / "p1_ED.nii.gz", reference(0) * 3)
    found = evaluate_folders(good, root, metrics=("dice",))
    assert "without a name: 3, 6" in found.problems["p1_ED"]
    assert len(found.cases) == 3


def test_label_names_come_from_the_predictions_where_no_dataset_is_known(folders):
    refs, good, _ = folders
    (good / "labels.json").write_text(json.dumps({"labels": {"background": 0, "gland": 1, "lesion": 2}}))
    assert evaluate_folders(good, refs, metrics=("dice",)).labels == {"gland": 1, "lesion": 2}


def test_given_labels_may_be_regions_and_leave_values_out(folders):
    refs, good, _ = folders
    found = evaluate_folders(good, refs, labels={"whole": (1, 2)}, metrics=("dice",))
    assert {row["label"] for row in found.rows} == {"whole"}
    assert found.rows[1]["dice"] == dice(shifted(1, 1) > 0, reference(1) > 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"liver": 1, "whole": [1, 2]}', {"liver": 1, "whole": (1, 2)}),
        ('{"labels": {"background": 0, "liver": 1}}', {"background": 0, "liver": 1}),
        ('{"labels": {"0": "background", "1": "liver"}}', {"background": 0, "liver": 1}),
        ('{"liver": "1"}', {"liver": 1}),
    ],
)
def test_label_files_of_every_common_form_are_read(tmp_path, text, expected):
    path = tmp_path / "labels.json"
    path.write_text(text)
    assert read_labels(path) == expected


@pytest.mark.parametrize("text", ["", "[1]", '{"liver": 0.5}', '{"liver": -1}', '{"background": 0}', "{}"])
def test_a_label_file_that_maps_no_names_to_values_is_refused(tmp_path, text):
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"labels\.json"):
        read_labels(path)


# -- units, intervals, comparison -------------------------------------------------------------------------


def test_grouping_by_patient_averages_the_cases_of_each(folders):
    refs, good, _ = folders
    found = evaluate_folders(good, refs, metrics=("dice",), by="patient")
    by_case = {row["case"]: row["dice"] for row in found.rows if row["label"] == "label_1"}
    units = group_by_patient(found.rows, ("dice",))
    unit = {row["case"]: row["dice"] for row in units if row["label"] == "label_1"}
    assert unit == {
        "p1": (by_case["p1_ED"] + by_case["p1_ES"]) / 2,
        "p2": (by_case["p2_ED"] + by_case["p2_ES"]) / 2,
    }
    assert found.summary["label_1"]["dice"].n == 2
    assert found.by == "patient"
    assert len(found.rows) == 8


def test_intervals_enclose_the_mean_and_come_only_when_asked_for(folders):
    refs, good, _ = folders
    plain = evaluate_folders(good, refs, metrics=("dice",)).summary[OVERALL]["dice"]
    found = evaluate_folders(good, refs, metrics=("dice",), ci=True, resamples=500).summary[OVERALL]["dice"]
    assert plain.low is None
    assert found.low < found.mean == plain.mean < found.high


def test_comparison_finds_the_better_method_in_both_directions_of_metrics(folders, tmp_path):
    refs, good, bad = tmp_path / "r", tmp_path / "g", tmp_path / "b"
    for number in range(12):
        save(refs / f"c{number}.nii.gz", reference(0))
        spot = reference(0)
        spot[2, 2, 1 + number % 4] = 0
        save(good / f"c{number}.nii.gz", spot)
        save(bad / f"c{number}.nii.gz", np.roll(spot, 1 + number % 2, axis=1))
    found = evaluate_folders(good, refs, labels={"whole": (1, 2)}, metrics=("dice", "hd95"), compare=bad)
    by_metric = {(row.label, row.metric): row for row in found.comparison}
    assert by_metric["whole", "dice"].difference > 0 > by_metric["whole", "hd95"].difference
    for row in found.comparison:
        assert (row.n, row.wins_a, row.wins_b, row.better) == (12, 12, 0, "a")
        assert row.p_value < row.p_holm < 0.05
        assert row.mean_a - row.mean_b == pytest.approx(row.difference)
    mirrored = evaluate_folders(bad, refs, labels={"whole": (1, 2)}, metrics=("dice", "hd95"), compare=good)
    assert {row.better for row in mirrored.comparison} == {"b"}


def test_a_method_compared_with_itself_is_no_different(folders):
    refs, good, _ = folders
    for row in evaluate_folders(good, refs, metrics=("dice",), compare=good).comparison:
        assert (row.difference, row.p_value, row.better, row.ties) == (0.0, 1.0, "", 4)


def test_comparison_uses_only_cases_that_both_have(folders):
    refs, good, bad = folders
    (bad / "p1_ED.nii.gz").unlink()
    found = evaluate_folders(good, refs, metrics=("dice",), compare=bad)
    assert {row.n for row in found.comparison} == {3}
    assert found.problems == {f"p1_ED in {bad}": "it has no prediction"}
    assert len(found.cases) == 4


# -- files ------------------------------------------------------------------------------------------------


def test_files_are_strict_and_read_back_equal(folders, tmp_path):
    refs, good, bad = folders
    save(good / "p1_ED.nii.gz", np.zeros((10, 9, 6)))
    found = evaluate_folders(good, refs, metrics=("dice", "hd95"), compare=bad, ci=True, resamples=200)
    json_path, csv_path = found.write(tmp_path / "result")
    content = json.loads(json_path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} in JSON"))
    empty = next(row for row in content["rows"] if row["case"] == "p1_ED")
    assert (empty["dice"], empty["hd95"]) == (0.0, "inf")
    with csv_path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert math.isinf(float(rows[0]["hd95"]))
    again = read_evaluation(json_path)
    assert repr(again) == repr(found)


def test_a_damaged_evaluation_file_is_refused(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text('{"schema": 1}')
    with pytest.raises(DataError, match=r"evaluation\.json"):
        read_evaluation(path)


def test_an_unknown_unit_is_refused(folders):
    refs, good, _ = folders
    with pytest.raises(ConfigError, match="slice"):
        evaluate_folders(good, refs, by="slice")
