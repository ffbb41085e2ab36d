"""Code of a plugin, run so that whatever it raises becomes one error that names it."""

from __future__ import annotations

import importlib.metadata
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from medrl.core.errors import MedrlError, PluginError

ANYTHING = (Exception, SystemExit, KeyboardInterrupt)
"""What a plugin may raise by itself."""


class CtrlC(KeyboardInterrupt):
    """Ctrl-C of the user, as opposed to a KeyboardInterrupt that a plugin raises."""


def describe(error: BaseException) -> str:
    """Return an exception as one line: its type and the first line of its message."""
    if isinstance(error, MedrlError):
        return str(error).splitlines()[0]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def plugin_code(
    what: str, doing: str, *, do: str = "", distribution: str = "", module: str = ""
) -> Iterator[None]:
    """Run a block of a plugin's code; what it raises becomes a PluginError, but for Ctrl-C of the user.

    Args:
        what: Names the plugin in the message.
        doing: What failed, such as ``importing cine``.
        do: The advice.
        distribution: That brings the plugin: if a package of one of its extras is missing, the advice names
            that extra.
        module: Tells the distribution where it is not known.

    Raises:
        PluginError: The block raised anything, also SystemExit or KeyboardInterrupt.
    """
    try:
        with telling_ctrl_c():
            yield
    except CtrlC:
        raise
    except ANYTHING as error:
        why = "it ended the program (SystemExit)" if isinstance(error, SystemExit) else describe(error)
        advice = do
        if isinstance(error, ModuleNotFoundError):
            advice = _missing_extra(error, distribution or _bringer(module)) or do
        raise PluginError(what, why=f"{doing} failed: {why}", do=advice) from error


@contextmanager
def telling_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C raise `CtrlC` inside the block, so that it can be told from what the block raises itself."""
    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # whoever handles SIGINT here raises no KeyboardInterrupt
        return
    signal.signal(signal.SIGINT, _ctrl_c)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _ctrl_c(_number: int, _frame: FrameType | None) -> None:
    raise CtrlC


def _missing_extra(error: ModuleNotFoundError, distribution: str) -> str:
    """Return how to install the extra that brings a missing module; empty if there is none."""
    if not error.name or not distribution:
        return ""
    wanted = _normal(error.name.partition(".")[0])
    try:
        requirements = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    for requirement in requirements:
        name = re.split(r"[<>=!~;\[ (]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        if extra and _normal(name) == wanted:
            return f"pip install '{distribution}[{extra[1]}]'"
    return ""


def _bringer(module: str) -> str:
    """Return the distribution that a module lies in, as far as it can be told."""
    top = module.partition(".")[0]
    return next(iter(importlib.metadata.packages_distributions().get(top, ())), "")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()
