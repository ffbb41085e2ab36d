"""``medrl methods``: what can be trained, without loading torch."""

from __future__ import annotations

from typing import Any

import click

from medrl.cli.completing import complete_methods
from medrl.cli.console import console, write_json
from medrl.cli.options import json_option
from medrl.cli.session import manager_of
from medrl.core.errors import MedrlError


@click.command("methods", short_help="List the methods and what they register.")
@click.argument("name", required=False, shell_complete=complete_methods())
@json_option()
@click.pass_context
def methods(ctx: click.Context, name: str | None, as_json: bool) -> None:
    """List the methods, or show one with its presets, options and registered parts."""
    manager = manager_of(ctx)
    if name is not None:
        facts = describe(manager, name)
        if as_json:
            write_json(facts)
        else:
            _show(facts)
        return
    rows = []
    for method in manager.names():
        try:
            rows.append(describe(manager, method))
        except MedrlError as error:
            rows.append({"name": method, "summary": f"broken: {error.why or error.what}", "commands": []})
    if as_json:
        write_json(rows)
        return
    screen = console()
    screen.table(
        ["method", "summary", "commands"],
        [[row["name"], row["summary"], " ".join(row["commands"]) or "–"] for row in rows],
    )
    screen.say("medrl methods NAME shows one; medrl init NAME writes its config")


def describe(manager: Any, name: str) -> dict[str, Any]:
    """Return what one method is and has, as plain values.

    Raises:
        PluginError: It cannot be loaded; near matches are named.
    """
    from medrl.core.registry import KINDS

    plugin = manager.load(name)
    info = plugin.info
    parts = {
        kind: {e.key: e.summary for e in manager.registry(kind).entries() if e.plugin == name}
        for kind in KINDS
    }
    return {
        "name": name,
        "summary": info.summary,
        "version": info.version,
        "paper": info.paper,
        "license": info.license,
        "commands": plugin.commands.provided(),
        "tools": sorted(plugin.commands.tools),
        "presets": _presets(manager, name) if info.config else [],
        "parts": {kind: found for kind, found in parts.items() if found},
    }


def _presets(manager: Any, name: str) -> list[str]:
    from medrl.core.config import presets

    return sorted(set(presets(manager, name)) - {"defaults"})


def _show(facts: dict[str, Any]) -> None:
    screen = console()
    screen.heading(f"{facts['name']} {facts['version']}: {facts['summary']}")
    screen.facts({key: facts[key] for key in ("paper", "license") if facts[key]})
    name = facts["name"]
    screen.facts(
        {
            "commands": ", ".join(f"medrl {kind} {name}" for kind in facts["commands"]) or "–",
            "tools": ", ".join(f"medrl {name} {tool}" for tool in facts["tools"]) or "–",
            "presets": ", ".join(facts["presets"]) or "–",
        }
    )
    rows = [[kind, key, summary] for kind, found in facts["parts"].items() for key, summary in found.items()]
    if rows:
        screen.say()
        screen.table(["registered as", "key", "summary"], rows)
