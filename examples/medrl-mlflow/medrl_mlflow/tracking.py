"""The run of MLflow that belongs to a run of medrl."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from medrl.core.config import flatten, parse_yaml

RECORD = "mlflow.json"
STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
LONGEST = 500
"""Characters of a parameter; servers refuse longer ones."""
_tracked: dict[Path, Tracked] = {}


class Tracked:
    """A run of MLflow.

    Args:
        run: The run of medrl.
    """

    def __init__(self, run: Any) -> None:
        self.client = MlflowClient(tracking_uri=tracking_uri(run.dir))
        record = run.dir / RECORD
        if record.is_file():
            self.id = str(json.loads(record.read_text(encoding="utf-8"))["run_id"])
            self.client.update_run(self.id, status="RUNNING")
            return
        config = flatten(parse_yaml(run.config_yaml, origin="config.yaml"))
        name = str(config.get("method", "medrl"))
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known is not None else self.client.create_experiment(name)
        self.id = self.client.create_run(experiment, run_name=run.dir.name).info.run_id
        values = [Param(_name(key), str(value)[:LONGEST]) for key, value in config.items()]
        for start in range(0, len(values), 100):
            self.client.log_batch(self.id, params=values[start : start + 100])
        self.client.log_text(self.id, run.config_yaml, "config.yaml")
        record.write_text(json.dumps({"run_id": self.id}) + "\n", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Log the finite numbers of a record; each element of a list has a name of its own."""
        now = int(time.time() * 1000)
        found = [Metric(_name(name), value, now, step) for name, value in _numbers(metrics)]
        if found:
            self.client.log_batch(self.id, metrics=found)

    def tag(self, name: str, text: str) -> None:
        """Set a tag."""
        self.client.set_tag(self.id, f"medrl.{name}", text)


def begin(run: Any) -> None:
    """Begin to track a run, or go on."""
    _tracked[run.dir] = Tracked(run)


def tracked(run: Any) -> Tracked:
    """The run of MLflow of a run that goes on."""
    return _tracked[run.dir]


def end(run: Any, outcome: str) -> None:
    """Tell MLflow how a run ended."""
    found = _tracked.pop(run.dir)
    found.client.set_terminated(found.id, STATUS.get(outcome, "FAILED"))


def tracking_uri(folder: Path) -> str:
    """The server that the environment names, else a folder of files beside the run."""
    named = os.environ.get("MLFLOW_TRACKING_URI", "")
    if named:
        return named
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return (folder.resolve().parent / "mlruns").as_uri()


def _name(text: str) -> str:
    """A name that MLflow takes: letters, digits, and ``_-. /``."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in text)


def _numbers(metrics: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, (list, tuple)):
            yield from _numbers({f"{name}/{index}": item for index, item in enumerate(value)})
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield name, float(value)
