"""Budget curves of a policy beside everything that it must beat, on cases that nobody learned from."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.core.rng import torch_generator
from medrl.core.stats import bootstrap_ci

from .candidates import exchanged, population_greedy
from .domain import Data, SliceInfo
from .measuring import Measured, Row, mean_of, measure
from .observer import CaseObserver
from .policies import (
    EquispacedLines,
    ExchangedLines,
    FixedLines,
    GreedyLines,
    LinePolicy,
    LowToHighLines,
    RandomLines,
    VariableDensityLines,
)
from .rewards import Quality

BASELINES = ("random", "equispaced", "low-to-high", "variable-density", "fixed")
ORACLES = ("fixed-exchanged", "greedy-oracle")
FULL = "full"
TITLES = {
    "policy": "policy",
    "random": "random",
    "equispaced": "equispaced",
    "low-to-high": "low to high",
    "variable-density": "variable density",
    "fixed": "fixed mask (greedy on training cases)",
    "fixed-exchanged": "fixed mask, lines exchanged",
    "greedy-oracle": "one-step oracle of each case (labels)",
    FULL: "all lines",
}
METRICS = ("dice", "ssim", "psnr", "nmse")
VOLUME_METRICS = ("dice", "hd95")
RESAMPLES = 2000


@dataclass
class Curves:
    """The results of an evaluation.

    Attributes:
        measured: By policy, then by budget (0 for all lines).
        masks: By policy and budget ``(N, A)``.
        lines: By policy and budget ``(N, budget)``, in order of acquisition.
        notes: What the numbers are not.
    """

    measured: dict[str, dict[int, Measured]] = field(default_factory=dict)
    masks: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    lines: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def add(self, name: str, budget: int, measured: Measured, masks: Tensor, lines: Tensor) -> None:
        """Take in the results of a policy at a budget."""
        self.measured.setdefault(name, {})[budget] = measured
        self.masks.setdefault(name, {})[budget] = masks
        self.lines.setdefault(name, {})[budget] = lines


def run(
    observer: CaseObserver,
    data: Data,
    info: Sequence[Sequence[SliceInfo]],
    policies: Mapping[str, LinePolicy],
    budgets: Sequence[int],
    *,
    seed: int = 0,
    notes: Sequence[str] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> Curves:
    """Let every policy acquire every case at every budget, and measure what comes of it.

    Random policies draw for each budget and seed alone. All lines (`full`) are measured once.
    """
    curves = Curves(notes=tuple(notes))
    case = torch.arange(len(observer.cases))
    initial = observer.cases.rows("initial", case).cpu()
    for name, policy in policies.items():
        whole: Tensor | None = None
        for budget in budgets:
            say(f"{TITLES.get(name, name)}, {budget} lines")
            generator = torch_generator(seed, "kspace", "evaluation", name, budget)
            if isinstance(policy, GreedyLines):
                # One step ahead knows no budget: the longest acquisition holds the shorter ones.
                if whole is None:
                    whole = policy.order(observer, case.to(observer.cases.device), max(budgets), generator)
                lines = whole[:, :budget].cpu()
            else:
                lines = policy.order(observer, case.to(observer.cases.device), budget, generator).cpu()
            masks = initial.clone().scatter_(1, lines, value=True)
            curves.add(name, budget, measure(observer, data, info, masks), masks, lines)
    everything = observer.cases.rows("possible", case).cpu() | initial
    found = measure(observer, data, info, everything)
    curves.add(FULL, 0, found, everything, torch.zeros(len(case), 0, dtype=torch.int64))
    return curves


def rivals(
    names: Sequence[str],
    training: CaseObserver,
    quality: Quality,
    budget: int,
    *,
    fit_cases: int = 192,
    sweeps: int = 2,
) -> dict[str, LinePolicy]:
    """Make baselines and oracles by name.

    Args:
        names: From `BASELINES` and `ORACLES`.
        training: Observer of training cases, on which fixed masks are fitted.
        quality: What fixed masks and the oracle make large.
        budget: The largest.
        fit_cases: At most so many training cases, spread evenly.
        sweeps: Passes of exchanging.

    Raises:
        ConfigError: A name is unknown.
    """
    plain: dict[str, Callable[[], LinePolicy]] = {
        "random": RandomLines,
        "equispaced": EquispacedLines,
        "low-to-high": LowToHighLines,
        "variable-density": VariableDensityLines,
        "greedy-oracle": lambda: GreedyLines(quality),
    }
    found: dict[str, LinePolicy] = {}
    order: Tensor | None = None
    for name in names:
        if name in plain:
            found[name] = plain[name]()
        elif name in ("fixed", "fixed-exchanged"):
            case = spread(len(training.cases), fit_cases).to(training.cases.device)
            if order is None:
                order = population_greedy(training, quality, case, budget)
            improve = partial(exchanged, training, quality, case, sweeps=sweeps)
            exchange = name == "fixed-exchanged"
            found[name] = ExchangedLines(order, improve) if exchange else FixedLines(order.cpu())
        else:
            known = ", ".join((*BASELINES, *ORACLES))
            raise ConfigError(f"policy '{name}'", why="unknown", do=f"choose among {known}")
    return found


def spread(count: int, most: int) -> Tensor:
    """At most so many numbers below `count`, spread evenly."""
    if count <= most:
        return torch.arange(count)
    return torch.tensor(sorted(set(torch.linspace(0, count - 1, most).round().long().tolist())))


# -- summaries ---------------------------------------------------------------------------------------


def summary(curves: Curves, data: Data, *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals over patients, by policy and budget, and areas under the curves.

    A value of a patient is the mean over its slices, or over its volumes. Slices without any label do not
    count for Dice; `slices` and `slices_with_labels` say how many there are.
    """
    found: dict[str, Any] = {"labels": dict(data.label_names), "notes": list(curves.notes), "policies": {}}
    for name, by_budget in curves.measured.items():
        rows = {str(budget): _at_budget(one, resamples) for budget, one in by_budget.items()}
        found["policies"][name] = {
            "title": TITLES.get(name, name),
            "budgets": rows,
            "area": {key: area({b: rows[str(b)][key]["mean"] for b in by_budget}) for key in _AREAS},
        }
    return found


_AREAS = ("slice_dice", "volume_dice", "slice_ssim")


def area(values: Mapping[int, float]) -> float:
    """Mean height of a curve over budgets, by trapezoids; of one budget its value, of none NaN."""
    points = sorted((budget, value) for budget, value in values.items() if budget and math.isfinite(value))
    if not points:
        return math.nan
    if len(points) == 1:
        return points[0][1]
    pairs = itertools.pairwise(points)
    whole = sum((b - a) * (left + right) / 2.0 for (a, left), (b, right) in pairs)
    return whole / (points[-1][0] - points[0][0])


def differences(
    curves: Curves, first: str, second: str, *, metric: str = "dice", resamples: int = RESAMPLES
) -> dict[str, dict[str, Any]]:
    """Paired differences of a slice metric between two policies, with intervals over patients, by budget."""
    found = {}
    for budget in sorted(set(curves.measured[first]) & set(curves.measured[second]) - {0}):
        one, other = (by_patient(curves.measured[name][budget].slices, metric) for name in (first, second))
        both = sorted(set(one) & set(other))
        found[str(budget)] = _interval([one[name] - other[name] for name in both], resamples)
    return found


def by_patient(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """Mean of a metric over the rows of each patient; patients without a finite value are left out."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = float(row.get(metric, math.nan))
        if math.isfinite(value):
            values.setdefault(row["patient"], []).append(value)
    return {name: sum(found) / len(found) for name, found in sorted(values.items())}


def _at_budget(one: Measured, resamples: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "lines": mean_of(row["lines"] for row in one.slices),
        "acceleration": mean_of(row["acceleration"] for row in one.slices),
        "slices": len(one.slices),
        "slices_with_labels": sum(math.isfinite(row.get("dice", math.nan)) for row in one.slices),
        "volumes": len(one.volumes),
    }
    labels = sorted({key for row in one.slices for key in row if key.startswith("dice_")})
    for metric in (*METRICS, *labels):
        values = by_patient(one.slices, metric)
        found[f"slice_{metric}"] = _interval(list(values.values()), resamples)
    surfaces = sorted({key for row in one.volumes for key in row if key.startswith(("dice_", "hd95_"))})
    for metric in (*VOLUME_METRICS, *surfaces):
        found[f"volume_{metric}"] = _interval(list(by_patient(one.volumes, metric).values()), resamples)
    for metric in ("edv_error_ml", "esv_error_ml", "ef_error"):
        values = by_patient(one.hearts, metric)
        found[metric] = _interval(list(values.values()), resamples)
        found[f"abs_{metric}"] = _interval([abs(value) for value in values.values()], resamples)
    return found


def _interval(values: Sequence[float], resamples: int) -> dict[str, Any]:
    found = bootstrap_ci(values, n=resamples)
    return {"mean": found.mean, "low": found.low, "high": found.high, "patients": len(values)}


# -- files -------------------------------------------------------------------------------------------


def write(curves: Curves, data: Data, folder: Path, ids: Sequence[str]) -> Path:
    """Write ``slices.csv``, ``volumes.csv``, ``hearts.csv``, ``masks.json`` and ``summary.json``.

    Args:
        curves: What was measured.
        data: Names of the labels.
        folder: Made if missing.
        ids: Names of the cases, in the order of the masks.

    Returns:
        Path of ``summary.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("slices", "volumes", "hearts"):
        rows = [
            {"policy": name, "budget": budget, **row}
            for name, by_budget in curves.measured.items()
            for budget, one in by_budget.items()
            for row in getattr(one, kind)
        ]
        write_csv(folder / f"{kind}.csv", rows)
    masks = {
        name: {str(budget): lines.tolist() for budget, lines in by_budget.items()}
        for name, by_budget in curves.lines.items()
        if name != FULL
    }
    histograms = {
        name: {str(budget): mask.float().mean(dim=0).tolist() for budget, mask in by_budget.items()}
        for name, by_budget in curves.masks.items()
    }
    content = {"ids": list(ids), "lines": masks, "share_of_cases": histograms}
    (folder / "masks.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    path = folder / "summary.json"
    path.write_text(json.dumps(plain(summary(curves, data)), indent=1) + "\n", encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with all of their keys as columns; NaN becomes an empty cell."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(value) for key, value in row.items()})


def plain(value: Any) -> Any:
    """The same with null for numbers that are not finite, as JSON wants it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return value
