"""``medrl plugins new``."""

from __future__ import annotations

from pathlib import Path

import click

from medrl.cli.console import console
from medrl.cli.session import manager_of
from medrl.core.errors import ConfigError


@click.command("new", short_help="Write the project of a new plugin.")
@click.argument("name")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the project.  [default: medrl-NAME]",
)
@click.pass_context
def new(ctx: click.Context, name: str, output: Path | None) -> None:
    """Write the project of a new plugin: a method that trains, predicts and is tested as it stands.

    NAME becomes the name of the method. The project has a network, a loss, an agent, an environment, a
    reward, commands, a config and tests; change one after the other.
    """
    from medrl.cli.main import COMMANDS
    from medrl.cli.templates import distribution_of, write_project

    manager = manager_of(ctx)
    taken = "a command of medrl" if name in COMMANDS else "installed already" if manager.knows(name) else ""
    if taken:
        raise ConfigError(f"plugin name '{name}'", why=f"it is {taken}", do="choose another name")
    folder = output if output is not None else Path(distribution_of(name))
    files = write_project(name, folder)
    screen = console()
    for path in files:
        screen.detail(str(path))
    screen.say(f"written: {len(files)} files in {folder}")
    policy = manager.policy
    if policy.third_party == "none" or (policy.third_party == "listed" and name not in policy.plugins):
        screen.line(f"note: {policy.path} does not allow it; add a line '[plugins.{name}]' there")
    screen.say(f"next: pip install -e {folder}")
    screen.say(f"      medrl plugins check {name}")
    screen.say(f"      medrl train {name} --fast-dev-run")
