"""The commands that measure rl4seg: the demonstration, the comparison, TS-IT, uncertainty."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medrl.core.errors import ConfigError
from medrl.core.jobs import DemoJob, DemoResult, executor_options, resolve_tool

if TYPE_CHECKING:
    from medrl.core.config import Layer, Resolved
    from medrl.core.manager import PluginManager

FOLDER = click.Path(path_type=Path, file_okay=False, resolve_path=True)
FILE = click.Path(path_type=Path, dir_okay=False)
ANY_PATH = click.Path(path_type=Path, resolve_path=True)


@click.command("demo")
def demo(job: DemoJob) -> DemoResult:
    """Source and target scanner, learned reward, PPO, controls, report, on synthetic echocardiograms."""
    from medrl.plugins.rl4seg.demo import run

    return run(job)


def _config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that give the config of a study, as `medrl train rl4seg` has them."""
    for option in reversed(
        [
            click.option("--data", "source", type=ANY_PATH, default=None, help="Labelled source images."),
            click.option("--target", type=ANY_PATH, default=None, help="Target images."),
            click.option("-c", "--config", "config_file", type=FILE, default=None, help="Config file."),
            click.option("--preset", default=None, help="smoke, small, release or paper."),
            click.option(
                "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any config value."
            ),
            click.option(
                "--seed", type=click.IntRange(min=0), default=None, help="Seed; the first of several."
            ),
            click.option("--device", default=None, help="auto, cpu, cuda, cuda:1."),
            click.option("--threads", type=click.IntRange(min=0), default=None, help="CPU threads."),
        ]
    ):
        command = option(command)
    return command


_KEYS = {
    "source": "data.root",
    "target": "target.root",
    "seed": "train.seed",
    "device": "train.device",
    "threads": "train.threads",
}
"""Options of the studies and the config keys that they set."""


def _resolver(manager: PluginManager, given: Mapping[str, Any]) -> Callable[[Sequence[Layer]], Resolved[Any]]:
    """Return what resolves the config of a study with further layers on top."""
    values = {key: given[name] for name, key in _KEYS.items() if given[name] is not None}
    return lambda layers: resolve_tool(manager, "rl4seg", values, given, layers)


@click.command("compare")
@_config_options
@click.option("-o", "--output", type=FOLDER, default=None, help="Folder of all runs and of the report.")
@click.option(
    "--methods",
    default="all",
    show_default=True,
    help="Names or groups with commas between: all, core, unlabelled, source, style-ppo, …",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Repeat with so many seeds."
)
@click.option(
    "--only",
    default=None,
    metavar="NAME",
    help="Do only this, and write no report: shared, one of --methods, or confidence. A task does it.",
)
@click.option("--list", "listing", is_flag=True, help="Show every method and do nothing.")
@click.pass_obj
def compare(
    manager: PluginManager,
    /,
    output: Path | None,
    methods: str,
    seeds: int,
    only: str | None,
    listing: bool,
    executor: str | None,
    jobs: int | None,
    resource: Sequence[str],
    **config: Any,
) -> None:
    """The method beside everything it must beat, at the same number of optimiser steps.

    Needs test images with labels in the target; its training labels are read only by the upper bounds
    (ppo-oracle, style-ppo-oracle, target). What is finished stays, an interrupted comparison goes on.
    With --jobs or --executor methods and seeds are made side by side.
    """
    from medrl.core.executors import make_executor, parse_resources
    from medrl.plugins.rl4seg.compare import catalogue, elsewhere, running

    if listing:
        for method in catalogue.METHODS:
            click.echo(f"{method.key:24} {method.role:9} {method.start or '-':7} {method.title}")
        return
    if output is None:
        raise ConfigError("compare", why="it has no folder to write to", do="-o DIR")
    by = None
    if executor or jobs:
        by = make_executor(executor or "local", jobs=jobs or 0, resources=parse_resources(resource))
    study = running.Study(
        manager,
        _resolver(manager, config),
        output,
        catalogue.chosen(_words(methods)),
        seeds=seeds,
        say=_say,
        command=sys.argv,
    )
    if only is not None:
        elsewhere.do_one(study, only)
        return
    outcome = study.run(by)
    for line in study.summary(outcome):
        click.echo(line)
    _say(f"numbers: {output / 'results.json'}")
    _say(f"report: {output / 'report.html'}")


compare.params += executor_options("methods")


@click.command("ts-it")
@_config_options
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of networks and scores.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=None,
    help="Optimiser steps of each network; left out, those of the method's source and PPO stages together.",
)
@click.pass_obj
def ts_it(manager: PluginManager, /, output: Path, steps: int | None, **config: Any) -> None:
    """Train the rival TS-IT: one binary network a class, which teaches itself where it is sure."""
    from medrl.plugins.rl4seg.compare import running

    scores = running.ts_it(
        manager, _resolver(manager, config), output, steps=steps, say=_say, command=sys.argv
    )
    for name, value in scores.items():
        click.echo(f"{name:20} {value:.4f}")


@click.command("uncertainty")
@click.option(
    "--model", type=ANY_PATH, required=True, help="Run folder of `medrl train rl4seg`, with its reward net."
)
@click.option("--target", type=ANY_PATH, default=None, help="Images with labels; left out, those of the run.")
@click.option(
    "--ensemble", type=ANY_PATH, multiple=True, help="Further runs or checkpoints: an ensemble as a rival."
)
@click.option("--save", type=FILE, default=None, help="Write the maps to this HDF5 file.")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of uncertainty.json and the report.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option("--threads", type=click.IntRange(min=0), default=1, show_default=True, help="CPU threads.")
@click.pass_obj
def uncertainty(
    manager: PluginManager,
    /,
    model: Path,
    target: Path | None,
    ensemble: Sequence[Path],
    save: Path | None,
    output: Path,
    device: str,
    threads: int,
) -> None:
    """Calibration and error finding of the reward map, beside dropout, ensemble, test-time augmentation."""
    from medrl.plugins.rl4seg.compare import judging

    lines = judging.run(
        manager,
        model,
        output,
        target=target,
        ensemble=ensemble,
        save=save,
        device=device,
        threads=threads,
        say=_say,
    )
    for line in lines:
        click.echo(line)


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError("--methods", why="it names no method", do="--methods core, or --methods all")
    return words


def _say(line: str) -> None:
    click.echo(line, err=True)
