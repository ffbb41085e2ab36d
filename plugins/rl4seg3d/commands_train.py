"""``medrl train rl4seg3d``: options become config values, the work is done elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medrl.core.jobs import DemoJob, DemoResult, TrainJob, config_option

STAGES = ("all", "source", "style", "corrector", "pairs", "anatomical", "landmark", "ppo", "test")
ANY_PATH = click.Path(path_type=Path, resolve_path=True)


class RegistryKey(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click
    """A registry key; without a plugin's name, one of rl4seg3d."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the whole key."""
        return str(value) if "." in str(value) else f"rl4seg3d.{value}"


@click.command("train")
@config_option(
    "--source", "source_root", key="data.root", type=ANY_PATH, help="Labelled source sequences, as --data."
)
@config_option(
    "--target", "target_root", key="target.root", type=ANY_PATH, help="Unlabelled target sequences."
)
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
    help="Rounds of pairs, reward nets and PPO.",
)
@config_option(
    "--start",
    key="loop.start",
    type=click.Choice(["style", "source"]),
    help="Actor from which PPO starts.",
)
@config_option(
    "--slurm",
    "slurm_mode",
    key="slurm.mode",
    type=click.Choice(["off", "slurm", "local"]),
    help="One Slurm job a stage, or one process a stage on this machine.",
)
@config_option("--reward", "reward_name", key="reward.name", type=RegistryKey(), help="The reward, by key.")
@config_option(
    "--corrector",
    "corrector_kind",
    key="corrector.kind",
    type=click.Choice(["denoiser", "vae", "temporal", "morphology", "atlas", "none"]),
    help="What makes masks plausible.",
)
@config_option(
    "--pairs",
    "pairs_kind",
    key="pairs.kind",
    type=click.Choice(["synthetic", "prediction"]),
    help="What the reward nets learn from.",
)
@config_option("--rules", key="rules", help="Anatomical rules of a frame: echo, echo_atrium, or a YAML file.")
@config_option(
    "--allow-target-labels",
    key="target.allow_labels",
    is_flag=True,
    flag_value=True,
    default=None,
    help="For an oracle reward only: read the training labels of the target.",
)
def train(job: TrainJob) -> None:
    """Adapt a source-trained network to unlabelled target sequences: pairs, learned rewards, PPO."""
    from medrl.plugins.rl4seg3d import loop

    loop.run(job)


@click.command("demo")
def demo(job: DemoJob) -> DemoResult:
    """Two scanners of beating hearts, learned rewards, PPO, a control and a report."""
    from medrl.plugins.rl4seg3d.demo import run

    return run(job)
