"""Faults of a prediction run: one bad case is recorded, the others are done, nothing half is left."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from medrl.core import predicting
from medrl.core.checkpoint import write_checkpoint
from medrl.core.errors import CheckpointError, DataError, RuntimeFault
from medrl.core.jobs import PredictJob
from medrl.core.types import Volume


class Bright:
    """Segments bright voxels; `spoil(volume, probabilities)` may damage the answer or raise."""

    channel_names = ("image",)

    def __init__(self, spoil=None) -> None:
        self.label_names = {"background": 0, "bright": 1}
        self.spoil = spoil

    def probabilities(self, volume: Volume, *, tta: bool, overlap: float) -> np.ndarray:
        foreground = (volume.data[0] > 0).astype(np.float32)
        found = np.stack([1 - foreground, foreground])
        if self.spoil is not None and "case1" in str(volume.source):
            return self.spoil(found)
        return found

    def decode(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities.argmax(axis=0).astype(np.uint8)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(3):
        data = np.random.default_rng(number).normal(size=(8, 7, 6)).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.diag([1.0, 1.0, 2.0, 1.0])), folder / f"case{number}.nii.gz")
    return folder


@pytest.fixture
def job(tmp_path: Path, scans: Path) -> PredictJob:
    model = write_checkpoint(tmp_path / "model.pt", {"net": {"w": torch.ones(1)}}, {"method": "toy"}).path
    return PredictJob(
        method="toy",
        inputs=scans,
        output=tmp_path / "out",
        checkpoints=[model],
        manager=SimpleNamespace(notify=lambda *_args, **_told: None),
    )


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.name.startswith("."))


def test_a_damaged_image_fails_by_name_and_the_others_are_done(job, scans):
    path = scans / "case1.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    outcome = job.run(lambda _: Bright())
    assert outcome.done == ("case0", "case2")
    assert list(outcome.failed) == ["case1"]
    assert "case1" in outcome.failed["case1"]
    assert not (job.output / "case1.nii.gz").exists()
    content = json.loads(outcome.report.read_text())
    assert content["counts"] == {"done": 2, "failed": 1}
    assert content["cases"]["case1"]["error"]["why"]
    assert left_over(job.output) == []


def raise_value_error(_found):
    raise ValueError("the tensors do not match")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (raise_value_error, "ValueError: the tensors do not match"),
        (lambda found: found * np.nan, "NaN"),
        (lambda found: found[:, :4], "shape"),
        (lambda found: np.stack([found[0], found[1], found[1] * 2]), "without a name"),
    ],
)
def test_whatever_a_method_does_wrong_stays_with_its_case(job, spoil, why):
    outcome = job.run(lambda _: Bright(spoil))
    assert outcome.done == ("case0", "case2")
    assert why in outcome.failed["case1"]
    assert left_over(job.output) == []


def test_a_failed_case_is_repeated_by_continue(job, scans):
    job.run(lambda _: Bright(raise_value_error))
    again = PredictJob(**{**vars(job), "continue_": True})
    outcome = again.run(lambda _: Bright())
    assert outcome.skipped == ("case0", "case2")
    assert outcome.done == ("case0", "case1", "case2")
    assert outcome.failed == {}


def test_a_segmentation_of_an_earlier_run_is_kept_and_told(job):
    job.run(lambda _: Bright())
    before = (job.output / "case1.nii.gz").read_bytes()
    outcome = job.run(lambda _: Bright(raise_value_error))
    assert "earlier run" in outcome.failed["case1"]
    assert (job.output / "case1.nii.gz").read_bytes() == before


def test_a_file_that_does_not_read_back_equal_is_never_given_its_name(job, monkeypatch):
    from medrl.core.volume import write

    honest = write._nifti_bytes

    def lying(array, like):
        return honest(1 - array, like)

    monkeypatch.setattr(write, "_nifti_bytes", lying)
    outcome = job.run(lambda _: Bright())
    assert outcome.done == ()
    assert len(outcome.failed) == 3
    assert not list(job.output.glob("*.nii.gz"))
    assert left_over(job.output) == []


def test_a_full_disk_ends_the_run_with_what_is_finished_recorded(job, monkeypatch):
    from medrl.core.volume import write

    honest = write._nifti_bytes
    calls = []

    def full(array, like):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeFault("cannot write", why="No space left on device") from OSError(
                errno.ENOSPC, "full"
            )
        return honest(array, like)

    monkeypatch.setattr(write, "_nifti_bytes", full)
    with pytest.raises(RuntimeFault, match="No space left"):
        job.run(lambda _: Bright())
    assert len(calls) == 2
    content = json.loads((job.output / "report.json").read_text())
    assert list(content["cases"]) == ["case0"]
    monkeypatch.undo()
    outcome = PredictJob(**{**vars(job), "continue_": True}).run(lambda _: Bright())
    assert outcome.skipped == ("case0",)
    assert outcome.done == ("case0", "case1", "case2")


def test_a_flipped_bit_in_the_checkpoint_stops_before_any_case(job):
    path = job.checkpoints[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError):
        job.run(lambda _: Bright())
    assert not job.output.exists()


def test_an_output_folder_that_is_a_file_is_refused_before_any_case(job):
    job.output.write_text("in the way")
    predicted = []
    with pytest.raises(RuntimeFault, match="output folder"):
        job.run(lambda _: Bright(lambda found: predicted.append(1) or found))
    assert predicted == []
    assert job.output.read_text() == "in the way"


def test_colliding_outputs_are_refused_before_any_case(job, scans):
    (scans / "case1.nii").write_bytes(b"")
    with pytest.raises(DataError, match="case1"):
        job.run(lambda _: Bright())
    assert not job.output.exists()


def test_a_damaged_report_means_that_nothing_is_finished(job):
    job.run(lambda _: Bright())
    (job.output / "report.json").write_text('{"cases": {"case0": 3}}')
    outcome = PredictJob(**{**vars(job), "continue_": True}).run(lambda _: Bright())
    assert outcome.skipped == ()
    assert len(outcome.done) == 3


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from types import SimpleNamespace
    from medrl.core.jobs import PredictJob
    from test_prediction import Bright

    def die(found):
        os.kill(os.getpid(), signal.SIGKILL)

    PredictJob(
        method="toy", inputs=Path({inputs!r}), output=Path({output!r}), checkpoints=[Path({model!r})],
        manager=SimpleNamespace(notify=lambda *a, **k: None),
    ).run(lambda _: Bright(die))
"""


def test_a_killed_run_goes_on_with_the_cases_that_are_left(job):
    code = KILLED.format(
        tests=str(Path(__file__).parent),
        inputs=str(job.inputs),
        output=str(job.output),
        model=str(job.checkpoints[0]),
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr.decode()
    assert predicting.read_report(job.output / "report.json").cases.keys() == {"case0"}
    outcome = PredictJob(**{**vars(job), "continue_": True}).run(lambda _: Bright())
    assert outcome.skipped == ("case0",)
    assert outcome.done == ("case0", "case1", "case2")
