"""Each stage as a task: what is recorded, what runs again, and that the outcome is that of one run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.jobs import build_train_job
from medrl.core.runtime import Runtime
from medrl.plugins.kspace import running

UNET = {"acquisition": {"recon": "unet"}}


def stages(run):
    """Name, state and end of each stage in the record."""
    found = json.loads((run / "stages.json").read_text())["stages"]
    return {name: (entry["state"], entry["finished"], entry["seconds"]) for name, entry in found.items()}


def ran_again(before, run):
    after = stages(run)
    assert {state for state, _, _ in after.values()} == {"done"}
    return [name for name in after if after[name] != before.get(name)]


@pytest.fixture(scope="module")
def values(tiny, tmp_path_factory, phantoms):
    """A policy that needs both parts, on images of its own."""
    root = shutil.copytree(phantoms, tmp_path_factory.mktemp("own") / "data")
    return tiny({**UNET, "data": {"root": str(root)}, "warm": {"states": 8}, "ppo": {"updates": 2}})


@pytest.fixture
def staged(manager, values, in_this_process):
    """Do all stages of a run folder as tasks; return the names of the tasks done in this process."""

    def do(run, executor=in_this_process):
        in_this_process.asked.clear()
        job = build_train_job(manager, "kspace", values, run)
        running.run(replace(job, stage_executor=executor))
        return list(in_this_process.asked)

    return do


@pytest.fixture(scope="module")
def whole(manager, values, tmp_path_factory):
    """The same run without stages."""
    run = tmp_path_factory.mktemp("whole") / "run"
    running.run(build_train_job(manager, "kspace", values, run))
    return run


def test_stages_as_tasks_end_where_one_run_ends_and_what_changed_runs_again(
    staged, whole, values, manager, tmp_path, tools
):
    run = tmp_path / "run"
    assert staged(run) == ["01_recon", "02_reward", "03_policy"]
    before = stages(run)
    assert not (whole / "stages.json").exists()
    for part in (".", "stages/recon", "stages/reward"):
        assert tools.differences(tools.states(whole / part), tools.states(run / part)) == [], part
    rows = [[{**row, "seconds": 0} for row in tools.records(folder)] for folder in (whole, run)]
    assert rows[0] == rows[1]
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["step"]) == ("finished", rows[0][-1]["step"])

    # Nothing changed: the last task looks at everything, and nothing runs.
    assert staged(run) == ["03_policy"]
    assert ran_again(before, run) == []
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["step"]) == ("finished", rows[0][-1]["step"])

    # A policy without its file is made again, and no part.
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    assert staged(run) == ["03_policy"]
    assert ran_again(before, run) == ["03_policy"]
    assert tools.differences(tools.states(whole), tools.states(run)) == []

    # A part that is made again is another input of what reads it, and of nothing before.
    before = stages(run)
    shutil.rmtree(run / "stages" / "reward")
    assert staged(run) == ["02_reward", "03_policy"]
    assert ran_again(before, run) == ["02_reward", "03_policy"]
    assert tools.differences(tools.states(whole), tools.states(run)) == []
    rows = [[{**row, "seconds": 0} for row in tools.records(folder)] for folder in (whole, run)]
    assert rows[0] == rows[1]
    last = stages(run)
    running.run(build_train_job(manager, "kspace", values, run))  # `medrl resume` keeps the record too
    assert ran_again(last, run) == []


def test_stages_in_other_processes_end_where_one_run_ends_and_this_one_goes_by_their_record(
    staged, elsewhere, whole, tmp_path, tools
):
    run = tmp_path / "run"
    staged(run, elsewhere)
    logs = sorted(path.stem for path in (run / "jobs").glob("0*.log"))
    assert logs == ["01_recon", "02_reward", "03_policy"]
    for part in (".", "stages/recon", "stages/reward"):
        assert tools.differences(tools.states(whole / part), tools.states(run / part)) == [], part
    before = stages(run)
    shutil.rmtree(run / "stages" / "reward")
    assert staged(run) == ["02_reward", "03_policy"]
    assert ran_again(before, run) == ["02_reward", "03_policy"]
    assert tools.differences(tools.states(whole), tools.states(run)) == []


def test_other_images_make_every_stage_learn_again(staged, values, tmp_path, tools):
    run, root = tmp_path / "run", Path(values["data"]["root"])
    staged(run)
    before, weights = stages(run), {part: tools.states(run / part) for part in (".", "stages/reward")}
    path = sorted((root / "imagesTr").glob("*.nii.gz"))[0]
    kept = path.read_bytes()
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.flip(np.asanyarray(image.dataobj), 0).copy(), image.affine), path)
    try:
        assert staged(run) == ["03_policy"]
        assert ran_again(before, run) == ["01_recon", "02_reward", "03_policy"]
        for part, old in weights.items():
            assert tools.differences(old, tools.states(run / part)) != [], part
    finally:
        path.write_bytes(kept)


def test_a_stage_that_was_stopped_goes_on_bit_for_bit(staged, whole, tmp_path, tools, monkeypatch):
    run, log = tmp_path / "run", Runtime.log

    def stopping(self, step, **facts):
        log(self, step, **facts)
        if self.run.dir == run.resolve() / "stages" / "reward" and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Runtime, "log", stopping)
    with pytest.raises(RuntimeFault, match="02_reward"):
        staged(run)
    assert {name: entry[0] for name, entry in stages(run).items()} == {
        "01_recon": "done",
        "02_reward": "stopped",
    }
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    monkeypatch.setattr(Runtime, "log", log)
    assert staged(run) == ["02_reward", "03_policy"]
    assert "stage 02_reward runs: it was stopped" in (run / "log.txt").read_text()
    assert tools.differences(tools.states(whole), tools.states(run)) == []


def test_a_run_whose_stages_were_not_recorded_is_refused_and_left_as_it_is(staged, whole):
    before = (whole / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="were not recorded"):
        staged(whole)
    assert (whole / "manifest.json").read_bytes() == before
    assert not (whole / "stages.json").exists()
