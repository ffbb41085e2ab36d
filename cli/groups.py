"""Click groups that import a command when it is used, and know methods besides commands."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import click

from medrl.cli.session import manager_of
from medrl.core.errors import ConfigError, PluginError, did_you_mean

EVERYWHERE = ("--plain", "--debug", "--no-third-party", "-q", "--quiet", "-v", "-vv", "--verbose")
"""Global flags that are understood after the command too."""


class FriendlyGroup(click.Group):
    """A group that shows its help when called alone, and names the nearest command on a wrong name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the help where nothing follows."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit(0)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; a wrong name is answered with near matches.

        Raises:
            ConfigError: There is no such command.
        """
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None and not ctx.resilient_parsing:
            if name.startswith("-"):
                raise click.NoSuchOption(name, ctx=ctx)
            raise ConfigError(
                f"no command '{name}' in {ctx.command_path}",
                why=did_you_mean(name, self.known(ctx)),
                do=f"{ctx.command_path} --help",
            )
        return (command.name if command else None), command, args[1:]

    def known(self, ctx: click.Context) -> list[str]:
        """Return the names that may be meant."""
        return self.list_commands(ctx)


class Root(FriendlyGroup):
    """The top group: commands by name, imported at use, and one group of tools for each method.

    Args:
        commands_by_name: Name to ``(module:attribute, section, summary)``, the module inside medrl.cli.
        sections: Headings of the help, in order.
    """

    def __init__(
        self,
        *args: Any,
        commands_by_name: Mapping[str, tuple[str, str, str]],
        sections: Sequence[str],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.commands_by_name = dict(commands_by_name)
        self.sections = tuple(sections)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Accept the global flags after the command as well."""
        return super().parse_args(ctx, hoisted(args))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands and the methods."""
        return [*self.commands_by_name, *manager_of(ctx).names()]

    def known(self, ctx: click.Context) -> list[str]:
        """Return the names that may be meant."""
        return self.list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, or make the group of a method's tools."""
        if cmd_name in self.commands_by_name:
            module, _, attribute = self.commands_by_name[cmd_name][0].partition(":")
            return cast(click.Command, getattr(importlib.import_module(f"medrl.cli.{module}"), attribute))
        if manager_of(ctx).knows(cmd_name):
            from medrl.cli.tools import MethodTools

            return MethodTools(cmd_name)
        return None

    def shell_complete(
        self, ctx: click.Context, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        """Complete commands and methods without importing them."""
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=summary)
            for name, (_, _, summary) in self.commands_by_name.items()
            if name.startswith(incomplete)
        ]
        found += [CompletionItem(name) for name in manager_of(ctx).names() if name.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section, then the methods with those that are broken."""
        for section in self.sections:
            rows = [
                (name, summary)
                for name, (_, where, summary) in self.commands_by_name.items()
                if where == section
            ]
            with formatter.section(section):
                formatter.write_dl(rows)
        rows = method_rows(ctx)
        if rows:
            with formatter.section("Methods (medrl METHOD lists the tools of one)"):
                formatter.write_dl(rows)


def method_rows(ctx: click.Context) -> list[tuple[str, str]]:
    """Return name and summary of each plugin; a broken one is shown with its reason."""
    manager = manager_of(ctx)
    manager.load_all()
    rows = []
    for entry in manager.entries():
        if entry.status == "loaded":
            try:
                rows.append((entry.name, manager.info(entry.name).summary))
            except PluginError as error:
                rows.append((entry.name, f"(broken: {error.why})"))
        elif entry.status in ("broken", "duplicate"):
            rows.append((entry.name, f"({entry.status}: {entry.reason})"))
    return rows


def hoisted(args: Sequence[str]) -> list[str]:
    """Move the global options to the front, wherever they were given; what follows ``--`` stays."""
    end = args.index("--") if "--" in args else len(args)
    before, after = list(args[:end]), list(args[end:])
    flags: list[str] = []
    rest: list[str] = []
    words = iter(before)
    for word in words:
        if word in EVERYWHERE or word.startswith("--plugins-file="):
            flags.append(word)
        elif word == "--plugins-file":
            flags += [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            rest.append(word)
    return [*flags, *rest, *after]
