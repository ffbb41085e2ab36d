"""``medrl plugins check``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from medrl.cli.completing import complete_methods
from medrl.cli.console import console, counted, write_json
from medrl.cli.options import FOLDER, json_option
from medrl.cli.session import manager_of
from medrl.core.errors import EXIT_OK, EXIT_PLUGIN, ConfigError, PluginError


@click.command("check", short_help="Check that a plugin keeps the rules of medrl.")
@click.argument("name", required=False, shell_complete=complete_methods())
@click.option("--quick", is_flag=True, help="Leave out what trains.")
@click.option("--data", type=FOLDER, metavar="DIR", help="Train on this dataset.  [default: a synthetic one]")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any config value.")
@click.option("--keep", type=FOLDER, metavar="DIR", help="Keep what the trial runs write here.")
@json_option()
@click.pass_context
def check(
    ctx: click.Context,
    name: str | None,
    quick: bool,
    data: Path | None,
    assignments: tuple[str, ...],
    keep: Path | None,
    as_json: bool,
) -> int:
    """Check that a plugin keeps the rules of medrl; without NAME all plugins, and quickly.

    It loads and its hooks are well formed, it imports nothing heavy, its parts and commands resolve, its
    config equals its defaults. Then it is trained for a few steps: a loss falls, equal runs give equal
    checkpoints, a stopped run goes on bit for bit, two ranks work, segmentations lie on their images, and
    environments pass the checker of gymnasium. Each failure says what to do, and a rule that does not apply
    says why; the exit code is 5 if there is a failure.
    """
    manager = manager_of(ctx)
    values = _values(data, assignments)
    if name is None and (values or keep is not None):
        raise ConfigError("NAME is missing", why="--data, --set and --keep are for one plugin")
    names = [name] if name is not None else manager.names()
    results = [
        outcome
        for each in names
        for outcome in _check_one(
            manager, each, quick=quick or name is None, values=values, keep=keep, quiet=as_json
        )
    ]
    broken = [item for item in results if item["findings"]]
    if as_json:
        write_json({"ok": not broken, "rules": results})
    else:
        screen = console()
        text = counted(len(broken), "broken rule") if broken else "no rule is broken"
        screen.say(screen.style(text, fg="red" if broken else "green", bold=True))
    return EXIT_PLUGIN if broken else EXIT_OK


def _check_one(
    manager: Any, name: str, *, quick: bool, values: dict[str, Any], keep: Path | None, quiet: bool
) -> list[dict[str, Any]]:
    """Check one plugin and show each rule as it is done."""
    screen = console()
    if not quiet:
        screen.heading(name)
    try:
        plugin = manager.load(name)
    except PluginError as error:
        do = error.do or f"medrl plugins info {name}"
        return [_show(name, "loads", [{"what": str(error), "do": do}], 0.0, quiet)]
    results = [_show(name, "loads", [], 0.0, quiet)]
    from medrl.core.testing import RULES, TRAINING_RULES, Subject, examine_rule

    with Subject(plugin, manager, values=values, folder=keep) as subject, _silent_runs():
        for rule in RULES:
            if quick and rule in TRAINING_RULES:
                continue
            if rule == "parts" and not quiet:
                screen.loading()
            start = perf_counter()
            outcome = examine_rule(rule, subject)
            found = [{"what": item.what, "do": item.do} for item in outcome.findings]
            seconds = perf_counter() - start
            results.append(_show(name, rule, found, seconds, quiet, skipped=outcome.skipped))
    return results


@contextmanager
def _silent_runs() -> Iterator[None]:
    """Hide what trial runs tell, such as that a signal stopped one as it should; ``-v`` shows it."""
    before = logging.root.manager.disable
    if console().verbosity < 1:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _show(
    name: str,
    rule: str,
    findings: list[dict[str, str]],
    seconds: float,
    quiet: bool,
    *,
    skipped: str = "",
) -> dict[str, Any]:
    if skipped and not quiet:
        console().say(f"-       {rule}: not checked, {skipped}")
    elif not quiet:
        screen = console()
        mark = screen.style("broken", fg="red") if findings else screen.style("ok    ", fg="green")
        write = screen.line if findings else screen.say
        write(f"{mark}  {rule}" + (f"  ({seconds:.1f} s)" if seconds >= 1 else ""))
        for item in findings:
            write(f"        {item['what']}")
            write(f"        do: {item['do']}")
    seconds = round(seconds, 2)
    return {"plugin": name, "rule": rule, "findings": findings, "skipped": skipped, "seconds": seconds}


def _values(data: Path | None, assignments: tuple[str, ...]) -> dict[str, Any]:
    """Return nested config values of ``--data`` and ``--set``."""
    if data is None and not assignments:
        return {}
    from medrl.core.config import nest, parse_set

    flat = {"data.root": str(data)} if data is not None else {}
    return nest({**flat, **dict(parse_set(text) for text in assignments)})
