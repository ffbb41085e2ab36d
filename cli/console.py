"""What people see: lines, tables and waiting notes on stderr; machine output on stdout.

Colours and bars appear on a terminal only; ``--plain``, ``NO_COLOR`` or a pipe give plain lines.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click


def rank() -> int:
    """Return the rank of this process, 0 outside a launcher."""
    for name in ("RANK", "SLURM_PROCID"):
        text = os.environ.get(name, "")
        if text.isdigit():
            return int(text)
    return 0


@dataclass
class Console:
    """How this call of the command line talks.

    Attributes:
        plain: No colours and no bars.
        verbosity: -1 quiet, 0 normal, 1 informative, 2 everything.
        debug: Show tracebacks.
        arguments: The command line after ``medrl``, for the record.
    """

    plain: bool = False
    verbosity: int = 0
    debug: bool = False
    arguments: tuple[str, ...] = ()
    _noted: set[str] = field(default_factory=set)

    @property
    def fancy(self) -> bool:
        """Whether colours and bars may be used."""
        if self.plain or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return False
        return sys.stderr.isatty()

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return shutil.get_terminal_size((100, 24)).columns

    def style(self, text: str, **style: Any) -> str:
        """Return the text in a style, or as it is where colours are off."""
        return click.style(text, **style) if self.fancy else text

    def line(self, text: str = "") -> None:
        """Write one line to stderr, whatever the verbosity; other ranks than the first are silent."""
        if rank() == 0:
            click.echo(text, err=True, color=self.fancy)

    def say(self, text: str = "") -> None:
        """Write one line for people, unless they asked for quiet."""
        if self.verbosity >= 0:
            self.line(text)

    def detail(self, text: str) -> None:
        """Write one line that only ``-v`` shows."""
        if self.verbosity >= 1:
            self.line(text)

    def waiting(self, what: str) -> None:
        """Say once that something slow begins, before the wait."""
        if what not in self._noted:
            self._noted.add(what)
            self.say(self.style(f"{what}…", dim=True))

    def loading(self) -> None:
        """Say that torch is loaded now, unless it is there already."""
        if "torch" not in sys.modules:
            self.waiting("loading torch")

    def heading(self, text: str) -> None:
        """Write a heading."""
        self.say(self.style(text, bold=True))

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()
    ) -> None:
        """Write rows under column names.

        Args:
            columns: Names of the columns.
            rows: Cells; numbers should be formatted already.
            right: Indices of the columns that are aligned to the right.
        """
        cells = [[str(cell) for cell in row] for row in rows]
        if not self.fancy:
            for text in plain_table(columns, cells, right=right):
                self.say(text)
            return
        from rich import box
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for index, name in enumerate(columns):
            table.add_column(name, justify="right" if index in right else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text.from_ansi(cell) for cell in row))
        if self.verbosity >= 0 and rank() == 0:
            RichConsole(file=sys.stderr, highlight=False).print(table)

    def facts(self, values: Mapping[str, object]) -> None:
        """Write names and values, one a line."""
        size = max((len(name) for name in values), default=0)
        for name, value in values.items():
            first, *rest = str(value).splitlines() or [""]
            self.say(f"{self.style(name.ljust(size), dim=True)}  {first}")
            for text in rest:
                self.say(" " * (size + 2) + text)


def plain_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> list[str]:
    """Return a table as aligned lines; nothing is cut off."""
    widths = [max([len(name), *(len(row[index]) for row in rows)]) for index, name in enumerate(columns)]

    def text(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(widths[index]) if index in right else cell.ljust(widths[index])
            for index, cell in enumerate(row)
        ]
        return "  ".join(cells).rstrip()

    return [text(columns), "  ".join("-" * width for width in widths), *(text(row) for row in rows)]


_active = Console()


def console() -> Console:
    """Return the console of this call."""
    return _active


def start_console() -> Console:
    """Begin a new call of the command line with the normal settings."""
    global _active
    _active = Console()
    return _active


def write_json(value: Any) -> None:
    """Write machine output: one JSON document on stdout."""
    import json

    if rank() == 0:
        click.echo(json.dumps(plain_values(value), indent=2, ensure_ascii=False, allow_nan=False))


def plain_values(value: Any) -> Any:
    """Return the value made of JSON's types; numbers that JSON cannot hold become None or text."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [plain_values(item) for item in items]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):
        return plain_values(value.tolist())
    if isinstance(value, float):
        if value != value:
            return None
        return value if abs(value) != float("inf") else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def wrapped(text: str, *, width: int, indent: str) -> list[str]:
    """Return a text in lines of at most `width`, the later ones indented; long words stay whole."""
    import textwrap

    lines: list[str] = []
    for part in text.splitlines() or [""]:
        lines += textwrap.wrap(
            part, width=max(width, 40), break_long_words=False, break_on_hyphens=False
        ) or [""]
    return [lines[0], *(indent + line for line in lines[1:])]


def number(value: object, digits: int = 4) -> str:
    """Return a number as short text; a missing one is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if value != value:
        return "–"
    if abs(value) == float("inf"):
        return "inf" if value > 0 else "-inf"
    if value != 0 and (abs(value) < 10**-digits or abs(value) >= 1e6):
        return f"{value:.{max(digits - 2, 1)}e}"
    return f"{value:.{digits}f}"


def counted(count: int, thing: str) -> str:
    """Return ``1 case`` or ``2 cases``."""
    return f"{count} {thing}" + ("" if count == 1 else "s")


def size(count: int | float) -> str:
    """Return a number of bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
