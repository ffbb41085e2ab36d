"""What a run writes beside its metrics at every validation: one row of a table, and pictures of some cases.

``training_log.csv`` has the columns of the original, then those of the agent. It is made of the records of
``metrics.jsonl``, so that a resumed run continues it.

Source: specification §6; train_student_rl_new_policy.py of the original.
"""

from __future__ import annotations

import csv
import io
import json
import math
from typing import TYPE_CHECKING, Any

from torch import nn

from medrl.core.volume.write import write_bytes

from .config import GraftConfig
from .data import GraftData
from .panels import Panels

if TYPE_CHECKING:
    from medrl.core.runlog import RunFolder
    from medrl.core.runtime import Runtime

TABLE = "training_log.csv"
_MEANS = {
    "train_loss": "loss",
    "train_loss_cls": "loss_supervised",
    "train_loss_kd": "loss_logits",
    "train_loss_feat": "loss_features",
    "train_metric": "train_dice",
}
"""Columns of the original that are means over the steps since the last row, and the numbers they are of."""
_LAST = {"val_loss": "val_loss", "val_dice": "val_dice", "val_iou": "val_iou"}
COLUMNS = ("epoch", *_MEANS, *_LAST, "learning_rate")
"""Columns of the original, in its order."""
_AGENT = ("weights_", "entropy_", "reward", "terminal_reward", "correlation_")


class Journal:
    """Writes the table and the pictures of a run, on the main rank.

    Args:
        rt: The run folder.
        cfg: What is drawn, and how often.
        data: The cases.
        per_epoch: Steps of an epoch.
    """

    def __init__(self, rt: Runtime, cfg: GraftConfig, data: GraftData, per_epoch: int) -> None:
        self.rt, self.cfg, self.per_epoch = rt, cfg, per_epoch
        self.table = EpochTable(rt.run, per_epoch)
        self.panels = Panels(rt, cfg, data)
        self.written = 0

    def write(self, step: int, student: nn.Module) -> None:
        """Add what the validation after `step` gave; call it after the validation was logged."""
        if not self.rt.is_main:
            return
        self.table.write()
        self.written += 1
        due = self.written % self.cfg.validation.panels_every == 0 or step == self.rt.total_steps
        if self.cfg.validation.panels and due:
            self.panels.draw(student, epoch=epoch_of(step, self.per_epoch))


def epoch_of(step: int, per_epoch: int) -> int:
    """Number, from 0, of the epoch that a step belongs to."""
    return (step - 1) // per_epoch


class EpochTable:
    """The table as a function of the run's records.

    Args:
        run: The run folder.
        per_epoch: Steps of an epoch.
    """

    def __init__(self, run: RunFolder, per_epoch: int) -> None:
        self.run, self.per_epoch = run, per_epoch
        self.rows: list[dict[str, Any]] = []
        self._position = 0
        self._sums: dict[str, tuple[float, int]] = {}
        self._rate: Any = None

    def write(self) -> None:
        """Read the new records and write the file anew.

        Raises:
            RuntimeFault: The disk is full.
        """
        for record in self._new_records():
            self._take(record)
        columns = list(dict.fromkeys((*COLUMNS, *(key for row in self.rows for key in row))))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_bytes(self.run.dir / TABLE, text.getvalue().encode())

    def _new_records(self) -> list[dict[str, Any]]:
        """Records since the last call; a line that is not whole yet is left for the next one."""
        with self.run.metrics_path.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        whole = content.rfind(b"\n") + 1
        self._position += whole
        records = []
        for line in content[:whole].splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut short by a kill, before a resume went on
                continue
            records.append(record)
        return records

    def _take(self, record: dict[str, Any]) -> None:
        if "event" in record:
            return
        if "val_dice" not in record:
            for key, value in record.items():
                if key in _MEANS.values() or key.startswith(_AGENT):
                    self._add(key, value)
            self._rate = record.get("lr", self._rate)
            return
        row: dict[str, Any] = {"epoch": epoch_of(int(record["step"]), self.per_epoch)}
        row |= {column: self._mean(key) for column, key in _MEANS.items()}
        row |= {column: record.get(key) for column, key in _LAST.items()}
        row["learning_rate"] = self._rate
        given = [key for key in self._sums if key.startswith(_AGENT)]
        row |= {key: self._mean(key) for key in given}
        if "terminal_reward" in record:
            row["terminal_reward"] = record["terminal_reward"]
        self.rows.append({key: "" if value is None else value for key, value in row.items()})
        self._sums = {}

    def _add(self, key: str, value: Any) -> None:
        if isinstance(value, (int, float)) and math.isfinite(value):
            total, count = self._sums.get(key, (0.0, 0))
            self._sums[key] = total + value, count + 1

    def _mean(self, key: str) -> float | None:
        """Mean since the last row; 0 for a part of the loss that the run does not have (as upstream)."""
        if key not in self._sums:
            return 0.0 if key in ("loss_logits", "loss_features") else None
        total, count = self._sums[key]
        return total / count
