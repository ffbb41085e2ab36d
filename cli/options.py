"""Option types and the options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from medrl.cli.completing import complete_presets, complete_runs, complete_set
from medrl.core.jobs import ConfigOption, executor_options

F = TypeVar("F", bound=Callable[..., Any])

PRECISIONS = ("fp32", "bf16", "fp16")
SINKS = ("jsonl", "tensorboard")


class FoldType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click
    """A fold number from 0, or ``all``."""

    name = "K|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Return the number, or ``all``."""
        if value == "all" or isinstance(value, int):
            return value  # type: ignore[no-any-return]  # both types of the union were checked
        if not str(value).isdigit():
            self.fail(f"'{value}' is neither a fold number from 0 nor 'all'", param, ctx)
        return int(value)


class DeviceType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click
    """``auto``, ``cpu``, ``mps``, ``cuda`` or ``cuda:1``."""

    name = "auto|cpu|cuda[:i]|mps"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the device as it was written."""
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(value)):
            self.fail(f"'{value}' is none of auto, cpu, mps, cuda, cuda:1", param, ctx)
        return str(value)


class ListType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click
    """Words separated by commas.

    Args:
        choices: The words allowed; none means any.
        number: Turn each word into a whole number.
    """

    name = "list"

    def __init__(self, *choices: str, number: bool = False) -> None:
        self.choices = choices
        self.number = number

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Return the words, or the numbers."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",") if word.strip()]
        if not words:
            self.fail("is empty", param, ctx)
        for word in words:
            if self.choices and word not in self.choices:
                self.fail(f"'{word}' is none of {', '.join(self.choices)}", param, ctx)
            if self.number and not word.isdigit():
                self.fail(f"'{word}' is no number", param, ctx)
        return tuple(int(word) for word in words) if self.number else tuple(words)


class PartType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click
    """``I/N``: the I-th of N parts, from 1."""

    name = "I/N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Return both numbers."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"'{value}' is not I/N with I from 1 to N, such as 1/4", param, ctx)
        return int(match[1]), int(match[2])


FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
ANY_PATH = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)
NATURAL = click.IntRange(min=0)


def train_options() -> list[click.Parameter]:
    """Return the options that every method's training has, in the order of the help."""
    option = click.Option
    return [
        option(
            ["-c", "--config"], type=FILE, metavar="FILE", help="Config file; medrl init METHOD writes one."
        ),
        ConfigOption(
            ["--data"], config_key="data.root", type=ANY_PATH, metavar="DIR", help="Dataset folder."
        ),
        option(
            ["-o", "--output"], type=FOLDER, metavar="RUN", help="Run folder.  [default: a new one in runs/]"
        ),
        option(
            ["--set", "assignments"],
            multiple=True,
            metavar="KEY=VALUE",
            shell_complete=complete_set,
            help="Set one config value, such as train.lr=1e-3. Wins over all others. Repeatable.",
        ),
        option(
            ["--preset"],
            metavar="NAME",
            shell_complete=complete_presets,
            help="Values that belong together, such as smoke or small; medrl methods NAME lists them.",
        ),
        option(
            ["--fold"],
            type=FoldType(),
            metavar="K|all",
            help="Validation fold from 0, or all, one run after the other.",
        ),
        ConfigOption(
            ["--exclude"],
            config_key="data.exclude",
            multiple=True,
            metavar="CASE",
            help="Leave a case out. Repeatable.",
        ),
        option(["--seed"], type=NATURAL, metavar="N", help="Seed of initialisation, sampling, augmentation."),
        option(["--seeds"], type=POSITIVE, metavar="N", help="N runs with seeds that follow each other."),
        ConfigOption(
            ["--deterministic"],
            config_key="train.deterministic",
            is_flag=True,
            flag_value=True,
            default=None,
            help="Only deterministic algorithms.",
        ),
        ConfigOption(
            ["--device"],
            config_key="train.device",
            type=DeviceType(),
            metavar="DEVICE",
            help="auto, cpu, cuda, cuda:1 or mps.",
        ),
        option(
            ["--devices"], type=POSITIVE, metavar="N", help="N processes, one a device, through torchrun."
        ),
        ConfigOption(
            ["--threads"],
            config_key="train.threads",
            type=NATURAL,
            metavar="N",
            help="CPU threads of torch; 0 leaves torch's choice.",
        ),
        ConfigOption(
            ["--precision"],
            config_key="train.precision",
            type=click.Choice(PRECISIONS),
            help="Numbers of the forward pass.",
        ),
        ConfigOption(
            ["--workers"],
            config_key="train.workers",
            type=NATURAL,
            metavar="N",
            help="Processes that load data.",
        ),
        ConfigOption(
            ["--max-steps"], config_key="train.max_steps", type=POSITIVE, metavar="N", help="Optimiser steps."
        ),
        option(
            ["--resume"],
            type=click.Choice(["auto", "never", "must"]),
            default="auto",
            show_default=True,
            help="For a run folder that exists: continue it, refuse it, or demand a checkpoint.",
        ),
        option(
            ["--init-from"],
            type=ANY_PATH,
            metavar="CKPT",
            shell_complete=complete_runs,
            help="Start from the weights of a run or checkpoint.",
        ),
        option(
            ["--trust-checkpoint"],
            is_flag=True,
            help="Read tensors of an --init-from file of other software; its code is never run.",
        ),
        ConfigOption(
            ["--log"],
            config_key="train.log",
            type=ListType(*SINKS),
            metavar="jsonl,tensorboard",
            help="Where metrics go; jsonl is always written.",
        ),
        option(["--print-config"], is_flag=True, help="Print every value with its origin, and stop."),
        option(
            ["--dry-run"],
            is_flag=True,
            help="Check config, data and split, say what would be done, and stop.",
        ),
        option(["--fast-dev-run"], is_flag=True, help="Two steps and one validation, to see that it works."),
        option(
            ["--requeue"],
            is_flag=True,
            help="Inside a Slurm job: when a signal stops the run, queue the job again; it goes on then.",
        ),
        *executor_options("runs"),
        option(
            ["--by"],
            type=click.Choice(["run", "stage"]),
            default="run",
            show_default=True,
            help="What is a task of the executor: a whole run, or each stage of a method that has stages.",
        ),
    ]


def compute_options() -> list[click.Parameter]:
    """Return where and how a prediction computes."""
    option = click.Option
    return [
        option(
            ["--device"],
            type=DeviceType(),
            metavar="DEVICE",
            default="auto",
            show_default=True,
            help="auto, cpu, cuda, cuda:1 or mps.",
        ),
        option(
            ["--threads"],
            type=NATURAL,
            default=0,
            show_default=True,
            metavar="N",
            help="CPU threads; 0 leaves torch's choice.",
        ),
        option(
            ["--precision"],
            type=click.Choice(PRECISIONS),
            default="fp32",
            show_default=True,
            help="Numbers of the forward pass.",
        ),
    ]


def json_option() -> Callable[[F], F]:
    """Return the decorator of ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
