"""Tasks as jobs of Slurm, through submitit; or through submitit's processes on this machine.

The jobs know each other through Slurm: a task that waits for another is submitted at once with a dependency,
and Slurm starts it. The program that submitted them only looks. Killed and started again it finds the jobs
by the numbers that it wrote down, and submits nothing twice.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.executors.local import exit_code, start
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
from medrl.core.runlog.lock import process_alive

RECORD = "jobs.json"
"""Numbers of the jobs by task, in the folder of an executor."""

POLL_S = 5.0
_GRACE_S = 60.0
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
_ALIVE = {
    "PENDING",
    "RUNNING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
}
_log = logging.getLogger("medrl.executors")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks for.

    Attributes:
        minutes: Time limit. A job that runs out of it saves, and is queued again, up to `requeues` times.
        gpus: GPUs of a node.
        cpus: Cores of a task.
        memory_gb: Memory of a node in GB.
        nodes: Nodes of a job.
        tasks: Ranks on a node; with more than one rank in all, the ranks of a run find each other.
        partition: Empty for the default one.
        account: Empty for the default one.
        requeues: How often a job that ran out of time goes on.
        options: Further options of sbatch by name, such as ``constraint``.
    """

    minutes: int = 60
    gpus: int = 0
    cpus: int = 4
    memory_gb: float = 16.0
    nodes: int = 1
    tasks: int = 1
    partition: str = ""
    account: str = ""
    requeues: int = 10
    options: Mapping[str, str] = field(default_factory=dict)


def parse_resources(texts: Sequence[str]) -> Resources:
    """Read ``KEY=VALUE`` words; a key that is no field of `Resources` is an option of sbatch.

    Example:
        >>> found = parse_resources(["minutes=90", "gpus=2", "constraint=a100"])
        >>> found.minutes, found.gpus, dict(found.options)
        (90, 2, {'constraint': 'a100'})

    Raises:
        ConfigError: A word has no ``=``, or its value is no number where one is needed.
    """
    values: dict[str, Any] = {}
    options: dict[str, str] = {}
    kinds: dict[str, Callable[[str], Any]] = {
        **dict.fromkeys(("minutes", "gpus", "cpus", "nodes", "tasks", "requeues"), _whole),
        "memory_gb": _positive,
        "partition": str,
        "account": str,
    }
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key or not value:
            raise ConfigError(
                f"--resource {text}", why="expected KEY=VALUE", do="for example --resource minutes=120"
            )
        if key not in kinds:
            options[key.lstrip("-")] = value
            continue
        try:
            values[key] = kinds[key](value)
        except ValueError as error:
            raise ConfigError(f"--resource {text}", why=str(error)) from error
    return Resources(**values, options=options)


class CommandJob:
    """The function of a job: does a command line in a process of its own; plain, so that it can be sent.

    Before a job is out of time, Slurm sends a signal. submitit then calls `checkpoint`: the process is asked
    to save, and the job is queued again with the same command.
    """

    def __init__(self, task: Task, folder: Path, cwd: Path) -> None:
        self.task, self.folder, self.cwd = task, Path(folder), Path(cwd)
        self._pid = 0
        self._leaving = False

    def __call__(self) -> int:
        """Do the task; raise if it did not end well, so that jobs that wait for it do not begin.

        Raises:
            RuntimeFault: Its exit code is not 0.
        """
        os.chdir(self.cwd)
        main = os.environ.get("SLURM_PROCID", "0") == "0"
        place = "" if main else f"_rank{os.environ['SLURM_PROCID']}"
        if main:
            code_file(self.folder, self.task).unlink(missing_ok=True)
        log = self.folder / f"{self.task.name}{place}.log"
        # submitit's own signal goes to the whole group; the process is told by SIGTERM instead.
        process = start(self.task, log, {}, ignore=(signal.SIGUSR2, signal.SIGUSR1), group=False)
        self._pid = process.pid
        while process.poll() is None:
            time.sleep(0.2)
        code = exit_code(process.returncode)
        while self._leaving:
            time.sleep(0.2)  # the handler of the signal ends this process
        if main:
            code_file(self.folder, self.task).write_text(f"{code}\n", encoding="utf-8")
        if code:
            raise RuntimeFault(f"task {self.task.name}", why=f"exit code {code}; its log: {log}")
        return code

    def checkpoint(self) -> Any:
        """Let the process save and end; submitit queues the same again."""
        from submitit.helpers import DelayedSubmission

        self._leaving = True
        if self._pid:
            deadline = time.monotonic() + _GRACE_S
            try:
                os.kill(self._pid, signal.SIGTERM)
            except ProcessLookupError:
                deadline = 0.0
            while process_alive(self._pid) and time.monotonic() < deadline:
                time.sleep(0.1)
        return DelayedSubmission(CommandJob(self.task, self.folder, self.cwd))


def code_file(folder: Path, task: Task) -> Path:
    """Return the file in which a job leaves the exit code of its task."""
    return folder / f"{task.name}.code"


class SubmititExecutor(Executor):
    """Submits jobs and waits for them; interrupted, it leaves them in the queue.

    Args:
        resources: What each job asks for.
        cluster: ``slurm``, or ``local`` for submitit's processes on this machine.
        jobs: Jobs at a time, 0 for no limit. Independent tasks are submitted as one job array.
        poll_s: Seconds between two looks.

    Raises:
        ConfigError: submitit is not installed.
    """

    def __init__(
        self,
        resources: Resources | None = None,
        *,
        cluster: Literal["slurm", "local"] = "slurm",
        jobs: int = 0,
        poll_s: float = POLL_S,
    ) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError(
                "executor slurm",
                why="the package submitit is not installed",
                do='pip install "medrl[slurm]"',
            ) from error
        self._submitit: Any = submitit
        self.resources = resources or Resources()
        self.cluster = cluster
        self.jobs = jobs
        self.poll_s = poll_s if cluster == "slurm" else min(poll_s, 0.2)

    def run(
        self, tasks: Sequence[Task], *, folder: Path, tell: Tell = lambda _news, _task, _end: None
    ) -> dict[str, TaskEnd]:
        """Submit what is not in the queue yet, and wait; see `Executor.run`."""
        check_tasks(tasks)
        folder = folder.resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RuntimeFault(f"{folder} cannot be made", why=error.strerror or str(error)) from error
        jobs = self._found(tasks, folder)
        for name, job in jobs.items():
            _log.info("task %s is job %s already", name, job.job_id)
        ends: dict[str, TaskEnd] = {}
        by_name = {task.name: task for task in tasks}
        told: set[str] = set()
        while len(ends) < len(tasks):
            self._submit_what_can_be(tasks, folder, jobs, ends, tell)
            states = self._states(jobs)
            for name in [name for name in jobs if name not in ends and states is not None]:
                state, task = (states or {}).get(str(jobs[name].job_id), ""), by_name[name]
                if name not in told and state != "PENDING":
                    told.add(name)
                    tell("started", task, None)
                if state not in _ALIVE:
                    ends[name] = self._end(task, jobs[name], folder, state, blocked_by(task, ends))
                    tell("ended", task, ends[name])
            if len(ends) < len(tasks):
                time.sleep(self.poll_s)
        return in_order(tasks, ends)

    # -- private -----------------------------------------------------------------------------------

    def _submit_what_can_be(
        self,
        tasks: Sequence[Task],
        folder: Path,
        jobs: dict[str, Any],
        ends: dict[str, TaskEnd],
        tell: Tell,
    ) -> None:
        for task in tasks:
            cause = blocked_by(task, ends)
            if task.name not in ends and task.name not in jobs and cause:
                log = folder / f"{task.name}.log"
                ends[task.name] = TaskEnd(
                    name=task.name, code=LEFT_OUT, log=log, why=f"{cause} did not end well"
                )
                tell("ended", task, ends[task.name])
        new = [task for task in tasks if task.name not in jobs and task.name not in ends]
        if self.cluster == "local":  # it knows no dependencies and no limit
            busy = len(jobs) - sum(name in ends for name in jobs)
            free = self.jobs - busy if self.jobs else len(new)
            new = [task for task in new if all(name in ends for name in task.after)][: max(0, free)]
        if not new:
            return
        for task in new:
            code_file(folder, task).unlink(missing_ok=True)
        alike = len({task.minutes for task in new}) == 1 and not any(task.after for task in new)
        if self.cluster == "slurm" and alike and len(new) > 1:
            made = self._submit(new, folder, "")
            jobs.update({task.name: job for task, job in zip(new, made, strict=True)})
            self._write(folder, jobs)
            return
        for task in new:
            before = [jobs[name].job_id for name in task.after if name not in ends]
            jobs[task.name] = self._submit([task], folder, ":".join(before))[0]
            self._write(folder, jobs)

    def _submit(self, tasks: Sequence[Task], folder: Path, after: str) -> list[Any]:
        """Submit tasks, several as one job array; the queue's refusal is an error."""
        works = [CommandJob(task, folder, Path.cwd()) for task in tasks]
        try:
            executor = self._executor(folder, tasks[0], after)
            if len(works) == 1:
                return [executor.submit(works[0])]
            return list(executor.submit_array(works))
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            why = (str(getattr(error, "output", "") or error).strip().splitlines() or [""])[-1]
            if self.cluster == "slurm" and shutil.which("srun") is None:
                raise ConfigError(
                    "executor slurm", why="there is no srun: this is no Slurm machine", do="--executor local"
                ) from error
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise RuntimeFault(
                    f"{folder} cannot be written",
                    why=error.strerror or str(error),
                    do="free space on that disk, or choose another folder with -o",
                ) from error
            if self.cluster == "slurm" and queue_states() is None:
                raise RuntimeFault(
                    "Slurm does not answer",
                    why=why,
                    do="medrl doctor says what there is; --executor local needs no Slurm",
                ) from error
            raise RuntimeFault(
                f"Slurm refuses {tasks[0].name}", why=why, do="check --resource with sinfo and sbatch"
            ) from error

    def _executor(self, folder: Path, task: Task, after: str) -> Any:
        asked = self.resources
        executor = self._submitit.AutoExecutor(
            folder=folder / "submitit", cluster=self.cluster, slurm_max_num_timeout=asked.requeues
        )
        executor.update_parameters(
            name=f"medrl-{task.name}"[:60],
            timeout_min=task.minutes or asked.minutes,
            gpus_per_node=asked.gpus,
            cpus_per_task=asked.cpus,
            mem_gb=asked.memory_gb,
            nodes=asked.nodes,
            tasks_per_node=asked.tasks,
        )
        if self.cluster == "slurm":
            extra = dict(asked.options)
            if after:
                extra |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
            named = {"slurm_partition": asked.partition, "slurm_account": asked.account}
            executor.update_parameters(
                **{key: value for key, value in named.items() if value},
                **({"slurm_additional_parameters": extra} if extra else {}),
                **({"slurm_array_parallelism": self.jobs} if self.jobs else {}),
            )
        return executor

    def _found(self, tasks: Sequence[Task], folder: Path) -> dict[str, Any]:
        """Return the jobs of an earlier call that are still in the queue."""
        if self.cluster != "slurm":
            return {}
        try:
            known = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        states = queue_states()
        if states is None:
            raise RuntimeFault(
                "Slurm does not answer",
                why="it cannot be told which jobs are in the queue already",
                do="squeue",
            )
        found = {}
        for task in tasks:
            number = known.get(task.name) if isinstance(known, dict) else None
            if isinstance(number, str) and states.get(number) in _ALIVE:
                found[task.name] = self._submitit.SlurmJob(folder / "submitit", number)
        return found

    def _write(self, folder: Path, jobs: Mapping[str, Any]) -> None:
        text = json.dumps({name: str(job.job_id) for name, job in jobs.items()}, indent=2) + "\n"
        path = folder / RECORD
        try:
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise RuntimeFault(f"{path} cannot be written", why=error.strerror or str(error)) from error

    def _states(self, jobs: Mapping[str, Any]) -> dict[str, str] | None:
        """Return the state of each job by its number; None if it cannot be told now.

        The queue decides and not the result, since a job that is queued again has a result too.
        """
        if self.cluster == "slurm":
            return queue_states()
        return {str(job.job_id): "" if job.done() else "RUNNING" for job in jobs.values()}

    def _end(self, task: Task, job: Any, folder: Path, state: str, cause: str) -> TaskEnd:
        """Return how a job ended: by the code that it left, else by what the queue says."""
        if cause:
            why = f"{cause} did not end well"
            log = folder / f"{task.name}.log"
            return TaskEnd(name=task.name, code=LEFT_OUT, log=log, job=str(job.job_id), why=why)
        log, number = folder / f"{task.name}.log", str(job.job_id)
        if not log.exists():
            log = Path(str(job.paths.stderr))
        deadline = time.monotonic() + self.poll_s
        while True:  # a file of another node may appear late
            try:
                code = int(code_file(folder, task).read_text(encoding="utf-8"))
                return TaskEnd(name=task.name, code=code, log=log, job=number)
            except (OSError, ValueError):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
        code = 143 if state in ("CANCELLED", "PREEMPTED") else 1
        why = f"job {number}: {state.lower().replace('_', ' ') or 'it left no exit code'}"
        return TaskEnd(name=task.name, code=code, log=log, job=number, why=why)


def queue_states() -> dict[str, str] | None:
    """Return the state of each of this user's jobs that Slurm still knows; None if Slurm is silent.

    ``squeue`` is asked, because ``sacct`` needs an accounting database that small clusters lack. A job that
    has ended disappears after some minutes.
    """
    program = shutil.which("squeue")
    if program is None:
        return {}
    try:
        done = subprocess.run(  # noqa: S603 - Slurm's own tool
            [program, "--noheader", "--states=all", "--array", "--format=%i|%T|%r", f"--user={os.getuid()}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    found = {}
    for line in done.stdout.splitlines():
        number, state, reason = (*line.strip().split("|"), "", "")[:3]
        never = state == "PENDING" and reason == "DependencyNeverSatisfied"
        found[number] = "CANCELLED" if never else state
    return found


def _whole(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"'{text}' is no whole number")
    return int(text)


def _positive(text: str) -> float:
    found = float(text)
    if not 0 < found < float("inf"):
        raise ValueError(f"'{text}' is not above 0")
    return found
