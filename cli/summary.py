"""The table of many runs, made from their folders alone: mean, spread and interval of each setting."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medrl.cli.console import console, number
from medrl.cli.runfiles import RunFacts, read_runs, run_config, run_folders
from medrl.core.errors import ConfigError, MedrlError, did_you_mean

VARIES = ("data.fold", "train.seed")
"""Keys over which the mean is taken."""

_LEVEL = 0.95


@dataclass(frozen=True)
class Row:
    """All runs of one setting.

    Attributes:
        setting: What sets it apart, by config key.
        runs: Runs of it.
        finished: Those of them that are finished.
        values: The value of each finished run that has one.
        spread: Standard deviation over runs; None for fewer than two.
        low, high: Ends of the 95 % interval of the mean (Student's t); None for fewer than two.
    """

    setting: dict[str, Any]
    runs: int
    finished: int
    values: list[float]
    mean: float | None
    spread: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Summary:
    """The rows of many runs, the best mean first where it is known which end is better.

    Attributes:
        metric: Name of the value.
        keys: Config keys that differ between settings.
    """

    metric: str
    keys: list[str]
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"metric": self.metric, "level": _LEVEL, "rows": [asdict(row) for row in self.rows]}

    def as_csv(self) -> str:
        """Return the table as CSV."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*self.keys, "runs", "finished", "mean", "standard_deviation", "low", "high"])
        for row in self.rows:
            numbers = [
                "" if value is None else f"{value:.6g}" for value in (row.mean, row.spread, row.low, row.high)
            ]
            writer.writerow([*row.setting.values(), row.runs, row.finished, *numbers])
        return text.getvalue()


def summarise(folders: Sequence[Path], metric: str = "") -> Summary:
    """Read run folders and put those together that differ only in fold and seed.

    Args:
        folders: Run folders.
        metric: Name of a recorded number, whose last value counts; empty takes the best validation.

    Raises:
        ConfigError: No run has recorded such a number.
    """
    facts = read_runs(folders)
    configs = [_flat_config(folder) for folder in folders]
    keys = _differing(configs)
    if metric:
        names = sorted({name for run in facts for name in run.metrics})
        if names and metric not in names:
            raise ConfigError(f"--metric {metric}", why=did_you_mean(metric, names))
    groups: dict[str, list[tuple[RunFacts, dict[str, Any]]]] = {}
    for run, config in zip(facts, configs, strict=True):
        setting = {key: config.get(key) for key in keys}
        groups.setdefault(repr(setting), []).append((run, setting))
    name = metric or next((run.best[0] for run in facts if run.best is not None), "")
    rows = [_row([run for run, _ in group], group[0][1], metric) for group in groups.values()]
    return Summary(name, keys, rows)


def say_summary(found: Summary) -> None:
    """Write the table for people."""
    screen = console()
    if not any(row.values for row in found.rows):
        return
    if len(found.rows) == 1:
        row = found.rows[0]
        text = f"{found.metric}: mean {number(row.mean)}"
        if row.spread is not None:
            text += f", standard deviation {number(row.spread)}"
            text += f", 95 % interval {number(row.low)} to {number(row.high)}"
        screen.say(f"{text}, of {len(row.values)} runs")
        return
    from medrl.cli.many import short_names

    short = short_names(found.keys)
    columns = [
        *(short[key] for key in found.keys),
        "finished",
        found.metric or "value",
        "sd",
        "95 % interval",
    ]
    rows = [
        [
            *(_shown(value) for value in row.setting.values()),
            f"{row.finished}/{row.runs}",
            number(row.mean),
            number(row.spread),
            f"{number(row.low)} to {number(row.high)}" if row.low is not None else "–",
        ]
        for row in found.rows
    ]
    first = len(found.keys)
    screen.table(columns, rows, right=(first, first + 1, first + 2))


def direct_runs(folder: Path) -> list[Path]:
    """Return the run folders that lie in a folder itself.

    Raises:
        ConfigError: There is none.
    """
    found = [path for path in run_folders(folder) if path.parent == folder]
    if not found:
        raise ConfigError(f"{folder} holds no runs", do="medrl runs list DIR")
    return found


def _row(runs: Sequence[RunFacts], setting: dict[str, Any], metric: str) -> Row:
    finished = [run for run in runs if run.status == "finished"]
    values = [value for run in finished if (value := _value(run, metric)) is not None]
    mean = spread = low = high = None
    if values:
        from medrl.core.stats import t_interval

        interval = t_interval(values, _LEVEL)
        mean = interval.mean
        if len(values) > 1:
            from statistics import stdev

            spread, low, high = stdev(values), interval.low, interval.high
    return Row(setting, len(runs), len(finished), values, mean, spread, low, high)


def _value(run: RunFacts, metric: str) -> float | None:
    found: Any = run.metrics.get(metric) if metric else run.best[1] if run.best is not None else None
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _flat_config(folder: Path) -> dict[str, Any]:
    from medrl.core.config import flatten

    try:
        return flatten(run_config(folder))
    except MedrlError:
        return {}


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ, without fold, seed and what belongs to the machine."""
    machine = _machine_keys(configs)
    every = dict.fromkeys(key for config in configs for key in config)
    return [
        key
        for key in every
        if key not in VARIES
        and key not in machine
        and len({repr(config.get(key)) for config in configs if config}) > 1
    ]


def _machine_keys(configs: Sequence[Mapping[str, Any]]) -> set[str]:
    from medrl.cli.session import current_manager
    from medrl.core.config import config_model, machine_keys

    found: set[str] = set()
    for method in {config.get("method") for config in configs}:
        if isinstance(method, str) and current_manager().knows(method):
            found |= machine_keys(config_model(current_manager(), method))
    return found


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)
