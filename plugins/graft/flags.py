"""The flags of the original by their names: live ones set config values, the others say what to use instead.

Nothing heavy is imported here.

Source: specification §6; train_student_rl_new_policy.py of the original.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from medrl.core.jobs import ConfigOption, config_option

ANY_PATH = click.Path(path_type=Path, resolve_path=True)
FILE = click.Path(path_type=Path, dir_okay=False, resolve_path=True)
COUNT = click.IntRange(min=1)
FROM_ZERO = click.IntRange(min=0)

ARCHITECTURES = {
    "fullres_3d_unet": "graft.fullres",
    "fullres_3d_unet_ds": "graft.fullres",
    "fullres_3d_unet_enc": "graft.fullres",
    "fullres_3d_unet_medium": "graft.medium",
    "fullres_3d_unet_medium_ds": "graft.medium",
    "fullres_3d_unet_large": "graft.large",
    "fullres_3d_unet_large_ds": "graft.large",
    "fullres_3d_unet_137": "graft.brats",
    "fullres_3d_unet_137_ds": "graft.brats",
    "fullres_3d_unet_137_binary": "graft.brats",
    "fullres_3d_unet_137_binary_ds": "graft.brats",
    "unet3d": "graft.unet3d",
    "swin_unetr3d": "graft.swin",
    "swin_unetr3d_small": "graft.swin",
    "swin_unetr3d_medium": "graft.swin",
    "swin_unetr3d_tiny": "graft.swin",
}
"""Networks of the original and the nearest one here, by registry key."""

RETIRED: dict[str, tuple[str, str]] = {
    # name: (kind, what to use instead)
    "--dataset": ("value", "--data names the dataset"),
    "--lr": ("value", "it had no effect upstream either; --init-lr sets the rate"),
    "--learning-rate": ("value", "it had no effect upstream either; --init-lr sets the rate"),
    "--momentum": ("value", "it had no effect upstream either; --set optim.momentum=0.9"),
    "--start-epoch": ("value", "a run goes on where it stopped: --resume auto"),
    "--print-freq": ("value", "every step is in metrics.jsonl, and progress shows by itself"),
    "--evaluate": ("flag", "medrl predict graft, then medrl graft evaluate"),
    "--pretrained": ("flag", "--init-from CHECKPOINT starts from weights"),
    "--dummy": ("flag", "--fast-dev-run tries everything on synthetic data"),
    "--rank": ("value", "ranks are numbered by --devices N or torchrun"),
    "--world-size": ("value", "--devices N starts N ranks"),
    "--local-rank": ("value", "ranks are numbered by --devices N or torchrun"),
    "--dist-url": ("value", "ranks find each other by --devices N or torchrun"),
    "--dist-backend": ("value", "NCCL on GPUs and gloo on CPUs are chosen by themselves"),
    "--multiprocessing-distributed": ("flag", "--devices N starts N ranks"),
    "--feat-kd": ("value", "it had no effect upstream either; --feat-loss chooses the feature loss"),
    "--use-robust-loss": ("flag", "it had no effect upstream either; --feat-loss smooth_l1"),
    "--contrastive-margin": ("value", "it had no effect upstream either, and the loss has no margin"),
    "--logits-actions": ("flag", "logits have weights of their own wherever --kd-weight is above 0"),
    "--load-neg2": ("flag", "--distill-features neg1 neg2 reads both layers"),
    "--cache-features": ("flag", "feature files are mapped into memory, which all ranks share"),
    "--cache-size": ("value", "feature files are mapped into memory, which all ranks share"),
    "--checkpoint-dir": ("value", "-o RUN names the run folder"),
    "--trial": ("value", "-o RUN names the run folder"),
    "--innovation-suffix": ("value", "-o RUN names the run folder"),
    "--teacher-name-list": ("values", "--teachers names their folders"),
}
"""Flags of the original that change nothing here; each is accepted with one line."""


class Several(ConfigOption):
    """A config option that takes every word up to the next option, as upstream's argparse does.

    ``--milestones 150 180 210``; a word that is no value of the option is left to others.
    """

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the option go on taking words."""
        super().add_to_parser(parser, ctx)
        take_several(self, parser, ctx)


class Retired(click.Option):
    """An option without effect that says once what to use instead; not shown in the help."""

    def __init__(self, *args: Any, kind: str, instead: str, **kwargs: Any) -> None:
        self.kind, self.instead = kind, instead
        kwargs |= {"is_flag": True} if kind == "flag" else {"multiple": kind == "values"}
        kwargs |= {"hidden": True, "expose_value": False, "callback": _deprecated, "help": instead}
        super().__init__(*args, **kwargs)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Take every word where upstream takes several."""
        super().add_to_parser(parser, ctx)
        if self.kind == "values":
            take_several(self, parser, ctx)


class Architecture(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click
    """A registry key, or the name that a network has in the original."""

    name = "network"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the registry key."""
        return ARCHITECTURES.get(str(value), str(value))


class Gpu(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click
    """The number of a GPU."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name of the device."""
        text = str(value).removeprefix("cuda:")
        if not text.isdigit():
            self.fail(f"'{value}' is no number of a GPU", param, ctx)
        return f"cuda:{text}"


def take_several(option: click.Option, parser: Any, ctx: click.Context) -> None:
    """Make the parser give an option all following words that are values of it."""
    entry = parser._long_opt[max(option.opts, key=len)]
    take: Callable[[str, Any], None] = entry.process

    def process(value: str, state: Any) -> None:
        take(value, state)
        while state.rargs and _fits(option, state.rargs[0], ctx):
            take(state.rargs.pop(0), state)

    entry.process = process


def upstream_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add every flag of the original to a command, live ones and retired ones."""
    retired = [
        click.option(name, cls=Retired, kind=kind, instead=instead)
        for name, (kind, instead) in RETIRED.items()
    ]
    for option in reversed([*LIVE, *retired]):
        command = option(command)
    return command


def _number(name: str, key: str, text: str, kind: Any = float) -> Callable[[Any], Any]:
    return config_option(name, key=key, type=kind, help=text)


def _switch(name: str, key: str, text: str, value: Any = True) -> Callable[[Any], Any]:
    return config_option(name, key=key, is_flag=True, flag_value=value, default=None, help=text)


def _choice(name: str, key: str, text: str, *words: str) -> Callable[[Any], Any]:
    return config_option(name, key=key, type=click.Choice(words), help=text)


def _several(name: str, key: str, text: str, kind: Any) -> Callable[[Any], Any]:
    return click.option(name, cls=Several, config_key=key, type=kind, multiple=True, help=text)


LIVE: Sequence[Callable[[Any], Any]] = (
    # data
    config_option(
        "--data-configs", key="data.root", type=ANY_PATH, help="Multi-cohort YAML; the same as --data."
    ),
    config_option(
        "--selected-cases", key="split.selected_cases", type=FILE, help="JSON of the only training cases."
    ),
    _number("--overfit-batches", "split.overfit_batches", "Train on the cases of so many batches.", COUNT),
    _switch("--use-fixed-subset-sampler", "split.fixed_subsets", "Each rank keeps its own cases."),
    _switch("--use-region-based-training", "target.kind", "Nested regions, not classes.", "regions"),
    # the student and its optimiser
    config_option("--arch", key="model.name", type=Architecture(), help="The student's network."),
    config_option("--gpu", key="train.device", type=Gpu(), help="Number of the GPU; --device cuda:N."),
    _number("--epochs", "epochs.total", "Length of the run; replaces --max-steps.", COUNT),
    _number("--batches-per-epoch", "epochs.batches", "At most so many batches in an epoch.", COUNT),
    _number("--batch-size", "train.batch_size", "Samples of a rank in a batch.", COUNT),
    _number("--gradient-accumulation-steps", "train.accumulate", "Batches in a step.", COUNT),
    _number("--init-lr", "train.lr", "Learning rate of the student."),
    _choice("--lr-type", "optim.schedule", "How the rate falls.", "cosine", "multistep", "constant"),
    _several("--milestones", "epochs.milestones", "Epochs at which multistep falls.", FROM_ZERO),
    _number("--warmup-epochs", "epochs.ramp", "Epochs over which the rate rises.", FROM_ZERO),
    config_option("--wd", "--weight-decay", key="train.weight_decay", type=float, help="Weight decay."),
    _switch("--fp16", "train.precision", "Half precision; --precision fp16.", "fp16"),
    _switch("--bf16", "train.precision", "bfloat16; --precision bf16.", "bf16"),
    # losses
    _number("--ce-weight", "loss.weight", "Weight of the supervised loss."),
    _switch("--use-deep-supervision", "loss.deep_supervision", "Supervise the lower decoder stages too."),
    # Of these three the last one counts, whatever their order on the command line, as upstream decides.
    _switch("--use-sharp-focal", "loss.focal", "Focal loss against false alarms.", "sharp"),
    _switch("--use-mild-focal", "loss.focal", "Focal loss for larger networks.", "mild"),
    _switch("--use-high-sensitivity", "loss.focal", "Focal loss against misses.", "high_sensitivity"),
    _switch("--use-loss-balancing", "loss.balance", "Divide each part of the loss by its running mean."),
    _number("--loss-balance-momentum", "loss.balance_momentum", "Memory of those means."),
    _number("--loss-balance-warmup", "loss.balance_warmup", "Batches before that begins.", FROM_ZERO),
    # distillation
    _several(
        "--distill-features",
        "distill.taps",
        "Layers whose features are distilled: neg1, neg2 or both.",
        click.Choice(["neg1", "neg2"]),
    ),
    _number("--feat-weight", "distill.feature_weight", "Weight of the feature loss."),
    _number("--neg2-weight", "distill.neg2_weight", "Weight of neg2 against neg1."),
    _switch("--use-orthogonal", "distill.projection", "Orthogonal maps between features.", "orthogonal"),
    _switch("--use-feature-masking", "distill.mask_features", "Compare only where a teacher is right."),
    _number("--mask-dilation-radius", "distill.mask_dilation", "Voxels around its hits.", FROM_ZERO),
    _number("--kd-weight", "distill.logit_weight", "Weight of the logit loss."),
    _number("--kd-T", "distill.temperature", "Its temperature."),
    _choice(
        "--kd-loss-type",
        "distill.logit_loss",
        "How probabilities are compared.",
        *("l1", "kl", "contrastive", "relation", "angular"),
    ),
    # the agent
    _number("--agent-lr", "agent.lr", "Learning rate of the policy."),
    _number("--agent-step", "agent.step_every", "Steps between updates without episodes.", COUNT),
    _number("--agent-update-interval", "agent.interval", "Measured actions in an episode.", COUNT),
    _number("--agent-warmup-epochs", "epochs.agent_warmup", "Epochs from prior to policy.", FROM_ZERO),
    _switch("--use-episode-reward", "agent.terminal", "End an episode with the gain in Dice."),
    _number("--reward-gamma", "agent.gamma", "Discount of later rewards."),
    _number("--reward-alpha", "agent.reward_alpha", "Part of Dice against cross-entropy in the reward."),
    _switch("--use-disagreement-reward", "agent.disagreement", "Show the policy who differs."),
    _switch(
        "--no-accuracy-gated-diversity",
        "agent.gated_diversity",
        "Weighting legacy: leave that part out.",
        False,
    ),
    _switch("--dynamic", "agent.dynamic", "Weighting legacy: learn the factors of the mixture."),
    # validation
    _choice("--val-mode", "validation.mode", "What is validated.", "full", "train", "subset"),
    _number("--val-subset-size", "validation.max_cases", "Validate so many cases.", COUNT),
    _switch("--early-stopping", "validation.early_stopping", "End when the Dice no longer rises."),
    _number("--early-stopping-patience", "validation.patience", "Validations without a rise.", COUNT),
    _number("--early-stopping-min-delta", "validation.min_delta", "What counts as a rise."),
)
"""The live flags, as decorators."""


def _fits(option: click.Option, word: str, ctx: click.Context) -> bool:
    """Whether a word is a value of an option, and no option itself."""
    if word.startswith("-"):
        return False
    try:
        option.type.convert(word, option, ctx)
    except click.UsageError:
        return False
    return True


def _deprecated(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Say what to use instead, once a command and on the main rank."""
    if not value or ctx.resilient_parsing or os.environ.get("RANK", "0") != "0":
        return
    instead = param.instead if isinstance(param, Retired) else ""
    click.echo(f"warning: {max(param.opts, key=len)} changes nothing here: {instead}", err=True)
