"""``medrl init METHOD``: a commented config that is valid as written."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from medrl.cli.completing import complete_methods, complete_presets
from medrl.cli.console import console
from medrl.cli.session import manager_of
from medrl.core.errors import ConfigError, MedrlError, PluginError, did_you_mean

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

WIDTH = 100
DATA_FOLDER = "./Dataset001_Name"
USUAL = frozenset(
    {"medrl", "method", "data.root", "data.fold", "data.folds", "data.group_by"}
    | {
        f"train.{name}"
        for name in ("max_steps", "batch_size", "lr", "precision", "seed", "device", "workers")
    }
)
"""Keys that the short config has for every method; a method adds those that it made options of."""


@click.command("init", short_help="Write a commented config of a method.")
@click.argument("method", shell_complete=complete_methods("train"))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    default=Path("config.yaml"),
    show_default=True,
    metavar="FILE",
    help="Where to write it; - is stdout.",
)
@click.option("--full", is_flag=True, help="Every value, not only the usual ones.")
@click.option("--preset", metavar="NAME", shell_complete=complete_presets, help="Start from a preset.")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="Your dataset folder.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.pass_context
def init(
    ctx: click.Context,
    method: str,
    output: Path,
    full: bool,
    preset: str | None,
    data: Path | None,
    force: bool,
) -> None:
    """Write a config of METHOD in which every value is explained. It is valid as written."""
    manager = manager_of(ctx)
    if not manager.knows(method):
        raise ConfigError(
            f"no method '{method}'", why=did_you_mean(method, manager.names()), do="medrl methods"
        )
    to_stdout = str(output) == "-"
    if not to_stdout and output.exists() and not force:
        raise ConfigError(f"{output} exists", do="choose another name with -o, or replace it with --force")
    base = Path.cwd() if to_stdout else output.parent
    text = config_text(manager, method, full=full, preset=preset, data=data, base=base)
    if to_stdout:
        click.echo(text, nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    screen = console()
    screen.say(f"written: {output}" + ("" if full else "; --full writes every value"))
    if data is None:
        screen.say(f"next: set data.root in it, then medrl train {method} -c {output}")
    else:
        screen.say(f"next: medrl train {method} -c {output}")


def config_text(
    manager: PluginManager,
    method: str,
    *,
    full: bool = False,
    preset: str | None = None,
    data: Path | None = None,
    base: Path | None = None,
) -> str:
    """Return a commented config of a method.

    Comments come from the method's defaults.yaml, and where it has none, from the descriptions of the
    config model.

    Args:
        manager: Where the method is.
        method: Its name.
        full: Every value; otherwise the usual ones and those that the method made options of.
        preset: Values over the defaults.
        data: Dataset folder; a placeholder if left out.
        base: Folder that the file will lie in; relative paths are taken from there.
    """
    from medrl.core.config import config_model, presets, resolve_method

    resolved = resolve_method(manager, method, preset=preset)
    values = resolved.values()
    wanted = None if full else {*USUAL, *option_keys(manager, method)}
    placeholder = data is None and values["data"].get("root") is None
    if placeholder:
        values["data"]["root"] = DATA_FOLDER
    elif data is not None:
        values["data"]["root"] = str(data.resolve())
    notes = {
        **descriptions(config_model(manager, method)),
        **comments(presets(manager, method).get("defaults", "")),
    }
    if placeholder:
        notes["data.root"] = "YOUR DATASET: " + notes.get("data.root", "Dataset folder.")
    lines = [
        f"# {method}: {manager.info(method).summary}",
        f"# medrl train {method} -c THIS_FILE",
        "# Relative paths are taken from the folder of this file. Unknown keys are errors.",
    ]
    if preset:
        lines.append(f"# Values of the preset {preset}.")
    if not full:
        lines.append(f"# The usual values; medrl init {method} --full writes all of them.")
    lines.append("")
    _block(values, notes, wanted, "", lines)
    text = "\n".join(lines).rstrip() + "\n"
    _check(manager, method, text, base or Path.cwd())
    return text


def option_keys(manager: PluginManager, method: str) -> set[str]:
    """Return the config keys that the method's train command has options for."""
    from medrl.core.jobs import ConfigOption

    try:
        command = manager.commands(method).train
    except PluginError:
        return set()
    params = command.params if command is not None else []
    return {item.config_key for item in params if isinstance(item, ConfigOption)}


def descriptions(model: Any, prefix: str = "") -> dict[str, str]:
    """Return the description of every key of a config model."""
    found: dict[str, str] = {}
    for name, info in model.model_fields.items():
        if info.description:
            found[f"{prefix}{name}"] = info.description + _choices(info.annotation, info.description)
        inner = _inner_model(info.annotation)
        if inner is not None:
            found.update(descriptions(inner, f"{prefix}{name}."))
    return found


def comments(text: str) -> dict[str, str]:
    """Return the comment of every key of a YAML text: the lines above it and the one behind its value."""
    found: dict[str, str] = {}
    above: list[str] = []
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            above.append(stripped.lstrip("# ").rstrip("-= "))
            continue
        match = re.match(r"^(\s*)([A-Za-z_][\w-]*):(?:\s|$)(.*)$", line)
        if match is None:
            above = []
            continue
        depth = len(match[1])
        path = [*(item for item in path if item[0] < depth), (depth, match[2])]
        behind = re.search(r"(?:^|\s)#\s*(.*)$", re.sub(r"""(['"]).*?\1""", "", match[3]))
        parts = [*above, *([behind[1].strip()] if behind else [])]
        note = " ".join(part for part in parts if part)
        if note:
            found[".".join(name for _, name in path)] = note
        above = []
    return found


def _choices(annotation: Any, text: str) -> str:
    """Return the values that a key may have, unless its description names them."""
    if get_origin(annotation) is not Literal:
        return ""
    values = [str(value) for value in get_args(annotation)]
    if len(values) < 2 or all(value in text for value in values):
        return ""
    return f" One of: {', '.join(values)}."


def _inner_model(annotation: Any) -> Any:
    if hasattr(annotation, "model_fields"):
        return annotation
    for argument in get_args(annotation):
        if hasattr(argument, "model_fields"):
            return argument
    return None


def _block(
    values: Mapping[str, Any],
    notes: Mapping[str, str],
    wanted: set[str] | None,
    prefix: str,
    lines: list[str],
) -> None:
    """Write the wanted keys of one block with their comments."""
    from medrl.cli.layers import yaml_lines

    indent = "  " * prefix.count(".")
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        is_block = isinstance(value, Mapping) and bool(value)
        if wanted is not None and not _is_wanted(dotted, is_block, wanted):
            continue
        if is_block and not prefix:
            lines.append("")
        note = notes.get(dotted, "")
        lines += textwrap.wrap(
            " ".join(note.split()),
            WIDTH,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        if is_block:
            lines.append(f"{indent}{key}:")
            _block(value, notes, wanted, f"{dotted}.", lines)
        else:
            lines += [indent + line for line in yaml_lines(key, value)]


def _is_wanted(dotted: str, is_block: bool, wanted: set[str]) -> bool:
    if dotted in wanted or dotted.split(".")[0] == "model":
        return True
    return is_block and any(key.startswith(f"{dotted}.") for key in wanted)


def _check(manager: PluginManager, method: str, text: str, base: Path) -> None:
    """Make sure that what will be written is valid.

    Raises:
        PluginError: It is not, which is a defect of the plugin.
    """
    from medrl.core.config import Layer, parse_yaml, resolve_method

    try:
        resolve_method(manager, method, layers=[Layer("init", parse_yaml(text), base_dir=base)])
    except MedrlError as error:
        raise PluginError(f"config of '{method}'", why=f"its defaults are not valid: {error}") from error
