"""``medrl demo [METHOD]``: from synthetic data to a report, offline."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from medrl.cli.console import console, number
from medrl.cli.method_command import Call, MethodCommand
from medrl.cli.options import FOLDER, NATURAL
from medrl.cli.progress import duration
from medrl.cli.session import manager_of
from medrl.core.errors import EXIT_OK, ConfigError, MedrlError, PluginError

REPORTS = Path("runs")
ROLES = {"baseline": "cyan", "method": "green", "control": "yellow"}


class Demo(MethodCommand):
    """Runs the demonstration of a method."""

    def find_method(self, ctx: click.Context, values: dict[str, Any]) -> str:
        """Take the first method that has a demonstration."""
        manager = manager_of(ctx)
        for name in manager.names():
            try:
                if "demo" in manager.commands(name).provided():
                    return name
            except MedrlError:
                continue
        raise ConfigError("no installed method has a demonstration", do="medrl doctor")

    def work(self, call: Call) -> int:
        """Run the demonstration and show its table and report."""
        from medrl.core.jobs import DemoJob, DemoResult

        shared = call.shared
        keep: Path | None = shared["keep"]
        if keep is not None and keep.exists() and any(keep.iterdir()):
            raise ConfigError(f"--keep {keep}", why="the folder is not empty", do="choose a new folder")
        folder = keep or Path(tempfile.mkdtemp(prefix=f"medrl-demo-{call.method}-"))
        screen = console()
        screen.heading(f"demo of {call.method}: {call.manager.info(call.method).summary}")
        screen.loading()
        start = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            result = call.start(
                DemoJob(
                    method=call.method,
                    folder=folder,
                    manager=call.manager,
                    preset=shared["preset"],
                    seed=shared["seed"],
                    threads=shared["threads"],
                    say=screen.say,
                    command=("medrl", *screen.arguments),
                )
            )
            if not isinstance(result, DemoResult):
                raise PluginError(
                    f"plugin '{call.method}', command demo",
                    why=f"it returned {type(result).__name__}, not a DemoResult",
                )
            report = result.report if keep is not None else saved_report(result.report, call.method)
        finally:
            if keep is None:
                shutil.rmtree(folder, ignore_errors=True)
        show(result, report, seconds=time.monotonic() - start)
        if keep is None:
            screen.say(f"everything else is removed again; medrl demo {call.method} --keep DIR keeps it")
        return EXIT_OK


def saved_report(report: Path, method: str) -> Path:
    """Copy the report, which needs no other file, to a place that stays."""
    target = REPORTS / f"demo_{method}" / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(report, target)
    return target


def show(result: Any, report: Path, *, seconds: float) -> None:
    """Write the table of a demonstration: baseline, method and control, what the numbers mean, the report."""
    screen = console()
    screen.say()
    rows = [
        [screen.style(role, fg=ROLES.get(role)), name, *(number(value) for value in numbers)]
        for name, role, numbers in result.rows
    ]
    columns = ["", "", *result.columns]
    screen.table(columns, rows, right=range(2, len(columns)))
    screen.say()
    for note in result.notes:
        screen.say(note)
    screen.say(f"time: {duration(seconds)}")
    screen.say(f"report: {report.resolve()}")


demo = Demo(
    "demo",
    kind="demo",
    params=[
        click.Option(["--keep"], type=FOLDER, metavar="DIR", help="Write everything to DIR and keep it."),
        click.Option(
            ["--preset"],
            type=click.Choice(["smoke", "small"]),
            default="small",
            show_default=True,
            help="smoke takes a minute or two, small several and shows more.",
        ),
        click.Option(["--seed"], type=NATURAL, default=1, show_default=True, metavar="N", help="Seed."),
        click.Option(
            ["--threads"],
            type=NATURAL,
            default=1,
            show_default=True,
            metavar="N",
            help="CPU threads of torch.",
        ),
    ],
    help=(
        "Show a method at work, offline: it writes a synthetic dataset, trains, predicts, evaluates, and "
        "ends with a table of baseline, method and a trivial control, and a report. METHOD left out is the "
        "first that has a demonstration."
    ),
    short_help="Show a method at work on synthetic data, offline.",
)
