"""``medrl plugins list|info|check|new``."""

from __future__ import annotations

from typing import Any

import click

from medrl.cli.completing import complete_methods
from medrl.cli.console import console, write_json
from medrl.cli.groups import FriendlyGroup
from medrl.cli.options import json_option
from medrl.cli.plugins_check import check
from medrl.cli.plugins_new import new
from medrl.cli.session import manager_of
from medrl.core.errors import EXIT_OK, EXIT_PLUGIN, MedrlError, PluginError, did_you_mean

COLOURS = {"loaded": "green", "broken": "red", "duplicate": "red", "disabled": "yellow"}


@click.group("plugins", cls=FriendlyGroup, short_help="List the plugins and their state.")
def plugins() -> None:
    """List the plugins and their state.

    A plugin is a Python package with an entry point of the group 'medrl.plugins'. It runs with your rights:
    install only what you trust. The file plugins.toml switches plugins off.
    """


plugins.add_command(check)
plugins.add_command(new)


@plugins.command("list", short_help="List all plugins, also broken and disabled ones.")
@json_option()
@click.pass_context
def list_plugins(ctx: click.Context, as_json: bool) -> None:
    """List all plugins, also broken and disabled ones, with the reason."""
    manager = manager_of(ctx)
    manager.load_all()
    entries = manager.entries()
    if as_json:
        write_json([facts(entry) for entry in entries])
        return
    screen = console()
    rows = [
        [e.name, screen.style(e.status, fg=COLOURS.get(e.status)), e.owner, e.origin, e.reason]
        for e in entries
    ]
    screen.table(["plugin", "status", "package", "origin", "reason"], rows)
    if manager.policy.path is not None:
        screen.say(f"policy: {manager.policy.path}")


@plugins.command("info", short_help="Show one plugin: package, file, hooks, parts.")
@click.argument("name", shell_complete=complete_methods())
@json_option()
@click.pass_context
def info(ctx: click.Context, name: str, as_json: bool) -> int:
    """Show one plugin: its package, file, state, and what it registers."""
    manager = manager_of(ctx)
    failure: MedrlError | None = None
    shown: dict[str, Any] = {}
    try:
        from medrl.cli.methods import describe

        shown = describe(manager, name)
    except PluginError as error:
        failure = error
    found = [entry for entry in manager.entries() if entry.name == name]
    if not found:
        raise PluginError(
            f"plugin '{name}'",
            why=f"there is no plugin of this name, {did_you_mean(name, manager.names())}",
            do="medrl plugins list",
        )
    values = {
        **facts(found[0]),
        **{key: value for key, value in shown.items() if key not in ("name", "version")},
    }
    if as_json:
        write_json(values)
        return EXIT_PLUGIN if failure else EXIT_OK
    parts = values.pop("parts", {})
    console().facts({key: _text(value) for key, value in values.items() if value not in ("", [], None)})
    rows = [[kind, key, summary] for kind, items in parts.items() for key, summary in items.items()]
    if rows:
        console().say()
        console().table(["registered as", "key", "summary"], rows)
    if failure is not None:
        raise failure
    return EXIT_OK


def facts(entry: Any) -> dict[str, Any]:
    """Return one plugin entry as plain values."""
    return {
        "name": entry.name,
        "status": entry.status,
        "reason": entry.reason,
        "distribution": entry.distribution,
        "version": entry.version,
        "origin": entry.origin,
        "module": entry.module,
        "file": entry.file,
        "load_s": round(entry.load_s, 4),
    }


def _text(value: Any) -> str:
    return ", ".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value)
