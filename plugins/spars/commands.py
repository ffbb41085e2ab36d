"""Command line of spars; options become config values, the work is done elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medrl.core.jobs import DemoJob, DemoResult, PredictJob, TrainJob, config_option, resolve_tool

if TYPE_CHECKING:
    from medrl.core.config import Resolved
    from medrl.core.manager import PluginManager
    from medrl.core.predicting import PredictOutcome

FOLDER = click.Path(path_type=Path, file_okay=False, resolve_path=True)
FILE = click.Path(path_type=Path, dir_okay=False, resolve_path=True)
ANY_PATH = click.Path(path_type=Path, resolve_path=True)
POLICIES = ("scan", "greedy", "self-play", "random", "tiles")
KINDS = ("fraction", "presence", "compact", "faithful")


@click.command("train")
@config_option(
    "--stage",
    key="stage",
    type=click.Choice(["all", "classifier", "play"]),
    help="classifier trains that alone; play and all train it first where it is missing.",
)
@config_option(
    "--presence", key="data.presence", type=FILE, help="Image labels; else presence.csv in --data."
)
@config_option(
    "--classifier-run",
    "classifier_run",
    key="inputs.classifier",
    type=ANY_PATH,
    help="Run of `medrl spars train-classifier`; without it the classifier is trained first.",
)
@config_option("--classifier", key="classifier.kind", type=click.Choice(KINDS), help="What scores windows.")
@config_option(
    "--label-source",
    key="classifier.label_source",
    type=click.Choice(["image", "crop"]),
    help="image: presence labels alone; crop: labels of crops from voxel masks (original).",
)
@config_option(
    "--opponents",
    key="opponents.kind",
    type=click.Choice(["frozen", "pool", "live"]),
    help="Whom the learner plays; live is itself (original).",
)
@config_option(
    "--reward", key="env.reward", metavar="KEY", help="What a move is paid, by registry key: sign, shaped, …"
)
@config_option(
    "--warm-start",
    key="warm.kind",
    type=click.Choice(["planned", "multiscale", "greedy", "none"]),
    help="Imitate the best plan or greedy look-ahead first, or start from nothing (original).",
)
@config_option("--updates", key="ppo.updates", type=click.IntRange(min=0), help="Updates of PPO.")
def train(job: TrainJob) -> None:
    """Train a classifier from image labels, then two windows that compete for what it has learned."""
    from medrl.plugins.spars import running

    running.run(job)


@click.command("predict")
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default=None,
    help="Who chooses the windows: an exhaustive scan, greedy look-ahead, the trained policy, a random walk, "
    "or tiles in random order.  [default: map.policy of the run]",
)
@click.option(
    "--episodes", type=click.IntRange(min=1), default=None, help="Rollouts.  [default: map.episodes]"
)
@click.option(
    "--horizon", type=click.IntRange(min=1), default=None, help="Steps of a rollout.  [default: map.horizon]"
)
@click.option(
    "--threshold",
    type=click.FloatRange(0.0, 1.0),
    default=None,
    help="Of the score map.  [default: what validation chose]",
)
@click.option("--organ", type=FOLDER, default=None, help="Masks of the organ; nothing outside is kept.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of starts and moves.")
def predict(job: PredictJob, **options: Any) -> PredictOutcome:
    """Hunt in volumes; writes the mask, the score map, the path and, with --preview, a picture of each."""
    from medrl.plugins.spars.predict import Options, run

    return run(job, Options(**options))


@click.command("demo")
def demo(job: DemoJob) -> DemoResult:
    """Find tumours in synthetic CT from image labels alone; self-play beside scan, greedy and random walk."""
    from medrl.plugins.spars.demo import run

    return run(job)


# -- tools -------------------------------------------------------------------------------------------


def _options(*, output: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options of a tool that takes a config, as `medrl train spars` has them."""
    options = [
        click.option("--data", type=ANY_PATH, default=None, help="Dataset."),
        click.option("-o", "--output", type=FOLDER, required=True, help=output),
        click.option("-c", "--config", "config_file", type=FILE, default=None, help="Config file."),
        click.option("--preset", default=None, help="smoke, small, medrl or faithful."),
        click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any config value."),
        click.option("--fold", type=click.IntRange(min=0), default=None, help="Validation fold."),
        click.option("--seed", type=click.IntRange(min=0), default=None, help="Seed of everything random."),
        click.option("--device", default=None, help="auto, cpu, cuda, cuda:1."),
        click.option("--threads", type=click.IntRange(min=0), default=None, help="CPU threads."),
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command("train-classifier")
@_options(output="Run folder.")
@click.pass_obj
def train_classifier(manager: PluginManager, /, output: Path, **given: Any) -> None:
    """Train the classifier alone.

    From presence labels of whole images, unless classifier.label_source is crop.
    """
    from medrl.plugins.spars import running

    resolved = _resolve(manager, given, {"stage": "classifier"})
    running.run(
        TrainJob(method="spars", resolved=resolved, run_dir=output, manager=manager, command=tuple(sys.argv))
    )
    _say(f"done: {output}")
    _say(f"next: medrl train spars --data DATA --classifier-run {output}")


@click.command("evaluate")
@click.option(
    "--model", "runs", type=ANY_PATH, multiple=True, required=True, help="Run or checkpoint; repeatable."
)
@click.option("--data", type=ANY_PATH, default=None, help="Dataset.  [default: that of the run]")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of tables and report.")
@click.option(
    "--policies",
    default="scan,greedy,self-play,random,tiles",
    show_default=True,
    metavar="A,B",
    help="Who is measured; scan and greedy are the baselines.",
)
@click.option(
    "--split",
    type=click.Choice(["auto", "test", "val"]),
    default="auto",
    show_default=True,
    help="Volumes to measure; auto takes test volumes where there are labelled ones.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of starts and moves.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option("--threads", type=click.IntRange(min=0), default=1, show_default=True, help="CPU threads.")
@click.pass_obj
def evaluate(manager: PluginManager, /, **given: Any) -> None:
    """Measure masks of every policy.

    Dice, HD95, lesion recall, hit rate, false positives on volumes without a lesion, AUC; per patient.
    """
    from medrl.plugins.spars import evaluate as measuring

    policies = [word.strip() for word in given.pop("policies").split(",") if word.strip()]
    found = measuring.run(manager, policies=policies, say=_say, **given)
    for line in found.lines():
        click.echo(line)
    _say(f"report: {found.report}")


@click.command("sweep")
@_options(output="Folder of runs and of the table.")
@click.option(
    "--only",
    default="",
    metavar="A,B",
    help="Parts: patients, window, tau, label-source, map, opponents.  [default: all]",
)
@click.pass_obj
def sweep(manager: PluginManager, /, output: Path, only: str, **given: Any) -> None:
    """Run the matrix of experiments.

    Classifier patients, window, tau, label source, map, opponents; what is done is not done again.
    """
    from medrl.plugins.spars import sweep as sweeping

    words = [word.strip() for word in only.split(",") if word.strip()]

    def resolve(values: Mapping[str, Any]) -> Resolved[Any]:
        return _resolve(manager, given, values)

    path = sweeping.run(manager, resolve, output, only=words, say=_say)
    _say(f"table: {path}")


# -- private -----------------------------------------------------------------------------------------


_KEYS = {
    "data": "data.root",
    "fold": "data.fold",
    "seed": "train.seed",
    "device": "train.device",
    "threads": "train.threads",
}
"""Options of the tools and the config keys that they set."""


def _resolve(
    manager: PluginManager, given: Mapping[str, Any], last: Mapping[str, Any] | None = None
) -> Resolved[Any]:
    """Resolve the config of a tool."""
    values = {key: given[name] for name, key in _KEYS.items() if given.get(name) is not None}
    return resolve_tool(manager, "spars", values, given, last)


def _say(line: str) -> None:
    click.echo(line, err=True)
