"""Command line of graft; options become config values, the work is done elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medrl.core.errors import ConfigError
from medrl.core.jobs import DemoJob, DemoResult, PredictJob, TrainJob, config_option, resolve_tool
from medrl.plugins.graft.flags import upstream_flags

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from medrl.core.config import Layer, Resolved
    from medrl.core.manager import PluginManager
    from medrl.core.predicting import PredictOutcome

PRIORS = ("uniform", "quality", "probe")
WEIGHTINGS = (*PRIORS, "fixed", "align", "meta", "legacy", "reinforce")
TARGETS = ("auto", "regions", "binary", "3class", "binary_classes", "nested", "separate", "classes")
FOLDER = click.Path(path_type=Path, file_okay=False, resolve_path=True)
FILE = click.Path(path_type=Path, dir_okay=False)
ANY_PATH = click.Path(path_type=Path, resolve_path=True)


@click.command("train")
@config_option(
    "--teachers",
    "features",
    key="teachers.features",
    type=ANY_PATH,
    multiple=True,
    help="Folder of teacher features, or with live teachers of runs (repeat for several); without it, "
    "training is supervised only.",
)
@config_option(
    "--teacher-source",
    key="teachers.source",
    type=click.Choice(["files", "live"]),
    help="Read extracted features, or ask the networks about every batch.",
)
@config_option(
    "--trust-teachers/--no-trust-teachers",
    key="teachers.trust",
    help="Read live teachers of nnU-Net whose files hold pickled objects; none is executed.",
)
@config_option(
    "--teacher-oof",
    key="teachers.oof",
    type=click.Choice(["off", "flag", "mean", "unseen"]),
    help="What follows where a teacher was trained on the student's cases.",
)
@config_option(
    "--weighting", key="weighting.mode", type=click.Choice(WEIGHTINGS), help="How much each teacher counts."
)
@config_option(
    "--weighting-prior",
    key="weighting.prior",
    type=click.Choice(PRIORS),
    help="What reinforce and align start from.",
)
@config_option(
    "--policy-update",
    key="weighting.mode",
    type=click.Choice(["reinforce", "legacy"]),
    help="How the policy learns; the same as --weighting.",
)
@config_option(
    "--labelled",
    key="split.labelled",
    type=click.IntRange(min=0),
    help="Use the labels of so many cases only.",
)
@config_option(
    "--unlabelled-from-test/--no-unlabelled-from-test",
    key="split.unlabelled_from_test",
    help="Train on test images without labels too; they are then no test cases.",
)
@config_option(
    "--reward-split", key="split.reward", type=float, help="Share of labelled cases that measure the reward."
)
@config_option(
    "--reward-every",
    key="agent.reward_every",
    type=click.IntRange(min=1),
    help="Measure the reward of every so many actions.",
)
@config_option(
    "--random-reward/--no-random-reward", key="agent.random_reward", help="Control: the reward is noise."
)
@config_option(
    "--feat-loss",
    key="distill.feature_loss",
    type=click.Choice(["cosine", "mse", "kl", "smooth_l1"]),
    help="How features are compared.",
)
@config_option(
    "--target", key="target.kind", type=click.Choice(TARGETS), help="What the network's channels mean."
)
@config_option(
    "--normalization",
    key="sample.normalization",
    type=click.Choice(["auto", "stats", "mask", "volume"]),
    help="How intensities are scaled.",
)
@config_option("--grad-clip", key="train.clip_norm", type=float, help="Largest gradient norm; 0 = no limit.")
@config_option(
    "--init-scope",
    key="optim.init_scope",
    type=click.Choice(["encoder", "all"]),
    help="What --init-from fills.",
)
@upstream_flags
def train(job: TrainJob) -> None:
    """Train a student: with teachers by distillation, without them by its labels."""
    from medrl.core.staged import is_staged
    from medrl.plugins.graft import data, staged
    from medrl.plugins.graft import train as method

    if is_staged(job):
        staged.run(job)
        return
    if job.config.teachers.train:
        raise ConfigError(
            "teachers.train", why="teachers are trained as stages of their own", do="--by stage"
        )
    with job.runtime() as rt:
        method.fit(rt, job.config, data.load(rt, job.config))


@click.command("predict")
@click.option("--masks", type=FOLDER, default=None, help="Organ masks, one <case>.nii.gz for each case.")
def predict(job: PredictJob, masks: Path | None) -> PredictOutcome:
    """Segment images with a student or a teacher; several folds are averaged."""
    from medrl.plugins.graft.predict import run

    return run(job, masks=masks)


@click.command("demo")
def demo(job: DemoJob) -> DemoResult:
    """Teachers, features, student, controls, report on synthetic prostates."""
    from medrl.plugins.graft.demo import run

    return run(job)


def _config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that give the config of a tool, as `medrl train graft` has them."""
    for option in reversed(
        [
            click.option(
                "--data", "data_root", type=ANY_PATH, default=None, help="Dataset folder, or cohort YAML."
            ),
            click.option("-c", "--config", "config_file", type=FILE, default=None, help="Config file."),
            click.option("--preset", default=None, help="smoke, small, paper or legacy."),
            click.option(
                "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any config value."
            ),
            click.option("--fold", type=click.IntRange(min=0), default=None, help="Fold of the student."),
            click.option("--device", default=None, help="auto, cpu, cuda, cuda:1."),
            click.option("--threads", type=click.IntRange(min=0), default=None, help="CPU threads."),
        ]
    ):
        command = option(command)
    return command


_KEYS = {
    "data_root": "data.root",
    "fold": "data.fold",
    "device": "train.device",
    "threads": "train.threads",
}
"""Options of the tools and the config keys that they set."""


def _resolve(manager: PluginManager, given: Mapping[str, Any], layers: Sequence[Layer] = ()) -> Resolved[Any]:
    """Resolve the config of a tool, with further layers on top."""
    values = {key: given[name] for name, key in _KEYS.items() if given[name] is not None}
    return resolve_tool(manager, "graft", values, given, layers)


@click.command("train-teachers")
@_config_options
@click.option(
    "-o", "--output", type=FOLDER, required=True, help="Folder of the run folders teacher_0, teacher_1, …."
)
@click.option(
    "--teachers",
    "count",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Number of teachers.",
)
@click.option("--only", default="", help="Numbers of the teachers to train now, such as 0,3.")
@click.option(
    "--max-steps", type=click.IntRange(min=1), default=None, help="Optimiser steps of each teacher."
)
@click.pass_obj
def train_teachers(
    manager: PluginManager, /, output: Path, count: int, only: str, max_steps: int | None, **config: Any
) -> None:
    """Train one teacher for each fold; each is an ordinary run that `medrl predict graft` accepts.

    Teacher k never sees fold k. A teacher that is finished stays as it is, an interrupted one goes on.
    """
    from medrl.core.config import Layer
    from medrl.plugins.graft import teachers

    more = [Layer("--max-steps", {"train": {"max_steps": max_steps}})] if max_steps else []
    runs = teachers.train_teachers(
        manager,
        lambda layers: _resolve(manager, config, [*more, *layers]),
        output,
        count=count,
        only=_numbers(only),
        command=sys.argv,
        say=_say,
    )
    _say(f"done: {len(runs)} teachers in {output}")
    _say(f"next: medrl graft extract-features --teachers {output} --data DATA -o FEATURES")


@click.command("extract-features")
@_config_options
@click.option(
    "--teachers",
    "runs",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Run folder, checkpoint (also of nnU-Net), or folder of them (repeat for several).",
)
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    required=True,
    help="Folder of the feature folders teacher_0, teacher_1, ….",
)
@click.option("--taps", default="neg1", show_default=True, help="Layers to store: neg1, or neg1,neg2.")
@click.option(
    "--storage",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    default="bf16",
    show_default=True,
    help="Precision of the files.",
)
@click.option(
    "--teacher-storage",
    type=click.Choice(["full", "pooled"]),
    default="full",
    show_default=True,
    help="Keep features whole, or at half the height and width for small disks.",
)
@click.option(
    "--every-case", is_flag=True, help="Also validation cases, not only the student's training fold."
)
@click.option(
    "--trust-checkpoint", is_flag=True, help="Read nnU-Net's files with pickled objects; none is executed."
)
@click.pass_obj
def extract_features(
    manager: PluginManager,
    /,
    runs: Sequence[Path],
    output: Path,
    taps: str,
    storage: str,
    teacher_storage: str,
    every_case: bool,
    trust_checkpoint: bool,
    **config: Any,
) -> None:
    """Write the teachers' features on exactly the windows that the student will see.

    Give the student's config: its dataset, fold and window decide what is written. Teachers are runs of this
    toolkit, or checkpoints and fold folders of nnU-Net v2. Files that are there and fit are kept.
    """
    from medrl.plugins.graft import teachers

    names = [word.strip() for word in taps.split(",") if word.strip()]
    wrong = [name for name in names if name not in ("neg1", "neg2")]
    if wrong or not names:
        raise ConfigError("--taps", why=f"'{taps}' is not neg1, neg2 or neg1,neg2")
    done = teachers.extract(
        manager,
        _resolve(manager, config).config,
        [path for run in runs for path in teachers.find_teachers(run)],
        output,
        taps=names,
        dtype=storage,
        pooled=teacher_storage == "pooled",
        every_case=every_case,
        trust=trust_checkpoint,
        say=_say,
    )
    _say(f"done: {done.written} cases written, {done.kept} kept, {done.bytes / 1e6:.1f} MB in {output}")
    _say(f"next: medrl train graft --teachers {output} --data DATA")


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdigit() for word in words):
        raise ConfigError("--only", why=f"'{text}' is no list of numbers", do="--only 0,3")
    return [int(word) for word in words]


def _say(line: str) -> None:
    click.echo(line, err=True)
