"""The stages of a run as tasks: which are asked for, in which order, and what a failure means."""

import json
from types import SimpleNamespace

import pytest

from medrl.core.adaptation.stages import numbered
from medrl.core.errors import RuntimeFault
from medrl.core.executors import Executor, TaskEnd
from medrl.core.executors.stages import FOLDER, run_stages, stage_tasks, stages_done
from medrl.core.stages import Pipeline

STAGES = numbered([("source", 0), ("reward", 1), ("ppo", 1)])


class Doer(Executor):
    """Does the stages as a run would: writes one file a stage and the record; some fail at first."""

    def __init__(self, run, fail=(), code=1):
        self.run_dir, self.fail, self.code = run, list(fail), code
        self.asked = []

    def run(self, tasks, *, folder, tell=None):
        self.asked.append([task.name for task in tasks])
        ends = {}
        for task in tasks:
            blocked = [name for name in task.after if not ends[name].ok]
            code = -1 if blocked else 0
            if not blocked and task.name in self.fail:
                self.fail.remove(task.name)
                code = self.code
            if code == 0:
                self.do(task.name)
            log = folder / f"{task.name}.log"
            log.write_text("" if code <= 0 else "error: the disk is full\n")
            ends[task.name] = TaskEnd(name=task.name, code=code, log=log)
        return ends

    def do(self, name):
        out = self.run_dir / name
        Pipeline(self.run_dir).stage(name, inputs={"a": 1}, outputs=[out], run=lambda: out.write_text(name))


@pytest.fixture
def job(tmp_path):
    return SimpleNamespace(
        method="toy",
        run_dir=tmp_path / "run",
        resolved=SimpleNamespace(to_yaml=lambda: "stage: all\n"),
        init_from=None,
        trust_checkpoint=False,
        fast_dev_run=False,
        devices=1,
    )


def test_each_stage_is_an_ordinary_command_after_the_one_before(job, tmp_path):
    tasks = stage_tasks(job, STAGES, settings=["slurm.mode=off"])
    assert [(task.name, task.after) for task in tasks] == [
        ("01_source", ()),
        ("02_reward_1", ("01_source",)),
        ("03_ppo_1", ("02_reward_1",)),
    ]
    config = tmp_path / "run" / FOLDER / "config.yaml"
    assert config.read_text() == "stage: all\n"
    assert tasks[1].arguments == (
        "--plain", "train", "toy", "-c", str(config), "-o", str(tmp_path / "run"),
        "--set", "slurm.mode=off", "--set", "stage=reward",
    )  # fmt: skip
    job.devices = 2
    assert stage_tasks(job, STAGES)[0].arguments[-4:] == ("--devices", "2", "--set", "stage=source")


def test_what_is_done_is_not_asked_for_and_the_last_stage_looks_whether_all_is_as_it_was(job, tmp_path):
    doer = Doer(job.run_dir)
    run_stages(job, STAGES, doer)
    assert stages_done(job.run_dir) == {"01_source", "02_reward_1", "03_ppo_1"}
    run_stages(job, STAGES, doer)
    (job.run_dir / "02_reward_1").write_text("changed")
    run_stages(job, STAGES, doer)
    assert doer.asked == [["01_source", "02_reward_1", "03_ppo_1"], ["03_ppo_1"], ["02_reward_1", "03_ppo_1"]]


def test_a_record_whose_file_is_gone_is_not_trusted(job):
    run_stages(job, STAGES, Doer(job.run_dir))
    record = json.loads((job.run_dir / "stages.json").read_text())
    assert record["stages"]["01_source"]["state"] == "done"
    (job.run_dir / "01_source").unlink()
    assert "01_source" not in stages_done(job.run_dir)


def test_a_failed_stage_is_tried_again_as_often_as_it_may_and_then_told(job):
    doer = Doer(job.run_dir, fail=["02_reward_1"])
    run_stages(job, STAGES, doer, retries=1)
    assert doer.asked[1] == ["02_reward_1", "03_ppo_1"]
    (job.run_dir / "02_reward_1").unlink()
    again = Doer(job.run_dir, fail=["02_reward_1"] * 2)
    with pytest.raises(RuntimeFault, match="02_reward_1: .*exit code 1: the disk is full") as error:
        run_stages(job, STAGES, again, retries=1)
    assert "the same command goes on" in error.value.do


def test_a_stage_that_was_stopped_is_not_tried_again(job):
    doer = Doer(job.run_dir, fail=["01_source"], code=143)
    with pytest.raises(RuntimeFault, match="exit code 143"):
        run_stages(job, STAGES, doer, retries=5)
    assert len(doer.asked) == 1
