"""Tools that do one stage alone, in a run folder of its own; the work is done elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medrl.core.errors import ConfigError
from medrl.core.jobs import TrainJob, resolve_tool

if TYPE_CHECKING:
    from medrl.core.config import Resolved
    from medrl.core.manager import PluginManager

ANY_PATH = click.Path(path_type=Path, resolve_path=True)
FOLDER = click.Path(path_type=Path, resolve_path=True, file_okay=False)
FILE = click.Path(path_type=Path, resolve_path=True, exists=True, dir_okay=False)

_KEYS = {
    "data": "data.root",
    "target": "target.root",
    "source_run": "inputs.source",
    "style_run": "inputs.style",
    "corrector_run": "inputs.corrector",
    "anatomical_run": "inputs.anatomical",
    "landmark_run": "inputs.landmark",
    "iteration": "iteration",
    "seed": "train.seed",
    "device": "train.device",
    "threads": "train.threads",
}
"""Options of the tools and the config keys that they set."""


def _stage_options(*needs: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options of a tool that does one stage, as `medrl train rl4seg3d` has them."""
    option = click.option
    inputs = {
        "target": option("--target", type=ANY_PATH, default=None, help="Unlabelled target sequences."),
        "source": option(
            "--source-run", type=ANY_PATH, default=None, help="Run of the actor trained on the source."
        ),
        "style": option("--style-run", type=ANY_PATH, default=None, help="Run of the style-tuned actor."),
        "actor": option("--actor", type=ANY_PATH, default=None, help="Run of the actor to start from."),
        "nets": option(
            "--anatomical-run", type=ANY_PATH, default=None, help="Run of the anatomical reward net."
        ),
        "landmark": option(
            "--landmark-run", type=ANY_PATH, default=None, help="Run of the landmark reward net."
        ),
        "corrector": option("--corrector-run", type=ANY_PATH, default=None, help="Run of a corrector."),
        "pairs": option(
            "--pairs", type=FOLDER, multiple=True, help="Folder of pairs, such as RUN/stages/04_pairs_1."
        ),
        "iteration": option(
            "--iteration",
            type=click.IntRange(min=1),
            default=None,
            help="Which iteration this is, for schedules.",
        ),
    }
    options = [
        option("--data", type=ANY_PATH, default=None, help="Labelled source sequences."),
        *(inputs[name] for name in needs),
        option("-o", "--output", type=FOLDER, required=True, help="Run folder."),
        option("-c", "--config", "config_file", type=FILE, default=None, help="Config file."),
        option("--preset", default=None, help="smoke, small or paper."),
        option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any config value."),
        option("--seed", type=click.IntRange(min=0), default=None, help="Seed of everything random."),
        option("--device", default=None, help="auto, cpu, cuda, cuda:1."),
        option("--threads", type=click.IntRange(min=0), default=None, help="CPU threads."),
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for one in reversed(options):
            command = one(command)
        return command

    return add


@click.command("pretrain")
@_stage_options("target", "source")
@click.option("--style", is_flag=True, help="Go on from --source-run with windows of changing style.")
@click.pass_obj
def pretrain(manager: PluginManager, /, style: bool, **given: Any) -> None:
    """Train the actor on labelled source sequences; with --style, on windows of changing style."""
    _do_stage(manager, "style" if style else "source", given)


@click.command("train-corrector")
@_stage_options()
@click.pass_obj
def train_corrector(manager: PluginManager, /, **given: Any) -> None:
    """Train the corrector (denoiser or vae) on source masks; it never sees an image.

    Use it in a loop: medrl train rl4seg3d … --set inputs.corrector=RUN.
    """
    _do_stage(manager, "corrector", given)


@click.command("train-reward")
@_stage_options("target", "actor", "pairs")
@click.option(
    "--net",
    type=click.Choice(["anatomical", "landmark"]),
    default="anatomical",
    show_default=True,
    help="Which reward net.",
)
@click.pass_obj
def train_reward(manager: PluginManager, /, net: str, **given: Any) -> None:
    """Train a reward net on folders of pairs that a loop wrote."""
    _do_stage(manager, net, given)


@click.command("ppo")
@_stage_options("target", "actor", "source", "style", "nets", "landmark", "corrector", "iteration")
@click.pass_obj
def ppo(manager: PluginManager, /, **given: Any) -> None:
    """Improve an actor on target sequences by PPO against a reward."""
    _do_stage(manager, "ppo", given)


def _do_stage(manager: PluginManager, stage: str, given: Mapping[str, Any]) -> None:
    """Do one stage in a run folder of its own."""
    from medrl.plugins.rl4seg3d import loop

    output: Path = given["output"]
    values = {key: given[name] for name, key in _KEYS.items() if given.get(name) is not None}
    if given.get("pairs"):
        values["inputs.pairs"] = [str(path) for path in given["pairs"]]
    resolved = _resolve(manager, stage, given, values)
    if given.get("actor") is not None:
        name = _part_of_actor(resolved.config, stage)
        resolved = _resolve(manager, stage, given, {**values, f"inputs.{name}": given["actor"]})
    _say(f"stage {stage}: {output}")
    loop.run(
        TrainJob(
            method="rl4seg3d",
            resolved=resolved,
            run_dir=output,
            manager=manager,
            command=tuple(sys.argv),
        )
    )
    _say(f"done: {output}")
    if stage == "ppo":
        _say(f"next: medrl predict -i SEQUENCES -o OUT --model {output}")
    else:
        _say(f"next: medrl train rl4seg3d … --set inputs.{stage}={output}")


def _part_of_actor(config: Any, stage: str) -> str:
    """What ``--actor`` is for a stage: the actor itself, or the start of the anatomical net.

    Raises:
        ConfigError: The stage takes none.
    """
    if stage == "ppo":
        return "actor"
    if stage == "landmark" or config.reward.init == "random":
        raise ConfigError("--actor", why="this reward net starts with new weights", do="leave it out")
    return str(config.reward.init)


def _resolve(
    manager: PluginManager, stage: str, given: Mapping[str, Any], values: Mapping[str, Any]
) -> Resolved[Any]:
    """Resolve the config of a tool."""
    return resolve_tool(manager, "rl4seg3d", values, given, {"stage": stage, "alone": True})


def _say(line: str) -> None:
    click.echo(line, err=True)
