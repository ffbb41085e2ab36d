"""``medrl cache info|clean``."""

from __future__ import annotations

from pathlib import Path

import click

from medrl.cli.console import console, size, write_json
from medrl.cli.groups import FriendlyGroup
from medrl.cli.options import FOLDER, json_option


@click.group("cache", cls=FriendlyGroup, short_help="Show or clean the cache of computed data.")
def cache() -> None:
    """Show or clean the cache of computed data. Cleaning it loses nothing: it is computed again."""


_folder = click.option(
    "--dir", "folder", type=FOLDER, metavar="DIR", help="Another cache folder.  [default: that of this user]"
)


@cache.command(short_help="Show where the cache is and how much it holds.")
@_folder
@json_option()
def info(folder: Path | None, as_json: bool) -> None:
    """Show where the cache is and how much it holds."""
    from medrl.core.cache import Cache, cache_root

    facts = Cache(folder or cache_root()).info()
    if as_json:
        write_json(
            {"root": facts.root, "entries": facts.entries, "bytes": facts.bytes, "temporary": facts.temporary}
        )
        return
    console().facts(
        {
            "folder": facts.root,
            "entries": facts.entries,
            "size": size(facts.bytes),
            "unfinished files": facts.temporary,
        }
    )


@cache.command(short_help="Remove entries from the cache.")
@_folder
@click.option(
    "--unused-days",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="N",
    help="Only those that were not used for N days.  [default: all]",
)
@json_option()
def clean(folder: Path | None, unused_days: float, as_json: bool) -> None:
    """Remove entries from the cache; runs that use one keep it until they end."""
    from medrl.core.cache import Cache, cache_root

    removed = Cache(folder or cache_root()).clean(unused_s=unused_days * 86_400)
    if as_json:
        write_json({"root": removed.root, "entries": removed.entries, "bytes": removed.bytes})
        return
    console().say(f"{removed.root}: removed {removed.entries} entries, {size(removed.bytes)}")
