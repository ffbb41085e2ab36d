"""Teachers, features and student as tasks: the files of three commands, and only what changed runs again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import ConfigError
from medrl.plugins.graft import data, staged, train


def stages(run):
    found = json.loads((run / "stages.json").read_text())["stages"]
    return {name: (entry["state"], entry["finished"], entry["seconds"]) for name, entry in found.items()}


def weights(run):
    state = load_checkpoint(find_checkpoint(run, "last")).states["student"]
    return {name: value.contiguous().view(-1).numpy().tobytes() for name, value in state.items()}


def test_a_student_after_its_stages_is_that_of_three_commands_and_only_what_changed_runs_again(
    make_job, phantoms, tmp_path, in_this_process
):
    root = shutil.copytree(phantoms, tmp_path / "data")
    run, values = tmp_path / "run", {"data": {"root": str(root)}, "teachers": {"train": 2}}
    job = replace(make_job(run, values), stage_executor=in_this_process)
    staged.run(job)
    assert in_this_process.asked == ["01_teachers", "02_features", "03_student"]
    first = stages(run)
    assert {state for state, _, _ in first.values()} == {"done"}

    # By hand, with the features that were written.
    by_hand = make_job(
        tmp_path / "hand",
        {"data": {"root": str(root)}, "teachers": {"features": [str(run / "stages" / "features")]}},
    )
    with by_hand.runtime() as rt:
        train.fit(rt, by_hand.config, data.load(rt, by_hand.config))
    assert weights(run) == weights(tmp_path / "hand")

    staged.run(job)
    assert (stages(run), in_this_process.asked[3:]) == (first, ["03_student"])

    # A damaged feature file is written again; the teachers stay. What was read is as it was.
    file = next((run / "stages" / "features").rglob("neg1.npy"))
    kept = file.read_bytes()
    shutil.rmtree(file.parent)
    staged.run(job)
    second = stages(run)
    assert [name for name in second if second[name] != first[name]] == ["02_features"]
    assert file.read_bytes() == kept

    # Another image: all three learn again.
    old, path = weights(run), sorted((root / "imagesTr").glob("*.nii.gz"))[0]
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.flip(np.asanyarray(image.dataobj), 0).copy(), image.affine), path)
    staged.run(job)
    third = stages(run)
    assert [name for name in third if third[name] != second[name]] == list(third)
    assert weights(run) != old


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", ["slurm"], indirect=True)
def test_stages_that_are_jobs_of_slurm_give_the_weights_of_one_program(
    make_job, phantoms, tmp_path, in_this_process, elsewhere
):
    values = {"data": {"root": str(phantoms)}, "teachers": {"train": 2}}
    for name, executor in (("one", in_this_process), ("jobs", elsewhere)):
        staged.run(replace(make_job(tmp_path / name, values), stage_executor=executor))
    assert {state for state, _, _ in stages(tmp_path / "jobs").values()} == {"done"}
    assert weights(tmp_path / "jobs") == weights(tmp_path / "one")


def test_teachers_are_trained_or_named_but_not_both(make_job, tmp_path, in_this_process):
    values = {"teachers": {"train": 2, "features": [str(tmp_path)]}}
    job = replace(make_job(tmp_path / "run", values), stage_executor=in_this_process)
    with pytest.raises(ConfigError, match=r"teachers\.train"):
        staged.run(job)
