"""Training one teacher for each fold: ordinary runs of the same code as the student, without teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medrl.core.config import Layer, Resolved
from medrl.core.errors import ConfigError
from medrl.core.jobs import TrainJob

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

Say = Callable[[str], None]
Resolve = Callable[[Sequence[Layer]], Resolved[Any]]
"""Resolves the config of a run with further layers on top."""


def train_teachers(
    manager: PluginManager,
    resolve: Resolve,
    out: Path,
    *,
    count: int,
    only: Sequence[int] = (),
    command: Sequence[str] = (),
    say: Say = lambda _line: None,
) -> list[Path]:
    """Train `count` teachers; teacher k never sees fold k of `count`.

    Each is an ordinary run folder ``out/teacher_k``, made by the code of the student without teachers. One
    that is finished is left as it is, one that was interrupted goes on.

    Args:
        manager: Source of models.
        resolve: Gives the config of a run, with the given layers on top.
        out: Folder of the run folders.
        count: Number of teachers and of folds.
        only: Numbers of the teachers to train now; empty trains all.
        command: The command line, for the record.
        say: Shows a line of progress.

    Returns:
        The run folders.
    """
    from medrl.plugins.graft import data, train

    wrong = [k for k in only if not 0 <= k < count]
    if wrong:
        raise ConfigError("--only", why=f"there is no teacher {wrong[0]}", do=f"choose 0 to {count - 1}")
    runs = []
    for k in only or range(count):
        seed = int(resolve(()).config.train.seed)
        values = {
            "data": {"fold": k, "folds": count},
            "train": {"seed": seed + k},
            "teachers": {"features": []},
            "split": {"labelled": 0},
        }
        job = TrainJob(
            method="graft",
            resolved=resolve([Layer(f"teacher {k}", values)]),
            run_dir=out / f"teacher_{k}",
            manager=manager,
            command=tuple(command),
        )
        say(f"teacher {k + 1} of {count}: {job.run_dir}")
        with job.runtime() as rt:
            train.fit(rt, job.config, data.load(rt, job.config))
        runs.append(job.run_dir)
    return runs
