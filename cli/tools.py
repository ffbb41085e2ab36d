"""``medrl METHOD TOOL``: the tools that a method brings, as a group of its own."""

from __future__ import annotations

import click

from medrl.cli.groups import FriendlyGroup
from medrl.cli.session import manager_of


class MethodTools(FriendlyGroup):
    """The tools of one method; its plugin is loaded when the help or a tool is asked for."""

    def __init__(self, method: str) -> None:
        super().__init__(name=method)
        self.method = method

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the method is and which commands it takes part in."""
        manager = manager_of(ctx)
        info = manager.info(self.method)
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(f"{self.method}: {info.summary}.".replace("..", "."))
        provided = [name for name in manager.commands(self.method).provided() if name != "evaluate"]
        if provided:
            with formatter.section("Used through"):
                formatter.write_dl([(f"medrl {name} {self.method}", "") for name in provided])

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the tools."""
        commands = manager_of(ctx).commands(self.method)
        own = ["evaluate"] if "evaluate" in commands.provided() else []
        return [*sorted(commands.tools), *own]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one tool; it finds the plugin manager as ``ctx.obj``."""
        manager = manager_of(ctx)
        ctx.obj = manager
        commands = manager.commands(self.method)
        if cmd_name == "evaluate" and commands.evaluate is not None:
            return commands.evaluate
        return commands.tools.get(cmd_name)
