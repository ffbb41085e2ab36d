"""Faults of run folders: two runs in one, stale locks, another config, full or unwritable disks."""

import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.runlog import RunFolder
from medrl.core.runlog import lock as lock_module

sys.path.insert(0, str(Path(__file__).parents[1] / "core" / "ranks"))
import toy_run as toy

fork = multiprocessing.get_context("fork")


def hold(path, ready, *, worker=False):
    run = RunFolder.create(path, config_yaml="method: toy\n")
    if worker:
        child = os.fork()
        if child == 0:
            signal.pause()
        (path / "worker.pid").write_text(str(child))
    ready.set()
    signal.pause()
    run.close()


@pytest.fixture
def held(tmp_path):
    """A run folder that another process holds."""
    ready = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(30)
    yield tmp_path / "run", process
    process.kill()
    process.join()


def test_a_second_run_in_the_same_folder_is_refused_with_process_host_and_start(held):
    path, process = held
    with pytest.raises(RuntimeFault, match="is in use") as caught:
        RunFolder.open(path)
    assert f"process {process.pid} on {socket.gethostname()} has it since 20" in caught.value.why
    assert "-o" in caught.value.do
    assert RunFolder.open(path, lock=False).owner["pid"] == process.pid


def test_two_training_runs_in_one_folder_cannot_overlap_even_in_one_process(tmp_path):
    with toy.make_job(tmp_path / "run", 2).runtime() as rt:
        toy.fit(rt)
        with pytest.raises(RuntimeFault, match="is in use"):
            toy.train(tmp_path / "run", 2)
    assert RunFolder.open(tmp_path / "run", lock=False).status == "finished"
    toy.train(tmp_path / "run", 3)


def test_the_lock_of_a_killed_run_is_reported_as_stale_and_taken_over(held, caplog):
    path, process = held
    process.kill()
    process.join()
    with caplog.at_level(logging.WARNING, "medrl"):
        run = RunFolder.open(path)
    assert f"stale lock in {path}: process {process.pid} on {socket.gethostname()}" in caplog.text
    assert run.owner["pid"] == os.getpid()
    run.close("finished")
    caplog.clear()
    RunFolder.open(path).close()
    assert "stale" not in caplog.text


def test_a_surviving_child_of_a_killed_run_does_not_keep_the_folder_locked(tmp_path):
    ready = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path / "run", ready), kwargs={"worker": True})
    process.start()
    assert ready.wait(30)
    process.kill()
    process.join()
    child = int((tmp_path / "run" / "worker.pid").read_text())
    try:
        assert lock_module.process_alive(child)
        RunFolder.open(tmp_path / "run").close()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.fixture
def without_file_locks(monkeypatch):
    """A file system that knows no locks, as some network file systems."""
    import errno

    def refuse(*_args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "flock", refuse)


def write_owner(path, **changes):
    process = fork.Process(target=int)
    process.start()
    process.join()
    owner = {
        "pid": process.pid,
        "host": socket.gethostname(),
        "start": "2026-01-01T00:00:00+00:00",
        "ticks": 1,
    }
    (path / "run.lock").write_text(json.dumps({**owner, **changes}))


def test_without_file_locks_the_process_number_decides(tmp_path, without_file_locks, caplog):
    RunFolder.create(tmp_path / "run", config_yaml="").close()
    write_owner(tmp_path / "run", pid=os.getpid(), ticks=None)
    with pytest.raises(RuntimeFault, match="is in use"):
        RunFolder.open(tmp_path / "run")
    write_owner(tmp_path / "run", host="elsewhere")
    with pytest.raises(RuntimeFault, match="on elsewhere has it"):
        RunFolder.open(tmp_path / "run")
    write_owner(tmp_path / "run", pid=os.getpid(), ticks=1)  # the number belongs to another process by now
    with caplog.at_level(logging.WARNING, "medrl"):
        RunFolder.open(tmp_path / "run").close()
    write_owner(tmp_path / "run")
    RunFolder.open(tmp_path / "run").close()
    assert caplog.text.count("stale lock") == 2


def test_a_lock_file_with_nonsense_is_no_obstacle(tmp_path):
    RunFolder.create(tmp_path / "run", config_yaml="").close()
    (tmp_path / "run" / "run.lock").write_bytes(b"\xff{[")
    RunFolder.open(tmp_path / "run").close()


def test_a_config_that_differs_on_resume_stops_and_shows_the_difference(tmp_path):
    toy.train(tmp_path / "run", 3)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="another config") as caught:
        toy.train(tmp_path / "run", 3, lr=0.5, batch_size=1)
    assert caught.value.problems == ("train.batch_size: 2 → 1", "train.lr: 0.01 → 0.5")
    assert "medrl resume" in caught.value.do
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after.pop(tmp_path / "run" / "log.txt") is not None
    before.pop(tmp_path / "run" / "log.txt")
    assert after == before, "nothing is touched"


def test_another_method_in_the_same_folder_is_refused(tmp_path):
    toy.train(tmp_path / "run", 2)
    with pytest.raises(ConfigError) as caught:
        toy.train(tmp_path / "run", 2, method="other")
    assert "method: 'toy' → 'other'" in caught.value.problems


def test_the_settings_of_the_machine_may_change_on_resume(tmp_path):
    toy.train(tmp_path / "run", 2)
    toy.train(tmp_path / "run", 4, threads=2, timeout_s=60, keep_last=3)
    assert toy.state_of(tmp_path / "run")["step"] == 4


def test_fewer_steps_than_before_are_a_difference(tmp_path):
    toy.train(tmp_path / "run", 3)
    with pytest.raises(ConfigError) as caught:
        toy.train(tmp_path / "run", 2)
    assert caught.value.problems == ("train.max_steps: 3 → 2",)


@pytest.mark.parametrize("place", ["file/run", "/proc/medrl/run"])
def test_an_unwritable_place_is_a_clear_error(tmp_path, place):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RuntimeFault, match="cannot be written") as caught:
        toy.train(tmp_path / place, 2)
    assert "-o" in caught.value.do


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_clear_error(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(RuntimeFault, match="cannot be written"):
        toy.train(tmp_path / "shut" / "run", 2)


def test_a_full_disk_ends_the_log_with_a_clear_error_and_keeps_the_checkpoint(tmp_path):
    toy.train(tmp_path / "run", 2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    run = RunFolder.open(tmp_path / "run")
    metrics.unlink()
    metrics.symlink_to("/dev/full")
    with pytest.raises(RuntimeFault, match="No space left on device"):
        run.metrics(3, loss=1.0)
    run.close("failed")
    metrics.unlink()
    toy.train(tmp_path / "run", 3)


def test_a_damaged_manifest_is_a_clear_error(tmp_path):
    toy.train(tmp_path / "run", 2)
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(RuntimeFault, match=r"manifest\.json cannot be read"):
        toy.train(tmp_path / "run", 3)


def test_a_failing_run_releases_its_lock(tmp_path):
    def fail(_rt, step):
        if step == 2:
            raise ValueError("a defect of the method")

    with pytest.raises(ValueError, match="defect"):
        toy.train(tmp_path / "run", 3, before=fail)
    assert RunFolder.open(tmp_path / "run", lock=False).status == "failed"
    toy.train(tmp_path / "run", 3)
