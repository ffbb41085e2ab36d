"""What is to be done elsewhere: command lines of medrl, in an order, and how each of them ended.

A task is a command line and nothing else. So whatever an executor does, a person can do by hand; a task that
was killed is started again by the same words, and goes on where its own files say.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from medrl.core.errors import ConfigError

LEFT_OUT = -1
"""Code of a task that was not begun, because a task before it failed."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One command line of medrl.

    Attributes:
        name: Unique among the tasks of a call; names the log.
        arguments: What follows ``medrl``.
        after: Names of the tasks that must have ended well before.
        minutes: Time limit of its job; 0 takes that of the resources.
    """

    name: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()
    minutes: int = 0

    def command(self) -> list[str]:
        """Return the whole command, for this interpreter."""
        return [sys.executable, "-m", "medrl.cli", *self.arguments]


@dataclass(frozen=True, kw_only=True)
class TaskEnd:
    """How a task ended.

    Attributes:
        code: Exit code; 128 + N for signal N, -1 if it was not begun.
        log: Everything that it wrote.
        job: Its number in the queue.
        why: What is known beyond the code.
    """

    name: str
    code: int
    log: Path
    job: str = ""
    why: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ended well."""
        return self.code == 0

    @property
    def stopped(self) -> bool:
        """Whether a signal asked it to stop, so that the same command goes on later."""
        return self.code in (130, 143)

    def last_error(self) -> str:
        """Return the last error that its log tells; empty if there is none."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 20_000))
                lines = file.read().decode("utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        told = [line.partition("error: ")[2] for line in lines if "error: " in line]
        return told[-1] if told else ""

    def cause(self) -> str:
        """Return why it did not end well, as far as it is known."""
        told = self.last_error()
        return self.why or f"its process ended with exit code {self.code}" + (f": {told}" if told else "")


Tell: TypeAlias = Callable[[str, Task, "TaskEnd | None"], None]
"""Called with ``started`` (no end yet), or ``ended``, the task, and its end."""


class Executor(ABC):
    """Does tasks somewhere."""

    @abstractmethod
    def run(
        self, tasks: Sequence[Task], *, folder: Path, tell: Tell = lambda _news, _task, _end: None
    ) -> dict[str, TaskEnd]:
        """Do all tasks and return how each ended, in the given order; one that fails does not stop others.

        Args:
            tasks: Tasks with different names; `after` names earlier ones of them.
            folder: Where logs and whatever else an executor writes go; shared by all machines.
            tell: Is told what happens.

        Raises:
            ConfigError: The tasks contradict each other, or the executor is not usable here.
            RuntimeFault: The folder cannot be written, or the queue refuses a job.
        """


def make_executor(name: str, *, jobs: int = 0, resources: Any = None) -> Executor:
    """Return the executor of a name.

    Args:
        name: ``local``: processes of this machine; ``slurm``: jobs of Slurm, through submitit; ``submitit``:
            processes of this machine through submitit, which needs no Slurm.
        jobs: Tasks at a time; 0 means one for ``local`` and no limit for the others.
        resources: `Resources` of a job; the defaults if left out.

    Raises:
        ConfigError: There is no such executor, or its package is not installed.
    """
    from medrl.core.executors.cluster import Resources, SubmititExecutor
    from medrl.core.executors.local import LocalExecutor

    if name == "local":
        return LocalExecutor(jobs or 1)
    if name in ("slurm", "submitit"):
        return SubmititExecutor(
            resources or Resources(), cluster="slurm" if name == "slurm" else "local", jobs=jobs
        )
    raise ConfigError(f"executor '{name}'", why="unknown", do="local or slurm")


def check_tasks(tasks: Iterable[Task]) -> None:
    """Refuse two tasks of one name, and one that waits for a later or an unknown one.

    Raises:
        ConfigError: There is such a task.
    """
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise ConfigError(f"task {task.name}", why="two tasks have this name")
        if not task.name or "/" in task.name or task.name.startswith("."):
            raise ConfigError(f"task '{task.name}'", why="its name is no file name")
        unknown = [name for name in task.after if name not in seen]
        if unknown:
            raise ConfigError(f"task {task.name}", why=f"it waits for {unknown[0]}, which is not before it")
        seen.add(task.name)


def blocked_by(task: Task, ends: Mapping[str, TaskEnd]) -> str:
    """Return the name of a task that this one needs and that did not end well; empty if there is none."""
    return next((name for name in task.after if name in ends and not ends[name].ok), "")


def in_order(tasks: Sequence[Task], ends: Mapping[str, TaskEnd]) -> dict[str, TaskEnd]:
    """Return the ends in the order of their tasks."""
    return {task.name: ends[task.name] for task in tasks if task.name in ends}
