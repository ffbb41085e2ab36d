"""Tables and the dot plot of an evaluation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medrl.core.evaluation import Comparison, Evaluation
from medrl.core.metrics import METRICS, OVERALL, Row, Summary, values_of

from .curves import nice_ticks, number_text
from .page import escape

_ids = itertools.count(1)


def simple_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    words: Sequence[int] = (0,),
    emphasise: Sequence[int] = (),
) -> str:
    """Return a plain table; numbers get four digits.

    Args:
        columns: Headings.
        rows: Cells: text or numbers.
        words: Columns of words, which are set left.
        emphasise: Rows in bold.
    """

    def cell(tag: str, at: int, content: Any) -> str:
        kind = ' class="t"' if at in words else ""
        return f"<{tag}{kind}>{escape(_text(content))}</{tag}>"

    head = "".join(cell("th", at, name) for at, name in enumerate(columns))
    body = "".join(
        f"<tr{' class=method' if number in emphasise else ''}>"
        + "".join(cell("td", at, content) for at, content in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def result_table(columns: Sequence[str], rows: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """Return the table of a demo: name, role (baseline, method, control), numbers; the method in bold."""
    return simple_table(
        ["", "role", *columns],
        [[name, role, *numbers] for name, role, numbers in rows],
        words=(0, 1),
        emphasise=[number for number, (_, role, _) in enumerate(rows) if role == "method"],
    )


def case_table(rows: Sequence[Row], metrics: Sequence[str] | None = None) -> str:
    """Return a table of every case and label that sorts on a click and can be filtered by label."""
    names = (
        list(metrics) if metrics is not None else [name for name in METRICS if any(name in r for r in rows)]
    )
    volumes = [name for name in ("ref_ml", "pred_ml") if any(name in row for row in rows)]
    table = f"t{next(_ids)}"
    heads = [("case", "t", "case"), ("label", "t", "label")]
    heads += [(heading(name), "", METRICS[name].explain if name in METRICS else name) for name in names]
    heads += [({"ref_ml": "true ml", "pred_ml": "found ml"}[name], "", "volume") for name in volumes]
    head = "".join(
        f'<th class="{kind}" title="{escape(tip)}"><button type="button">{escape(text)}</button>'
        '<span class="way"></span></th>'
        for text, kind, tip in heads
    )
    body = "".join(
        f'<tr data-label="{escape(row["label"])}"><td class="t">{escape(row.get("case", ""))}</td>'
        f'<td class="t">{escape(row["label"])}</td>'
        + "".join(_number_cell(row.get(name, math.nan)) for name in (*names, *volumes))
        + "</tr>"
        for row in rows
    )
    labels = list(dict.fromkeys(str(row["label"]) for row in rows))
    choice = ""
    if len(labels) > 1:
        options = "".join(f'<option value="{escape(label)}">{escape(label)}</option>' for label in labels)
        choice = f'<select data-for="{table}"><option value="">all</option>{options}</select>'
        choice = f"<p><label>label {choice}</label></p>"
    return (
        f'{choice}<div class="scroll tall"><table class="sortable" id="{table}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def summary_table(summary: Mapping[str, Mapping[str, Summary]]) -> str:
    """Return mean ± standard deviation of each metric by label, with what the mean leaves out."""
    names = list(dict.fromkeys(name for by_metric in summary.values() for name in by_metric))
    single = len([label for label in summary if label != OVERALL]) < 2
    head = "".join(f"<th>{escape(heading(name))}</th>" for name in names)
    body = ""
    for label, by_metric in summary.items():
        if label == OVERALL and single:
            continue
        shown = "mean over labels" if label == OVERALL else label
        cells = "".join(_summary_cell(by_metric[name]) for name in names)
        body += f'<tr><td class="t">{escape(shown)}</td>{cells}</tr>'
    return (
        f'<div class="scroll"><table><thead><tr><th class="t">label</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _summary_cell(value: Summary) -> str:
    """Return mean ± standard deviation, and below in small letters the interval and the counts."""
    mean, _, rest = summary_text(value).partition(" ± ")
    spread, _, counts = rest.partition(", ")
    spread, _, interval = spread.partition(" [")
    if not rest:
        mean, _, counts = mean.partition(", ")
    first = f"{mean} ± {spread}" if rest else mean
    second = ", ".join(part for part in (f"[{interval}" if interval else "", counts) if part)
    return f'<td>{escape(first)}<br><small class="soft">{escape(second)}</small></td>'


def summary_text(value: Summary) -> str:
    """Return a summary in one cell: ``0.812 ± 0.05 [0.79, 0.83], n 20, 2 empty, 1 infinite``."""
    if value.n == 0:
        return f"– ({value.excluded} empty)" if value.excluded else "–"
    text = "–" if math.isnan(value.mean) else f"{value.mean:.3f}"
    if not math.isnan(value.std):
        text += f" ± {value.std:.3f}"
    if value.low is not None and value.high is not None and not math.isnan(value.low):
        text += f" [{value.low:.3f}, {value.high:.3f}]"
    text += f", n {value.n}"
    if value.excluded:
        text += f", {value.excluded} empty"
    if value.infinite:
        text += f", {value.infinite} infinite"
    return text


def comparison_table(rows: Sequence[Comparison]) -> str:
    """Return the paired comparison of two methods."""
    cells: list[list[Any]] = []
    for row in rows:
        verdict = {"a": "first", "b": "second"}.get(row.better, "unclear")
        interval = "–" if math.isnan(row.low) else f"[{row.low:.3f}, {row.high:.3f}]"
        cells.append(
            [
                "mean over labels" if row.label == OVERALL else row.label,
                heading(row.metric),
                f"{row.mean_a:.3f}",
                f"{row.mean_b:.3f}",
                f"{row.difference:+.3f} {interval}",
                f"{row.wins_a} / {row.ties} / {row.wins_b}",
                _p_text(row.p_value),
                _p_text(row.p_holm),
                verdict,
            ]
        )
    columns = ["label", "metric", "first", "second", "difference", "win / tie / loss", "p", "corrected p"]
    return simple_table([*columns, "better"], cells, words=(0, 1, 8))


def dot_plot(evaluation: Evaluation, metric: str) -> str:
    """Return one dot a case for each label, with the mean (line) and its interval (bar), as SVG."""
    labels = [label for label in evaluation.summary if label != OVERALL]
    values = {label: values_of(evaluation.rows, label, metric) for label in labels}
    finite = [v for by_case in values.values() for v in by_case.values() if math.isfinite(v)]
    if not finite:
        return ""
    info = METRICS.get(metric)
    bounded = info is not None and info.unit == "" and min(finite) >= 0 and max(finite) <= 1
    low, high = (0.0, 1.0) if bounded else (min(0.0, *finite), max(finite))
    ticks = nice_ticks(low, high if high > low else low + 1.0)
    low, high = ticks[0], ticks[-1]
    left, right, row = 130, 690, 34
    height = row * len(labels) + 34

    def px(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = [
        f'<line class="grid" x1="{px(t):.1f}" x2="{px(t):.1f}" y1="4" y2="{height - 28}"/>'
        f'<text x="{px(t):.1f}" y="{height - 12}" text-anchor="middle">{number_text(t)}</text>'
        for t in ticks
    ]
    rng = np.random.default_rng(0)
    for number, label in enumerate(labels):
        y, colour = row * number + row / 2 + 4, f"var(--c{number % 8 + 1})"
        shown = label if len(label) < 19 else label[:17] + "…"
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>')
        summary = evaluation.summary[label][metric]
        if summary.low is not None and summary.high is not None and math.isfinite(summary.low):
            parts.append(
                f'<rect x="{px(summary.low):.1f}" width="{max(1.0, px(summary.high) - px(summary.low)):.1f}"'
                f' y="{y - 11}" height="22" fill="{colour}" fill-opacity=".18"/>'
            )
        for case, value in values[label].items():
            if math.isfinite(value):
                shift = float(rng.uniform(-8, 8))
                parts.append(
                    f'<circle cx="{px(value):.1f}" cy="{y + shift:.1f}" r="3.2" fill="{colour}"'
                    f' fill-opacity=".65"><title>{escape(f"{case}: {value:.3f}")}</title></circle>'
                )
        if math.isfinite(summary.mean):
            at = f"{px(summary.mean):.1f}"
            parts.append(
                f'<line x1="{at}" x2="{at}" y1="{y - 12}" y2="{y + 12}" stroke="{colour}"'
                ' stroke-width="2.5"/>'
            )
    tip = f"{heading(metric)}: one dot is one case, the line is the mean"
    tip += ", the bar its confidence interval" if summary_has_interval(evaluation) else ""
    words = f"{escape(tip)}. {escape(info.explain if info else '')}"
    return (
        f'<figure class="dots"><svg viewBox="0 0 720 {height}" role="img" aria-label="{escape(tip)}">'
        f'{"".join(parts)}</svg><figcaption class="small">{words}</figcaption></figure>'
    )


def summary_has_interval(evaluation: Evaluation) -> bool:
    """Whether the summary holds confidence intervals."""
    return any(value.low is not None for by in evaluation.summary.values() for value in by.values())


def heading(metric: str) -> str:
    """Return the title of a metric with its unit."""
    info = METRICS.get(metric)
    if info is None:
        return metric
    return f"{info.title} ({info.unit})" if info.unit else info.title


def _number_cell(value: Any) -> str:
    number = float(value)
    if math.isnan(number):
        return '<td data-v="" title="neither side holds this label: left out of the mean">–</td>'
    if math.isinf(number):
        return '<td data-v="Infinity" title="only one side holds this label">∞</td>'
    return f'<td data-v="{number:.8g}">{number:.3f}</td>'


def _text(cell: Any) -> str:
    if isinstance(cell, bool) or not isinstance(cell, (float, np.floating)):
        return str(cell)
    return "–" if math.isnan(cell) else "∞" if math.isinf(cell) else f"{cell:.4g}"


def _p_text(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
