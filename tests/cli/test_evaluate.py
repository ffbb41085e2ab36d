import csv
import json

import nibabel as nib
import numpy as np
import pytest

from medrl.cli.evaluate import interval_text, probability


def write(path, boxes):
    """Write a label map of 12 x 12 x 12 voxels of 1 mm with boxes of labels."""
    data = np.zeros((12, 12, 12), dtype=np.uint8)
    for value, (start, stop) in boxes.items():
        data[start:stop, 2:6, 2:6] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)


@pytest.fixture
def folders(toy):
    """Eight references; folder 'good' is right, 'half' overlaps by half."""
    for index in range(8):
        write(toy / "ref" / f"c{index}.nii.gz", {1: (2, 6)})
        write(toy / "good" / f"c{index}.nii.gz", {1: (2, 6)})
        write(toy / "half" / f"c{index}.nii.gz", {1: (4, 8)})
    return toy


def test_a_table_shows_the_mean_of_each_metric(medrl, folders):
    answer = medrl("evaluate", "-p", "half", "-r", "ref", "--metrics", "dice,iou")
    rows = [line.split() for line in answer.err.splitlines()]
    assert answer.code == 0
    assert ["overall", "Dice", "0.5000", "0.0000", "0.5000", "8", "0", "0"] in rows
    assert ["overall", "IoU", "0.3333", "0.0000", "0.3333", "8", "0", "0"] in rows


def test_json_holds_every_row_and_the_summary(medrl, folders):
    facts = json.loads(medrl("evaluate", "-p", "half", "-r", "ref", "--metrics", "dice", "--json").out)
    assert len(facts["rows"]) == 8
    assert facts["summary"]["overall"]["dice"]["mean"] == 0.5


def test_intervals_are_added_on_demand(medrl, folders):
    write(folders / "half" / "c0.nii.gz", {1: (2, 6)})
    plain = medrl("evaluate", "-p", "half", "-r", "ref", "--metrics", "dice")
    with_ci = medrl("evaluate", "-p", "half", "-r", "ref", "--metrics", "dice", "--ci", "--json")
    assert "interval" not in plain.err
    found = json.loads(with_ci.out)["summary"]["overall"]["dice"]
    assert found["low"] < found["mean"] < found["high"]


def test_compare_names_the_better_one_with_a_paired_test(medrl, folders):
    answer = medrl("evaluate", "-p", "good", "-r", "ref", "--metrics", "dice", "--compare", "half")
    assert answer.code == 0
    assert "good (A) against half (B)" in answer.err
    assert "good is better in" in answer.err
    assert "8/0/0" in answer.err
    same = medrl("evaluate", "-p", "good", "-r", "ref", "--metrics", "dice", "--compare", "good")
    assert "no difference" in same.err


def test_missing_and_damaged_predictions_are_named_the_others_done_and_the_exit_code_is_3(medrl, folders):
    (folders / "half" / "c1.nii.gz").unlink()
    damaged = folders / "half" / "c2.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:60])
    answer = medrl("evaluate", "-p", "half", "-r", "ref", "--metrics", "dice")
    assert answer.code == 3
    assert "problem: case c1: it has no prediction" in answer.err
    assert "problem: case c2" in answer.err
    assert "6 cases, 2 not evaluated" in answer.err
    (folders / "half" / "c2.nii.gz").unlink()
    assert medrl("evaluate", "-p", "half", "-r", "ref", "--metrics", "dice", "--missing-ok").code == 0


def test_empty_against_empty_is_left_out_and_counted(medrl, folders):
    write(folders / "ref" / "c0.nii.gz", {})
    write(folders / "half" / "c0.nii.gz", {})
    (folders / "labels.json").write_text(json.dumps({"background": 0, "liver": 1}))
    answer = medrl("evaluate", "-p", "half", "-r", "ref", "--metrics", "dice", "--labels", "labels.json")
    rows = [line.split() for line in answer.err.splitlines()]
    assert ["liver", "Dice", "0.5000", "0.0000", "0.5000", "7", "1", "0"] in rows
    assert "left out: neither segmentation nor reference has the label" in answer.err


def test_results_are_written_as_json_and_csv(medrl, folders):
    assert medrl("evaluate", "-p", "half", "-r", "ref", "--metrics", "dice", "-o", "e").code == 0
    assert json.loads((folders / "e" / "evaluation.json").read_text())["cases"] == 8
    rows = list(csv.DictReader((folders / "e" / "metrics.csv").open()))
    assert "half" in (folders / "e" / "report.html").read_text()
    assert {row["case"] for row in rows} == {f"c{index}" for index in range(8)}


def test_cases_are_shown_on_demand(medrl, folders):
    assert "c7" not in medrl("evaluate", "-p", "half", "-r", "ref", "--metrics", "dice", "-q").err
    assert "c7  " in medrl("evaluate", "-p", "half", "-r", "ref", "--metrics", "dice", "--cases").err


def test_an_unknown_metric_gives_the_nearest(medrl, folders):
    answer = medrl("evaluate", "-p", "half", "-r", "ref", "--metrics", "dise")
    assert (answer.code, "did you mean 'dice'?" in answer.err) == (2, True)


def test_missing_folders_are_named_with_their_option(medrl, folders):
    answer = medrl("evaluate", "-p", "nowhere", "-r", "ref")
    assert (answer.code, "-p nowhere" in answer.err) == (2, True)
    answer = medrl("evaluate", "-p", "half", "-r", "ref", "--compare", "nothing")
    assert (answer.code, "--compare nothing" in answer.err) == (2, True)


def test_small_probabilities_are_bounds_and_undefined_numbers_dashes():
    assert [probability(p) for p in (0.0001, 0.0421, float("nan"), None)] == ["< 0.001", "0.042", "–", "–"]
    assert [interval_text(0.0, 1.0), interval_text(None, 1.0)] == ["0.0000 to 1.0000", "–"]
