"""One job a stage: through submitit's local executor, and through Slurm where there is one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.executors import LocalExecutor
from medrl.core.executors.stages import FOLDER, stage_tasks
from medrl.plugins.rl4seg3d import loop, slurm
from medrl.plugins.rl4seg3d.config import SlurmConfig
from medrl.plugins.rl4seg3d.stages import Stage

submitit = pytest.importorskip("submitit")
ORACLE = {
    "reward": {"name": "rl4seg3d.pixelwise_accuracy"},
    "loop": {"start": "source"},
    "target": {"allow_labels": True},
    "source": {"steps": 1},
    "ppo": {"steps": 1},
}
JOBS = {"gpus": 0, "cpus": 1, "memory_gb": 1, "minutes": 30, "poll_s": 0.2}


def done(run):
    stages = json.loads((run / "stages.json").read_text())["stages"]
    return {name: record["state"] for name, record in stages.items()}


def jobs(run):
    return sorted(path.name for path in (run / FOLDER / "submitit").glob("*submitted.pkl"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, make_job, tools):
    """The same stages in one program."""
    run = tmp_path_factory.mktemp("straight") / "run"
    loop.run(make_job(run, ORACLE))
    return run


def test_each_stage_is_a_job_and_the_weights_are_those_of_one_program(straight, make_job, tmp_path, tools):
    run = tmp_path / "run"
    values = tools.merged(ORACLE, {"slurm": {"mode": "local", **JOBS}})
    loop.run(make_job(run, values))
    assert done(run) == dict.fromkeys(["01_source", "02_ppo_1", "03_test"], "done")
    assert len(jobs(run)) == 3
    assert tools.same(tools.states(run), tools.states(straight))
    before = {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("*.pt")}
    loop.run(make_job(run, values))
    assert len(jobs(run)) == 4, "the last stage is asked whether everything is still as it was"
    assert {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("*.pt")} == before


def test_a_stage_whose_input_changed_is_done_again_and_only_what_follows_from_it(
    straight, make_job, tmp_path, tools
):
    """The rule files decide what the test says, and nothing before it."""
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    kept = {path: path.read_bytes() for path in (run / "stages").rglob("last.pt")}
    record = json.loads((run / "stages.json").read_text())
    for name in ("01_source", "02_ppo_1", "03_test"):
        assert record["stages"][name]["state"] == "done"
    (run / "test.json").write_text("{}")
    job = replace(make_job(run, ORACLE), stage_executor=LocalExecutor())
    loop.run(job)
    again = json.loads((run / "stages.json").read_text())
    assert again["stages"]["03_test"]["outputs"] == record["stages"]["03_test"]["outputs"]
    assert again["stages"]["01_source"] == record["stages"]["01_source"]
    assert {path: path.read_bytes() for path in (run / "stages").rglob("last.pt")} == kept
    assert sorted(path.name for path in (run / FOLDER).glob("*.log")) == ["03_test.log"]


def test_a_job_that_fails_is_submitted_again_and_then_named(straight, make_job, tmp_path, tools):
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    record = json.loads((run / "stages.json").read_text())
    del record["stages"]["03_test"]
    (run / "stages.json").write_text(json.dumps(record))
    target = tmp_path / "elsewhere"
    values = tools.merged(ORACLE, {"slurm": {"mode": "local", **JOBS}, "target": {"root": str(target)}})
    with pytest.raises(RuntimeFault, match="03_test") as error:
        loop.run(make_job(run, values))
    assert len(jobs(run)) == 2
    assert "see " in error.value.do


def test_iterations_get_more_time_and_each_stage_waits_for_the_one_before(make_job, tmp_path):
    one, two = Stage(1, "source"), Stage(7, "ppo", 2)
    minutes = lambda stage: slurm.minutes_of(SlurmConfig(minutes=60), stage)  # noqa: E731
    tasks = stage_tasks(make_job(tmp_path / "run", ORACLE), [one, two], minutes_of=minutes)
    assert [(task.name, task.after, task.minutes) for task in tasks] == [
        ("01_source", (), 60),
        ("07_ppo_2", ("01_source",), 180),
    ]
    assert tasks[1].arguments[-1] == "stage=ppo"


def test_without_slurm_the_message_says_what_to_do(make_job, tmp_path, tools, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    values = tools.merged(ORACLE, {"slurm": {"mode": "slurm", **JOBS}})
    with pytest.raises(ConfigError, match="no Slurm machine"):
        loop.run(make_job(tmp_path / "run", values))


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_a_real_slurm_does_every_stage(straight, make_job, tmp_path, tools):
    run = tmp_path / "run"
    loop.run(make_job(run, tools.merged(ORACLE, {"slurm": {"mode": "slurm", **JOBS}})))
    assert set(done(run).values()) == {"done"}
    assert tools.same(tools.states(run), tools.states(straight))
