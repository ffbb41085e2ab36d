"""``medrl model info|export|verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medrl.cli.completing import complete_runs
from medrl.cli.console import console, size, write_json
from medrl.cli.groups import FriendlyGroup
from medrl.cli.options import ANY_PATH, json_option
from medrl.cli.session import manager_of
from medrl.core.errors import EXIT_CHECKPOINT, EXIT_OK, CheckpointError, MedrlError

FORMATS = ("safetensors", "torchscript", "onnx", "monai-bundle")


@click.group("model", cls=FriendlyGroup, short_help="Look into checkpoints, export and verify them.")
def model() -> None:
    """Look into checkpoints, export and verify them. No code in a checkpoint is ever run."""


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


@model.command(short_help="Write a network for other programs, verified.")
@click.argument("run", type=ANY_PATH, metavar="RUN|FILE", shell_complete=complete_runs)
@click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    required=True,
    help="safetensors: weights alone; the others run without medrl.",
)
@click.option(
    "-o",
    "--output",
    type=ANY_PATH,
    metavar="PATH",
    help="File or folder.  [default: export/ in the run folder]",
)
@click.option("--network", metavar="NAME", help="Which network.  [default: the one that decides]")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@json_option()
@click.pass_context
def export(
    ctx: click.Context,
    run: Path,
    format_: str,
    output: Path | None,
    network: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a network of a run or checkpoint in a format of other programs.

    The file is read back by the loader of that format and asked about a phantom; it appears only if it says
    what the checkpoint says, within the tolerance that is shown. medrl model verify repeats this anywhere.
    """
    console().loading()
    from medrl.core.export import export as write

    made = write(run, manager_of(ctx), format=format_, output=output, network=network, overwrite=overwrite)
    if as_json:
        write_json({**verdict_facts(made.verdict), "others": made.others})
        return
    screen = console()
    facts = made.verdict.facts
    inputs = ", ".join(f"{name} {_shape(shape)}" for name, shape in facts["inputs"].items())
    shown = {
        "network": f"{made.name} of {facts['method']}, step {facts['step']}",
        "input": f"{inputs}, float32: {facts['preparation']}",
        "output": ", ".join(facts["outputs"])
        + ("" if facts["activation"] == "none" else f"; {facts['activation']} makes probabilities"),
        "labels": _text(facts["label_names"]),
        "verified": _agreement(made.verdict),
        "also in it": ", ".join(f"--network {name}" for name in made.others),
    }
    screen.facts({key: value for key, value in shown.items() if value})
    screen.say(f"written: {made.path}")


@model.command(short_help="Verify checkpoints and exported files.")
@click.argument(
    "file", type=ANY_PATH, nargs=-1, required=True, metavar="FILE|RUN...", shell_complete=complete_runs
)
@click.option(
    "--model",
    "against",
    type=ANY_PATH,
    metavar="RUN|CKPT",
    shell_complete=complete_runs,
    help="Compare exported files with this checkpoint, not only with what they keep of it.",
)
@json_option()
@click.pass_context
def verify(ctx: click.Context, file: tuple[Path, ...], against: Path | None, as_json: bool) -> int:
    """Verify the digest of checkpoints and what exported files say, of a run or folder all of them.

    An exported file is run by the loader of its format on a phantom. The exit code is 4 if a file is damaged
    or says something else than its checkpoint.
    """
    console().loading()
    results: list[dict[str, Any]] = []
    known: dict[str, Any] = {}
    for path in file:
        exported = exported_files(path)
        if path not in exported and (not exported or _has_checkpoints(path)):
            results += [_verify_checkpoint(item) for item in checkpoint_files((path,))]
        results += [_verify_export(ctx, item, against, known) for item in exported]
    bad = [item for item in results if not item["ok"]]
    if as_json:
        write_json(results)
        return EXIT_CHECKPOINT if bad else EXIT_OK
    screen = console()
    for item in results:
        if item["ok"]:
            state = screen.style("intact ", fg="green")
            screen.say(f"{state} {item['file']}  {item.get('said') or 'step ' + str(item['step'])}")
        else:
            state = screen.style("damaged" if "format" not in item else "differs", fg="red")
            screen.line(f"{state} {item['file']}: {item['why']}")
            if item["do"]:
                screen.line(f"        do: {item['do']}")
    return EXIT_CHECKPOINT if bad else EXIT_OK


def _verify_checkpoint(path: Path) -> dict[str, Any]:
    from medrl.core.checkpoint import read_meta

    try:
        return {"file": path, "ok": True, "step": read_meta(path).get("step")}
    except MedrlError as error:
        return {"file": path, "ok": False, "why": error.why or error.what, "do": error.do}


def _has_checkpoints(folder: Path) -> bool:
    return any(next(place.glob("*.pt"), None) is not None for place in (folder, folder / "checkpoints"))


def exported_files(path: Path) -> list[Path]:
    """Return what was exported: the path itself, or what lies in a folder or in the ``export`` of a run."""
    from medrl.core.export import format_of

    if not path.exists():
        return []
    if format_of(path) is not None:
        return [path]
    inside = [*path.glob("*"), *(path / "export").glob("*")] if path.is_dir() else []
    return sorted(item for item in inside if not item.name.startswith(".") and format_of(item) is not None)


def _verify_export(
    ctx: click.Context, path: Path, against: Path | None, known: dict[str, Any]
) -> dict[str, Any]:
    """Verify one exported file; `known` keeps the networks of `against` between files."""
    from medrl.core.export import checkpoint_of, format_of, networks_of
    from medrl.core.export import verify as compare

    try:
        network = None
        if against is not None:
            known = known or dict(networks_of(checkpoint_of(against), manager_of(ctx)))
            kind = format_of(path)
            name = "" if kind is None else str(kind.facts(path).get("network"))
            if name not in known:
                why = f"the checkpoint has no network '{name}'; it has {', '.join(known)}"
                raise CheckpointError(str(path), why=why, do="name the run that it was exported from")
            network = known[name]
        found = compare(path, network)
    except CheckpointError as error:
        return {"file": path, "ok": False, "why": error.why or error.what, "do": error.do}
    return verdict_facts(found)


def verdict_facts(found: Any) -> dict[str, Any]:
    """Return a verdict as plain values."""
    return {
        "file": found.path,
        "ok": found.ok,
        "format": found.format,
        "network": found.facts.get("network"),
        "method": found.facts.get("method"),
        "step": found.facts.get("step"),
        "compared": found.against,
        "numbers": found.numbers,
        "largest_difference": found.deviations,
        "tolerance": found.facts.get("tolerance"),
        "said": _agreement(found),
        "why": "; ".join(found.problems),
        "do": "medrl model export RUN --format " + found.format if found.problems else "",
    }


def _agreement(found: Any) -> str:
    """Return in one line how far an exported file is from its checkpoint."""
    if found.against == "weights":
        return "weights are those that were exported; --model RUN compares outputs"
    tolerance = found.facts["tolerance"]
    most = max(found.deviations.values(), default=0.0)
    allowed = f"{tolerance['absolute']:g} + {tolerance['relative']:g} × |value|"
    if not tolerance["absolute"] and not tolerance["relative"]:
        allowed = "none"
    other = "the checkpoint" if found.against == "checkpoint" else "what it keeps of its checkpoint"
    difference = f"differs by at most {most:.2g} from" if most else "equals"
    return f"{difference} {other} in {found.numbers:,} numbers (tolerance {allowed})"


def _shape(sizes: Any) -> str:
    return "(" + ", ".join(["N", *(str(size) for size in sizes)]) + ")"


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
