"""The stages of one run folder as tasks, each after the one before: processes, or jobs of Slurm.

Each task is ``medrl train METHOD -o RUN --set stage=KIND``. It goes through all stages up to its own and does
those whose inputs or outputs do not hash to what the record says (`medrl.core.stages`). So a record is never
trusted by itself, and a task that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medrl.core.errors import RuntimeFault
from medrl.core.executors.tasks import LEFT_OUT, Executor, Task, TaskEnd
from medrl.core.jobs import global_arguments
from medrl.core.stages import Pipeline

if TYPE_CHECKING:
    from medrl.core.adaptation.stages import Stage
    from medrl.core.config import Resolved
    from medrl.core.jobs import TrainJob

FOLDER = "jobs"
"""Config and logs of the tasks, in the run folder."""

_log = logging.getLogger("medrl.executors")


def run_stages(
    job: TrainJob,
    stages: Sequence[Stage],
    executor: Executor,
    *,
    settings: Sequence[str] = (),
    minutes_of: Callable[[Stage], int] = lambda _stage: 0,
    retries: int = 0,
) -> None:
    """Do the stages of a run from the first that is not done, each as a task; one that is done does nothing.

    Where all are done, the last is asked once more: it looks whether an input has changed since.

    Args:
        job: The job of the whole run; its config has the field `stage`.
        stages: All stages in their order.
        executor: Does the tasks.
        settings: Further ``KEY=VALUE`` of each task.
        minutes_of: Time limit of a stage; 0 takes that of the executor.
        retries: How often stages that failed are tried again.

    Raises:
        RuntimeFault: A stage failed as often as it may, or was stopped.
    """
    folder = job.run_dir / FOLDER
    tries = 0
    while True:
        done = stages_done(job.run_dir)
        # What comes after a stage that is done again may read it.
        first_open = next((at for at, stage in enumerate(stages) if stage.name not in done), -1)
        ends = executor.run(
            stage_tasks(job, stages[first_open:], settings=settings, minutes_of=minutes_of),
            folder=folder,
            tell=_tell,
        )
        bad = [end for end in ends.values() if not end.ok and end.code != LEFT_OUT]
        if not bad and all(end.ok for end in ends.values()):
            return
        first = (bad or list(ends.values()))[0]
        tries += 1
        if tries > retries or first.stopped:
            raise RuntimeFault(
                f"stage {first.name}",
                why=first.cause(),
                do=f"see {first.log}; the same command goes on from here",
            )
        _log.warning("stage %s failed; it is tried again", first.name)


def write_config(path: Path, resolved: Resolved[Any]) -> None:
    """Write the config that the commands of tasks read.

    Raises:
        RuntimeFault: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(resolved.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise RuntimeFault(
            f"{path} cannot be written",
            why=error.strerror or str(error),
            do="free space on that disk, or choose another folder with -o",
        ) from error


def stage_tasks(
    job: TrainJob,
    stages: Sequence[Stage],
    *,
    settings: Sequence[str] = (),
    minutes_of: Callable[[Stage], int] = lambda _stage: 0,
) -> list[Task]:
    """Write the config of a run and return the tasks of some of its stages, each after the one before.

    Raises:
        RuntimeFault: The run folder cannot be written.
    """
    config = (job.run_dir / FOLDER / "config.yaml").resolve()
    write_config(config, job.resolved)
    common = [*global_arguments(), "train", job.method, "-c", str(config), "-o", str(job.run_dir.resolve())]
    if job.init_from is not None:
        common += ["--init-from", str(Path(job.init_from).resolve())]
    common += ["--trust-checkpoint"] * job.trust_checkpoint + ["--fast-dev-run"] * job.fast_dev_run
    common += ["--devices", str(job.devices)] if job.devices > 1 else []
    for text in settings:
        common += ["--set", text]
    tasks: list[Task] = []
    for stage in stages:
        tasks.append(
            Task(
                name=stage.name,
                arguments=(*common, "--set", f"stage={stage.kind}"),
                after=tuple(task.name for task in tasks[-1:]),
                minutes=minutes_of(stage),
            )
        )
    return tasks


def stages_done(run_dir: Path) -> set[str]:
    """Return the names of the stages whose files are what the record of a run folder says."""
    return {name for name, status in Pipeline(run_dir).status().items() if status.state == "done"}


def _tell(_news: str, task: Task, end: TaskEnd | None) -> None:
    if end is None:
        _log.info("stage %s begins", task.name)
    elif end.ok:
        _log.info("stage %s is done", task.name)
    else:
        _log.warning("stage %s ended with code %d %s", task.name, end.code, end.why)
