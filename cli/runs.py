"""``medrl runs list|show|diff|summary|report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medrl.cli.completing import complete_runs
from medrl.cli.console import console, number, size, write_json
from medrl.cli.groups import FriendlyGroup
from medrl.cli.method_command import existing
from medrl.cli.options import ANY_PATH, json_option
from medrl.cli.runfiles import RunFacts, read_run, read_runs, run_config, run_folders

COLOURS = {
    "finished": "green",
    "failed": "red",
    "interrupted": "yellow",
    "stopped": "yellow",
    "running": "cyan",
}


@click.group("runs", cls=FriendlyGroup, short_help="List, show and compare runs.")
def runs() -> None:
    """List, show and compare runs. A run is a folder with a config, metrics and checkpoints."""


@runs.command("list", short_help="List the runs of a folder.")
@click.argument("folder", type=ANY_PATH, default=Path("runs"), metavar="[DIR]")
@json_option()
def list_runs(folder: Path, as_json: bool) -> None:
    """List the runs in DIR, by default runs/."""
    found = read_runs(run_folders(folder))
    if as_json:
        write_json([_plain(facts) for facts in found])
        return
    screen = console()
    if not found:
        screen.say(f"no runs in {folder}; medrl train METHOD makes one")
        return
    rows = [
        [str(f.dir), f.method or "–", screen.style(f.status, fg=COLOURS.get(f.status)), f.step, f.best_text()]
        for f in found
    ]
    screen.table(["run", "method", "status", "step", "best"], rows, right=(3,))


@runs.command(short_help="Show one run: status, last numbers, files.")
@click.argument("run", type=ANY_PATH, shell_complete=complete_runs)
@json_option()
def show(run: Path, as_json: bool) -> None:
    """Show one run: status, last numbers, checkpoints, versions."""
    facts = read_run(run)
    if as_json:
        write_json({**_plain(facts), "manifest": facts.manifest})
        return
    screen = console()
    screen.heading(f"{run}: {facts.sentence()}")
    told = ("status", "step", "best")
    screen.facts(
        {
            key.replace("_", " "): _text(value)
            for key, value in facts.manifest.items()
            if key not in told and value not in (None, "", [], {})
        }
    )
    if facts.metrics:
        screen.say()
        rows = [[key, _text(value)] for key, value in facts.metrics.items()]
        screen.table(["last value of", ""], rows)
    files = sorted((run / "checkpoints").glob("*.pt"))
    if files:
        screen.say()
        screen.table(
            ["checkpoint", "size"], [[str(path), size(path.stat().st_size)] for path in files], right=(1,)
        )
    if facts.status in ("stopped", "interrupted", "failed"):
        screen.say(f"go on: medrl resume {run}")


@runs.command(short_help="Compare config and results of two runs.")
@click.argument("a", type=ANY_PATH, shell_complete=complete_runs)
@click.argument("b", type=ANY_PATH, shell_complete=complete_runs)
@json_option()
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Compare two runs: config values that differ, and the last numbers of both."""
    first, second = read_run(a), read_run(b)
    from medrl.core.config import flatten

    left, right = flatten(run_config(a)), flatten(run_config(b))
    keys = sorted(set(left) | set(right))
    config = {key: [left.get(key), right.get(key)] for key in keys if left.get(key) != right.get(key)}
    names = sorted(set(first.metrics) | set(second.metrics))
    metrics = {name: [first.metrics.get(name), second.metrics.get(name)] for name in names}
    if as_json:
        write_json({"a": a, "b": b, "config": config, "metrics": metrics})
        return
    screen = console()
    if config:
        rows = [[key, _text(pair[0]), _text(pair[1])] for key, pair in config.items()]
        screen.table(["config", str(a), str(b)], rows)
    else:
        screen.say("the configs are equal")
    rows = [["step", str(first.step), str(second.step), ""]]
    for name, pair in metrics.items():
        rows.append([name, _text(pair[0]), _text(pair[1]), _change(*pair)])
    screen.say()
    screen.table(["last value of", str(a), str(b), "change"], rows, right=(3,))


@runs.command(short_help="Mean, spread and interval over folds and seeds.")
@click.argument("folder", type=ANY_PATH, metavar="DIR")
@click.option("--metric", default="", metavar="NAME", help="A recorded number.  [default: best validation]")
@json_option()
def summary(folder: Path, metric: str, as_json: bool) -> None:
    """Show mean, standard deviation and 95 % interval of the runs in DIR, for each setting.

    Runs that differ only in fold and seed belong to one setting.
    """
    from medrl.cli.summary import direct_runs, say_summary, summarise

    found = summarise(direct_runs(folder), metric)
    if as_json:
        write_json(found.as_dict())
        return
    say_summary(found)


@runs.command(short_help="Write report.html of runs.")
@click.argument("run", type=ANY_PATH, nargs=-1, required=True, shell_complete=complete_runs)
@click.option(
    "--evaluation",
    type=ANY_PATH,
    metavar="DIR",
    help="Also show an evaluation that medrl evaluate -o DIR wrote.",
)
def report(run: tuple[Path, ...], evaluation: Path | None) -> None:
    """Write report.html into each RUN: one file that needs nothing else."""
    existing(evaluation, option="--evaluation")
    for path in run:
        read_run(path)
    from medrl.core.report import build_report

    for path in run:
        console().say(f"written: {build_report(path, evaluation=evaluation)}")


def _plain(facts: RunFacts) -> dict[str, Any]:
    return {
        "run": facts.dir,
        "method": facts.method,
        "status": facts.status,
        "step": facts.step,
        "best": None if facts.best is None else dict(zip(("name", "value", "step"), facts.best, strict=True)),
        "seconds": facts.seconds,
        "metrics": facts.metrics,
    }


def _change(a: object, b: object) -> str:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool):
        return f"{b - a:+.4g}"
    return ""


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return number(value)
