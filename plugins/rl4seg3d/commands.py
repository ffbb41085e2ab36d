"""Command line of prediction and weights; training has its own. The work is done elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medrl.core.errors import ConfigError
from medrl.core.jobs import PredictJob

if TYPE_CHECKING:
    from medrl.core.predicting import PredictOutcome

ANY_FILE = click.Path(path_type=Path, dir_okay=False)
TTO_WORDS = {
    "off": "off", "false": "off", "no": "off", "auto": "auto", "on": "auto", "true": "auto", "yes": "auto",
    "force": "force",
}  # fmt: skip


class PairType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click
    """Two positive numbers, ``0.3,0.3``; one stands for both."""

    name = "x,y"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        """Return the two numbers."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = [float(word) for word in str(value).split(",")]
        except ValueError:
            numbers = []
        numbers = numbers * 2 if len(numbers) == 1 else numbers
        if len(numbers) != 2 or not all(0.0 < number < float("inf") for number in numbers):
            self.fail(f"'{value}' is not two positive numbers, such as 0.37,0.37", param, ctx)
        return numbers[0], numbers[1]


class TTOType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click
    """``off``, ``auto`` or ``force``; ``on`` is ``auto``, and YAML's true and false are understood."""

    name = "off|auto|force"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the mode."""
        found = TTO_WORDS.get(str(value).lower())
        if found is None:
            self.fail(f"'{value}' is none of off, auto, force", param, ctx)
        return found


class NamedFile(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click
    """``NAME=FILE``."""

    name = "NAME=FILE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        """Return name and file."""
        if isinstance(value, tuple):
            return value
        name, mark, file = str(value).partition("=")
        if not mark or not file or not name.replace("_", "").isalnum():
            self.fail(f"'{value}' is not NAME=FILE, such as anatomical=rewardnet.ckpt", param, ctx)
        if name in ("fused", "uncertainty"):
            self.fail(f"the name {name} is taken", param, ctx)
        return name, Path(file)


@click.command("predict", context_settings={"default_map": {"tta": True}})
@click.option(
    "--tto",
    type=TTOType(),
    default="off",
    show_default=True,
    help="Optimise a copy of the actor on each file against its reward nets: off, auto (where the first "
    "prediction is not valid), force.",
)
@click.option(
    "--equalize",
    "equalise",
    type=click.Choice(["auto", "on", "off"]),
    default=None,
    help="CLAHE of each frame; auto: unless values lie in [0, 1] already.  [default: as the model "
    "was trained, else auto]",
)
@click.option("--time-axis", type=click.IntRange(-1, 2), default=-1, help="Axis that is time; -1: the last.")
@click.option(
    "--spacing", type=PairType(), default=None, help="Pixel size in mm for the network.  [default: its own]"
)
@click.option("--pixel-size", type=PairType(), default=None, help="Pixel size in mm, for files without one.")
@click.option(
    "--blend",
    type=click.Choice(["gaussian", "legacy", "uniform"]),
    default="gaussian",
    show_default=True,
    help="How windows of four frames are joined; legacy: as the original does by mistake.",
)
@click.option(
    "--rewards/--no-rewards", default=True, show_default=True, help="Write the maps of the reward nets."
)
@click.option(
    "--reward",
    "reward_files",
    type=NamedFile(),
    multiple=True,
    help="A reward net in a file of its own. Repeatable.",
)
@click.option(
    "--fusion",
    type=click.Choice(["min", "mean", "product"]),
    default="min",
    show_default=True,
    help="How several rewards become one.",
)
@click.option("--gif", is_flag=True, help="Write a moving picture of each file, as --preview does.")
@click.option("--mp4", is_flag=True, help="Write it as MP4; needs ffmpeg, which the extra `video` brings.")
@click.option("--view", default=None, help="View that a TorchScript package is told: a2c, a3c, a4c.")
@click.option(
    "--rules",
    default=None,
    help="Anatomical rules: a name or a YAML file.  [default: as the model was trained, else echo]",
)
@click.option(
    "--temporal-rules",
    default=None,
    help="Temporal rules, likewise.  [default: as the model was trained, else echo_temporal]",
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Seed of --tto.")
@click.option(
    "--tto-passes", type=click.IntRange(min=1), default=4, show_default=True, help="Passes of --tto."
)
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@click.option(
    "--trust-checkpoint",
    "trust",
    is_flag=True,
    help="Run TorchScript packages; read checkpoints with pickled objects, of which nothing is run.",
)
def predict(job: PredictJob, **values: Any) -> PredictOutcome:
    """Segment sequences (NIfTI, ultrasound DICOM): LV and myocardium, judged frame by frame and over time.

    The model may be a run of medrl, the original's checkpoints and TorchScript packages, or a file that
    `medrl rl4seg3d convert` wrote.
    """
    from medrl.plugins.rl4seg3d.predict_config import PredictConfig, TTOConfig
    from medrl.plugins.rl4seg3d.predicting import run

    names = [name for name, _ in values["reward_files"]]
    if len(set(names)) < len(names):
        raise ConfigError("--reward", why="one name is given twice")
    tto = TTOConfig(mode=values.pop("tto"), seed=values.pop("seed"), passes=values.pop("tto_passes"))
    spacing, pixel_size = values.pop("spacing"), values.pop("pixel_size")
    config = PredictConfig(spacing_mm=spacing, pixel_size_mm=pixel_size, tto=tto, **values)
    return run(job, config)


@click.command("convert")
@click.argument("source", type=ANY_FILE)
@click.argument("target", type=ANY_FILE)
@click.option(
    "--parts", default="actor,rewards", show_default=True, help="Of actor,reference,critic,rewards."
)
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@click.option(
    "--trust-checkpoint", "trust", is_flag=True, help="Read pickled objects; nothing of them is run."
)
def convert(source: Path, target: Path, parts: str, overwrite: bool, trust: bool) -> None:
    """Make a small safetensors file of a checkpoint of the original."""
    from medrl.plugins.rl4seg3d.foreign import convert as work

    chosen = tuple(word.strip() for word in parts.split(",") if word.strip())
    work(source, target, parts=chosen, trust=trust, overwrite=overwrite)
    before, after = source.stat().st_size, target.stat().st_size
    click.echo(f"{target}: {after / 1e6:.1f} MB of {before / 1e6:.1f} MB", err=True)
