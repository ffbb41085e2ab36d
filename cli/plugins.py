"""``medrl plugins list|info|check|new``."""

from __future__ import annotations

from typing import Any

import click

from medrl.cli.completing import complete_methods
from medrl.cli.console import console, counted, write_json
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
    """List all plugins with version, API, what they add and how long they took to load.

    Broken and disabled ones are listed too, with the reason.
    """
    manager = manager_of(ctx)
    manager.load_all()
    entries = manager.entries()
    if as_json:
        write_json([facts(entry) | added(manager, entry) for entry in entries])
        return
    screen = console()
    rows = []
    for e in entries:
        shown = added(manager, e)
        rows.append(
            [
                e.name,
                screen.style(e.status, fg=COLOURS.get(e.status)),
                e.owner,
                str(shown["api"] or ""),
                _adds(shown),
                f"{1000 * e.load_s:.0f} ms" if e.load_s else "",
            ]
        )
    screen.table(["plugin", "status", "package", "API", "adds", "loaded in"], rows, right=(5,))
    for e in entries:
        if e.reason:
            screen.line(
                f"{screen.style(e.status, fg=COLOURS.get(e.status))}: {e.name} of {e.owner}: {e.reason}"
            )
            advice = _advice(manager, e.name) if e.status == "broken" else ""
            if advice:
                screen.line(f"         do: {advice}")
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
        **{key: value for key, value in added(manager, found[0]).items() if key in ("api", "observes")},
        **{key: value for key, value in shown.items() if key not in ("name", "version")},
    }
    if as_json:
        write_json(values)
        return EXIT_PLUGIN if failure else EXIT_OK
    parts = values.pop("parts", {})
    loaded_in = values.pop("load_s")
    values["loaded in"] = f"{1000 * loaded_in:.0f} ms" if loaded_in else ""
    console().facts({key: _text(value) for key, value in values.items() if value not in ("", [], None)})
    rows = [[kind, key, summary] for kind, items in parts.items() for key, summary in items.items()]
    if rows:
        console().say()
        console().table(["registered as", "key", "summary"], rows)
    if failure is not None:
        raise failure
    return EXIT_OK


@plugins.command("doctor", short_help="Examine every plugin; one fix for each problem.")
@json_option()
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> int:
    """Examine every plugin: does it load, can its commands be imported, what mends it.

    The exit code is 5 if one is broken. medrl plugins check NAME goes deeper into one.
    """
    from dataclasses import asdict

    from medrl.cli.doctor import BAD, show
    from medrl.cli.doctor import plugins as examine

    found = list(examine(ctx))
    if as_json:
        write_json([asdict(finding) for finding in found])
    else:
        for finding in found:
            show(finding)
    return EXIT_PLUGIN if any(finding.state == BAD for finding in found) else EXIT_OK


def added(manager: Any, entry: Any) -> dict[str, Any]:
    """Return what a plugin adds to medrl, as plain values; nothing for one that is not loaded."""
    from medrl.core.hookspecs import OBSERVERS
    from medrl.core.registry import KINDS

    if entry.status != "loaded":
        return {"api": None, "parts": {}, "commands": [], "tools": 0, "observes": []}
    plugin = manager.load(entry.name)
    parts = {
        kind: sum(item.plugin == entry.name for item in manager.registry(kind).entries()) for kind in KINDS
    }
    hooks = [name for name in OBSERVERS if getattr(plugin.hooks.hook, name).get_hookimpls()]
    return {
        "api": plugin.info.api,
        "parts": {kind: count for kind, count in parts.items() if count},
        "commands": plugin.commands.provided(),
        "tools": plugin.commands.count_tools(),
        "observes": [name.removeprefix("medrl_") for name in hooks],
    }


def _adds(shown: dict[str, Any]) -> str:
    words = list(shown["commands"])
    words += [f"{count} {kind if count != 1 else _singular(kind)}" for kind, count in shown["parts"].items()]
    words += [counted(shown["tools"], "tool")] * bool(shown["tools"])
    words += ["observes runs"] * bool(shown["observes"])
    return ", ".join(words)


def _singular(kind: str) -> str:
    return {"losses": "loss"}.get(kind, kind.removesuffix("s"))


def _advice(manager: Any, name: str) -> str:
    """Return what mends a broken plugin."""
    try:
        manager.load(name)
    except MedrlError as error:
        return error.do
    return ""


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
