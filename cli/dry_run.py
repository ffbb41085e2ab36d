"""``medrl train … --dry-run``: says what would be done; writes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medrl.cli.console import console
from medrl.core.errors import ConfigError

if TYPE_CHECKING:
    from medrl.cli.many import Planned
    from medrl.core.manager import PluginManager


def describe(manager: PluginManager, method: str, planned: Planned, shared: Mapping[str, Any]) -> None:
    """Check data, split and run folder of one run and say what it would do.

    Raises:
        ConfigError: The run folder holds a run with another config, or cannot be written.
        DataError: The dataset or its split is not usable.
    """
    config = planned.resolved.config
    devices = shared["devices"] or 1
    facts = {
        "method": f"{method}: {manager.info(method).summary}",
        "config": f"{planned.resolved.hash}, preset {shared['preset']}"
        if shared["preset"]
        else planned.resolved.hash,
        "run folder": _folder(planned, shared["resume"]),
        "training": (
            f"{config.train.max_steps} steps" if config.train.max_steps else "the steps of each stage"
        )
        + f", batch size {config.train.batch_size}"
        + (f" on each of {devices} ranks" if devices > 1 else ""),
        "device": f"{config.train.device}, {config.train.precision}",
        "seed": str(config.train.seed),
        **_data(config),
        **_further_data(config),
    }
    if shared["init_from"] is not None:
        facts["start from"] = str(shared["init_from"])
    console().facts(facts)


def _data(config: Any) -> dict[str, str]:
    data = config.data
    if data.root is None:
        return {"dataset": "none is named (data.root); --data DIR names one"}
    if data.root.is_file():
        return {"dataset": f"{data.root}, a file that the method reads itself when it trains"}
    from medrl.core.dataset import open_dataset

    console().waiting("reading the dataset")
    dataset = open_dataset(data.root, layout=data.layout, exclude=data.exclude)
    split = dataset.fold(data.fold, folds=data.folds, seed=data.split_seed, group_by=data.group_by)
    labels = ", ".join(f"{name} {value}" for name, value in dataset.labels.items())
    return {
        "dataset": f"{dataset.name} ({dataset.layout}): {len(dataset.cases)} cases, "
        f"{len(dataset.test_cases)} for testing",
        "channels": ", ".join(dataset.channel_names),
        "labels": labels,
        "fold": f"{data.fold}: {len(split.train)} cases for training, {len(split.val)} for validation",
    }


def _further_data(config: Any) -> dict[str, str]:
    """Return what a method calls its other datasets, such as ``target``, and where they are.

    Raises:
        DataError: One is named and does not exist.
    """
    from medrl.core.config import DataConfig
    from medrl.core.errors import DataError

    found = {}
    for name in type(config).model_fields:
        block = getattr(config, name)
        if name == "data" or not isinstance(block, DataConfig):
            continue
        if block.root is not None and not block.root.exists():
            raise DataError(str(block.root), why="no such dataset", do=f"check {name}.root")
        found[name] = str(block.root) if block.root else f"none is named ({name}.root)"
    return found


def _folder(planned: Planned, resume: str) -> str:
    path = planned.run_dir
    if (path / "manifest.json").is_file():
        if resume == "never":
            raise ConfigError(
                f"run folder {path}", why="it holds a run, and --resume is never", do="choose another -o"
            )
        changed = _difference(planned)
        if changed:
            raise ConfigError(
                f"run folder {path}",
                why="it holds a run with another config",
                do="give the same settings again, or choose another folder with -o",
                problems=changed,
            )
        return f"{path} (exists: would be continued)"
    if resume == "must":
        raise ConfigError(f"run folder {path}", why="it holds no run, and --resume is must")
    _check_writable(path)
    return f"{path} (new)"


def _difference(planned: Planned) -> list[str]:
    """Return the config values in which a run that exists differs; more steps only extend it."""
    from medrl.cli.runfiles import run_config

    stored = run_config(planned.run_dir)
    before = stored.get("train", {}).get("max_steps") if isinstance(stored.get("train"), dict) else None
    more = isinstance(before, int) and planned.resolved.config.train.max_steps > before
    lines: list[str] = planned.resolved.difference(stored)
    return [line for line in lines if not (more and line.startswith("train.max_steps:"))]


def _check_writable(path: Path) -> None:
    """Refuse a folder that could not be made."""
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = f"{there} cannot be written" if there.is_dir() else f"{there} is a file"
        raise ConfigError(f"run folder {path}", why=why, do="choose another folder with -o")
