"""Tasks as processes of this machine, so many at a time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.executors.tasks import (
    LEFT_OUT,
    Executor,
    Task,
    TaskEnd,
    Tell,
    blocked_by,
    check_tasks,
    in_order,
)

GRACE_S = 120.0
"""How long tasks that were asked to stop may take to save before they are killed."""

_PAUSE_S = 0.05
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen[bytes]
    slot: int
    log: Path


class LocalExecutor(Executor):
    """Starts processes; each has the whole machine's rights and its own log.

    Where there are several GPUs, each place has one of them in turn. A signal to this process is passed on:
    runs save and stop. Should this process be killed, Linux does the same.

    Args:
        jobs: Processes at a time.

    Raises:
        ConfigError: There is no place for a single process.
    """

    def __init__(self, jobs: int = 1) -> None:
        if jobs < 1:
            raise ConfigError(f"{jobs} processes at a time", why="at least one is needed", do="--jobs 1")
        self.jobs = jobs

    def run(
        self, tasks: Sequence[Task], *, folder: Path, tell: Tell = lambda _news, _task, _end: None
    ) -> dict[str, TaskEnd]:
        """Do all tasks; see `Executor.run`."""
        check_tasks(tasks)
        waiting, running = list(tasks), dict[str, _Running]()
        ends: dict[str, TaskEnd] = {}
        devices = visible_gpus() if self.jobs > 1 else []
        try:
            while waiting or running:
                self._begin(waiting, running, ends, folder, devices, tell)
                for name, item in list(running.items()):
                    code = item.process.poll()
                    if code is not None:
                        del running[name]
                        ends[name] = TaskEnd(name=name, code=exit_code(code), log=item.log)
                        tell("ended", item.task, ends[name])
                time.sleep(_PAUSE_S)
        finally:
            stop([item.process for item in running.values()])
        return in_order(tasks, ends)

    def _begin(
        self,
        waiting: list[Task],
        running: dict[str, _Running],
        ends: dict[str, TaskEnd],
        folder: Path,
        devices: Sequence[str],
        tell: Tell,
    ) -> None:
        """Start what can be started, and set aside what waits for a task that failed."""
        for task in list(waiting):
            cause = blocked_by(task, ends)
            log = folder / f"{task.name}.log"
            if cause:
                waiting.remove(task)
                ends[task.name] = TaskEnd(
                    name=task.name, code=LEFT_OUT, log=log, why=f"{cause} did not end well"
                )
                tell("ended", task, ends[task.name])
            elif len(running) < self.jobs and all(name in ends for name in task.after):
                waiting.remove(task)
                slot = min(set(range(self.jobs)) - {item.slot for item in running.values()})
                gpu = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if len(devices) > 1 else {}
                running[task.name] = _Running(task, start(task, log, {**self._threads(), **gpu}), slot, log)
                tell("started", task, None)

    def _threads(self) -> dict[str, str]:
        """Share the cores among the processes; more threads than cores make everything slow."""
        if self.jobs == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}


def start(
    task: Task, log: Path, environment: Mapping[str, str], *, ignore: Sequence[int] = (), group: bool = True
) -> subprocess.Popen[bytes]:
    """Start the process of a task; what it writes is added to its log.

    Args:
        task: What to do.
        log: Made if missing.
        environment: Added to this process's own.
        ignore: Signals that the process does not react to.
        group: Give it a process group of its own, so that a Ctrl-C reaches it only through this process.

    Raises:
        RuntimeFault: The log cannot be written, or the process cannot be started.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            return _popen(task, out, environment, _at_start(tuple(ignore)), group=group)
    except OSError as error:
        raise RuntimeFault(
            f"task {task.name} cannot be started",
            why=f"{error.filename or log}: {error.strerror or error}",
            do="free space on that disk, or choose another folder with -o",
        ) from error


def stop(processes: Sequence[subprocess.Popen[bytes]], grace_s: float = GRACE_S) -> None:
    """Ask processes to save and end; those that do not are killed after a while."""
    for process in processes:
        with contextlib.suppress(OSError):
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def exit_code(code: int) -> int:
    """Return the exit code of a process as a shell tells it: 128 + N where signal N killed it."""
    return 128 - code if code < 0 else code


def visible_gpus() -> list[str]:
    """Return the names of this machine's GPUs as CUDA_VISIBLE_DEVICES takes them, without torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip()]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(  # noqa: S603 - the driver's own tool, without arguments from outside
            [program, "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip().isdigit()]


def _popen(
    task: Task, out: IO[bytes], environment: Mapping[str, str], at_start: Callable[[], None], *, group: bool
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - this interpreter with words that the planner wrote
        task.command(),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        start_new_session=group,
        preexec_fn=at_start,
    )


def _libc() -> Any:
    """Return the C library, loaded before any fork; None where there is no prctl."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None)
        _ = found.prctl
    except (OSError, AttributeError):
        return None
    return found


_LIBC = _libc()


def _at_start(ignore: tuple[int, ...]) -> Callable[[], None]:
    """Return what the new process does before its program: ignore signals, and end with its parent."""

    def prepare() -> None:
        for number in ignore:
            signal.signal(number, signal.SIG_IGN)
        if _LIBC is not None:
            _LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)

    return prepare
