"""Failures as people see them: one ``error:`` line, one ``do:`` line, and the exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType

import click

from medrl.cli.console import Console, rank, wrapped
from medrl.core.errors import (
    EXIT_CONFIG,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RUNTIME,
    EXIT_TERMINATED,
    ConfigError,
    Interrupted,
    MedrlError,
    did_you_mean,
    near_matches,
)


class Terminated(BaseException):
    """SIGTERM arrived outside a training run; as an exception it lets temporary files be removed."""


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def catch_termination() -> None:
    """Turn SIGTERM into `Terminated`; a training run replaces this by its own handler."""
    signal.signal(signal.SIGTERM, _terminate)


def guarded(call: Callable[[], object], console: Console) -> int:
    """Run a call and return the exit code; every failure is shown, none leaves as a traceback."""
    try:
        return _guarded(call, console)
    except Terminated:
        # It came while another failure was being shown: that one has the word.
        return EXIT_TERMINATED
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _guarded(call: Callable[[], object], console: Console) -> int:
    try:
        result = call()
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _show(console, "interrupted", "")
        return EXIT_INTERRUPTED
    except Terminated:
        _show(console, "terminated by a signal", "")
        return EXIT_TERMINATED
    except click.ClickException as error:
        _show(console, *_usage(error))
        return EXIT_CONFIG
    except MedrlError as error:
        _trace(console, error)
        show_error(error, console)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone (`medrl … | head`); silence the flush at exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        _trace(console, error)
        _show(console, *_system(error))
        return EXIT_RUNTIME
    except Exception as error:  # noqa: BLE001 - the outermost seam: no traceback reaches a person unasked
        _trace(console, error)
        _show(console, *_unexpected(error))
        return EXIT_RUNTIME
    return result if isinstance(result, int) and not isinstance(result, bool) else EXIT_OK


def show_error(error: MedrlError, console: Console) -> None:
    """Show a handled error; ranks after the first repeat nothing that the first one says too."""
    if rank() and isinstance(error, (ConfigError, Interrupted)):
        return
    text = f"{error.what}: {error.why}" if error.why else error.what
    _show(console, text, error.do, problems=getattr(error, "problems", ()))


def _show(console: Console, text: str, do: str, *, problems: tuple[str, ...] = ()) -> None:
    here = f"[rank {rank()}] " if rank() else ""
    width = console.width - 7 if console.fancy else 10_000
    lines = [console.style("error: ", fg="red", bold=True) + _joined(here + text, width)]
    for problem in problems:
        lines.append("       - " + _joined(problem, width - 2, "         "))
    if do:
        lines.append(console.style("do:    ", fg="green", bold=True) + _joined(do, width))
    click.echo("\n".join(lines), err=True, color=console.fancy)


def _joined(text: str, width: int, indent: str = "       ") -> str:
    return "\n".join(wrapped(text, width=width, indent=indent))


def _trace(console: Console, error: BaseException) -> None:
    if console.debug:
        import traceback

        click.echo("".join(traceback.format_exception(error)), err=True)


def _usage(error: click.ClickException) -> tuple[str, str]:
    """Return what is wrong with the command line, and the help that says how it is right."""
    ctx = getattr(error, "ctx", None)
    help_command = f"{ctx.command_path} --help" if ctx is not None else "medrl --help"
    if isinstance(error, click.NoSuchOption):
        return f"no option '{error.option_name}'" + _near_option(error, ctx), help_command
    if isinstance(error, click.MissingParameter):
        hint = error.param.get_error_hint(ctx).strip("'\"") if error.param and ctx else "an argument"
        return f"{hint.replace(chr(39), '')} is missing", help_command
    if isinstance(error, click.BadParameter) and error.param is not None and ctx is not None:
        hint = error.param.get_error_hint(ctx).replace("'", "").split(" / ")[-1]
        return f"{hint}: {_lower(error.message)}", help_command
    return _lower(error.format_message()), help_command


def _near_option(error: click.NoSuchOption, ctx: click.Context | None) -> str:
    if ctx is None:
        return ""
    known = [
        name
        for parameter in ctx.command.get_params(ctx)
        if isinstance(parameter, click.Option) and not parameter.hidden
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--")
    ]
    return f", {did_you_mean(error.option_name, known)}" if near_matches(error.option_name, known) else ""


def _lower(text: str) -> str:
    text = text.strip().rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _system(error: OSError) -> tuple[str, str]:
    """Return an error of the operating system with its path and the usual remedy."""
    path = error.filename or error.filename2 or ""
    reason = error.strerror or str(error) or type(error).__name__
    advice = {
        errno.ENOSPC: "free space on this disk, or choose another folder with -o",
        errno.EDQUOT: "free space in your quota, or choose another folder with -o",
        errno.EACCES: "check who owns it, or choose another folder",
        errno.EROFS: "choose a folder that can be written, with -o",
        errno.EMFILE: "ulimit -n 65536",
        errno.ENOMEM: "use a smaller batch or patch, or fewer workers",
    }.get(error.errno or 0, "run again with --debug to see where")
    return (f"{path}: {reason.lower()}" if path else reason.lower()), advice


def _outside(error: BaseException) -> str:
    """Return where the command of a plugin raised; empty for commands that medrl brings itself."""
    import traceback

    ours, framework = Path(__file__).resolve().parent.parent, Path(click.__file__).parent
    frames = [(Path(item.filename), item) for item in traceback.extract_tb(error.__traceback__)]
    for (caller, _), (called, _) in pairwise(frames):
        outside = not called.resolve().is_relative_to(ours) and not called.is_relative_to(framework)
        if caller.is_relative_to(framework) and outside:
            last = [item for path, item in frames if path.parent == called.parent][-1]
            return f" (in {last.filename}, line {last.lineno})"
    return ""


def _unexpected(error: BaseException) -> tuple[str, str]:
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return "out of memory", "use a smaller train.batch_size or patch, or another device"
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"unexpected {name}" + (f": {first}" if first else "") + _outside(error)
    return text, "run again with --debug to see where, and report it with that output"
