"""``medrl rl4seg check-masks``: folders of label maps, one bad file among good ones, JSON and CSV."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner

from medrl.core.errors import ConfigError, DataError
from medrl.core.validity import load_rules
from medrl.plugins.rl4seg.checking import check_folder
from medrl.plugins.rl4seg.commands_checks import check_masks

ECHO = load_rules("echo")
CAMUS = Path(__file__).resolve().parents[3] / "shared" / "data" / "camus_4ch" / "labels"


def mask() -> np.ndarray:
    """A valid mask in the order of the files, (x, y)."""
    rows = np.zeros((64, 64), dtype=np.uint8)
    rows[10:50, 20:44] = 2
    rows[16:50, 26:38] = 1
    return np.ascontiguousarray(rows.T)


def holed() -> np.ndarray:
    found = mask()
    found[32, 30] = 0
    return found


def write(path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([0.5, 0.5, 1, 1])), path)


@pytest.fixture
def folder(tmp_path):
    """A tree with valid and invalid masks, a stack, another format, and files that are no label maps."""
    root = tmp_path / "masks"
    write(root / "good.nii.gz", mask()[..., None])
    write(root / "a" / "b" / "plane.nii", mask())
    write(root / "a" / "holed.nii.gz", holed()[..., None])
    write(root / "a" / "first_axis.nii.gz", mask()[None])
    write(root / "a" / "empty.nii.gz", mask()[..., None] * 0)
    write(root / "stack.nii.gz", np.stack([mask(), holed(), mask()], axis=-1))
    write(root / "time.nii.gz", np.stack([mask(), mask()], axis=-1)[:, :, None])
    write(root / "atrium.nii.gz", np.where(np.arange(64) > 55, 3, mask())[..., None].astype(np.uint8))
    sitk.WriteImage(sitk.GetImageFromArray(mask().T[None]), str(root / "other.mha"))
    write(root / "half.nii.gz", mask()[..., None] * np.float32(0.5))
    (root / "torn.nii.gz").write_bytes((root / "good.nii.gz").read_bytes()[:60])
    (root / "notes.txt").write_text("no image")
    write(root / ".hidden" / "x.nii.gz", mask())
    return root


VERDICTS = {
    "a/b/plane.nii": True,
    "a/empty.nii.gz": False,
    "a/first_axis.nii.gz": True,
    "a/holed.nii.gz": False,
    "atrium.nii.gz": True,
    "good.nii.gz": True,
    "half.nii.gz": None,
    "other.mha": True,
    "stack.nii.gz": False,
    "time.nii.gz": True,
    "torn.nii.gz": None,
}


def test_every_file_has_a_verdict_and_a_bad_one_stops_nothing(folder):
    found = check_folder(folder, ECHO)
    verdicts = {result.file: None if result.error else result.valid for result in found.files}
    assert verdicts == VERDICTS
    by_name = {result.file: result for result in found.files}
    assert "whole numbers" in by_name["half.nii.gz"].error
    assert "ends inside its header" in by_name["torn.nii.gz"].error
    assert [report.valid for report in by_name["stack.nii.gz"].frames] == [True, False, True]
    assert by_name["stack.nii.gz"].failed["holes_in_lv"] == 1
    assert len(by_name["time.nii.gz"].frames) == 2
    assert by_name["atrium.nii.gz"].unlisted == (3,)
    assert by_name["good.nii.gz"].unlisted == ()
    assert found.counts == {
        "files": 11,
        "valid": 6,
        "invalid": 3,
        "unreadable": 2,
        "frames": 12,
        "valid_frames": 9,
    }
    assert found.failed["holes_in_lv"] == 2
    assert found.failed["lv_pixels"] == 1


def test_worker_processes_find_the_same(folder):
    assert check_folder(folder, ECHO, workers=2).to_json() == check_folder(folder, ECHO).to_json()


def test_the_spacing_of_each_file_is_used_for_areas(tmp_path):
    (tmp_path / "area.yaml").write_text(
        "medrl_rules: 1\nrows: y\nlabels: {lv: 1}\n"
        "rules: {lv_mm2: {measure: area, region: lv, unit: mm2, min: 102, max: 102}}\n"
    )
    write(tmp_path / "m.nii.gz", mask()[..., None])
    (result,) = check_folder(tmp_path, load_rules(tmp_path / "area.yaml")).files
    assert result.frames[0].values == {"lv_mm2": 12 * 34 * 0.25}


def test_a_single_file_is_accepted_and_a_folder_without_images_is_an_error(folder, tmp_path):
    assert check_folder(folder / "good.nii.gz", ECHO).files[0].file == "good.nii.gz"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no image is found"):
        check_folder(tmp_path / "nothing", ECHO)
    with pytest.raises(DataError, match="not found"):
        check_folder(tmp_path / "absent", ECHO)


def test_a_volume_with_channels_is_told_as_such(tmp_path):
    write(tmp_path / "five.nii.gz", np.zeros((8, 8, 8, 2), dtype=np.uint8))
    (result,) = check_folder(tmp_path, ECHO).files
    assert "no frames" in result.error


def run(*arguments):
    return CliRunner().invoke(check_masks, [str(item) for item in arguments])


def test_the_command_prints_a_table_and_ends_with_3_if_a_file_is_unreadable(folder):
    done = run(folder)
    assert done.exit_code == 3
    assert done.stdout == ""
    lines = {line.split()[0]: line for line in done.stderr.splitlines() if line}
    assert "not valid" in lines["a/holed.nii.gz"]
    assert "holes_in_lv 1" in lines["a/holed.nii.gz"]
    assert "2/3 frames valid" in lines["stack.nii.gz"]
    assert "unreadable" in lines["torn.nii.gz"]
    assert lines["holes_in_lv"].split(maxsplit=1)[1] == "not passed by 2 of 12 label maps"
    assert "taken for background: 3" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "11 files by the rules echo: 6 valid, 3 not valid, 2 unreadable; 9 of 12 label maps valid (75.0%)"
    )


def test_masks_that_are_not_valid_are_no_failure_of_the_command(folder):
    done = run(folder / "a")
    assert done.exit_code == 0
    assert "4 files by the rules echo: 2 valid, 2 not valid, 0 unreadable" in done.stderr


def test_json_goes_to_stdout_alone_and_nan_becomes_null(folder):
    done = run(folder, "--json")
    found = json.loads(done.stdout)
    files = {item["file"]: item for item in found["files"]}
    assert found["counts"]["files"] == 11
    assert found["rules"]["labels"] == {"background": 0, "lv": 1, "myo": 2}
    assert files["a/empty.nii.gz"]["frames"][0]["values"]["erosion_ratio_before_myo_split"] is None
    assert files["good.nii.gz"]["frames"][0]["values"]["erosion_ratio_before_myo_split"] == 0.75
    assert files["a/holed.nii.gz"]["failed"] == [
        "holes_in_lv",
        "holes_in_epi",
        "frontier_ratio_between_lv_and_bg_no_atr",
    ]
    assert set(files["torn.nii.gz"]) == {"file", "error"}


def test_files_of_results_are_json_or_csv_by_their_name(folder, tmp_path):
    assert run(folder, "-o", tmp_path / "new" / "r.json").exit_code == 3
    assert json.loads((tmp_path / "new" / "r.json").read_text())["counts"]["valid"] == 6
    done = run(folder, "-o", tmp_path / "r.csv")
    assert f"written: {tmp_path / 'r.csv'}" in done.stderr
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert len(rows) == 12 + 2
    assert [row["valid"] for row in rows if row["file"] == "stack.nii.gz"] == ["true", "false", "true"]
    (torn,) = [row for row in rows if row["file"] == "torn.nii.gz"]
    assert torn["error"]
    (empty,) = [row for row in rows if row["file"] == "a/empty.nii.gz"]
    assert empty["width_ratio_between_lv_and_myo"] == "nan"
    done = run(folder, "-o", tmp_path / "r.txt")
    assert isinstance(done.exception, ConfigError)
    assert "ends in .json or .csv" in str(done.exception)


def test_rules_labels_and_orientation_are_options(tmp_path):
    write(tmp_path / "m" / "x.nii.gz", mask().T[..., None] * 3)
    arguments = [tmp_path / "m", "--label", "lv=3", "--label", "myo=6", "--rows", "x"]
    assert "1 file by the rules echo: 1 valid" in run(*arguments).stderr
    assert "0 valid, 1 not valid" in run(*arguments[:-2]).stderr
    done = run(tmp_path / "m", "--rules", "echo_atrium", "--label", "lv=x")
    assert isinstance(done.exception, ConfigError)
    done = run(tmp_path / "m", "--rules", "echos")
    assert "did you mean 'echo'" in str(done.exception)


def test_the_command_imports_nothing_heavy():
    code = "import sys, medrl.plugins.rl4seg.commands_checks; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert loaded & {"torch", "monai", "nibabel", "numpy", "scipy", "skimage", "pydantic"} == set()


def test_every_option_explains_itself():
    assert check_masks.help
    for item in check_masks.params:
        assert item.param_type_name == "argument" or item.help


def test_a_folder_of_images_is_told_from_one_of_label_maps(tmp_path):
    write(tmp_path / "image.nii.gz", np.arange(64 * 64, dtype=np.int16).reshape(64, 64, 1) % 99)
    assert "note: 1 of the files hold so many values that they look like images" in run(tmp_path).stderr


@pytest.mark.realdata
@pytest.mark.skipif(not CAMUS.is_dir(), reason="the real images are not here")
def test_masks_drawn_by_experts_are_valid_in_the_orientation_of_their_files():
    assert check_folder(CAMUS, ECHO).counts["valid"] == 64
    assert check_folder(CAMUS, load_rules("echo", rows="x")).counts["valid"] == 5
    with_atrium = check_folder(CAMUS, load_rules("echo_atrium"))
    wrong = {result.file: result.failed for result in with_atrium.files if not result.valid}
    assert wrong == {"patient0026_4CH_ES_gt.nii.gz": {"frontier_ratio_between_myo_and_atrium": 1}}
