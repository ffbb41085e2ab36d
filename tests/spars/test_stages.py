"""Classifier and self-play as tasks: the outcome is that of one run, and only what changed runs again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.jobs import build_train_job
from medrl.plugins.spars import running


def stages(run):
    found = json.loads((run / "stages.json").read_text())["stages"]
    assert {entry["state"] for entry in found.values()} == {"done"}
    return {name: (entry["finished"], entry["seconds"]) for name, entry in found.items()}


def tensors(run):
    """Every tensor of the last checkpoint, as bytes."""
    found = {}

    def walk(value, where):
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{where}.{key}")
        elif hasattr(value, "numpy"):
            found[where] = value.contiguous().numpy().tobytes()

    walk(load_checkpoint(find_checkpoint(run, "last")).states, "")
    return found


@pytest.fixture
def own(tiny, tmp_path, phantoms):
    """The tiny config on volumes of its own."""
    return tiny({"data": {"root": str(shutil.copytree(phantoms, tmp_path / "data"))}})


def test_classifier_and_play_as_tasks_end_where_one_run_ends_and_only_what_changed_runs_again(
    own, manager, play_run, tmp_path, in_this_process
):
    run = tmp_path / "run"
    job = replace(build_train_job(manager, "spars", own, run), stage_executor=in_this_process)
    running.run(job)
    assert in_this_process.asked == ["01_classifier", "02_play"]
    assert tensors(run) == tensors(play_run)
    assert tensors(run / "stages" / "classifier") == tensors(play_run / "stages" / "classifier")

    before = stages(run)
    running.run(job)
    assert stages(run) == before
    assert in_this_process.asked[2:] == ["02_play"]

    (run / "checkpoints" / "last.pt").unlink()
    running.run(job)
    after = stages(run)
    assert [name for name in after if after[name] != before[name]] == ["02_play"]
    assert tensors(run) == tensors(play_run)

    # A label of an image is an input of both.
    table = tmp_path / "data" / "presence.csv"
    head, first, *rest = table.read_text().splitlines()
    name, _, label = first.rpartition(",")
    table.write_text("\n".join([head, f"{name},{1 - int(label)}", *rest]) + "\n")
    running.run(job)
    last = stages(run)
    assert [name for name in last if last[name] != after[name]] == ["01_classifier", "02_play"]
    assert tensors(run / "stages" / "classifier") != tensors(play_run / "stages" / "classifier")


def test_both_in_other_processes_end_where_one_run_ends_and_this_one_goes_by_their_record(
    own, manager, play_run, tmp_path, in_this_process, elsewhere
):
    run = tmp_path / "run"
    job = build_train_job(manager, "spars", own, run)
    running.run(replace(job, stage_executor=elsewhere))
    assert sorted(path.stem for path in (run / "jobs").glob("0*.log")) == ["01_classifier", "02_play"]
    assert tensors(run) == tensors(play_run)
    assert tensors(run / "stages" / "classifier") == tensors(play_run / "stages" / "classifier")
    before = stages(run)
    (run / "checkpoints" / "last.pt").unlink()
    running.run(replace(job, stage_executor=in_this_process))
    after = stages(run)
    assert [name for name in after if after[name] != before[name]] == ["02_play"]
    assert tensors(run) == tensors(play_run)
