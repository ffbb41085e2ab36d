"""What the shell completes besides commands and options: methods, runs, presets, config and registry keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from medrl.cli.session import manager_of
from medrl.core.errors import MedrlError

METHOD_KEY = "medrl.method"
"""Where a method command leaves ``(method, click command)`` in the context, once both are known."""

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _matching(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_methods(kind: str = "") -> Completer:
    """Return a completer of methods; with `kind` only of those that have that command."""

    def complete(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        manager = manager_of(ctx)
        found = []
        for name in manager.names():
            try:
                if not kind or kind in manager.commands(name).provided():
                    found.append(name)
            except MedrlError:
                continue
        return _matching(found, incomplete)

    return complete


def complete_runs(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete run folders below ``runs/``, and paths otherwise."""
    found = [str(path.parent) for path in sorted(Path("runs").glob("*/manifest.json"))]
    return _matching(found, incomplete) or [CompletionItem(incomplete, type="file")]


def complete_presets(
    ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the presets of the method that was named."""
    method = _method(ctx)
    if method is None:
        return []
    from medrl.core.config import presets

    try:
        return _matching(sorted(set(presets(manager_of(ctx), method)) - {"defaults"}), incomplete)
    except MedrlError:
        return []


def complete_set(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete ``--set``: config keys, and after ``….name=`` the registry keys of that kind."""
    method = _method(ctx)
    manager = manager_of(ctx)
    key, sign, value = incomplete.partition("=")
    try:
        if sign:
            from medrl.core.registry import KINDS

            part = key.split(".")[-2] if "." in key else key
            kinds = [kind for kind in KINDS if kind.startswith(part.rstrip("s"))] or list(KINDS)
            keys = [name for kind in kinds for name in manager.registry(kind).keys()]  # noqa: SIM118 - no mapping
            return _matching([f"{key}={name}" for name in sorted(set(keys))], f"{key}={value}")
        if method is None:
            return []
        from medrl.core.config import config_model, known_keys

        return _matching([f"{name}=" for name in known_keys(config_model(manager, method))], incomplete)
    except MedrlError:
        return []


def complete_registry_keys(
    ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the keys of every registry."""
    from medrl.core.registry import KINDS

    manager = manager_of(ctx)
    keys = {key for kind in KINDS for key in manager.registry(kind).keys()}  # noqa: SIM118 - no mapping
    return _matching(sorted(keys), incomplete)


def _method(ctx: click.Context) -> str | None:
    found = ctx.meta.get(METHOD_KEY)
    method = found[0] if found else ctx.params.get("method")
    return method if isinstance(method, str) and manager_of(ctx).knows(method) else None
