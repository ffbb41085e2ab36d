"""Many runs of one call: what each of them is, where it goes, and who does it.

``--fold all``, ``--seeds N`` and ``medrl sweep`` differ only in what varies. Each run is an ordinary run
folder that an ordinary ``medrl train`` makes; what a planner adds lies in ``.sweep/`` beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import click

from medrl.cli.console import console, counted
from medrl.cli.failure import Terminated
from medrl.cli.layers import FAST_DEV_RUN
from medrl.cli.method_command import Call
from medrl.cli.runfiles import RunFacts, read_run
from medrl.core.errors import (
    EXIT_OK,
    EXIT_RUNTIME,
    EXIT_TERMINATED,
    ConfigError,
    MedrlError,
    RuntimeFault,
)
from medrl.core.executors import Task, TaskEnd, Tell, make_executor, parse_resources
from medrl.core.jobs import ConfigOption, global_arguments

FOLDER = ".sweep"
"""Folder of lock, planned configs and logs, beside the run folders."""

_PASSED_BY_PLAN = {
    "config",
    "output",
    "assignments",
    "preset",
    "fold",
    "seed",
    "seeds",
    "grid",
    "executor",
    "jobs",
    "resource",
    "print_config",
    "dry_run",
    "fast_dev_run",
    "resume",
    "requeue",
    "by",
}
_NAME = re.compile(r"[^A-Za-z0-9._=+-]+")


@dataclass(frozen=True)
class Planned:
    """One run that is to be done.

    Attributes:
        flags: Arguments that set this run apart, for the ranks that a launcher starts.
        name: Its folder in that of all runs.
        varied: What a grid sets in this run.
    """

    resolved: Any
    run_dir: Path
    flags: tuple[str, ...] = ()
    name: str = ""
    varied: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name or self.run_dir.name


@dataclass(frozen=True)
class Variations:
    """What varies between runs.

    Attributes:
        grid: Values by config key; every combination is a run.
        folds: Validation folds; empty leaves the config's own.
        seeds: Training seeds; empty leaves the config's own.
    """

    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    folds: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key, taken in (("data.fold", self.folds), ("train.seed", self.seeds)):
            if key in self.grid and taken:
                raise ConfigError(
                    f"{key} varies twice", why="in the grid and by a flag", do="leave one of both out"
                )
        for key, values in self.grid.items():
            if not values:
                raise ConfigError(f"grid {key}", why="it has no value", do=f"--grid {key}=V1,V2")

    def __len__(self) -> int:
        count = max(1, len(self.folds)) * max(1, len(self.seeds))
        for values in self.grid.values():
            count *= len(values)
        return count

    def runs(self) -> Iterator[tuple[str, dict[str, Any], int | None, int | None]]:
        """Yield name, grid values, fold and seed of each run."""
        short = short_names(self.grid)
        for values in product(*self.grid.values()):
            varied = dict(zip(self.grid, values, strict=True))
            for fold, seed in product(self.folds or (None,), self.seeds or (None,)):
                parts = [f"{short[key]}={_text(value)}" for key, value in varied.items()]
                parts += [f"fold{fold}"] * (len(self.folds) > 1) + [f"seed{seed}"] * (len(self.seeds) > 1)
                yield safe_name("_".join(parts)), varied, fold, seed


def short_names(keys: Mapping[str, Any] | Sequence[str]) -> dict[str, str]:
    """Return the last word of each dotted key, or the whole key where two end alike."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {
        key: key if sum(other == name for other in last.values()) > 1 else name for key, name in last.items()
    }


def safe_name(text: str) -> str:
    """Return a text as a file name; a long one is cut and told apart by a hash."""
    name = _NAME.sub("-", text).strip("-.")
    if len(name) <= 120:
        return name
    import hashlib

    return f"{name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Read ``KEY=V1,V2`` words; values are YAML, so that a list is written ``[16, 32]``.

    Raises:
        ConfigError: A word is no such thing, or a key comes twice.
    """
    from medrl.core.config import parse_yaml

    found: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        key, sign, values = text.partition("=")
        key = key.strip()
        if not sign or not key or not values.strip():
            raise ConfigError(f"--grid {text}", why="expected KEY=V1,V2", do="--grid train.lr=1e-3,1e-4")
        if key in found:
            raise ConfigError(f"--grid {key}", why="it is given twice", do=f"--grid {key}=V1,V2,V3")
        try:
            found[key] = tuple(parse_yaml(f"values: [{values}]", origin=f"--grid {key}")["values"])
        except ConfigError as error:
            raise ConfigError(f"--grid {text}", why=error.why or error.what) from error
    return found


def check_names(plan: Sequence[Planned]) -> None:
    """Refuse a plan in which two runs are the same, or have one folder.

    Raises:
        ConfigError: There are such runs.
    """
    seen: dict[Path, Planned] = {}
    same: dict[str, Planned] = {}
    for planned in plan:
        other = seen.get(planned.run_dir)
        if other is not None:
            raise ConfigError(
                f"two runs have the folder {planned.run_dir}",
                why=f"{dict(other.varied)} and {dict(planned.varied)}",
                do="leave one of both out",
            )
        seen[planned.run_dir] = planned
        twin = same.get(planned.resolved.hash)
        if twin is not None:
            raise ConfigError(
                f"runs {twin.label} and {planned.label} are the same",
                why="a value of the grid is there twice",
            )
        same[planned.resolved.hash] = planned


def do_elsewhere(call: Call, plan: Sequence[Planned]) -> int:
    """Do the runs of a plan as tasks of an executor; return the first exit code that is not 0.

    Runs that are finished are left as they are, so that the same command goes on after an interruption.

    Args:
        call: The call with the options ``executor``, ``jobs`` and ``resource``.
        plan: The runs, in one folder; a single one without a name is planned in its own folder.

    Raises:
        ConfigError: A run folder holds a run with another config.
        RuntimeFault: Another call is at work in the folder, or it cannot be written.
    """
    shared, screen = call.shared, console()
    executor = make_executor(
        shared["executor"] or "local",
        jobs=shared["jobs"] or 0,
        resources=parse_resources(shared["resource"]),
    )
    check_names(plan)
    root = plan[0].run_dir.parent if plan[0].name else plan[0].run_dir
    with held(root):
        finished = [planned for planned in plan if is_finished(planned)]
        refuse_others(plan)
        todo = [planned for planned in plan if planned not in finished]
        if finished:
            screen.say(f"{counted(len(finished), 'run')} of {len(plan)} finished before")
        tasks = [task_of(call, planned, root / FOLDER) for planned in todo]
        ends: dict[str, TaskEnd] = {}
        try:
            ends = executor.run(tasks, folder=root / FOLDER / "logs", tell=teller(len(plan), len(finished)))
        except (KeyboardInterrupt, Terminated):
            if shared["executor"] == "slurm":
                screen.line("the jobs stay in the queue; the same command looks after them again")
            raise
        finally:
            show_runs(plan, {name: end.code for name, end in ends.items()})
    show_failures(ends.values())
    return first_code(ends.values())


def is_finished(planned: Planned) -> bool:
    """Whether the folder of a run holds exactly this run, finished."""
    if not (planned.run_dir / "manifest.json").is_file():
        return False
    facts = read_run(planned.run_dir)
    return facts.status == "finished" and not _changed(planned)


def refuse_others(plan: Sequence[Planned]) -> None:
    """Refuse a plan where a folder holds a run with another config; all such runs are told at once.

    Raises:
        ConfigError: There is such a folder.
    """
    problems = []
    for planned in plan:
        if (planned.run_dir / "manifest.json").is_file():
            problems += [f"{planned.run_dir}: {line}" for line in _changed(planned)]
    if problems:
        raise ConfigError(
            f"{plan[0].run_dir.parent} holds runs with another config",
            why="stored -> now",
            do="give the same settings again, or choose another folder with -o",
            problems=problems,
        )


def task_of(call: Call, planned: Planned, folder: Path) -> Task:
    """Write the config of a run and return the command that does it.

    Raises:
        RuntimeFault: The file cannot be written.
    """
    name = planned.label
    config = (folder / "plan" / f"{name}.yaml").resolve()
    _write(config, planned.resolved.to_yaml())
    arguments = [*global_arguments(), "train", call.method, "-c", str(config)]
    if call.shared["fast_dev_run"]:
        from medrl.core.config import flatten

        values = flatten(planned.resolved.values())
        arguments += ["--fast-dev-run"]
        arguments += [word for key in FAST_DEV_RUN for word in ("--set", f"{key}={json.dumps(values[key])}")]
    arguments += plain_arguments(train_parameters(), call.shared, leave_out=_PASSED_BY_PLAN)
    arguments += plain_arguments(call.command.params, call.own)
    arguments += ["--resume", "never"] if call.shared["resume"] == "never" else []
    return Task(name=name, arguments=(*arguments, "-o", str(planned.run_dir.resolve())))


def train_parameters() -> list[click.Parameter]:
    """Return the options that every method's training has."""
    from medrl.cli.options import train_options

    return train_options()


def plain_arguments(
    parameters: Sequence[click.Parameter], values: Mapping[str, Any], *, leave_out: set[str] | None = None
) -> list[str]:
    """Return options that are no config keys as words of a command line; those at their default are left out.

    Paths become absolute.
    """
    words: list[str] = []
    for item in parameters:
        if not isinstance(item, click.Option) or isinstance(item, ConfigOption) or item.name is None:
            continue
        value = values.get(item.name)
        if item.name in (leave_out or ()) or value is None or value == () or value == item.default:
            continue
        flag = max(item.opts, key=len)
        if item.is_flag:
            words += [flag] if value else list(item.secondary_opts[:1])
        elif item.multiple:
            words += [word for one in value for word in (flag, *_words(one))]
        else:
            words += [flag, *_words(value, nargs=item.nargs)]
    return words


@contextmanager
def held(root: Path, name: str = FOLDER) -> Iterator[None]:
    """Hold the lock of a folder of runs or parts, so that no two calls plan in it.

    Args:
        root: The folder.
        name: Folder in it for lock, plan and logs.

    Raises:
        RuntimeFault: Another call holds it, or the folder cannot be written.
    """
    from medrl.core.runlog import RunLock

    folder = root / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeFault(
            f"{folder} cannot be made", why=error.strerror or str(error), do="choose another folder with -o"
        ) from error
    lock = RunLock(folder / "lock")
    try:
        lock.acquire(wait_s=2.0)
    except RuntimeFault as error:
        raise RuntimeFault(
            f"{root} is in use", why=error.why, do="wait for it, or choose another folder with -o"
        ) from error
    try:
        yield
    finally:
        lock.release()


def show_runs(plan: Sequence[Planned], codes: Mapping[str, int]) -> None:
    """Write the table of runs, and the mean over folds and seeds of each setting."""
    rows = []
    for planned in plan:
        there = (planned.run_dir / "manifest.json").is_file()
        facts = read_run(planned.run_dir) if there else RunFacts()
        code = codes.get(planned.label)
        config = planned.resolved.config
        status = facts.status or ("not begun" if code in (None, -1) else f"failed ({code})")
        rows.append(
            [
                str(config.data.fold),
                str(config.train.seed),
                status,
                str(facts.step),
                facts.best_text(),
                str(planned.run_dir),
            ]
        )
    console().table(["fold", "seed", "status", "step", "best", "run"], rows, right=(0, 1, 3))
    from medrl.cli.summary import say_summary, summarise

    roots = {planned.run_dir.parent for planned in plan}
    folders = [
        planned.run_dir for planned in plan if (planned.run_dir / "manifest.json").is_file() and len(plan) > 1
    ]
    if not folders:
        return
    found = summarise(folders)
    say_summary(found)
    if len(roots) == 1 and (roots.pop() / FOLDER).is_dir():
        root = plan[0].run_dir.parent
        _write(root / "summary.json", json.dumps(found.as_dict(), indent=2) + "\n")
        _write(root / "summary.csv", found.as_csv())


def show_failures(ends: Iterator[TaskEnd] | Any) -> None:
    """Write how each task failed: the last error line of its log, and where the log is."""
    screen = console()
    for end in ends:
        if not end.ok:
            why = end.why or end.last_error() or f"exit code {end.code}"
            screen.line(f"{screen.style('failed', fg='red')}: {end.name}: {why}")
            if end.log.is_file():
                screen.line(f"         log: {end.log}")


def first_code(ends: Any) -> int:
    """Return the exit code of several tasks: that of the first that failed, a stop before all others."""
    codes = [end.code for end in ends]
    stops = [end.code for end in ends if end.stopped]
    if stops:
        return int(stops[0])
    found = next((code for code in codes if code), EXIT_OK)
    known = 0 <= found <= EXIT_TERMINATED
    return int(found) if known and (found < 6 or found in (130, 143)) else EXIT_RUNTIME


def teller(total: int, before: int = 0) -> Tell:
    """Return what says which task of how many begins and ends."""
    done = before

    def tell(news: str, task: Task, end: TaskEnd | None) -> None:
        nonlocal done
        if end is None:
            console().say(f"{task.name}: {news}")
            return
        done += 1
        how = "done" if end.ok else "stopped" if end.stopped else f"failed ({end.code})"
        console().say(f"{task.name}: {how}, {done} of {total}")

    return tell


def _changed(planned: Planned) -> list[str]:
    from medrl.cli.runfiles import run_config

    try:
        return list(planned.resolved.difference(run_config(planned.run_dir)))
    except MedrlError as error:
        return [f"its config cannot be read: {error.why or error.what}"]


def _words(value: Any, *, nargs: int = 1) -> list[str]:
    if isinstance(value, Path):
        return [str(value.expanduser().resolve())]
    if isinstance(value, (tuple, list)):
        return [str(one) for one in value] if nargs != 1 else [",".join(str(one) for one in value)]
    return [str(value)]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, dict, bool)) or value is None else str(value)


def _write(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    import os

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RuntimeFault(
            f"{path} cannot be written",
            why=f"{error.strerror or error} ({len(text.encode())} bytes)",
            do="free space on that disk, or choose another folder with -o",
        ) from error
