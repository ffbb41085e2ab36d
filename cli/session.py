"""What the commands of one call share: the plugin manager, made when it is first needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

_KEY = "medrl.manager"


def manager_of(ctx: click.Context) -> PluginManager:
    """Return the plugin manager of this call under the global options."""
    top = ctx.find_root()
    if _KEY not in top.meta:
        from medrl.core.manager import PluginManager

        file = top.params.get("plugins_file")
        use_manager(
            ctx,
            PluginManager.create(
                plugins_file=Path(file) if file else None,
                third_party=not top.params.get("no_third_party", False),
            ),
        )
    return cast("PluginManager", top.meta[_KEY])


def use_manager(ctx: click.Context, manager: PluginManager) -> None:
    """Set the plugin manager of this call."""
    ctx.find_root().meta[_KEY] = manager


def current_manager() -> PluginManager:
    """Return the plugin manager of the command that runs."""
    return manager_of(click.get_current_context())
