"""Command line of kspace; options become config values, the work is done elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medrl.core.errors import ConfigError
from medrl.core.jobs import DemoJob, DemoResult, PredictJob, TrainJob, config_option, resolve_tool

if TYPE_CHECKING:
    from medrl.core.config import Resolved
    from medrl.core.manager import PluginManager
    from medrl.core.predicting import PredictOutcome

FOLDER = click.Path(path_type=Path, file_okay=False, resolve_path=True)
FILE = click.Path(path_type=Path, dir_okay=False, resolve_path=True)
ANY_PATH = click.Path(path_type=Path, resolve_path=True)
READERS = ("auto", "core", "acdc-nifti", "acdc-png", "acdc-h5", "fastmri", "ismrmrd", "bart")


@click.command("train")
@config_option(
    "--reader", key="data.reader", type=click.Choice(READERS), help="What the dataset is; auto recognises it."
)
@config_option(
    "--reward-run",
    "reward_run",
    key="inputs.reward",
    type=ANY_PATH,
    help="Run of `medrl kspace train-reward`; without it the reward model is trained first.",
)
@config_option(
    "--recon-run",
    "recon_run",
    key="inputs.recon",
    type=ANY_PATH,
    help="Run of `medrl kspace train-recon`, for --recon unet; without it that is trained first.",
)
@config_option(
    "--crossed",
    key="seg.crossed",
    type=click.IntRange(min=0),
    help="Reward models more, each without one part of the patients, so that the policy learns from all.",
)
@config_option("--sampler", "sampler_file", key="inputs.sampler", type=FILE, help="File of make-sampler.")
@config_option(
    "--warm-start",
    key="warm.kind",
    type=click.Choice(["greedy", "none"]),
    help="Start from imitation of the exact gain of every line, or from nothing.",
)
@config_option(
    "--blind/--sighted", key="blind", help="Control: the policy sees mask and counters only, no measurement."
)
@config_option(
    "--reward-mode",
    key="reward.mode",
    type=click.Choice(["delta", "asmr", "terminal"]),
    help="What a line is paid.",
)
@config_option("--lambda-rec", key="reward.rec", type=float, help="Weight of the reconstruction.")
@config_option("--lambda-seg", key="reward.seg", type=float, help="Weight of the segmentation.")
@config_option(
    "--geometry",
    key="acquisition.geometry",
    type=click.Choice(["slice", "stack", "volume3d"]),
    help="Slices one by one, the slices of a volume under one mask, or volumes.",
)
@config_option(
    "--recon",
    "recon_kind",
    key="acquisition.recon",
    type=click.Choice(["zf", "unet", "sense"]),
    help="Zero-filled, U-Net with data consistency, or CG-SENSE.",
)
@config_option("--init-center", key="acquisition.init_center", type=int, help="Columns that are there first.")
@config_option("--updates", key="ppo.updates", type=click.IntRange(min=0), help="Updates of PPO.")
def train(job: TrainJob) -> None:
    """Learn which line of k-space to acquire next: reward model, warm start, PPO."""
    from medrl.plugins.kspace import running

    running.run(job)


@click.command("predict")
@click.option(
    "--lines",
    type=click.IntRange(min=1),
    default=None,
    help="Lines to acquire beyond the initial ones.  [default: the largest of budget.eval]",
)
@click.option(
    "--stop-below",
    type=float,
    default=None,
    help="Stop a slice early once its mean entropy per pixel (nats) is below this.",
)
def predict(job: PredictJob, lines: int | None, stop_below: float | None) -> PredictOutcome:
    """Acquire, reconstruct and segment scans; writes the lines, the image and the labels of each."""
    from medrl.plugins.kspace.predict import run

    return run(job, lines=lines, stop_below=stop_below)


@click.command("demo")
def demo(job: DemoJob) -> DemoResult:
    """Train reward model, policy and blind twin on synthetic hearts, and compare them with their rivals."""
    from medrl.plugins.kspace.demo import run

    return run(job)


# -- tools -------------------------------------------------------------------------------------------


def _options(*, output: str, required: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options of a tool that takes a config, as `medrl train kspace` has them."""
    options = [
        click.option("--data", type=ANY_PATH, default=None, help="Dataset."),
        click.option("-o", "--output", type=ANY_PATH, required=required, help=output),
        click.option("-c", "--config", "config_file", type=FILE, default=None, help="Config file."),
        click.option("--preset", default=None, help="smoke, small, fast, medrl or asmr."),
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


@click.command("train-reward")
@_options(output="Run folder.")
@click.option(
    "--crossed",
    type=click.IntRange(min=0),
    default=None,
    help="Reward models more, each without one part of the patients, for policies that learn from all.",
)
@click.pass_obj
def train_reward(manager: PluginManager, /, output: Path, **given: Any) -> None:
    """Train the reward model.

    It segments slices from which lines are missing.
    """
    _train_part(manager, "reward", output, given)
    crossed = f" --crossed {given['crossed']}" if given["crossed"] else ""
    _say(f"next: medrl train kspace --data DATA --reward-run {output}{crossed}")


@click.command("train-recon")
@_options(output="Run folder.")
@click.pass_obj
def train_recon(manager: PluginManager, /, output: Path, **given: Any) -> None:
    """Train the reconstruction network.

    Policies use it with --recon unet.
    """
    _train_part(manager, "recon", output, given)
    _say(f"next: medrl train kspace --data DATA --recon unet --recon-run {output}")


@click.command("make-sampler")
@_options(output="JSON file to write.")
@click.pass_obj
def make_sampler(manager: PluginManager, /, output: Path, **given: Any) -> None:
    """Weigh the training cases by their labels.

    Every set of labels is then drawn as often as any other.
    """
    from medrl.plugins.kspace import running

    found = running.write_sampler(manager, _resolve(manager, given).config, output)
    _say(f"written: {output}, {len(found.ids)} cases, {len(set(found.weights))} different weights")
    _say(f"next: medrl train kspace --set sampler.kind=weighted --sampler {output}")


@click.command("export-png")
@_options(output="Folder to write.")
@click.pass_obj
def export_png(manager: PluginManager, /, output: Path, **given: Any) -> None:
    """Write a dataset as PNG with a sidecar.

    The layout is patientNNN/{images,labels}/<i>.png, as the original reads it.
    """
    from medrl.plugins.kspace import running

    count = running.write_png(_resolve(manager, given).config, output)
    _say(f"written: {count} slices in {output}")
    _say(f"next: medrl train kspace --reader acdc-png --data {output}")


def _study_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option(
            "--model",
            "runs",
            type=ANY_PATH,
            multiple=True,
            required=True,
            help="Run or checkpoint; repeatable.",
        ),
        click.option("--data", type=ANY_PATH, default=None, help="Dataset.  [default: that of the run]"),
        click.option("-o", "--output", type=FOLDER, required=True, help="Folder of tables and report."),
        click.option(
            "--budgets", default="", metavar="A,B", help="Lines.  [default: budget.eval of the run]"
        ),
        click.option(
            "--split",
            type=click.Choice(["auto", "test", "val"]),
            default="auto",
            show_default=True,
            help="Cases to measure; auto takes test cases where there are labelled ones.",
        ),
        click.option(
            "--cases", type=click.IntRange(min=0), default=0, help="At most so many.  [default: all]"
        ),
        click.option(
            "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of random lines."
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1."),
        click.option(
            "--threads", type=click.IntRange(min=0), default=1, show_default=True, help="CPU threads."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command("eval")
@_study_options
@click.option(
    "--against",
    default="low-to-high,fixed",
    show_default=True,
    metavar="A,B",
    help="Baselines to measure beside the policy, all or none.",
)
@click.pass_obj
def evaluate(manager: PluginManager, /, against: str, **given: Any) -> None:
    """Measure policies over budgets.

    Dice, HD95, volumes, ejection fraction, SSIM, PSNR and NMSE, as tables and a report.
    """
    _study(manager, against, with_policy=True, given=given)


@click.command("baselines")
@_study_options
@click.option(
    "--methods",
    "against",
    default="all",
    show_default=True,
    metavar="A,B",
    help="random, equispaced, low-to-high, variable-density, fixed, fixed-exchanged, greedy-oracle; or all.",
)
@click.pass_obj
def baselines(manager: PluginManager, /, against: str, **given: Any) -> None:
    """Measure the rivals of a policy, and oracles.

    The reward model of the run segments, its training cases fit the fixed masks.
    """
    _study(manager, against, with_policy=False, given=given)


@click.command("export-mask")
@click.option("--model", "run", type=ANY_PATH, required=True, help="Run or checkpoint of a policy.")
@click.option("--data", type=ANY_PATH, default=None, help="Dataset.  [default: that of the run]")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of masks.npy and lines.csv.")
@click.option("--lines", type=click.IntRange(min=1), default=None, help="Budget.  [default: the largest]")
@click.option(
    "--split",
    type=click.Choice(["auto", "test", "val"]),
    default="auto",
    show_default=True,
    help="Cases; auto takes test cases where there are labelled ones.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.pass_obj
def export_mask(
    manager: PluginManager,
    /,
    run: Path,
    data: Path | None,
    output: Path,
    lines: int | None,
    split: str,
    device: str,
) -> None:
    """Write mask and lines of every case.

    masks.npy, and lines.csv in the order of acquisition, for a scanner.
    """
    from medrl.plugins.kspace import study

    count = study.export_masks(manager, run, output, data=data, lines=lines, split=split, device=device)
    _say(f"written: masks and lines of {count} cases in {output}")


# -- private -----------------------------------------------------------------------------------------


def _train_part(manager: PluginManager, stage: str, output: Path, given: Mapping[str, Any]) -> None:
    from medrl.plugins.kspace import running

    resolved = _resolve(manager, given, {"stage": stage})
    job = TrainJob(
        method="kspace", resolved=resolved, run_dir=output, manager=manager, command=tuple(sys.argv)
    )
    _say(f"stage {stage}: {output}")
    running.run(job)
    _say(f"done: {output}")


def _study(manager: PluginManager, against: str, *, with_policy: bool, given: dict[str, Any]) -> None:
    from medrl.plugins.kspace import study

    found = study.run(
        manager,
        given["runs"],
        given["output"],
        data=given["data"],
        budgets=_numbers(given["budgets"]),
        split=given["split"],
        cases=given["cases"],
        against=[word.strip() for word in against.split(",") if word.strip() and word.strip() != "none"],
        with_policy=with_policy,
        seed=given["seed"],
        device=given["device"],
        threads=given["threads"],
        say=_say,
    )
    for line in found.lines():
        click.echo(line)
    _say(f"report: {found.report}")


_KEYS = {
    "data": "data.root",
    "fold": "data.fold",
    "seed": "train.seed",
    "device": "train.device",
    "threads": "train.threads",
    "crossed": "seg.crossed",
}
"""Options of the tools and the config keys that they set."""


def _resolve(
    manager: PluginManager, given: Mapping[str, Any], last: Mapping[str, Any] | None = None
) -> Resolved[Any]:
    """Resolve the config of a tool."""
    values = {key: given[name] for name, key in _KEYS.items() if given.get(name) is not None}
    return resolve_tool(manager, "kspace", values, given, last)


def _numbers(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise ConfigError("--budgets", why=f"'{text}' is no list of numbers", do="--budgets 4,8,16")
    return tuple(sorted({int(word) for word in words}))


def _say(line: str) -> None:
    click.echo(line, err=True)
