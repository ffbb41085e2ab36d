"""The report of a comparison: tables, a chart of all methods, training curves, panels of test images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.report import (
    Section,
    curves,
    escape,
    folded,
    gallery,
    overlay_panel,
    paragraphs,
    simple_table,
    write_page,
)
from medrl.core.stats import Interval

from ..scoring import EPI, VALID
from ..uncertainty import averages
from .catalogue import BY_KEY
from .outcome import Outcome, Row

COLOURS = {"baseline": "var(--c1)", "method": "var(--c2)", "control": "var(--c4)", "bound": "var(--c6)"}
HEADS = {"dice": "Dice", VALID: "valid", "hd95": "HD95 (mm)"}
MORE = {f"dice_{EPI}": "Dice of LV and MYO together", "hd": "HD (mm)"}


def table(outcome: Outcome, *, iterations: bool = True) -> tuple[list[str], list[list[str]], list[int]]:
    """Return headings, rows and the numbers of the rows to stress, for the terminal and the page."""
    rows = [row for row in outcome.rows() if iterations or "@" not in row.key]
    names = [name for name in HEADS if any(name in row.numbers for row in rows)]
    rival = "source" if "source" in outcome.scores else ""
    heads = ["method", "start", "role", "seeds", *(HEADS[name] for name in names)]
    heads += ["gain in Dice over source-only"] if rival else []
    cells = []
    for row in rows:
        line = [row.title, row.start, row.role, str(len(row.seeds))]
        line += [_level(row.numbers.get(name)) for name in names]
        if rival:
            found = row.gains.get(rival)
            line.append(found["dice"].text() if found else "–")
        cells.append(line)
    return heads, cells, [number for number, row in enumerate(rows) if row.role == "method"]


def more_table(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Return what the first table leaves out."""
    rows = outcome.rows()
    names = [name for name in MORE if any(name in row.numbers for row in rows)]
    cells = [
        [
            row.title,
            row.start,
            f"{row.spread[0]:.3f} to {row.spread[1]:.3f}",
            *(_level(row.numbers.get(name)) for name in names),
            _number(sum(outcome.seconds.get(row.key, {}).values()) / max(1, len(row.seeds))),
        ]
        for row in rows
    ]
    return ["method", "start", "Dice of the seeds", *(MORE[name] for name in names), "CPU s"], cells


def gains_table(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Return the gains of the method over its rivals."""
    cells = []
    for row in outcome.rows():
        if row.role != "method" or "@" in row.key:
            continue
        for rival, gains in row.gains.items():
            other = BY_KEY[rival]
            title = other.title + (f" ({other.start})" if other.start else "")
            cells.append(
                [
                    f"{row.title} ({row.start})",
                    title,
                    gains["dice"].text(),
                    gains[VALID].text() if VALID in gains else "–",
                ]
            )
    return ["method", "against", "Dice", "validity"], cells


def quality_table(
    found: Mapping[str, Mapping[int, Mapping[str, float]]], names: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Return a table of measures of confidence, as means over seeds."""
    cells = []
    for name, by in found.items():
        mean = averages(list(by.values()))
        cells.append([name, *(_number(mean.get(key, math.nan)) for key in names)])
    return ["confidence", *names.values()], cells


FINDING = {"near_auroc": "error AUROC near the prediction", "error_auroc": "on the foreground", "ece": "ECE"}
TRUST = {
    "dice": "Dice",
    "ece": "ECE",
    "mce": "MCE",
    "ace": "ACE",
    "nmi": "NMI",
    "error_auroc": "error AUROC",
    "r_mean": "r(Dice, mean u)",
    "r_sum": "r(Dice, Σu / size)",
}


def write(
    path: Path,
    outcome: Outcome,
    *,
    title: str,
    subtitle: str = "",
    facts: Mapping[str, Any] | None = None,
    records: Sequence[Mapping[str, Any]] = (),
    panels: Mapping[str, str] | None = None,
    more: Sequence[Section] = (),
) -> Path:
    """Write the report.

    Args:
        path: File to write.
        outcome: What was found.
        title: Heading.
        subtitle: A sentence below it.
        facts: Names and values in a box.
        records: Records of runs, for curves.
        panels: Panels of test images by name, from `panel`.
        more: Sections at the end.
    """
    heads, cells, stress = table(outcome)
    sections = [
        Section(
            "Result",
            simple_table(heads, cells, words=(0, 1, 2), emphasise=stress)
            + folded("More numbers", simple_table(*more_table(outcome), words=(0, 1)))
            + paragraphs(outcome.notes),
            _RESULT,
        )
    ]
    if len(outcome.scores) > 1:
        sections.append(Section("All methods", forest(outcome.rows()), _FOREST))
    claims = outcome.claims()
    if claims:
        heads, cells = gains_table(outcome)
        sections.append(
            Section(
                "What the method may claim",
                simple_table(heads, cells, words=(0, 1)) + paragraphs(claims[-1:]),
                _CLAIMS,
            )
        )
    if outcome.finding:
        heads, cells = quality_table(outcome.finding, FINDING)
        sections.append(Section("Who finds the errors", simple_table(heads, cells), _FINDING))
    if outcome.trust:
        heads, cells = quality_table(outcome.trust, TRUST)
        sections.append(Section("How far confidence can be trusted", simple_table(heads, cells), TRUST_WORDS))
    drawn = curves(records)
    if drawn:
        sections.append(Section("How training went", drawn, _CURVES))
    if panels:
        sections.append(Section("Test images", gallery(panels), _PANELS))
    return write_page(path, title, [*sections, *more], subtitle=subtitle, facts=facts)


def forest(rows: Sequence[Row], name: str = "dice") -> str:
    """Return an SVG with the mean of each method, its interval, and a dot for each seed's extremes."""
    shown = [row for row in rows if "@" not in row.key and math.isfinite(row.numbers[name].mean)]
    if not shown:
        return ""
    ends = [value for row in shown for value in _ends(row.numbers[name])]
    low = math.floor(20 * min(ends)) / 20
    high = min(1.0, math.ceil(20 * max(ends)) / 20)
    high = high if high > low else low + 0.05
    left, right, step = 300, 700, 24
    height = step * len(shown) + 34

    def px(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    ticks = np.linspace(low, high, 5)
    parts = [
        f'<line class="grid" x1="{px(t):.1f}" x2="{px(t):.1f}" y1="4" y2="{height - 28}"/>'
        f'<text x="{px(t):.1f}" y="{height - 12}" text-anchor="middle">{t:.3g}</text>'
        for t in ticks
    ]
    for number, row in enumerate(shown):
        y, colour = step * number + step / 2 + 2, COLOURS[row.role]
        found = row.numbers[name]
        words = row.title + (f" ({row.start})" if row.start else "")
        parts.append(f'<text x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(words)}</text>')
        first, last = _ends(found)
        tip = escape(f"{words}: {_level(found)}")
        parts.append(
            f'<line x1="{px(first):.1f}" x2="{px(last):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"'
            f' stroke-width="6" stroke-opacity=".3" stroke-linecap="round"><title>{tip}</title></line>'
            f'<circle cx="{px(found.mean):.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"><title>{tip}</title>'
            "</circle>"
        )
    label = "Dice of every method, with its interval"
    return (
        f'<figure class="dots"><svg viewBox="0 0 720 {height}" role="img" aria-label="{label}">'
        f'{"".join(parts)}</svg><figcaption class="small">{label}. Blue: baselines, orange: the method, '
        "pink: controls, brown: upper bounds, which look at target labels.</figcaption></figure>"
    )


def panel(
    image: NDArray[Any],
    maps: Mapping[str, NDArray[Any]],
    *,
    title: str,
    spacing: Sequence[float],
    label_names: Mapping[str, int],
    caption: str = "",
) -> str:
    """Return a panel of one image ``(C, X, Y)`` with label maps ``(X, Y)`` by name; y points down."""

    def stood(array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(array[::-1, ::-1, None])

    return overlay_panel(
        {"image": stood(image[0])},
        {name: stood(mask) for name, mask in maps.items()},
        title=title,
        spacing=(*(float(value) for value in spacing), 1.0),
        names={name: value for name, value in label_names.items() if value},
        caption=caption,
    )


def records_of(runs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Return the logged numbers of PPO runs, named so that runs share a chart."""
    from medrl.core.runlog import RunFolder

    shown: list[dict[str, Any]] = []
    for name, folder in runs.items():
        if not (folder / "manifest.json").is_file():
            continue
        for row in RunFolder.open(folder, lock=False).records():
            found = {
                f"{words}/{name}": row[key]
                for key, words in _CURVES_OF.items()
                if isinstance(row.get(key), int | float)
            }
            if found and isinstance(row.get("step"), int):
                shown.append({"step": row["step"], **found})
    return shown


def _ends(found: Interval) -> tuple[float, float]:
    if math.isfinite(found.low) and math.isfinite(found.high):
        return found.low, found.high
    return found.mean, found.mean


def _level(found: Interval | None) -> str:
    if found is None or not math.isfinite(found.mean):
        return "–"
    if not math.isfinite(found.low):
        return _number(found.mean)
    return f"{_number(found.mean)} [{_number(found.low)}, {_number(found.high)}]"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


_CURVES_OF = {
    "reward": "reward",
    "val_reward": "reward, held out",
    "val_validity": "valid masks, held out",
    "kl": "KL to the start",
    "entropy": "entropy",
    "foreground": "share of foreground",
}
_RESULT = (
    "Means over test images and seeds with 95 % intervals (bootstrap over seeds and patients). Dice is the "
    "overlap with the reference; valid is the share of masks that keep every anatomical rule; distances are "
    "in mm. Baselines and controls see no target labels, as the method; upper bounds do. All trained rows "
    "took the same number of optimiser steps beyond their start."
)
_FOREST = "The same numbers as a picture: the dot is the mean, the bar its interval."
_CLAIMS = (
    "What the learned reward knows can be used without reinforcement learning: by more supervised steps, by "
    "self-training on the labels that it would choose, and by post-processing. Only a gain over all of these "
    "may be credited to reinforcement learning. Differences pair the same patients and seeds; the last "
    "numbers count the seeds on which the method is better."
)
_FINDING = (
    "How well each confidence ranks the wrong pixels of the source-only predictions below the right ones "
    "(area under the ROC curve; 0.5 is chance), within 3 pixels of the predicted foreground and on the "
    "foreground of prediction or reference. A reward that cannot find errors cannot teach."
)
TRUST_WORDS = (
    "Each method judges its own prediction. ECE, MCE and ACE are gaps between confidence and accuracy over "
    "20 bins, on pixels where prediction or reference is foreground (0 is perfect); NMI is the normalised "
    "mutual information of confidence and being right; r is the correlation over images of Dice and "
    "uncertainty (-1 is best)."
)
_CURVES = "The reward that PPO earns while training, and what validation images say, none with labels."
_PANELS = "Some test images: the image, the reference, and predictions."
