"""Units (cases or patients), confidence intervals, and the paired comparison of two methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from medrl.core.metrics import METRICS, OVERALL, Row, Summary, summarise, summarise_values, values_of
from medrl.core.stats import bootstrap_ci, compare_paired, holm

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """One metric of one label, this method (a) against another (b) on the same cases.

    Attributes:
        n: Pairs that took part.
        mean_a: Mean over the pairs whose difference is finite.
        difference: Mean of a minus b, with its bootstrap interval `low` to `high`.
        p_value: Two-sided Wilcoxon signed-rank test.
        p_holm: The same, corrected for all labels and metrics of the table.
        better: ``a`` or ``b`` if the corrected p is below 0.05 and the metric has a good direction.
        wins_a: Pairs in which a is better, `ties` equal, `wins_b` b better.
        infinite: Pairs outside the mean difference because a distance is infinite.
    """

    label: str
    metric: str
    n: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float
    better: str
    wins_a: int
    ties: int
    wins_b: int
    infinite: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def group_by_patient(rows: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """Average the cases of each patient, label by label; NaN is left out.

    Cases of one patient are no independent observations: intervals and tests over them would be too
    narrow.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((str(row["patient"]), str(row["label"])), []).append(row)
    return [
        {
            "case": patient,
            "patient": patient,
            "label": label,
            **{name: _mean(float(row[name]) for row in members) for name in metrics},
        }
        for (patient, label), members in groups.items()
    ]


def with_intervals(
    rows: Sequence[Row], metrics: Sequence[str], *, resamples: int, seed: int, level: float
) -> dict[str, dict[str, Summary]]:
    """Return the summary of `medrl.core.metrics.summarise` with bootstrap intervals of the means."""
    found = summarise(rows, metrics)
    for label, by_metric in found.items():
        for name, summary in by_metric.items():
            interval = bootstrap_ci(values_of(rows, label, name).values(), resamples, seed, level)
            by_metric[name] = replace(summary, low=interval.low, high=interval.high)
    return found


def compare_rows(
    a: Sequence[Row],
    b: Sequence[Row],
    metrics: Sequence[str],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Comparison]:
    """Compare two methods label by label on the cases that both have, ``overall`` last."""
    labels = [*dict.fromkeys(str(row["label"]) for row in a), OVERALL]
    found: list[Comparison] = []
    for label in labels:
        for name in metrics:
            first, second = values_of(a, label, name), values_of(b, label, name)
            cases = [case for case in first if case in second]
            found.append(_compare(label, name, [first[c] for c in cases], [second[c] for c in cases],
                                  resamples, seed, level))  # fmt: skip
    corrected = holm([row.p_value for row in found])
    return [replace(row, p_holm=p, better=_better(row, p)) for row, p in zip(found, corrected, strict=True)]


def _compare(
    label: str, name: str, a: Sequence[float], b: Sequence[float], resamples: int, seed: int, level: float
) -> Comparison:
    test = compare_paired(a, b, resamples, seed, level)
    finite = [(x, y) for x, y in zip(a, b, strict=True) if math.isfinite(x) and math.isfinite(y)]
    lower_wins = METRICS[name].higher_is_better is False if name in METRICS else False
    return Comparison(
        label=label,
        metric=name,
        n=test.n,
        mean_a=summarise_values(x for x, _ in finite).mean,
        mean_b=summarise_values(y for _, y in finite).mean,
        difference=test.difference.mean,
        low=test.difference.low,
        high=test.difference.high,
        p_value=test.p_value,
        p_holm=math.nan,
        better="",
        wins_a=test.smaller if lower_wins else test.larger,
        ties=test.equal,
        wins_b=test.larger if lower_wins else test.smaller,
        infinite=test.infinite,
    )


def _better(row: Comparison, p: float) -> str:
    direction = METRICS[row.metric].higher_is_better if row.metric in METRICS else None
    if direction is None or not p < ALPHA or row.wins_a == row.wins_b:
        return ""
    return "a" if row.wins_a > row.wins_b else "b"


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def summary_dict(summary: Mapping[str, Mapping[str, Summary]]) -> dict[str, dict[str, Any]]:
    """Return a summary as plain values."""
    return {
        label: {name: value.as_dict() for name, value in by_metric.items()}
        for label, by_metric in summary.items()
    }
