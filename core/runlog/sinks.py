"""Places besides ``metrics.jsonl`` that receive the numbers of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medrl.core.errors import ConfigError


class TensorBoardSink:
    """Writes scalars as TensorBoard event files.

    Args:
        folder: Where the event files go.
        purge_step: First step that this run will write; earlier attempts at later steps are hidden by
            TensorBoard.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        self._writer = self.require()(log_dir=str(folder), purge_step=purge_step)

    @staticmethod
    def require() -> Any:
        """Return torch's writer class; raise before a run begins if TensorBoard is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "train.log names tensorboard, which is not installed",
                why=str(error),
                do="pip install 'medrl[log]', or train with --log jsonl",
            ) from error
        return SummaryWriter

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Add the finite numbers of one record; a list of numbers becomes one scalar for each element."""
        for name, value in values.items():
            if isinstance(value, (list, tuple)):
                self.write(step, {f"{name}/{index}": item for index, item in enumerate(value)})
            elif isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(name, value, global_step=step)

    def flush(self) -> None:
        """Write buffered events."""
        self._writer.flush()

    def close(self) -> None:
        """Write buffered events and close the file."""
        self._writer.close()
