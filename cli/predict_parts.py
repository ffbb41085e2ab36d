"""``medrl predict … --parts N``: each part a process or a job, one report in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from medrl.cli.console import console, counted
from medrl.cli.failure import Terminated
from medrl.cli.many import first_code, held, plain_arguments, show_failures, teller
from medrl.cli.method_command import Call
from medrl.core.errors import EXIT_DATA, EXIT_OK, EXIT_RUNTIME, ConfigError
from medrl.core.executors import Resources, Task, make_executor, parse_resources
from medrl.core.jobs import global_arguments

FOLDER = ".parts"
"""Folder of lock and logs, in the output folder."""

_OWN = {"parts", "executor", "jobs", "resource", "part", "report", "continue_", "paths", "input", "output"}


def do_parts(call: Call, parameters: Sequence[click.Parameter], shared: dict[str, Any]) -> int:
    """Predict all parts and put their reports together; return the exit code.

    Every part leaves finished cases as they are, so that the same command goes on after an interruption.

    Args:
        call: The call.
        parameters: Options that every method's prediction has.
        shared: Their values, with input and output.

    Raises:
        ConfigError: The options contradict each other.
        RuntimeFault: Another call is at work in the output folder.
    """
    parts, output = int(shared["parts"]), Path(shared["output"])
    if tuple(shared["part"]) != (1, 1):
        raise ConfigError("--part and --parts", why="one does a part, the other all of them")
    if output.name.lower().endswith((".nii", ".nii.gz")):
        raise ConfigError(f"-o {output}", why="parts need a folder", do="name a folder")
    name = shared["executor"] or "local"
    jobs = shared["jobs"] or (parts if name == "local" else 0)
    if name == "local":
        jobs = _fitting(jobs, shared["max_memory"])
    executor = make_executor(name, jobs=jobs, resources=_resources(shared))
    tasks = [_task(call, parameters, shared, (index, parts)) for index in range(1, parts + 1)]
    screen = console()
    with held(output, FOLDER):
        screen.say(f"{counted(parts, 'part')}, logs in {output / FOLDER}")
        try:
            ends = executor.run(tasks, folder=output / FOLDER, tell=teller(parts))
        except (KeyboardInterrupt, Terminated):
            if name == "slurm":
                screen.line("the jobs stay in the queue; the same command looks after them again")
            raise
        from medrl.core.predicting.parts import merge_parts

        merged = merge_parts(output, parts, shared["report"])
    bad = [end for end in ends.values() if end.code not in (EXIT_OK, EXIT_DATA)]
    show_failures(bad)
    for case, why in merged.failed.items():
        screen.line(f"{screen.style('failed', fg='red')}: case {case}: {why.removeprefix(f'case {case}: ')}")
    for index, left in merged.missing.items():
        what = "left no report" if left is None else f"did not come to {counted(left, 'case')}"
        screen.line(f"{screen.style('missing', fg='red')}: part {index} {what}; the same command goes on")
    told = [f"{counted(len(merged.done), 'case')} in {output}"]
    told += [f"{len(merged.failed)} failed"] * bool(merged.failed)
    screen.say(", ".join(told))
    screen.say(f"report: {merged.report}")
    if bad:
        return first_code(bad)
    if merged.missing:
        return EXIT_RUNTIME
    return EXIT_DATA if merged.failed else EXIT_OK


def _task(
    call: Call, parameters: Sequence[click.Parameter], shared: dict[str, Any], part: tuple[int, int]
) -> Task:
    index, parts = part
    arguments = [*global_arguments(), "predict", call.method]
    arguments += ["-i", str(Path(shared["input"]).resolve()), "-o", str(Path(shared["output"]).resolve())]
    arguments += plain_arguments(parameters, shared, leave_out=_OWN)
    arguments += plain_arguments(call.command.params, call.own)
    arguments += ["--part", f"{index}/{parts}", "--continue"]
    return Task(name=f"part{index}of{parts}", arguments=tuple(arguments))


def _resources(shared: dict[str, Any]) -> Resources:
    """Return what a job asks for; its memory is that of ``--max-memory`` unless it is named."""
    found = parse_resources(shared["resource"])
    named = any(text.startswith("memory_gb=") for text in shared["resource"])
    return replace(found, memory_gb=shared["max_memory"]) if shared["max_memory"] and not named else found


def _fitting(jobs: int, max_memory_gb: float) -> int:
    """Return how many processes of this size the machine has memory for, at most `jobs`."""
    if not max_memory_gb:
        return jobs
    from medrl.core.predicting.memory import GIB, available_bytes

    free = available_bytes()
    room = max(1, int(free / (max_memory_gb * GIB))) if free else jobs
    if room < jobs:
        console().say(f"{room} of {jobs} processes at a time: {free / GIB:.1f} GiB are free")
    return min(jobs, room)
