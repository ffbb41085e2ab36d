"""A real Slurm of one node: ranks under srun, jobs of executors, signals, and what is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "ranks"))
import run_nodes

from medrl.core.executors import Resources, SubmititExecutor, Task

pytestmark = pytest.mark.slow
TOY = str(Path(__file__).parents[1] / "cli" / "toy")
SMALL = Resources(minutes=10, cpus=1, memory_gb=0.5)
RESOURCES = ("--resource", "cpus=1", "--resource", "memory_gb=0.5")


@pytest.fixture
def work(tmp_path, monkeypatch, slurm):
    """An empty folder that jobs share; they know the plugin `toy`."""
    monkeypatch.setenv("PYTHONPATH", TOY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def executor(**options):
    return SubmititExecutor(options.pop("resources", SMALL), poll_s=0.5, **options)


def toy(name, *arguments, **options):
    return Task(name=name, arguments=("--plain", "train", "toy", "-o", name, *arguments), **options)


def in_background(call):
    """Run something in a thread; return the thread and where its result will be."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


def until(ready, slurm, limit_s=120):
    deadline = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.1)


def job_of(folder, name):
    until_there = folder / "jobs.json"
    return json.loads(until_there.read_text())[name]


def test_two_tasks_of_srun_are_ranks_and_a_requeued_job_goes_on_to_the_same_weights(work, slurm):
    script = work / "job.sh"
    script.write_text(
        "#!/bin/sh\n"
        f"srun -n2 {sys.executable} -W ignore {run_nodes.__file__} srun {work} && exit 0\n"
        "[ $? = 143 ] && scontrol requeue $SLURM_JOB_ID\n"
    )
    job = slurm.ask(
        "sbatch", "--parsable", "--requeue", "-n2", "--mem=1000", "--open-mode=append", str(script)
    )
    until(lambda: all((work / f"ready_{rank}").exists() for rank in range(2)), slurm)
    slurm.ask("scancel", "--signal=TERM", job)  # what --signal=TERM@120 sends before the time is over
    until(lambda: (work / "rank1.json").exists() and (work / "rank0.json").exists(), slurm, limit_s=240)
    slurm.wait_for(job, "COMPLETED")
    weights, scores = run_nodes.train(work / "alone", 6, batch_size=4)
    for rank in range(2):
        found = torch.load(work / f"weights_{rank}.pt", weights_only=True)
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)
        assert json.loads((work / f"rank{rank}.json").read_text()) == pytest.approx(
            scores, rel=1e-5, abs=1e-6
        )
    manifest = json.loads((work / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["resumed"], manifest["world_size"]) == ("finished", 1, 2)


def test_when_a_rank_of_srun_is_killed_the_job_ends_with_the_cause(work, slurm):
    """Without ``--kill-on-bad-exit`` Slurm would let the other rank wait for ever."""
    script = work / "job.sh"
    script.write_text(
        "#!/bin/sh\n"
        f"exec srun -n2 --kill-on-bad-exit=0 {sys.executable} -W ignore {run_nodes.__file__} long {work}\n"
    )
    job = slurm.ask("sbatch", "--parsable", "-n2", "--mem=1000", "--output=out", str(script))
    until(lambda: all((work / f"pid_{rank}").exists() for rank in range(2)), slurm)
    os.kill(int((work / "pid_1").read_text()), signal.SIGKILL)
    slurm.wait_for(job, "FAILED")
    assert "rank 1 died at step" in (work / "run" / "log.txt").read_text(), (work / "out").read_text()
    assert json.loads((work / "run" / "manifest.json").read_text())["status"] == "failed"


def test_jobs_wait_for_each_other_and_one_behind_a_failure_is_never_begun(work, slurm):
    tasks = [
        toy("first"),
        toy("second", after=("first",)),
        Task(name="bad", arguments=("nonsense",)),
        toy("never", after=("bad",)),
    ]
    ends = executor().run(tasks, folder=work / "logs")
    assert {name: end.code for name, end in ends.items()} == {"first": 0, "second": 0, "bad": 2, "never": -1}
    times = [json.loads((work / name / "manifest.json").read_text()) for name in ("first", "second")]
    assert times[0]["ended"] <= times[1]["created"]
    assert not (work / "never").exists()


def test_a_job_that_runs_out_of_time_saves_and_is_queued_again(work, slurm, monkeypatch):
    monkeypatch.setenv("MEDRL_TOY_FAIL", "wait")
    thread, found = in_background(lambda: executor().run([toy("r")], folder=work / "logs"))
    until(lambda: (work / "waiting_0").exists(), slurm)
    job = job_of(work / "logs", "r")
    (work / "waiting_0").unlink()
    slurm.ask("scancel", "--signal=USR2", job)  # what submitit has Slurm send before the time is over
    until(lambda: (work / "waiting_0").exists(), slurm, limit_s=240)
    assert "stopped by a signal" in (work / "logs" / "r.log").read_text()
    assert not (work / "logs" / "r.code").exists(), "the job is not over"
    slurm.ask("scancel", job)
    thread.join(120)
    assert found[0]["r"].stopped


def test_a_cancelled_job_has_saved_and_the_same_call_goes_on(work, slurm, monkeypatch):
    monkeypatch.setenv("MEDRL_TOY_FAIL", "wait")
    thread, found = in_background(lambda: executor().run([toy("r")], folder=work / "logs"))
    until(lambda: (work / "waiting_0").exists(), slurm)
    slurm.ask("scancel", job_of(work / "logs", "r"))
    thread.join(120)
    assert found[0]["r"].stopped
    until(lambda: "stopped by a signal" in (work / "logs" / "r.log").read_text(), slurm, limit_s=20)
    monkeypatch.delenv("MEDRL_TOY_FAIL")
    assert executor().run([toy("r")], folder=work / "logs")["r"].ok
    assert json.loads((work / "r" / "manifest.json").read_text())["resumed"] is True


def test_a_job_outlives_the_daemon_of_its_node(work, slurm, monkeypatch):
    monkeypatch.setenv("MEDRL_TOY_FAIL", "linger")
    thread, found = in_background(lambda: executor().run([toy("r")], folder=work / "logs"))
    until(lambda: (work / "lingering").exists(), slurm)
    slurm.kill("slurmd")
    time.sleep(1)
    (work / "go").touch()
    slurm.start_node()
    thread.join(240)
    assert found[0]["r"].ok, (slurm.logs(), (work / "logs" / "r.log").read_text())
    assert json.loads((work / "r" / "manifest.json").read_text())["status"] == "finished"


def command(*arguments):
    return [sys.executable, "-m", "medrl.cli", *arguments]


def test_a_sweep_leaves_its_jobs_when_it_is_interrupted_and_finds_them_again(work, slurm):
    call = command(
        "sweep", "toy", "--grid", "train.lr=0.1,0.2", "-o", "many", "--executor", "slurm", *RESOURCES
    )  # fmt: skip
    slow = {**os.environ, "MEDRL_TOY_FAIL": "linger"}
    process = subprocess.Popen(call, env=slow, stderr=subprocess.PIPE, text=True)
    until(lambda: (work / "lingering").exists(), slurm)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "the jobs stay in the queue" in err
    logs = work / "many" / ".sweep" / "logs"
    submitted = sorted(logs.glob("submitit/*submitted.pkl"))
    with (work / "again").open("w") as said:
        again = subprocess.Popen(call, stderr=said)
    until(lambda: "lr=0.1: started" in (work / "again").read_text(), slurm)
    (work / "go").touch()
    assert again.wait(240) == 0, (work / "again").read_text()
    assert sorted(logs.glob("submitit/*submitted.pkl")) == submitted, "nothing was submitted twice"
    assert (work / "many" / "summary.csv").read_text().count("\n") == 3


def test_parts_of_a_prediction_are_jobs_and_their_reports_become_one(work, slurm):
    assert subprocess.run(command("train", "toy", "-o", "m"), check=False).returncode == 0
    (work / "images").mkdir()
    done = subprocess.run(
        command(
            "predict", "-i", "images", "-o", "out", "--model", "m", "--parts", "2",
            "--executor", "slurm", "--resource", "cpus=1", "--max-memory", "0.5",
        ),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(json.loads((work / "out" / "report.json").read_text())["cases"]) == ["toy_001", "toy_002"]


def test_a_run_with_requeue_is_queued_again_by_itself(work, slurm):
    script = work / "job.sh"
    script.write_text(
        "#!/bin/sh\n"
        '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] && export MEDRL_TOY_FAIL=wait\n'
        f"srun {sys.executable} -m medrl.cli train toy -o r --requeue\n"
    )
    job = slurm.ask("sbatch", "--parsable", "--requeue", "--mem=500", "--open-mode=append", str(script))
    until(lambda: (work / "waiting_0").exists(), slurm)
    slurm.ask("scancel", "--signal=TERM", job)
    until(lambda: (work / "r" / "seen.json").exists(), slurm, limit_s=240)
    slurm.wait_for(job, "COMPLETED")
    # What the run says last may be lost with its step; the controller knows how often the job began anew.
    assert "Restarts=1 " in slurm.ask("scontrol", "show", "job", job)
