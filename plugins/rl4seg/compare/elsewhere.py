"""The methods of a comparison as tasks, one a seed and method: processes side by side, or jobs of Slurm.

Each task is ``medrl rl4seg compare … --seed N --only NAME``. What all methods of a seed share is made before
them, and their confidence is measured after them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medrl.core.errors import ConfigError, Interrupted, RuntimeFault
from medrl.core.executors import Task
from medrl.core.executors.stages import FOLDER, write_config
from medrl.core.jobs import global_arguments
from medrl.core.runlog import RunLock

from . import trust

if TYPE_CHECKING:
    from medrl.core.executors import Executor, TaskEnd

    from .running import Study
    from .work import SeedStudy

SHARED, CONFIDENCE = "shared", "confidence"
"""What a task may do beside a method."""


def do_tasks(study: Study, executor: Executor) -> None:
    """Make what is left of a comparison in tasks; what is finished and unchanged is not asked for.

    Raises:
        RuntimeFault: A task failed, another comparison is at work in the folder, or it cannot be written.
        Interrupted: A task was stopped.
    """
    folder = study.folder / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder / "lock")
        lock.acquire(wait_s=2.0)
    except OSError as error:
        raise RuntimeFault(
            f"{folder} cannot be made", why=error.strerror or str(error), do="choose another folder with -o"
        ) from error
    try:
        tasks = tasks_of(study)
        ends = executor.run(tasks, folder=folder, tell=_Teller(study, len(tasks)))
    finally:
        lock.release()
    bad = [end for end in ends.values() if not end.ok]
    if not bad:
        return
    for end in bad:
        study.say(f"{end.name}: {end.cause()}; its log: {end.log}")
    first = next((end for end in bad if end.stopped), bad[0])
    again = "the same command goes on from here"
    if first.stopped:
        stopped = Interrupted(first.code - 128)
        stopped.do = again
        raise stopped
    raise RuntimeFault(f"comparison, {first.name}", why=first.cause(), do=f"see {first.log}; {again}")


def tasks_of(study: Study) -> list[Task]:
    """Write the config of a comparison and return what is left of each seed as tasks.

    Raises:
        RuntimeFault: The folder cannot be written.
    """
    config = (study.folder / FOLDER / "config.yaml").resolve()
    write_config(config, study.resolved)
    words = [*global_arguments(), "rl4seg", "compare", "-c", str(config), "-o", str(study.folder.resolve())]
    words += ["--methods", ",".join(method.key for method in study.methods)]
    tasks: list[Task] = []

    def add(seed: int, name: str, after: tuple[str, ...]) -> str:
        arguments = (*words, "--seed", str(seed), "--only", name)
        tasks.append(Task(name=f"seed_{seed}_{name}", arguments=arguments, after=after))
        return tasks[-1].name

    for seed, work in study.seeds.items():
        left = [method for method in study.possible(work) if not work.is_made(method)]
        judged = study.judge and (bool(left) or not _is_measured(study, work))
        kinds = [kind for method in left for kind in work.reads(method)]
        before = (add(seed, SHARED, ()),) if work.lacking(kinds) else ()
        made = [add(seed, method.key, before) for method in left]
        if judged and trust.applies(work, study.methods):
            add(seed, CONFIDENCE, (*before, *made))
    return tasks


def do_one(study: Study, name: str) -> None:
    """Do what one task does, for each seed of a comparison.

    Raises:
        ConfigError: There is no such thing.
    """
    methods = {method.key: method for method in study.methods}
    if name not in (SHARED, CONFIDENCE, *methods):
        raise ConfigError(f"--only {name}", why=f"neither {SHARED}, {CONFIDENCE} nor one of --methods")
    for work in study.seeds.values():
        if name == CONFIDENCE:
            trust.measure(work, study.methods, members=study.members)
        elif name == SHARED:
            for method in study.possible(work):
                for kind in work.reads(method):
                    work.shared(kind)
        else:
            study.make(work, methods[name])


def _is_measured(study: Study, work: SeedStudy) -> bool:
    return trust.is_measured(work, study.methods, members=study.members)


class _Teller:
    """Says which task of how many begins and ends."""

    def __init__(self, study: Study, total: int) -> None:
        self.study, self.total, self.done = study, total, 0

    def __call__(self, news: str, task: Task, end: TaskEnd | None) -> None:
        if end is None:
            self.study.say(f"{task.name}: {news}")
            return
        self.done += 1
        how = "done" if end.ok else "stopped" if end.stopped else f"failed ({end.code})"
        self.study.say(f"{task.name}: {how}, {self.done} of {self.total}")
