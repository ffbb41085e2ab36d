"""Progress: bars with rate and remaining time on a terminal, one line an interval otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from medrl.cli.console import Console, console, number, rank

INTERVAL_S = 10.0
"""Seconds between two lines where no bar can be drawn."""

_SHOWN = 4


def duration(seconds: float) -> str:
    """Return a time span for people."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def chosen_metrics(metrics: Mapping[str, Any]) -> str:
    """Return the few numbers that say most as text: losses first, then scores, in their order."""
    numbers = {
        key: value
        for key, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("step", "time_s")
    }

    def weight(key: str) -> int:
        last = key.rpartition("/")[2]
        return 0 if last == "loss" else 1 if "dice" in key or "reward" in key else 2 if "loss" in key else 3

    best = sorted(numbers, key=weight)[:_SHOWN]
    return "  ".join(f"{key} {number(numbers[key])}" for key in best)


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


class _Counter:
    """Counts towards a total and shows it; used through `training_progress` and `case_progress`."""

    def __init__(self, screen: Console, unit: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._screen = screen
        self._unit = unit
        self._clock = clock
        self._bar: Any = None
        self._task: Any = None
        self._first: tuple[float, int] | None = None
        self._done = 0
        self._last_line = float("-inf")
        self._note = ""

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are finished."""
        if self._screen.verbosity < 0 or rank():
            return
        self._note = note or self._note
        if self._first is None or done < self._done:  # the first, or another stage begins to count
            self._first = (self._clock(), done)
        self._done = done
        if self._screen.fancy:
            self._draw(done, total)
        else:
            self._write(done, total)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _write(self, done: int, total: int) -> None:
        now = self._clock()
        if done < total and now - self._last_line < INTERVAL_S:
            return
        self._last_line = now
        start, first = self._first or (now, done)
        text = f"{self._unit} {done}/{total}"
        if self._note:
            text += f"  {self._note}"
        if done > first and now > start:
            rate = (done - first) / (now - start)
            text += f"  {_rate(rate)} {self._unit}s/s"
            if done < total:
                text += f"  {duration((total - done) / rate)} left"
        self._screen.line(text)

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            self._bar = Progress(
                TextColumn(self._unit),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                # The note gives way on a narrow terminal; count, rate and remaining time stay readable.
                TextColumn(
                    "{task.fields[note]}",
                    markup=False,
                    table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
                ),
                expand=True,
                console=RichConsole(file=sys.stderr, highlight=False),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=done, rate="", note=self._note)
        start, first = self._first or (self._clock(), done)
        spent = self._clock() - start
        rate = f"{_rate((done - first) / spent)}/s" if done > first and spent > 0 else ""
        self._bar.update(self._task, completed=done, total=total, rate=rate, note=self._note)


@contextmanager
def training_progress() -> Iterator[Callable[[int, int, Mapping[str, Any]], None]]:
    """Yield a callable ``(step, total, metrics)`` that shows how training goes."""
    counter = _Counter(console(), "step")

    def update(step: int, total: int, metrics: Mapping[str, Any]) -> None:
        counter.update(step, total, chosen_metrics(metrics))

    try:
        yield update
    finally:
        counter.close()


@contextmanager
def case_progress() -> Iterator[Callable[[int, int, str], None]]:
    """Yield a callable ``(done, total, case)`` that shows which case is worked on."""
    counter = _Counter(console(), "case")
    try:
        yield counter.update
    finally:
        counter.close()
