"""SIGTERM and SIGINT: the step is finished, the state saved, the exit code set; a second one ends at once."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from medrl.core.checkpoint import load_checkpoint
from medrl.core.runlog import RunFolder
from medrl.core.runtime.signals import StopFlag

sys.path.insert(0, str(Path(__file__).parents[1] / "core" / "ranks"))
import run_toy
import toy_run as toy


def start(mode, folder):
    (process,) = run_toy.launch(mode, folder)
    wait_for(folder / "ready_0", process)
    return process


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        if process.exitcode is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{path.name} did not appear: {(path.parent / 'stderr_0').read_text()}")
        time.sleep(0.02)


def end_of(process):
    process.join(60)
    ended = process.exitcode
    process.kill()
    return ended


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_exit_code(tmp_path, number, code):
    process = start("signals", tmp_path)
    os.kill(process.pid, number)
    assert end_of(process) == code
    text = (tmp_path / "stderr_0").read_text()
    assert f"signal {int(number)}, checkpoint saved to" in text
    run = RunFolder.open(tmp_path / "run", lock=False)
    assert (run.status, run.owner) == ("interrupted", {})
    step = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").meta["step"]
    assert step >= 2
    assert max(record["step"] for record in run.records()) == step, "the step under way was finished"
    assert run.manifest["step"] == step


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    def stop_at_three(rt, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    from medrl.core.errors import Interrupted

    toy.train(tmp_path / "a", 6)
    with pytest.raises(Interrupted) as caught:
        toy.train(tmp_path / "b", 6, before=stop_at_three)
    assert caught.value.exit_code == 143
    assert toy.state_of(tmp_path / "b")["step"] == 3
    toy.train(tmp_path / "b", 6)
    assert toy.state_of(tmp_path / "a") == toy.state_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("first", "second", "code"), [("SIGTERM", "SIGTERM", 143), ("SIGTERM", "SIGINT", 130)]
)
def test_the_second_signal_ends_at_once(tmp_path, first, second, code):
    process = start("stubborn", tmp_path)
    os.kill(process.pid, getattr(signal, first))
    wait_for(tmp_path / "flagged", process)
    assert process.exitcode is None, "the first signal only sets a flag"
    os.kill(process.pid, getattr(signal, second))
    assert end_of(process) == code
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_signal_before_the_first_step_still_leaves_a_checkpoint(tmp_path):
    from medrl.core.errors import Interrupted

    class Eager(toy.Manager):
        def notify(self, hook, **facts):
            if hook == "medrl_run_started":
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        toy.train(tmp_path / "run", 5, manager=Eager())
    assert toy.state_of(tmp_path / "run")["step"] == 0
    toy.train(tmp_path / "run", 5)
    toy.train(tmp_path / "straight", 5)
    assert toy.state_of(tmp_path / "run") == toy.state_of(tmp_path / "straight")


def test_under_torchrun_the_echo_of_a_signal_counts_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    flag = StopFlag()
    flag._handle(signal.SIGINT, None)
    flag._handle(signal.SIGINT, None)
    assert (flag.number, ended) == (signal.SIGINT, [])
    flag._handle(signal.SIGTERM, None)
    assert ended == [143]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    flag = StopFlag()
    flag._handle(signal.SIGINT, None)
    flag._handle(signal.SIGINT, None)
    assert ended == [143, 130]


def test_a_scheduler_that_signals_every_process_does_not_lose_the_workers(tmp_path):
    def signal_all(rt, step):
        if step == 3:
            workers = rt._loaders["loader0"]._endless._workers
            for number in [worker.pid for worker in workers] + [os.getpid()]:
                os.kill(number, signal.SIGTERM)
            time.sleep(0.2)

    from medrl.core.errors import Interrupted

    with pytest.raises(Interrupted):
        toy.train(tmp_path / "run", 50, before=signal_all, workers=1)
    assert toy.state_of(tmp_path / "run")["step"] == 3
