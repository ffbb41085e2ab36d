"""Predicting many cases: outputs, ensembles, side outputs, continuing, parts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from medrl.core.checkpoint import write_checkpoint
from medrl.core.errors import CheckpointError, ConfigError, DataError
from medrl.core.jobs import PredictJob
from medrl.core.predicting import entropy, read_report
from medrl.core.types import Volume

OBLIQUE = np.array([[-0.5, 0, 0, 57.0], [0, -0.48, -0.9, 82.0], [0, -0.15, 2.8, -27.0], [0, 0, 0, 1.0]])
LABELS = {"background": 0, "organ": 1, "lesion": 2}


class Threshold:
    """Knows three classes of voxels by their grey value; `sure` is how sure it is."""

    channel_names = ("T2",)

    def __init__(self, sure: float = 0.8, labels: dict[str, int] | None = None) -> None:
        self.sure = sure
        self.label_names = labels or LABELS
        self.calls: list[dict] = []

    def probabilities(self, volume: Volume, *, tta: bool, overlap: float) -> np.ndarray:
        self.calls.append({"tta": tta, "overlap": overlap})
        labels = np.digitize(volume.data[0], [0.5, 1.5])
        rest = (1 - self.sure) / 2
        return np.stack([np.where(labels == k, self.sure, rest) for k in range(3)])

    def decode(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities.argmax(axis=0)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(3):
        data = np.random.default_rng(number).integers(0, 3, (6, 7, 5)).astype(np.float32)
        image = nib.Nifti1Image(data, OBLIQUE)
        image.header.set_xyzt_units("mm", "sec")
        image.set_sform(OBLIQUE, code=1)
        image.set_qform(OBLIQUE, code=1)
        image.header["descrip"] = b"MUSTERMANN^MAX"
        nib.save(image, folder / f"case{number}.nii.gz")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(
        tmp_path / "model.pt", {"net": {"weight": torch.ones(2)}}, {"method": "toy", "step": 7}
    ).path


@pytest.fixture
def make_job(tmp_path, scans, checkpoint):
    def make(**changes) -> PredictJob:
        seen: list[tuple] = []
        values = {
            "method": "toy",
            "inputs": scans,
            "output": tmp_path / "out",
            "checkpoints": [checkpoint],
            "manager": SimpleNamespace(
                notify=lambda hook, **told: seen.append((hook, told["case"])), seen=seen
            ),
        }
        return PredictJob(**(values | changes))

    return make


def truth(scans: Path, case: str) -> np.ndarray:
    return np.asarray(nib.load(scans / f"{case}.nii.gz").dataobj).astype(int)


def test_every_case_gets_a_segmentation_on_the_grid_of_its_input(make_job, scans):
    job = make_job()
    outcome = job.run(lambda _: Threshold())
    assert outcome.done == ("case0", "case1", "case2")
    assert outcome.failed == {}
    for case in outcome.done:
        image = nib.load(scans / f"{case}.nii.gz")
        found = nib.load(outcome.outputs[case])
        assert np.array_equal(np.asarray(found.dataobj), truth(scans, case))
        assert np.array_equal(found.affine, image.affine)
        assert (int(found.header["sform_code"]), int(found.header["qform_code"])) == (1, 1)
        assert found.header.get_zooms() == image.header.get_zooms()
        assert found.header.get_xyzt_units() == image.header.get_xyzt_units()
        assert found.get_data_dtype() == np.uint8
    assert job.manager.seen == [("medrl_case_predicted", case) for case in outcome.done]


def test_the_report_tells_versions_model_seconds_and_files(make_job):
    outcome = make_job(command=("medrl", "predict")).run(lambda _: Threshold())
    content = json.loads(outcome.report.read_text())
    assert content["counts"] == {"done": 3, "failed": 0}
    assert content["command"] == ["medrl", "predict"]
    assert content["checkpoints"][0]["step"] == 7
    assert len(content["checkpoints"][0]["sha256"]) == 64
    assert content["versions"]["torch"] == torch.__version__.split("+")[0] or content["versions"]["torch"]
    record = content["cases"]["case1"]
    assert record["output"] == "case1.nii.gz"
    assert set(record["seconds"]) == {"read", "predict", "write"}
    assert list(record["files"]) == ["case1.nii.gz"]


def test_no_header_text_of_the_input_reaches_the_output(make_job, tmp_path):
    make_job(preview=True, save_uncertainty=True, statistics=True).run(lambda _: Threshold())
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.name.endswith(".gz"):
                content = nib.load(path).header.binaryblock
            assert b"MUSTERMANN" not in content


def test_label_names_lie_beside_the_segmentations(make_job, tmp_path):
    make_job().run(lambda _: Threshold())
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {"labels": LABELS}


def test_options_reach_the_method(make_job):
    predictor = Threshold()
    make_job(tta=True, overlap=0.25).run(lambda _: predictor)
    assert predictor.calls == [{"tta": True, "overlap": 0.25}] * 3


def test_folds_are_averaged_on_their_probabilities(make_job, checkpoint, tmp_path):
    folds = iter([Threshold(0.6), Threshold(0.9), Threshold(0.9)])
    outcome = make_job(checkpoints=[checkpoint] * 3, save_probabilities=True).run(lambda _: next(folds))
    with np.load(tmp_path / "out" / "probabilities" / "case0.npz") as found:
        assert found["probabilities"].dtype == np.float32
        assert found["probabilities"].max(axis=0) == pytest.approx(np.full((6, 7, 5), 0.8), abs=1e-6)
        assert np.array_equal(found["affine"], nib.load(outcome.outputs["case0"]).affine)


def test_folds_with_other_labels_are_refused_before_any_case(make_job, checkpoint, tmp_path):
    folds = iter([Threshold(), Threshold(labels={"background": 0, "other": 1, "lesion": 2})])
    with pytest.raises(CheckpointError, match="labels"):
        make_job(checkpoints=[checkpoint] * 2).run(lambda _: next(folds))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_method_is_refused_before_any_case(make_job, tmp_path):
    with pytest.raises(CheckpointError, match="toy"):
        make_job(method="other").run(lambda _: Threshold())
    assert not (tmp_path / "out").exists()


def test_a_method_may_say_itself_how_uncertain_its_labels_are(make_job, scans, tmp_path):
    class Doubtful(Threshold):
        def uncertainty(self, volume, labels):
            return np.where(labels > 0, 0.25, 0.0).astype(np.float32)

    make_job(save_uncertainty=True).run(lambda _: Doubtful())
    labels = np.asarray(nib.load(tmp_path / "out" / "case2.nii.gz").dataobj)
    found = np.asarray(nib.load(tmp_path / "out" / "uncertainty" / "case2.nii.gz").dataobj)
    assert labels.any()
    assert np.array_equal(found, np.where(labels > 0, 0.25, 0.0))


def test_uncertainty_preview_and_statistics_are_written_where_they_are_asked_for(make_job, scans, tmp_path):
    out = tmp_path / "out"
    make_job(save_uncertainty=True, preview=True, statistics=True).run(lambda _: Threshold())
    uncertainty = nib.load(out / "uncertainty" / "case2.nii.gz")
    expected = -(0.8 * np.log(0.8) + 0.2 * np.log(0.1)) / np.log(3)
    assert np.asarray(uncertainty.dataobj) == pytest.approx(np.full((6, 7, 5), expected), abs=1e-5)
    assert np.array_equal(uncertainty.affine, nib.load(out / "case2.nii.gz").affine)
    assert (out / "previews" / "case2.png").read_bytes().startswith(b"\x89PNG")
    with (out / "statistics.csv").open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    voxel_ml = abs(np.linalg.det(OBLIQUE[:3, :3])) / 1000
    assert float(rows["case2"]["organ_ml"]) == pytest.approx(
        (truth(scans, "case2") == 1).sum() * voxel_ml, abs=1e-4
    )
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [
        "case0.nii.gz", "case1.nii.gz", "case2.nii.gz"
    ]  # fmt: skip


def test_entropy_is_0_when_sure_and_1_when_all_classes_are_alike():
    p = np.zeros((3, 1, 1, 2), np.float32)
    p[0, ..., 0] = 1.0
    p[:, ..., 1] = 1 / 3
    assert entropy(p).ravel() == pytest.approx([0.0, 1.0], abs=1e-6)
    regions = np.array([[0.5, 1.0], [1.0, 1.0]], np.float32).reshape(2, 1, 1, 2)
    assert entropy(regions).ravel() == pytest.approx([1.0, 0.0], abs=1e-6)


# -- continuing and parts ---------------------------------------------------------------------------------


def test_continue_skips_what_is_finished_and_verified(make_job):
    make_job().run(lambda _: Threshold())
    predictor = Threshold()
    job = make_job(continue_=True)
    outcome = job.run(lambda _: predictor)
    assert outcome.skipped == outcome.done == ("case0", "case1", "case2")
    assert predictor.calls == []
    assert job.manager.seen == []


@pytest.mark.parametrize("change", ["damaged", "missing", "other image"])
def test_continue_repeats_a_case_whose_files_are_not_what_they_were(make_job, scans, tmp_path, change):
    make_job().run(lambda _: Threshold())
    path = tmp_path / "out" / "case1.nii.gz"
    intact = path.read_bytes()
    if change == "damaged":
        path.write_bytes(intact[:-3] + b"xyz")
    elif change == "missing":
        path.unlink()
    else:
        (scans / "case1.nii.gz").write_bytes((scans / "case2.nii.gz").read_bytes())
    outcome = make_job(continue_=True).run(lambda _: Threshold())
    assert outcome.skipped == ("case0", "case2")
    assert np.array_equal(np.asarray(nib.load(path).dataobj), truth(scans, "case1"))


def test_continue_repeats_every_case_for_another_model_or_option(make_job, tmp_path):
    make_job().run(lambda _: Threshold())
    other = write_checkpoint(tmp_path / "b.pt", {"net": {"weight": torch.zeros(2)}}, {"method": "toy"}).path
    assert make_job(continue_=True, checkpoints=[other]).run(lambda _: Threshold()).skipped == ()
    assert make_job(continue_=True, checkpoints=[other], tta=True).run(lambda _: Threshold()).skipped == ()


def test_continue_repeats_a_case_that_lacks_what_is_asked_for_now(make_job, tmp_path):
    make_job().run(lambda _: Threshold())
    assert make_job(continue_=True, save_uncertainty=True).run(lambda _: Threshold()).skipped == ()
    assert (tmp_path / "out" / "uncertainty" / "case0.nii.gz").is_file()


def test_parts_share_the_cases_without_overlap_or_rest(make_job, tmp_path):
    found = [make_job(part=(i, 2)).run(lambda _: Threshold()) for i in (1, 2)]
    assert [outcome.done for outcome in found] == [("case0", "case2"), ("case1",)]
    assert [outcome.report.name for outcome in found] == ["report_part1of2.json", "report_part2of2.json"]
    assert make_job(continue_=True).run(lambda _: Threshold()).skipped == ("case0", "case1", "case2")


def test_a_part_that_does_not_exist_is_refused(make_job):
    with pytest.raises(ConfigError, match="part 3 of 2"):
        make_job(part=(3, 2)).run(lambda _: Threshold())


def test_one_case_may_be_given_a_file_of_its_own(make_job, scans, tmp_path):
    target = tmp_path / "one" / "liver.nii.gz"
    outcome = make_job(inputs=scans / "case1.nii.gz", output=target).run(lambda _: Threshold())
    assert outcome.outputs == {"case1": target}
    assert np.array_equal(np.asarray(nib.load(target).dataobj), truth(scans, "case1"))
    with pytest.raises(ConfigError, match="3 cases"):
        make_job(output=target.with_name("x.nii.gz")).run(lambda _: Threshold())


def test_an_output_that_would_overwrite_its_input_is_refused(make_job, scans):
    before = (scans / "case1.nii.gz").read_bytes()
    with pytest.raises(DataError, match="overwrite"):
        make_job(inputs=scans / "case1.nii.gz", output=scans / "case1.nii.gz").run(lambda _: Threshold())
    with pytest.raises(DataError, match="overwrite"):
        make_job(output=scans).run(lambda _: Threshold())
    assert (scans / "case1.nii.gz").read_bytes() == before


def test_a_report_is_read_back_as_it_was_written(make_job):
    outcome = make_job(statistics=True).run(lambda _: Threshold())
    report = read_report(outcome.report)
    assert set(report.cases) == {"case0", "case1", "case2"}
    assert set(report.cases["case0"].volumes_ml) == {"organ", "lesion"}
    outcome.report.write_text("{")
    with pytest.raises(DataError, match="report"):
        read_report(outcome.report)


def test_progress_is_told_for_each_case_and_at_the_end(make_job):
    told = []
    make_job(progress=lambda *step: told.append(step)).run(lambda _: Threshold())
    assert told == [(0, 3, "case0"), (1, 3, "case1"), (2, 3, "case2"), (3, 3, "")]
