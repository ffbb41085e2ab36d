"""The entry point ``medrl``: global options, lazily imported commands, and the tools of each method."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from medrl.cli.console import console, rank, start_console
from medrl.cli.failure import catch_termination, guarded
from medrl.cli.groups import Root
from medrl.cli.launch import inside_launcher

SECTIONS = ("Start", "Methods at work", "Data", "Runs and models", "Installation")

COMMANDS = {
    "demo": ("demo:demo", "Start", "Show a method at work on synthetic data, offline."),
    "doctor": ("doctor:doctor", "Start", "Check this installation; one fix for each problem."),
    "methods": ("methods:methods", "Start", "List the methods and what they register."),
    "init": ("init:init", "Start", "Write a commented config of a method."),
    "train": ("train:train", "Methods at work", "Train a method."),
    "sweep": ("sweep:sweep", "Methods at work", "Train every combination of a grid."),
    "resume": ("resume:resume", "Methods at work", "Continue a run from its last checkpoint."),
    "predict": ("predict:predict", "Methods at work", "Segment images with a trained model."),
    "evaluate": ("evaluate:evaluate", "Methods at work", "Compare segmentations with their references."),
    "data": ("data:data", "Data", "Check, split, convert and look at datasets."),
    "env": ("env:env", "Data", "List, check and play environments."),
    "runs": ("runs:runs", "Runs and models", "List, show and compare runs."),
    "model": ("model:model", "Runs and models", "Look into checkpoints, export and verify them."),
    "cache": ("cache:cache", "Installation", "Show or clean the cache of computed data."),
    "plugins": ("plugins:plugins", "Installation", "List the plugins and their state."),
    "completion": ("completion:completion", "Installation", "Print the completion script of a shell."),
}
"""Name to target, section of the help, and summary; a test compares the summaries with the commands."""


def _show_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"medrl {version('medrl')}")
        ctx.exit(0)


@click.command(
    cls=Root,
    commands_by_name=COMMANDS,
    sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: medrl demo · Your own data: medrl data check DIR, then medrl init METHOD",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version.",
)
@click.option("-q", "--quiet", is_flag=True, help="Show warnings and errors only.")
@click.option("-v", "--verbose", count=True, help="Show more; -vv shows everything.")
@click.option("--plain", is_flag=True, help="No colours, no bars: one line at a time.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--plugins-file",
    type=click.Path(path_type=Path, dir_okay=False),
    is_eager=True,  # --help lists the plugins too
    metavar="FILE",
    help="A plugins.toml to use instead.",
)
@click.option(
    "--no-third-party", is_flag=True, is_eager=True, help="Use only the plugins that medrl brings itself."
)
def root(
    quiet: bool,
    verbose: int,
    plain: bool,
    debug: bool,
    plugins_file: Path | None,
    no_third_party: bool,
) -> None:
    """Reinforcement-learning methods for medical image segmentation, as one tool."""
    screen = console()
    screen.plain, screen.debug = plain, debug
    screen.verbosity = -1 if quiet else verbose
    set_up_logging(screen.verbosity)


class _LogLines(logging.Handler):
    """Shows log records of medrl as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if self._comes_again(record) or (rank() and record.levelno < logging.ERROR):
            return
        screen = console()
        name = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        here = f"[rank {rank()}] " if rank() else ""
        text = record.getMessage().replace("\n", "\n         ")
        click.echo(screen.style(name, fg="yellow") + here + text, err=True, color=screen.fancy)

    def _comes_again(self, record: logging.LogRecord) -> bool:
        """Whether the record is the log's copy of an exception, which ends the command as its error line."""
        if record.name != "medrl.runtime" or record.levelno < logging.ERROR:
            return False
        return not inside_launcher() or str(record.msg).startswith("rank %d failed")


def set_up_logging(verbosity: int) -> None:
    """Show warnings of medrl, with ``-v`` also what it does, and hide other libraries' chatter without it."""
    import warnings

    logger = logging.getLogger("medrl")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _LogLines)]
    logger.addHandler(_LogLines())
    level = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    logger.setLevel(level)
    logger.propagate = False
    if verbosity < 1 and not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: What follows ``medrl``; None takes the arguments of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    screen = start_console()
    screen.arguments = tuple(given)
    screen.debug = "--debug" in given
    screen.plain = "--plain" in given
    return guarded(lambda: root.main(args=given, prog_name="medrl", standalone_mode=False), screen)


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    catch_termination()
    sys.exit(run())
