"""One TensorBoard writer for each run that is going on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

FOLDER = "board"
_open: dict[Path, Board] = {}


class Board:
    """The event files of a run; a resumed one hides what was written beyond its first step.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last = 0
        self._waiting: list[tuple[str, str, int]] = []
        self._writer: Any = None

    def scalars(self, step: int, metrics: Mapping[str, object]) -> None:
        """Add the finite numbers of a record; each element of a list has a curve of its own."""
        writer = self._ready(step)
        for name, value in _numbers(metrics):
            writer.add_scalar(name, value, global_step=step)
        self.last = step

    def text(self, name: str, text: str, step: int) -> None:
        """Add a text, shown as it is; before the first record it waits, because it does not tell the step."""
        shown = "\n".join(f"    {line}" for line in text.splitlines())
        if self._writer is None:
            self._waiting.append((name, shown, step))
        else:
            self._writer.add_text(name, shown, global_step=step)

    def close(self) -> None:
        """Write what is buffered."""
        self._ready(self.last).close()

    def _ready(self, step: int) -> Any:
        if self._writer is None:
            self._writer = SummaryWriter(log_dir=str(self.folder), purge_step=step)
            for name, text, when in self._waiting:
                self._writer.add_text(name, text, global_step=max(when, step))
        return self._writer


def board_of(run: Any) -> Board:
    """Return the board of a run, new for the first record."""
    return _open.setdefault(run.dir, Board(run.dir / FOLDER))


def close(run: Any, outcome: str) -> None:
    """Note how a run ended, and close its board."""
    board = board_of(run)
    board.text("outcome", outcome, board.last)
    board.close()
    del _open[run.dir]


def _numbers(metrics: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, (list, tuple)):
            yield from _numbers({f"{name}/{index}": item for index, item in enumerate(value)})
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield name, float(value)
