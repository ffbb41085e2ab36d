"""Parts of a prediction: the same cases in any number of parts, one report, and a stated need of memory."""

from __future__ import annotations

import csv
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

from medrl.core.checkpoint import write_checkpoint
from medrl.core.errors import ConfigError
from medrl.core.jobs import PredictJob
from medrl.core.predicting import merge_parts, read_report
from medrl.core.predicting import record as record_module
from medrl.core.predicting.memory import array_bytes, grid_of, needs, resident_bytes, state
from medrl.core.types import Case


class Bright:
    """Segments bright voxels; case 3 fails."""

    channel_names = ("image",)
    label_names = {"background": 0, "bright": 1}  # noqa: RUF012

    def __init__(self, broken="case3"):
        self.broken = broken

    def probabilities(self, volume, *, tta, overlap):
        if self.broken in str(volume.source):
            raise ValueError("broken on purpose")
        foreground = (volume.data[0] > 0).astype(np.float32)
        return np.stack([1 - foreground, foreground])

    def decode(self, probabilities):
        return probabilities.argmax(axis=0).astype(np.uint8)


def write_scans(folder, count, shape=(8, 7, 6)):
    folder.mkdir()
    for number in range(count):
        data = np.random.default_rng(number).normal(size=shape).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.diag([1.0, 1.0, 2.0, 1.0])), folder / f"case{number}.nii.gz")
    return folder


@pytest.fixture
def make_job(tmp_path):
    scans = write_scans(tmp_path / "scans", 7)
    model = write_checkpoint(tmp_path / "model.pt", {"net": {"w": torch.ones(1)}}, {"method": "toy"}).path

    def make(output="out", **changes):
        values = {
            "method": "toy",
            "inputs": scans,
            "output": tmp_path / output,
            "checkpoints": [model],
            "manager": SimpleNamespace(notify=lambda *_args, **_told: None),
        }
        return PredictJob(**(values | changes))

    return make


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("case*.nii.gz"))}


@pytest.mark.parametrize("parts", [1, 3, 9])
def test_any_number_of_parts_gives_the_files_and_the_report_of_one(make_job, tmp_path, parts):
    whole = make_job("whole", statistics=True).run(lambda _: Bright())
    for index in range(1, parts + 1):
        make_job(part=(index, parts), statistics=True).run(lambda _: Bright())
    merged = merge_parts(tmp_path / "out", parts)
    assert merged.done == whole.done
    assert merged.failed.keys() == {"case3"}
    assert merged.missing == {}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    one, many = (read_report(tmp_path / name / "report.json") for name in ("whole", "out"))
    for case, record in one.cases.items():
        assert many.cases[case].files == record.files
    tables = [list(csv.DictReader((tmp_path / name / "statistics.csv").open())) for name in ("whole", "out")]
    assert tables[0] == tables[1]
    assert sorted(path.name for path in (tmp_path / "out").glob("report*")) == ["report.json"]


def test_a_part_that_never_ran_or_was_cut_short_is_missing_and_the_rest_is_kept(make_job, tmp_path):
    make_job(part=(1, 3)).run(lambda _: Bright())

    class Stop(BaseException):
        pass

    def stop(done, _total, _case):
        if done == 1:
            raise Stop

    with pytest.raises(Stop):
        make_job(part=(2, 3), progress=stop).run(lambda _: Bright())
    merged = merge_parts(tmp_path / "out", 3)
    assert merged.missing == {2: 1, 3: None}
    assert merged.done == ("case0", "case1", "case6")
    for index in (1, 2, 3):
        outcome = make_job(part=(index, 3), continue_=True).run(lambda _: Bright())
        assert len(outcome.skipped) == (2, 1, 0)[index - 1]
    assert merge_parts(tmp_path / "out", 3).missing == {}


def test_other_parts_than_before_go_on_with_what_is_finished(make_job, tmp_path):
    for index in (1, 2):
        make_job(part=(index, 2)).run(lambda _: Bright())
    merge_parts(tmp_path / "out", 2)
    skipped = [
        len(make_job(part=(index, 3), continue_=True).run(lambda _: Bright("none")).skipped)
        for index in (1, 2, 3)
    ]
    assert sum(skipped) == 6
    assert len(merge_parts(tmp_path / "out", 3).done) == 7


def test_a_kill_while_going_on_forgets_nothing_that_was_finished(make_job, tmp_path):
    make_job().run(lambda _: Bright("none"))

    class Stop(BaseException):
        pass

    def stop(done, _total, _case):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        make_job(continue_=True, progress=stop).run(lambda _: Bright("none"))
    assert len(make_job(continue_=True).run(lambda _: Bright("none")).skipped) == 7


def test_the_report_is_not_written_anew_for_every_case(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "_SHARE", 1e9)
    written = []
    honest = record_module.PredictReport.write
    monkeypatch.setattr(
        record_module.PredictReport, "write", lambda self: (written.append(len(self.cases)), honest(self))
    )
    make_job().run(lambda _: Bright())
    assert written == [0, 7]
    assert len(read_report(tmp_path / "out" / "report.json").cases) == 7
    assert list((tmp_path / "out").glob("*.jsonl")) == []


def test_a_journal_that_a_kill_cut_short_gives_its_whole_lines(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "_SHARE", 1e9)
    code = """
        import os, sys
        sys.path.insert(0, {tests!r})
        from types import SimpleNamespace
        from pathlib import Path
        from test_predicting_parts import Bright
        from medrl.core.jobs import PredictJob
        from medrl.core.predicting import record
        record._SHARE = 1e9
        def progress(done, total, case):
            if done == 4:
                os.kill(os.getpid(), 9)
        manager = SimpleNamespace(notify=lambda *a, **k: None)
        paths = dict(inputs=Path({inputs!r}), output=Path({output!r}), checkpoints=[Path({model!r})])
        PredictJob(method="toy", **paths, manager=manager, progress=progress).run(lambda _: Bright("none"))
    """
    job = make_job()
    text = textwrap.dedent(code).format(
        tests=str(Path(__file__).parent),
        inputs=str(job.inputs),
        output=str(job.output),
        model=str(job.checkpoints[0]),
    )
    done = subprocess.run(
        [sys.executable, "-c", text], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == -9
    journal = tmp_path / "out" / "report.jsonl"
    assert len(journal.read_text().splitlines()) == 4
    journal.write_text(journal.read_text()[:-20])
    assert sorted(read_report(tmp_path / "out" / "report.json").cases) == ["case0", "case1", "case2"]
    assert len(make_job(continue_=True).run(lambda _: Bright("none")).skipped) == 3


# -- memory ------------------------------------------------------------------------------------------


def test_the_need_of_a_case_is_counted_by_hand():
    # 1000 voxels: image twice in 4 bytes, two sums of three classes in 4 bytes, labels in 8
    assert array_bytes((10, 10, 10), 1, 3) == 1000 * (4 * (2 + 6) + 8)
    assert array_bytes((10, 10, 10), 2, 3, folds=5, tta=True) == 1000 * (4 * (4 + 12) + 8)
    assert array_bytes((), 1, 3) == 0


def test_headers_tell_the_largest_case_without_reading_voxels(tmp_path):
    write_scans(tmp_path / "a", 2)
    big = tmp_path / "a" / "big.nii"
    nib.save(nib.Nifti1Image(np.zeros((20, 20, 20), np.uint8), np.eye(4)), big)
    with big.open("r+b") as file:
        file.truncate(400)
    assert grid_of(big) == (20, 20, 20)
    cases = [Case(id=path.name, images=(path,)) for path in sorted((tmp_path / "a").iterdir())]
    found = needs(cases, classes=2, every=True)
    assert next(need.case for need in found) == "big.nii"
    (tmp_path / "a" / "broken.nii.gz").write_bytes(b"nothing")
    assert grid_of(tmp_path / "a" / "broken.nii.gz") == ()


def test_what_the_largest_case_needs_is_said_before_the_first_case(make_job, tmp_path):
    said = []
    job = make_job(say=said.append, progress=lambda *_: said.append("case"))
    job.run(lambda _: Bright())
    assert said[0].startswith("memory: about ")
    assert "8 × 7 × 6" in said[0]
    facts = json.loads((tmp_path / "out" / "report.json").read_text())["memory"]
    assert facts["loaded_bytes"] + facts["largest_case_bytes"] <= 2 * facts["peak_bytes"]
    assert facts["peak_bytes"] >= facts["loaded_bytes"] > 10 * 2**20


def test_cases_beyond_the_limit_are_refused_before_any_work(make_job, tmp_path):
    with pytest.raises(ConfigError, match="7 of 7 cases need more") as error:
        make_job(max_memory_gb=0.001).run(lambda _: Bright())
    assert "--max-memory" in error.value.do
    assert not (tmp_path / "out").exists()
    text, _ = state(needs([], classes=2), limit_gb=1.0)
    assert text == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits data memory")
def test_a_case_that_takes_more_than_the_limit_fails_alone(make_job):
    class Greedy(Bright):
        def probabilities(self, volume, *, tta, overlap):
            if "case2" in str(volume.source):
                np.ones(3 * 2**30, np.uint8)
            return super().probabilities(volume, tta=tta, overlap=overlap)

    limit = resident_bytes() / 2**30 + 1.0
    outcome = make_job(max_memory_gb=limit).run(lambda _: Greedy("none"))
    assert outcome.failed.keys() == {"case2"}
    assert "needs more than" in outcome.failed["case2"]
    assert len(np.ones(2 * 2**20)) > 0, "the limit ends with the run"
