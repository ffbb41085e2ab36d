"""Results of an evaluation as files and lines.

``summary.json``, ``structures.csv`` (one row a case and structure), ``cases.csv`` (one row a case) and
``lesions.csv`` (one row a lesion, candidate or sextant).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from medrl.core.metrics import summarise
from medrl.core.predicting.record import json_bytes
from medrl.core.volume.write import write_bytes

from .evaluation import METRICS, CaseResult, Rules, bootstrap, measure


@dataclass(frozen=True)
class LesionEvaluation:
    """The result of an evaluation.

    Attributes:
        results: One for each case.
        summary: Plain values, as in ``summary.json``.
    """

    results: tuple[CaseResult, ...]
    summary: dict[str, Any] = field(default_factory=dict)


def summarise_results(
    results: Sequence[CaseResult], protocols: Sequence[str], rules: Rules, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Turn the results of all cases into the plain values of ``summary.json``."""
    statistic = partial(measure, protocols=protocols, rules=rules)
    values = statistic(results)
    ends = bootstrap(
        results, statistic, n=int(facts["resamples"]), seed=int(facts["seed"]), level=float(facts["level"])
    )
    rows = [row for result in results for row in result.rows]
    summary: dict[str, Any] = {
        **facts,
        "protocols": list(protocols),
        "cases": len(results),
        "patients": len({result.patient for result in results}),
        "positive_cases": sum(result.positive for result in results),
        "structures": {},
    }
    described = summarise(rows, METRICS)
    for name in results[0].counts:
        per_case = {
            metric: {**described[name][metric].as_dict(), **_interval(ends, f"mean.{name}.{metric}")}
            for metric in METRICS
        }
        pooled = {
            metric: {"value": values[f"pooled.{name}.{metric}"], **_interval(ends, f"pooled.{name}.{metric}")}
            for metric in ("dice", "iou")
        }
        summary["structures"][name] = {"pooled": pooled, "per_case": per_case}
    for group in ("case", *protocols):
        summary[group] = {
            key.removeprefix(f"{group}."): {"value": value, **_interval(ends, key)}
            for key, value in values.items()
            if key.startswith(f"{group}.")
        }
    if "picai" in protocols:
        summary["picai"]["lesions"] = sum(result.match.lesions for result in results)
        summary["picai"]["candidates"] = sum(len(r.match.hits) + len(r.match.false_alarms) for r in results)
    if "sextant" in protocols:
        items = [item for result in results for item in result.scored]
        summary["sextant"]["lesions"] = sum(item.positive for item in items)
        summary["sextant"]["sextants"] = sum(not item.positive for item in items)
    return summary


def write_results(evaluation: LesionEvaluation, folder: Path) -> list[Path]:
    """Write ``summary.json``, ``structures.csv``, ``cases.csv`` and ``lesions.csv``; return the files."""
    cases, lesions = [], []
    for result in evaluation.results:
        match = result.match
        cases.append(
            {
                "case": result.case,
                "patient": result.patient,
                "positive": int(result.positive),
                "score": result.score,
                "candidate_score": result.candidate,
                "lesions": match.lesions,
                "hits": len(match.hits),
                "false_alarms": len(match.false_alarms),
                "misses": match.misses,
            }
        )
        lesions += _lesion_rows(result)
    structures = [row for result in evaluation.results for row in result.rows]
    tables: dict[str, tuple[Sequence[str], Sequence[Mapping[str, Any]]]] = {
        "structures.csv": (("case", "label", *METRICS, "ref_ml", "pred_ml"), structures),
        "cases.csv": (tuple(cases[0]) if cases else ("case",), cases),
        "lesions.csv": (("protocol", "case", "kind", "name", "positive", "score", "overlap"), lesions),
    }
    written = []
    for name, (columns, rows) in tables.items():
        write_bytes(folder / name, _csv(columns, rows))
        written.append(folder / name)
    write_bytes(folder / "summary.json", json_bytes(evaluation.summary))
    return [*written, folder / "summary.json"]


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The main numbers as lines for people."""
    text = [f"{summary['cases']} cases, {summary['positive_cases']} with {summary['lesion']['name']}"]
    for name, parts in summary["structures"].items():
        pooled, per_case = parts["pooled"]["dice"], parts["per_case"]
        text.append(
            f"{name}: Dice pooled {_text(pooled)}, per case "
            f"{_text({**per_case['dice'], 'value': per_case['dice']['mean']})} "
            f"({per_case['dice']['n']} cases, {per_case['dice']['excluded']} empty), "
            f"HD95 {_text({**per_case['hd95'], 'value': per_case['hd95']['mean']})} mm "
            f"({per_case['hd95']['infinite']} infinite)"
        )
    for group in ("case", *summary["protocols"]):
        numbers = {key: value for key, value in summary[group].items() if isinstance(value, Mapping)}
        text.append(f"{group}: " + ", ".join(f"{key} {_text(value)}" for key, value in numbers.items()))
    return text


def _interval(ends: Mapping[str, tuple[float, float, int]], name: str) -> dict[str, float]:
    low, high, count = ends[name]
    return {"low": low, "high": high} if count else {}


def _lesion_rows(result: CaseResult) -> list[dict[str, Any]]:
    match = result.match
    rows: list[dict[str, Any]] = []
    blank = {"protocol": "picai", "case": result.case, "name": "", "overlap": ""}
    for score, overlap in zip(match.hits, match.overlaps, strict=True):
        rows.append({**blank, "kind": "hit", "positive": 1, "score": score, "overlap": overlap})
    rows += [{**blank, "kind": "false alarm", "positive": 0, "score": score} for score in match.false_alarms]
    rows += [{**blank, "kind": "miss", "positive": 1, "score": ""}] * match.misses
    for item in result.scored:
        kind = "lesion" if item.positive else "sextant"
        rows.append(
            {
                "protocol": "sextant",
                "case": result.case,
                "kind": kind,
                "name": item.name,
                "positive": int(item.positive),
                "score": item.score,
                "overlap": "",
            }
        )
    return rows


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column, "")) for column in columns])
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    """Numbers with six digits; empty where not defined."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def _text(number: Mapping[str, Any]) -> str:
    value = number["value"]
    if value is None or math.isnan(value):
        return "not defined"
    low, high = number.get("low"), number.get("high")
    if low is None or high is None or math.isnan(low):
        return f"{value:.3f}"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
