"""The outcome of an evaluation, and its files ``evaluation.json`` and ``metrics.csv``.

Numbers that are not finite are written so that any reader understands them: NaN (neither side holds the
label) as null in JSON and as an empty cell in CSV, infinity as the text ``inf``.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from medrl.core.errors import DataError
from medrl.core.metrics import LabelValues, Row, Summary
from medrl.core.volume.write import write_bytes

from .comparing import Comparison, summary_dict

SCHEMA = 1
JSON_NAME = "evaluation.json"
CSV_NAME = "metrics.csv"


@dataclass(kw_only=True)
class Evaluation:
    """Segmentations against references.

    Attributes:
        labels: What was evaluated.
        metrics: Names of the metrics.
        rows: One row for each case and label: ``case, patient, label``, the metrics, ``ref_ml, pred_ml``.
        by: ``case`` or ``patient``: what counts as one observation in `summary` and `comparison`.
        summary: Summary by label and metric; ``overall`` counts each case with the mean of its labels.
        pooled_dice: Dice over the summed volumes of all cases, by label.
        comparison: Against the other folder, if one was given.
        problems: Cases that could not be evaluated, with the reason; the command line exits with 3.
        extra: Predictions without reference; they are left out.
        settings: Folders and options.
    """

    labels: dict[str, LabelValues]
    metrics: tuple[str, ...]
    rows: list[Row]
    by: str = "case"
    summary: dict[str, dict[str, Summary]] = field(default_factory=dict)
    pooled_dice: dict[str, float] = field(default_factory=dict)
    comparison: list[Comparison] | None = None
    problems: dict[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def cases(self) -> tuple[str, ...]:
        """Cases that were evaluated."""
        return tuple(dict.fromkeys(str(row["case"]) for row in self.rows))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        content = {
            "schema": SCHEMA,
            "settings": self.settings,
            "labels": {
                name: value if isinstance(value, int) else list(value) for name, value in self.labels.items()
            },
            "metrics": list(self.metrics),
            "by": self.by,
            "cases": len(self.cases),
            "summary": summary_dict(self.summary),
            "pooled_dice": self.pooled_dice,
            "comparison": None if self.comparison is None else [row.as_dict() for row in self.comparison],
            "problems": self.problems,
            "extra": list(self.extra),
            "rows": self.rows,
        }
        return dict(_encode(content))

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``evaluation.json`` and ``metrics.csv``; return their paths.

        Raises:
            RuntimeFault: The disk is full or the folder cannot be written.
        """
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_bytes(folder / JSON_NAME, (text + "\n").encode())
        write_bytes(folder / CSV_NAME, self.csv().encode())
        return folder / JSON_NAME, folder / CSV_NAME

    def csv(self) -> str:
        """Return the rows as CSV."""
        columns = ["case", "patient", "label", *self.metrics, "ref_ml", "pred_ml"]
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for row in self.rows:
            writer.writerow([_cell(row.get(column, "")) for column in columns])
        return text.getvalue()


def read_evaluation(path: Path) -> Evaluation:
    """Read an ``evaluation.json`` back.

    Raises:
        DataError: It is missing, damaged or of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {content.get('schema')}, expected {SCHEMA}")
        metrics = tuple(str(name) for name in content["metrics"])
        numbers = {*metrics, "ref_ml", "pred_ml"}
        names = {item.name for item in fields(Comparison)}
        comparison = content["comparison"]
        return Evaluation(
            labels={
                name: value if isinstance(value, int) else tuple(value)
                for name, value in content["labels"].items()
            },
            metrics=metrics,
            rows=[
                {key: _number(value) if key in numbers else value for key, value in row.items()}
                for row in content["rows"]
            ],
            by=str(content["by"]),
            summary={
                label: {name: _summary(value) for name, value in by_metric.items()}
                for label, by_metric in content["summary"].items()
            },
            pooled_dice={label: _number(value) for label, value in content["pooled_dice"].items()},
            comparison=None if comparison is None else [_comparison(row, names) for row in comparison],
            problems=dict(content["problems"]),
            extra=tuple(content["extra"]),
            settings=dict(content["settings"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            str(path), why=f"is no evaluation that can be read: {error}", do="run medrl evaluate again"
        ) from error


_COUNTS = {"n", "excluded", "infinite", "wins_a", "ties", "wins_b"}


def _count(key: str, value: Any) -> Any:
    return int(value) if key in _COUNTS else _number(value)


def _comparison(row: Mapping[str, Any], names: set[str]) -> Comparison:
    values: dict[str, Any] = {key: value for key, value in row.items() if key in names}
    for key in values.keys() - {"label", "metric", "better"}:
        values[key] = _count(key, values[key])
    return Comparison(**values)


def _summary(values: Mapping[str, Any]) -> Summary:
    return Summary(**{key: _count(key, value) for key, value in values.items()})


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)
