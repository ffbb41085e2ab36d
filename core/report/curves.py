"""Curves of a run as inline SVG, drawn here so that they print and need no library."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .page import escape, folded

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 164
MAX_POINTS = 300
"""More records than this are averaged in groups before they are drawn."""
SMOOTH_FROM = 40
"""Curves of at least so many points get a smoothed line over a pale one."""
MAX_LINES = 8
_ids = itertools.count(1)

_EXPLAIN: tuple[tuple[str, str], ...] = (
    (r"dice", "Overlap with the reference, from 0 (none) to 1 (perfect). Higher is better."),
    (r"iou", "Shared voxels over all voxels of both, from 0 to 1. Higher is better."),
    (r"hd95|assd|hausdorff", "Distance between surfaces in mm. Lower is better."),
    (
        r"reward",
        "What the agent is paid for its actions. Higher is better; its zero has no meaning of its own.",
    ),
    (r"advantage", "How much better an action did than expected; it hovers around 0."),
    (r"correlation", "How actions and what they earned go together, from -1 to 1; near 0, not at all."),
    (r"entropy", "How undecided the policy still is. It falls as the policy makes up its mind."),
    (r"\bkl\b|divergence", "How far the policy moved in one update. Small and steady is healthy."),
    (r"value_loss|explained", "How well the critic predicts what the agent will earn."),
    (r"policy|actor|clip", "How the policy is being changed. Its size matters less than that it stays calm."),
    (r"weight|alpha", "Share of each part, such as each teacher. Equal lines mean that none is preferred."),
    (r"loss", "What training makes small. It should fall and then level off."),
    (r"^lr|learning_rate", "Size of the steps of the optimiser, as planned by its schedule."),
    (r"grad", "Length of the gradient. Sudden peaks mean unstable training."),
    (r"per_s|seconds|time|memory", "What training costs."),
    (r"epoch", "Passes over the training cases so far."),
    (r"skip|nonfinite", "Steps that were left out because a number was not finite."),
)
_ORDER = ("val_dice", "dice", "loss", "reward", "weight", "entropy", "correlation", "iou", "hd95")


@dataclass(frozen=True)
class _Line:
    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def curves(
    records: Iterable[Mapping[str, Any]],
    keys: Sequence[str] | None = None,
    *,
    limit: int = 8,
    axis: str = "step",
) -> str:
    """Return charts of logged numbers over steps.

    Keys that differ by a leading ``val_`` or ``train_``, by a trailing number, or by a further word
    (``dice``, ``dice_liver``) share a chart; with ``group/name``, the group is the chart.

    Args:
        records: Records of ``metrics.jsonl``: ``{"step": 10, "loss": 0.3, …}``.
        keys: Numbers to draw; all if left out.
        limit: Charts that are shown at once; the others open on a click.
        axis: What the numbers under ``step`` are, in words.

    Returns:
        HTML; empty if there is nothing to draw.
    """
    lines = _lines(records, keys)
    charts: dict[str, list[_Line]] = {}
    for name, line in lines.items():
        charts.setdefault(chart_of(name), []).append(line)
    _merge(charts)
    ordered = sorted(charts.items(), key=lambda item: _rank(item[0], item[1]))
    drawn = [chart(name, members, axis=axis) for name, members in ordered]
    if not drawn:
        return ""
    html = f'<div class="charts">{"".join(drawn[:limit])}</div>'
    if len(drawn) > limit:
        more = f'<div class="charts">{"".join(drawn[limit:])}</div>'
        html += folded(f"{len(drawn) - limit} more curves", more)
    return html


def chart_of(key: str) -> str:
    """Return the chart that a key is drawn in."""
    if "/" in key:
        head, _, tail = key.partition("/")
        return chart_of(tail) if head in ("train", "val") else head
    key = re.sub(r"^(val|train)_", "", key)
    return re.sub(r"[_.]?\d+$", "", key) or key


def _merge(charts: dict[str, list[_Line]]) -> None:
    """Move the lines of ``dice_liver`` into the chart ``dice`` if that is there and has room."""
    for name in sorted(charts, key=len, reverse=True):
        base = next((other for other in charts if name.startswith(f"{other}_")), None)
        if base is not None and len(charts[base]) + len(charts[name]) <= MAX_LINES:
            charts[base] += charts.pop(name)


def explain(name: str) -> str:
    """Return one sentence about a logged number, empty if nothing is known."""
    return next((text for pattern, text in _EXPLAIN if re.search(pattern, name.lower())), "")


def chart(name: str, lines: Sequence[_Line], *, axis: str = "step") -> str:
    """Return one chart with its legend, caption and the data for the mouse."""
    shown = [_thin(line) for line in lines[:MAX_LINES]]
    smooth = [_smooth(line) if len(line.x) >= SMOOTH_FROM else None for line in shown]
    x0, x1 = min(float(line.x[0]) for line in shown), max(float(line.x[-1]) for line in shown)
    low, high = _limits(shown, smooth)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def px(x: float) -> float:
        return LEFT + (x - x0) / ((x1 - x0) or 1.0) * (RIGHT - LEFT)

    def py(y: float) -> float:
        return BOTTOM - (y - low) / ((high - low) or 1.0) * (BOTTOM - TOP)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{py(t) + 4:.1f}" text-anchor="end">{number_text(t)}</text>'
        for t in ticks
    ]
    parts += [
        f'<text x="{px(t):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{number_text(t)}</text>'
        for t in nice_ticks(x0, x1, 3)
        if x0 <= t <= x1
    ]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axis)}</text>')
    clip = f"clip{next(_ids)}"
    parts.append(
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP - 4}" width="{RIGHT - LEFT + 2}"'
        f' height="{BOTTOM - TOP + 8}"/></clipPath><g clip-path="url(#{clip})">'
    )
    for at, (line, soft) in enumerate(zip(shown, smooth, strict=True)):
        colour = f"var(--c{at % MAX_LINES + 1})"
        pale = ' stroke-opacity=".28"' if soft is not None else ""
        parts.append(_path(line, px, py, colour, 1.0 if soft is not None else 2.0, pale))
        if soft is not None:
            parts.append(_path(soft, px, py, colour, 2.2, ""))
    parts.append("</g>")
    parts.append(f'<line class="cross" y1="{TOP}" y2="{BOTTOM}" x1="0" x2="0" visibility="hidden"/>')
    data = {
        "x0": x0,
        "x1": x1,
        "left": LEFT,
        "right": RIGHT,
        "series": [
            {"name": line.name, "x": line.x.tolist(), "y": [float(f"{y:.6g}") for y in line.y]}
            for line in shown
        ],
    }
    rest = f" Only the first {MAX_LINES} of {len(lines)} lines are drawn." if len(lines) > MAX_LINES else ""
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(data))}">'
        f"<figcaption><b>{escape(name)}</b> {escape(explain(name) + rest)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)} over {escape(axis)}">'
        f'{"".join(parts)}</svg><div class="tip"></div>{_legend(name, shown)}</figure>'
    )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers that enclose a range, about `count` steps apart."""
    if not math.isfinite(low) or not math.isfinite(high) or high <= low:
        return [low, low + 1.0] if math.isfinite(low) else [0.0, 1.0]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def number_text(value: float) -> str:
    """Return a number in few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def _lines(records: Iterable[Mapping[str, Any]], keys: Sequence[str] | None) -> dict[str, _Line]:
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        step = record.get("step")
        if not isinstance(step, (int, float)) or "event" in record:
            continue
        for key, value in record.items():
            if key == "step" or (keys is not None and key not in keys):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            points.setdefault(key, []).append((float(step), float(value)))
    found: dict[str, _Line] = {}
    for key, pairs in points.items():
        if len(pairs) > 1:
            array = np.asarray(sorted(pairs))
            found[key] = _Line(key, array[:, 0], array[:, 1])
    return found


def _thin(line: _Line) -> _Line:
    """Average neighbouring points until at most `MAX_POINTS` are left."""
    if len(line.x) <= MAX_POINTS:
        return line
    groups = np.array_split(np.arange(len(line.x)), MAX_POINTS)
    return _Line(
        line.name,
        np.asarray([line.x[group].mean() for group in groups]),
        np.asarray([line.y[group].mean() for group in groups]),
    )


def _smooth(line: _Line) -> _Line:
    """Return a moving average over a twentieth of the points on each side."""
    half = max(1, len(line.y) // 20)
    total = np.concatenate([[0.0], np.cumsum(line.y)])
    at = np.arange(len(line.y))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(line.y))
    return _Line(line.name, line.x, (total[high] - total[low]) / (high - low))


def _limits(lines: Sequence[_Line], smooth: Sequence[_Line | None]) -> tuple[float, float]:
    """Return a range that shows all lines; of a pale one, the most extreme twentieth may leave it."""
    values = np.concatenate(
        [
            line.y if soft is None else np.concatenate([soft.y, np.percentile(line.y, (2.5, 97.5))])
            for line, soft in zip(lines, smooth, strict=True)
        ]
    )
    low, high = float(values.min()), float(values.max())
    if high <= low:
        pad = abs(low) * 0.1 or 0.5
        return low - pad, high + pad
    pad = (high - low) * 0.06
    return (0.0 if 0.0 <= low < 0.25 * high else low - pad), high + pad


def _path(line: _Line, px: Any, py: Any, colour: str, width: float, extra: str) -> str:
    points = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
    return f'<path d="M{points}" fill="none" stroke="{colour}" stroke-width="{width}"{extra}/>'


def _legend(chart_name: str, lines: Sequence[_Line]) -> str:
    items = "".join(
        f'<li><i style="background:var(--c{at % MAX_LINES + 1})"></i>{escape(name)}</li>'
        for at, name in enumerate(line.name.removeprefix(f"{chart_name}/") for line in lines)
    )
    return f'<ul class="legend">{items}</ul>'


def _rank(name: str, lines: Sequence[_Line]) -> tuple[int, str]:
    names = [name, *(line.name for line in lines)]
    for rank, wanted in enumerate(_ORDER):
        if any(wanted in item.lower() for item in names):
            return rank, name
    return len(_ORDER), name
