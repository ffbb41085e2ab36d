"""``medrl model info|verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medrl.cli.completing import complete_runs
from medrl.cli.console import console, size, write_json
from medrl.cli.groups import FriendlyGroup
from medrl.cli.options import ANY_PATH, json_option
from medrl.core.errors import EXIT_CHECKPOINT, EXIT_OK, CheckpointError, MedrlError


@click.group("model", cls=FriendlyGroup, short_help="Look into checkpoints and verify them.")
def model() -> None:
    """Look into checkpoints and verify them. No code in a file is ever run."""


@model.command(short_help="Show what a checkpoint is: method, step, labels.")
@click.argument("file", type=ANY_PATH, metavar="FILE|RUN", shell_complete=complete_runs)
@json_option()
def info(file: Path, as_json: bool) -> None:
    """Show what a checkpoint is: method, version, step, labels, channels and parameters."""
    console().loading()
    from medrl.core.checkpoint import find_checkpoint, load_checkpoint

    path = find_checkpoint(file)
    checkpoint = load_checkpoint(path)
    facts = {
        "file": path,
        "size": path.stat().st_size,
        "sha256": checkpoint.digest,
        **checkpoint.meta,
        "objects": {name: _count(state) for name, state in checkpoint.states.items()},
    }
    if as_json:
        write_json(facts)
        return
    config = facts.pop("config", None)
    facts["size"] = size(path.stat().st_size)
    facts["objects"] = ", ".join(
        f"{name} ({count:,} numbers)" if count else name for name, count in facts["objects"].items()
    )
    console().facts(
        {
            key.replace("_", " "): _text(value)
            for key, value in facts.items()
            if value not in (None, "", [], {})
        }
    )
    if config:
        console().detail(f"config: {config}")


@model.command(short_help="Verify the digest of checkpoints.")
@click.argument(
    "file", type=ANY_PATH, nargs=-1, required=True, metavar="FILE|RUN...", shell_complete=complete_runs
)
@json_option()
def verify(file: tuple[Path, ...], as_json: bool) -> int:
    """Verify the digest of checkpoints, of a run all of them; the exit code is 4 if one is damaged."""
    console().loading()
    from medrl.core.checkpoint import read_meta

    results = []
    for path in checkpoint_files(file):
        try:
            results.append({"file": path, "ok": True, "step": read_meta(path).get("step")})
        except MedrlError as error:
            results.append({"file": path, "ok": False, "why": error.why or error.what, "do": error.do})
    bad = [item for item in results if not item["ok"]]
    if as_json:
        write_json(results)
        return EXIT_CHECKPOINT if bad else EXIT_OK
    screen = console()
    for item in results:
        if item["ok"]:
            screen.say(f"{screen.style('intact ', fg='green')} {item['file']}  step {item['step']}")
        else:
            screen.line(f"{screen.style('damaged', fg='red')} {item['file']}: {item['why']}")
            if item["do"]:
                screen.line(f"        do: {item['do']}")
    return EXIT_CHECKPOINT if bad else EXIT_OK


def checkpoint_files(paths: tuple[Path, ...]) -> list[Path]:
    """Return the checkpoint files of runs, folders and files.

    Raises:
        CheckpointError: A path holds none.
    """
    found: list[Path] = []
    for path in paths:
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        files = [path] if path.is_file() else sorted(folder.glob("*.pt"))
        if not files:
            why = "no checkpoint in it" if path.exists() else "no such file or folder"
            raise CheckpointError(f"{path}", why=why, do="medrl runs list")
        found += files
    return found


def _count(state: Any) -> int:
    """Return the number of numbers in the tensors of a state."""
    if hasattr(state, "numel"):
        return int(state.numel())
    if isinstance(state, dict):
        return sum(_count(item) for item in state.values())
    if isinstance(state, (list, tuple)):
        return sum(_count(item) for item in state)
    return 0


def _text(value: Any) -> str:
    if isinstance(value, dict):
        if all(isinstance(item, int) for item in value.values()):
            value = dict(sorted(value.items(), key=lambda pair: pair[1]))
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value)
