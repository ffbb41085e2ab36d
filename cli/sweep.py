"""``medrl sweep CONFIG``: every combination of a grid, each an ordinary run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

from medrl.cli.console import console, rank
from medrl.cli.launch import inside_launcher
from medrl.cli.many import Variations, do_elsewhere, parse_grid
from medrl.cli.method_command import Call, existing
from medrl.cli.options import train_options
from medrl.cli.session import manager_of
from medrl.cli.train import Train, plan_runs, scratch_folder, show_plan
from medrl.core.errors import EXIT_OK, ConfigError, did_you_mean

BLOCK = "sweep"
"""Block of a config file that says what varies."""

_KEYS = ("grid", "folds", "seeds")


class Sweep(Train):
    """Plans the runs of a grid and hands them to an executor."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take a first word that is no method as the config file."""
        if args and not args[0].startswith("-") and not manager_of(ctx).knows(args[0]):
            path = Path(args[0])
            if path.is_file() or path.suffix in (".yaml", ".yml"):
                args = ["-c", *args]
        return super().parse_args(ctx, args)

    def work(self, call: Call) -> int:
        """Read what varies, plan the runs and do those that are not finished."""
        shared = call.shared
        if inside_launcher():
            raise ConfigError(
                "sweep", why="inside torchrun or srun one call is one run", do="--executor slurm instead"
            )
        existing(shared["init_from"], option="--init-from")
        scratch = scratch_folder() if shared["fast_dev_run"] else None
        try:
            varied = read_variations(call)
            if len(varied) == 1 and not varied.grid:
                raise ConfigError(
                    "nothing varies", why="no grid, no folds, no seeds", do="--grid train.lr=1e-3,1e-4"
                )
            plan = plan_runs(call, scratch, varied)
            if shared["print_config"] or shared["dry_run"]:
                show_plan(call, plan)
                return EXIT_OK
            root = plan[0].run_dir.parent
            console().say(f"{len(plan)} runs in {root}")
            return do_elsewhere(call, plan)
        finally:
            if scratch is not None and rank() == 0:
                shutil.rmtree(scratch, ignore_errors=True)


def read_variations(call: Call) -> Variations:
    """Return what varies: the block `sweep` of the config file under the options.

    The rest of the file becomes the config of all runs.

    Raises:
        ConfigError: The block or an option is no such thing.
    """
    shared = call.shared
    block: dict[str, Any] = {}
    if shared["config"] is not None:
        from medrl.core.config import load_yaml

        values = load_yaml(Path(shared["config"]))
        block = values.pop(BLOCK, {})
        shared["config_values"] = values
    if not isinstance(block, dict):
        raise ConfigError(f"{shared['config']}: {BLOCK}", why="it is no block", do=f"{BLOCK}: {{grid: …}}")
    unknown = [key for key in block if key not in _KEYS]
    if unknown:
        raise ConfigError(f"{shared['config']}: {BLOCK}.{unknown[0]}", why=did_you_mean(unknown[0], _KEYS))
    grid = {str(key): _values(key, values) for key, values in dict(block.get("grid") or {}).items()}
    grid |= parse_grid(shared["grid"])
    folds, seeds = block.get("folds"), block.get("seeds")
    if shared["fold"] is not None:
        folds = shared["fold"] if shared["fold"] == "all" else [shared["fold"]]
    shared["fold"] = "all" if folds == "all" else None
    if shared["seeds"] is not None:
        seeds = shared["seeds"]
    shared["seeds"] = None
    return Variations(
        grid=grid,
        folds=() if folds in (None, "all") else _numbers("folds", folds),
        seeds=() if seeds is None else _seeds(seeds, shared["seed"]),
    )


def _values(key: object, values: object) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{BLOCK}.grid.{key}", why="its values must be a list", do=f"{key}: [V1, V2]")
    return tuple(values)


def _seeds(value: object, first: int | None) -> tuple[int, ...]:
    """Return the seeds of a list, or as many that follow the first."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        start = 1 if first is None else first
        return tuple(range(start, start + value))
    return _numbers("seeds", value)


def _numbers(name: str, value: object) -> tuple[int, ...]:
    good = isinstance(value, list) and value and all(isinstance(item, int) and item >= 0 for item in value)
    if not isinstance(value, list) or not good or len(set(value)) < len(value):
        raise ConfigError(f"{BLOCK}.{name}", why=f"{value} is no list of different whole numbers from 0")
    return tuple(value)


def _options() -> list[click.Parameter]:
    grid = click.Option(
        ["--grid"],
        multiple=True,
        metavar="KEY=V1,V2",
        help="Values of one config key; several of these make every combination. Repeatable.",
    )
    return [grid, *train_options()]


sweep = Sweep(
    "sweep",
    kind="train",
    params=_options(),
    help=(
        "Train every combination of a grid, with all folds and seeds that are asked for.\n\nCONFIG is a "
        "config file of a method, in which a block `sweep` may say what varies: `grid` (lists by config "
        "key), `folds` (a list, or all), `seeds` (a list, or how many). Each run is an ordinary run folder "
        "below -o; the same command goes on after an interruption. --executor says who does the runs."
    ),
    short_help="Train every combination of a grid.",
)
