"""Command line of rl4seg; options become config values, the work is done elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medrl.core.errors import ConfigError
from medrl.core.jobs import PredictJob, TrainJob, config_option, resolve_tool

if TYPE_CHECKING:
    from medrl.core.config import Resolved
    from medrl.core.manager import PluginManager
    from medrl.core.predicting import PredictOutcome

STAGES = ("all", "source", "style", "corrector", "pairs", "reward", "ppo", "test")
FOLDER = click.Path(path_type=Path, file_okay=False, resolve_path=True)
FILE = click.Path(path_type=Path, dir_okay=False)
ANY_PATH = click.Path(path_type=Path, resolve_path=True)


class RegistryKey(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click
    """A registry key; without a plugin's name, one of rl4seg."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the whole key."""
        return str(value) if "." in str(value) else f"rl4seg.{value}"


@click.command("train")
@config_option(
    "--source", "source_root", key="data.root", type=ANY_PATH, help="Labelled source images, as --data."
)
@config_option("--target", "target_root", key="target.root", type=ANY_PATH, help="Unlabelled target images.")
@config_option(
    "--stage",
    key="stage",
    type=click.Choice(STAGES),
    help="Do one stage of the run folder: the next of its kind that is not done.",
)
@config_option(
    "--iterations",
    key="loop.iterations",
    type=click.IntRange(min=1),
    help="Rounds of pairs, reward net and PPO.",
)
@config_option(
    "--start",
    key="loop.start",
    type=click.Choice(["style", "source"]),
    help="Actor from which PPO starts.",
)
@config_option("--reward", "reward_name", key="reward.name", type=RegistryKey(), help="The reward, by key.")
@config_option(
    "--corrector",
    "corrector_kind",
    key="corrector.kind",
    type=click.Choice(["denoiser", "vae", "morphology", "atlas", "none"]),
    help="What makes masks plausible.",
)
@config_option(
    "--pairs",
    "pairs_kind",
    key="pairs.kind",
    type=click.Choice(["synthetic", "prediction"]),
    help="What the reward net learns from.",
)
@config_option("--rules", key="rules", help="Anatomical rules: echo, echo_atrium, or a YAML file.")
@config_option(
    "--allow-target-labels",
    key="target.allow_labels",
    is_flag=True,
    flag_value=True,
    default=None,
    help="For an oracle reward only: read the training labels of the target.",
)
def train(job: TrainJob) -> None:
    """Adapt a source-trained network to unlabelled target images: pairs, learned reward, PPO."""
    from medrl.plugins.rl4seg import loop

    loop.run(job)


@click.command("predict")
@click.option(
    "--largest-blob/--all-blobs",
    default=None,
    help="Keep only the largest blob of foreground.  [default: as in the config of the run]",
)
@click.option(
    "--tta-axes", default=None, metavar="x,y", help="Axes that --tta mirrors.  [default: as in that config]"
)
def predict(job: PredictJob, largest_blob: bool | None, tta_axes: str | None) -> PredictOutcome:
    """Segment images of any size; --save-uncertainty writes 1 - reward, calibrated."""
    from medrl.plugins.rl4seg.predict import run

    return run(job, largest_blob=largest_blob, tta_axes=tta_axes)


# -- tools: one stage alone --------------------------------------------------------------------------


def _stage_options(*needs: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options of a tool that does one stage, as `medrl train rl4seg` has them."""
    inputs = {
        "target": click.option("--target", type=ANY_PATH, default=None, help="Unlabelled target images."),
        "source": click.option(
            "--source-run", type=ANY_PATH, default=None, help="Run of the source actor, for --style."
        ),
        "actor": click.option("--actor", type=ANY_PATH, default=None, help="Run of the actor to start from."),
        "reward": click.option("--reward-run", type=ANY_PATH, default=None, help="Run of the reward net."),
        "corrector": click.option("--corrector-run", type=ANY_PATH, default=None, help="Run of a corrector."),
        "pairs": click.option(
            "--pairs", type=FOLDER, multiple=True, help="Folder of pairs, such as RUN/stages/04_pairs_1."
        ),
        "iteration": click.option(
            "--iteration",
            type=click.IntRange(min=1),
            default=None,
            help="Which iteration this is, for schedules.",
        ),
    }
    options = [
        click.option("--data", type=ANY_PATH, default=None, help="Labelled source images."),
        *(inputs[name] for name in needs),
        click.option("-o", "--output", type=FOLDER, required=True, help="Run folder."),
        click.option("-c", "--config", "config_file", type=FILE, default=None, help="Config file."),
        click.option("--preset", default=None, help="smoke, small, release or paper."),
        click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any config value."),
        click.option("--seed", type=click.IntRange(min=0), default=None, help="Seed of everything random."),
        click.option("--device", default=None, help="auto, cpu, cuda, cuda:1."),
        click.option("--threads", type=click.IntRange(min=0), default=None, help="CPU threads."),
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command("pretrain")
@_stage_options("target", "source")
@click.option("--style", is_flag=True, help="Go on from --source-run with styled images of the source.")
@click.pass_obj
def pretrain(manager: PluginManager, /, style: bool, **given: Any) -> None:
    """Train the actor on labelled source images; with --style, on images of changing style."""
    _do_stage(manager, "style" if style else "source", given)


@click.command("train-corrector")
@_stage_options()
@click.pass_obj
def train_corrector(manager: PluginManager, /, **given: Any) -> None:
    """Train the corrector (denoiser or vae) on source masks; it never sees an image.

    Use it in a loop: medrl train rl4seg … --set inputs.corrector=RUN.
    """
    _do_stage(manager, "corrector", given)


@click.command("train-reward")
@_stage_options("target", "actor", "pairs")
@click.pass_obj
def train_reward(manager: PluginManager, /, **given: Any) -> None:
    """Train the reward net on folders of pairs that a loop wrote."""
    _do_stage(manager, "reward", given)


@click.command("ppo")
@_stage_options("target", "actor", "reward", "corrector", "iteration")
@click.pass_obj
def ppo(manager: PluginManager, /, **given: Any) -> None:
    """Improve an actor on target images by PPO against a reward."""
    _do_stage(manager, "ppo", given)


@click.command("pg")
@_stage_options("target", "actor", "reward", "corrector", "iteration")
@click.pass_obj
def pg(manager: PluginManager, /, **given: Any) -> None:
    """Improve an actor on target images by the plain policy gradient: no critic, no ratio, no reference."""
    _do_stage(manager, "ppo", given, {"ppo.algorithm": "pg"})


_KEYS = {
    "data": "data.root",
    "target": "target.root",
    "source_run": "inputs.source",
    "reward_run": "inputs.reward",
    "corrector_run": "inputs.corrector",
    "iteration": "iteration",
    "seed": "train.seed",
    "device": "train.device",
    "threads": "train.threads",
}
"""Options of the tools and the config keys that they set."""


def _do_stage(
    manager: PluginManager, stage: str, given: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> None:
    """Do one stage in a run folder of its own."""
    from medrl.plugins.rl4seg import loop

    output: Path = given["output"]
    values = {key: given[name] for name, key in _KEYS.items() if given.get(name) is not None}
    if given.get("pairs"):
        values["inputs.pairs"] = [str(path) for path in given["pairs"]]
    resolved = _resolve(manager, stage, given, {**values, **(more or {})})
    cfg = resolved.config
    if given.get("actor") is not None:
        name = cfg.reward.init if stage == "reward" else "actor"
        if name == "random":
            raise ConfigError("--actor", why="reward.init is random, so no actor is used", do="leave it out")
        resolved = _resolve(
            manager, stage, given, {**values, **(more or {}), f"inputs.{name}": given["actor"]}
        )
    _say(f"stage {stage}: {output}")
    job = TrainJob(
        method="rl4seg", resolved=resolved, run_dir=output, manager=manager, command=tuple(sys.argv)
    )
    loop.run(job)
    _say(f"done: {output}")
    following = {
        "source": f"next: medrl train rl4seg … --set inputs.source={output}",
        "style": f"next: medrl train rl4seg … --set inputs.style={output}",
        "corrector": f"next: medrl train rl4seg … --set inputs.corrector={output}",
        "reward": f"next: medrl train rl4seg … --set inputs.reward={output}",
        "ppo": f"next: medrl predict -i IMAGES -o OUT --model {output}",
    }
    _say(following[stage])


def _resolve(
    manager: PluginManager, stage: str, given: Mapping[str, Any], values: Mapping[str, Any]
) -> Resolved[Any]:
    """Resolve the config of a tool."""
    return resolve_tool(manager, "rl4seg", values, given, {"stage": stage, "alone": True})


def _say(line: str) -> None:
    click.echo(line, err=True)
