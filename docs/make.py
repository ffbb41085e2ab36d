"""The pages of the documentation that are made from the code: ``make docs`` writes, a test compares them.

``hooks.md`` from the hook specifications, ``cli.md`` from the commands, ``config/<method>.md`` from the
config models and presets of the methods that medrl brings.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from medrl.cli.main import COMMANDS, SECTIONS, root
from medrl.cli.session import use_manager
from medrl.core.config import config_model, flatten, parse_yaml, presets
from medrl.core.hookspecs import reference
from medrl.core.manager import PluginManager

HERE = Path(__file__).resolve().parent
WIDTH = 100


def pages() -> dict[str, str]:
    """Every page that is made, by its path below this folder."""
    manager = PluginManager([*_bundled()], policy=PluginManager.create(third_party=False).policy)
    methods = sorted(name for name in manager.names() if manager.info(name).config)
    return {
        "hooks.md": reference(),
        "cli.md": commands_page(manager),
        **{f"config/{name}.md": config_page(manager, name) for name in methods},
    }


def _bundled() -> Iterator[Any]:
    """The plugins of this distribution, whatever policy lies in the current folder."""
    from medrl.core.discovery import Policy, discover

    yield from (entry for entry in discover(Policy()) if entry.origin == "bundled")


# -- commands ----------------------------------------------------------------------------------------


def commands_page(manager: PluginManager) -> str:
    """Help of every command, and of every tool of every method."""
    top = _context(root, "medrl", None)
    use_manager(top, manager)
    lines = [
        "# Commands",
        "",
        "Made by `make docs` from the commands themselves. Machine output (`--json`) goes to stdout, "
        "everything for people to stderr. `-q`, `-v`, `--plain`, `--debug`, `--plugins-file` and "
        "`--no-third-party` may stand anywhere.",
        "",
        "Exit codes: 0 success, 1 failure at run time, 2 usage or config, 3 data (the other cases are done), "
        "4 checkpoint, 5 plugin, 130 interrupted, 143 terminated.",
        "",
        *_block(_global_help()),
    ]
    for section in SECTIONS:
        lines += ["", f"## {section}"]
        for name in (name for name, (_, where, _) in COMMANDS.items() if where == section):
            command = root.get_command(top, name)
            if command is not None:
                lines += _helps(command, f"medrl {name}", top)
    lines += ["", "## Methods"]
    for name in sorted(manager.names()):
        lines += _method(manager, name, top)
    return "\n".join(lines) + "\n"


def _global_help() -> str:
    """The global options; the list of commands follows as sections."""
    context = _context(root, "medrl", None)
    formatter = context.make_formatter()
    root.format_usage(context, formatter)
    root.format_help_text(context, formatter)
    click.Command.format_options(root, context, formatter)
    return formatter.getvalue()


def _helps(command: click.Command, path: str, parent: click.Context) -> list[str]:
    """Help of a command and of those below it."""
    context = _context(command, path.rpartition(" ")[2], parent)
    lines = ["", f"### {path}", "", *_block(command.get_help(context))]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                lines += _helps(inner, f"{path} {name}", context)
    return lines


def _method(manager: PluginManager, name: str, top: click.Context) -> list[str]:
    """Options that a method adds to the shared commands, and its tools."""
    commands = manager.commands(name)
    lines = ["", f"### {name}", "", f"{manager.info(name).summary.capitalize()}."]
    for kind in ("train", "predict"):
        command = getattr(commands, kind)
        if command is None:
            continue
        context = _context(command, kind, top)
        rows = [row for item in command.params if (row := item.get_help_record(context)) is not None]
        if rows:
            formatter = context.make_formatter()
            formatter.write_dl(rows)
            lines += ["", f"`medrl {kind} {name}` also has", "", *_block(formatter.getvalue())]
    group = root.get_command(top, name)
    if isinstance(group, click.Group):
        context = _context(group, name, top)
        for tool in group.list_commands(context):
            command = group.get_command(context, tool)
            if command is not None:
                lines += [
                    "#" + line if line.startswith("### ") else line
                    for line in _helps(command, f"medrl {name} {tool}", context)
                ]
    return lines


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    settings: dict[str, Any] = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    # click keeps the help option of the first context in which a command was used, with its names.
    vars(command).update(_help_option=None)
    return click.Context(
        command, info_name=name, parent=parent, help_option_names=["-h", "--help"], **settings
    )


def _block(text: str) -> list[str]:
    return ["```text", *(line.rstrip() for line in text.strip("\n").splitlines()), "```"]


# -- config ------------------------------------------------------------------------------------------


def config_page(manager: PluginManager, method: str) -> str:
    """Tables of all settings of a method: a section for each block, then the presets."""
    model = config_model(manager, method)
    texts = presets(manager, method)
    defaults = flatten(parse_yaml(texts.pop("defaults", ""), origin="defaults.yaml"))
    lines = [
        f"# Settings of {method}",
        "",
        f"Made by `make docs` from the config model and `defaults.yaml`. `medrl init {method}` writes a file "
        f"of them, `medrl train {method} --print-config` shows where each value of a run comes from, and "
        "`--set KEY=VALUE` sets one.",
    ]
    for heading, text, rows in _blocks(model, "", defaults):
        lines += ["", f"## {heading}", "", *([text, ""] if text else [])]
        lines += _table(["key", "default", "values", "meaning"], rows)
    changed = {name: flatten(parse_yaml(text, origin=name)) for name, text in sorted(texts.items())}
    if changed:
        keys = sorted({key for values in changed.values() for key in values} - {"method"})
        lines += ["", "## Presets", "", "What each preset sets; an empty field leaves the default.", ""]
        rows = [
            [f"`{key}`", *(_value(values[key]) if key in values else "" for values in changed.values())]
            for key in keys
        ]
        lines += _table(["key", *changed], rows)
    return "\n".join(lines) + "\n"


def _blocks(
    model: type[BaseModel], prefix: str, defaults: Mapping[str, Any]
) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Heading, text and rows of a block, then those of the blocks in it."""
    rows, inner = [], []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        block = _block_of(field.annotation)
        if block is not None and block.model_config.get("extra") != "allow":
            inner.append((key, field, block))
            continue
        rows.append([f"`{key}`", _default(key, field, defaults), _kind(field), _cell(field.description)])
        if block is not None:
            rows[-1][2] = "registry key; further keys are parameters"
    if rows:
        heading = f"`{prefix.removesuffix('.')}`" if prefix else "At the top"
        yield heading, " ".join((inspect.getdoc(model) or "").split()) if prefix else "", rows
    for key, _, block in inner:
        yield from _blocks(block, f"{key}.", defaults)


def _block_of(annotation: Any) -> type[BaseModel] | None:
    """The block that a field holds, None allowed."""
    for item in (annotation, *typing.get_args(annotation)):
        if isinstance(item, type) and issubclass(item, BaseModel):
            return item
    return None


def _default(key: str, field: FieldInfo, defaults: Mapping[str, Any]) -> str:
    if key in defaults:
        return _value(defaults[key])
    inner = {
        name.removeprefix(f"{key}."): value for name, value in defaults.items() if name.startswith(f"{key}.")
    }
    if inner:
        return "<br>".join(f"{name}: {_value(value)}" for name, value in inner.items())
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return _value(list(value) if isinstance(value, tuple) else value)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        text = str(value).lower()
    elif value is None:
        text = "null"
    elif isinstance(value, float):
        text = f"{value:.10g}"
    elif isinstance(value, str):
        text = value or '""'
    else:
        text = str(value)
    return f"`{text}`".replace("|", "\\|")


def _kind(field: FieldInfo) -> str:
    """Type and range of a field, for people."""
    text = _type(field.annotation)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "at least", "max_length": "at most"}
    limits = [
        f"{sign} {getattr(item, name):.10g}" + (" items" if "length" in name else "")
        for item in field.metadata
        for name, sign in signs.items()
        if getattr(item, name, None) is not None
    ]
    return ", ".join([text, *limits])


def _type(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(_value(item) for item in inner)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(item) for item in inner))
    if origin in (tuple, list, set, frozenset):
        members = [item for item in inner if item is not Ellipsis]
        if Ellipsis not in inner and origin is tuple:
            return "[" + ", ".join(_type(item) for item in members) + "]"
        return "list of " + " or ".join(_type(item) for item in members)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return f"{_type(inner[0])} to {_type(inner[1])}"
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Path: "path"}
    if annotation in (None, type(None)):
        return "`null`"
    return names.get(annotation, getattr(annotation, "__name__", "any"))


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def main() -> None:
    """Write every page that differs."""
    for name, text in pages().items():
        path = HERE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            click.echo(f"written: docs/{name}")


if __name__ == "__main__":
    sys.exit(main())
