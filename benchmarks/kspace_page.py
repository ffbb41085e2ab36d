"""The page of `kspace_evidence.py`: what its finished jobs say, in tables."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medrl.core.stats import bootstrap_ci
from medrl.plugins.kspace import evaluate

SETTINGS = (
    "standard",
    "shifted",
    "shifted-many",
    "real",
    "real-crossed",
    "real-stack",
    "standard-128",
    "real-128",
)
SHIFTED = ("shifted", "shifted-many")
REAL = ("real", "real-crossed", "real-stack", "real-128")
MEANING = {
    "standard": "Synthetic hearts; anatomy, intensity and phase vary. A fixed mask should do as well here.",
    "shifted": "The same with a k-space centre that is displaced at random in each frame, by up to {shift:g} "
    "of {columns} columns: the positive control, with as few patients as `standard`.",
    "shifted-many": "The same shifts in more patients, of one slice each: every patient brings two shifts "
    "to learn from, however many slices it has. The reward model learns longer, the policy from more states.",
    "real": "Slices of ACDC at end-diastole and end-systole, the middle 96 × 128 pixels averaged 2 by 2, "
    "with a simulated smooth phase.",
    "real-crossed": "The same slices, third attempt: the policy learns from all patients that are not tested "
    "on. The reward model learns from all of them too, and each is judged by one of three more reward "
    "models, which does not know it (`--crossed 3`); fixed masks are fitted with those as well.",
    "real-stack": "The same, fourth attempt: all slices of a frame are acquired with one mask, by a policy "
    "that looks at all of them, and lines are paid for the Dice of the volume (geometry `stack`).",
    "standard-128": "The hearts of `standard`, drawn anew with {columns} columns.",
    "real-128": "The slices of `real` at full resolution, {columns} columns.",
}
METRICS = {"dice": "Dice of slices", "volume_dice": "Dice of volumes", "ssim": "SSIM of slices"}
KEPT = 0.95
SHARE = 0.08
TITLES = {
    "policy": "policy, λ = {}",
    "blind": "blind twin, λ = {}",
    "ppo": "policy, then PPO, λ = {}",
    "flat": "flatter start, then PPO, λ = {}",
    "ce": "policy for cross-entropy, λ = {}",
    "terminal": "policy, then PPO with terminal reward, λ = {}",
    "asmr": "policy, then PPO with the reward of ASMR, λ = {}",
    "fast": "fastest policy (one trunk, no derivative of the entropy, bfloat16), λ = {}",
    "transfer": "agent of the standard phantoms, not trained on these, λ = {}",
    "small": "smaller agent (width 8), more weight decay, fewer epochs, λ = {}",
    "fixed": "fixed mask, λ = {}",
    "fixed-exchanged": "fixed mask, lines exchanged, λ = {}",
    "greedy-oracle": "one-step oracle (labels; some cases), λ = {}",
}
ORDER = (
    *("random", "equispaced", "variable-density", "low-to-high"),
    *("fixed 1", "fixed-exchanged 1", "fixed 0.5", "fixed-exchanged 0.5"),
    *("policy 1", "blind 1", "ppo 1", "policy 0.75", "policy 0.5", "blind 0.5", "policy 0.25", "policy 0"),
    *(
        "flat 1",
        "ce 1",
        "terminal 1",
        "asmr 1",
        "transfer 1",
        "small 1",
        "fast 1",
        "greedy-oracle 1",
        "greedy-oracle 0.5",
    ),
)
PAIRS = (
    ("policy 1", "low-to-high"),
    ("policy 1", "fixed 1"),
    ("policy 1", "fixed-exchanged 1"),
    ("policy 1", "blind 1"),
    ("blind 1", "fixed 1"),
    ("ppo 1", "policy 1"),
    ("ppo 1", "fixed 1"),
    ("policy 0.5", "low-to-high"),
    ("policy 0.5", "fixed 0.5"),
    ("policy 0.5", "blind 0.5"),
    ("flat 1", "fixed 1"),
    ("ce 1", "fixed 1"),
    ("terminal 1", "fixed 1"),
    ("asmr 1", "fixed 1"),
    ("fast 1", "low-to-high"),
    ("fast 1", "fixed 1"),
    ("fast 1", "policy 1"),
    ("transfer 1", "low-to-high"),
    ("transfer 1", "fixed 1"),
    ("transfer 1", "policy 1"),
    ("small 1", "low-to-high"),
    ("small 1", "fixed 1"),
    ("small 1", "policy 1"),
    ("greedy-oracle 1", "fixed 1"),
)
MAIN = PAIRS[:5]
IMAGE_PAIRS = (
    ("policy 0.5", "low-to-high"),
    ("policy 0.5", "fixed 0.5"),
    ("policy 0.5", "blind 0.5"),
    ("policy 0", "low-to-high"),
    ("policy 0", "fixed 0.5"),
)
"""Pairs whose SSIM is compared: policies that are paid for it."""

Values = dict[str, dict[str, dict[str, dict[str, list[float]]]]]
"""By policy, budget, metric and patient: one value for each round."""


@dataclass(frozen=True)
class Facts:
    """What the page says of the experiment.

    Attributes:
        shape: Rows and columns.
        initial: Columns that are there first.
        totals: Columns in all.
        shift: Columns up to which the centre is displaced.
        lines: Sentences on size and training.
        settings: Those of settings that differ.
    """

    shape: tuple[int, int]
    initial: int
    totals: tuple[int, ...]
    shift: float
    lines: tuple[str, ...] = ()
    settings: Mapping[str, Facts] = field(default_factory=dict)

    @property
    def budgets(self) -> list[int]:
        """Columns that are chosen."""
        return [total - self.initial for total in self.totals]

    def of(self, setting: str) -> Facts:
        """The facts of one setting."""
        return self.settings.get(setting, self)


@dataclass
class Found:
    """All results of a setting."""

    values: Values = field(default_factory=dict)
    rooms: list[dict[str, float]] = field(default_factory=list)
    caveats: tuple[str, ...] = ()
    units: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: Path) -> Found:
        """Read what is finished of a setting."""
        found = cls()
        for path in sorted(folder.glob("fold*_seed*/results/*.json")):
            content = json.loads(path.read_text())
            found.units.add(path.parts[-3])
            found.caveats = tuple(content.get("caveats", ())) or found.caveats
            if "best" in content:
                found.rooms.append(content)
            for policy, by_budget in content.get("measured", {}).items():
                for budget, by_metric in by_budget.items():
                    for metric, by_name in by_metric.items():
                        found._take(policy, budget, metric, by_name)
        return found

    def _take(self, policy: str, budget: str, metric: str, by_name: Mapping[str, float | None]) -> None:
        place = self.values.setdefault(policy, {}).setdefault(budget, {}).setdefault(metric, {})
        for patient, value in by_name.items():
            if value is not None:
                place.setdefault(patient, []).append(value)

    def patients(self, policy: str, budgets: Sequence[int], metric: str = "dice") -> dict[str, float]:
        """Mean over budgets and rounds of each patient that all budgets have."""
        rows = [self.values.get(policy, {}).get(str(budget), {}).get(metric, {}) for budget in budgets]
        both = set.intersection(*(set(row) for row in rows)) if rows else set()
        return {name: float(np.mean([np.mean(row[name]) for row in rows])) for name in sorted(both)}

    def full(self, metric: str = "dice") -> dict[str, float]:
        """The value of each patient with all lines."""
        return self.patients(evaluate.FULL, [0], metric)

    def gap(self, first: str, second: str, budgets: Sequence[int], metric: str = "dice") -> list[float]:
        """Paired differences of the patients that both have."""
        one, other = (self.patients(name, budgets, metric) for name in (first, second))
        return [one[name] - other[name] for name in sorted(set(one) & set(other))]


def page(work: Path, facts: Facts) -> str:
    """The page of the results in a folder."""
    found = {setting: Found.of(work / setting) for setting in SETTINGS}
    found = {setting: one for setting, one in found.items() if one.values}
    rows = [list(row) for setting, one in found.items() for row in aims(setting, one, facts.of(setting))]
    lines = [*introduction(facts, found), "## Aims", ""]
    lines += [
        *table(["setting", "aim", "found", "reached"], rows),
        "",
        "Differences are of the Dice of slices (where it says so, of their SSIM), mean over all totals. "
        "“Above”: the 95 % interval lies above zero. “Level”: it does not lie below.",
        "",
    ]
    for setting, one in found.items():
        lines += section(setting, one, facts.of(setting))
    lines += rooms(found)
    path = work / "results" / "brain.json"
    if path.exists():
        lines += brain(json.loads(path.read_text()))
    return "\n".join(wrapped(line) for line in [*lines, *closing(work, found)]) + "\n"


def introduction(facts: Facts, found: Mapping[str, Found]) -> list[str]:
    """What was done; of settings without results nothing is said."""
    absent = tuple(f"**Other in {setting}.**" for setting in SETTINGS if setting not in found)
    return [
        "# kspace: does a policy that looks beat fixed masks?",
        "",
        "Written by `benchmarks/kspace_evidence.py page`. Every patient is tested by networks that were "
        "trained on others, and reward model and policy never share patients either: of the patients "
        "outside a test fold one half (of the real ones two thirds) trains the reward model, the others "
        "policies and fixed masks (`real-crossed` and `real-stack`: all of them both, each patient judged by "
        "a reward model that does not know it). Fold and seed go together: five folds, five seeds. "
        "Intervals are 95 % bootstrap intervals over patients, without a correction for several "
        "comparisons; with 12 patients they are too narrow to be trusted far.",
        "",
        *[word for line in facts.lines if not line.startswith(absent) for word in (line, "")],
    ]


def aims(setting: str, one: Found, facts: Facts) -> list[tuple[str, str, str, str]]:
    """What was aimed at, and what came of it."""
    rows: list[tuple[str, str, str, str]] = []
    few = max(total for total in facts.totals if total <= max(SHARE * facts.shape[1], facts.totals[0]))
    own, whole = one.patients("policy 1", [few - facts.initial]), one.full()
    kept = [own[name] / whole[name] for name in sorted(set(own) & set(whole)) if whole[name] > 0]
    if kept:
        words = f"policy has {KEPT:.0%} of the Dice of all lines with {few} of {facts.shape[1]} lines"
        rows.append((setting, words, interval(kept), "yes" if float(np.mean(kept)) >= KEPT else "no"))

    def add(first: str, second: str, words: str, kind: str = "above", metric: str = "dice") -> None:
        gap = one.gap(first, second, facts.budgets, metric)
        if len(gap) > 1:
            words += f" ({len(gap)} patients)" if len(gap) < len(whole) else ""
            found = bootstrap_ci(gap, n=5000)
            reached = {"above": found.low > 0, "level": found.high >= 0, "not above": found.low <= 0}[kind]
            rows.append((setting, words, interval(gap, signed=True), "yes" if reached else "no"))

    add("policy 1", "low-to-high", "policy above low to high")
    if setting in SHIFTED:
        add("policy 1", "fixed 1", "policy above the fixed mask")
        add("blind 1", "fixed 1", "blind twin not above the fixed mask", "not above")
        add("policy 1", "blind 1", "policy above its blind twin")
    else:
        add("policy 1", "fixed 1", "policy level with the fixed mask", "level")
    if setting in REAL:
        add("policy 1", "fixed 1", "policy above the fixed mask (the harder aim)")
        add("policy 1", "blind 1", "policy above its blind twin")
        add("blind 1", "low-to-high", "blind twin, a learned fixed mask, above low to high")
        add("blind 1", "fixed 1", "blind twin above the fixed mask of greedy search")
    add("policy 0.5", "low-to-high", "policy of the default weights (λ = 0.5) above low to high")
    if setting in SHIFTED:
        for metric, name in (("dice", "Dice"), ("ssim", "SSIM")):
            words = f"policy of the default weights above its fixed mask, {name}"
            add("policy 0.5", "fixed 0.5", words, metric=metric)
            words = f"blind twin of the default weights not above the fixed mask, {name}"
            add("blind 0.5", "fixed 0.5", words, "not above", metric)
    else:
        add("policy 0.5", "fixed 0.5", "policy of the default weights level with its fixed mask", "level")
    if setting == "real":
        for second, words, kind in (
            ("low-to-high", "above low to high", "above"),
            ("fixed 1", "level with the fixed mask", "level"),
            ("fixed 1", "above the fixed mask", "above"),
            ("blind 1", "above the blind twin", "above"),
        ):
            add("small 1", second, f"second attempt, smaller agent: {words}", kind)
    return rows


def section(setting: str, one: Found, facts: Facts) -> list[str]:
    """The part of one setting."""
    heads = [str(total) for total in facts.totals]
    words = MEANING[setting].format(shift=facts.shift, columns=facts.shape[1])
    lines = [f"## {setting}", "", f"{words} {len(one.full('ssim'))} patients, {len(one.units)} units.", ""]
    for metric, name in METRICS.items():
        rows = []
        for policy in (name for name in ORDER if name in one.values):
            each = [list(one.patients(policy, [budget], metric).values()) for budget in facts.budgets]
            cells = [interval(values) if metric == "dice" else mean(values) for values in each]
            rows.append([title(policy), str(max(len(values) for values in each)), *cells])
        full = list(one.full(metric).values())
        rows.append(["all lines", str(len(full)), interval(full), *[""] * (len(heads) - 1)])
        lines += [f"### {name}", "", *table(["lines in all", "patients", *heads], rows), ""]
    for metric, pairs in (("dice", PAIRS), ("volume_dice", MAIN), ("ssim", IMAGE_PAIRS)):
        rows = []
        for first, second in pairs:
            cells = [
                interval(one.gap(first, second, [budget], metric), signed=True) for budget in facts.budgets
            ]
            if any(cell != "–" for cell in cells):
                rows.append([f"{title(first)} − {title(second)}", *cells])
        if rows:
            lines += [f"### Paired differences, {METRICS[metric]}", ""]
            lines += [*table(["lines in all", *heads], rows), ""]
    return lines


def rooms(found: Mapping[str, Found]) -> list[str]:
    """What can be predicted without labels."""
    rows = []
    for setting, one in found.items():
        gains = [[room[name] for room in one.rooms] for name in ("blind", "policy", "best")]
        parts = [(own - dark) / (best - dark) for dark, own, best in zip(*gains, strict=True) if best > dark]
        if parts:
            means = [f"{np.mean(values):.4f}" for values in gains]
            rows.append([setting, *means, f"{np.mean(parts):.1%} ({min(parts):.1%} to {max(parts):.1%})"])
    if not rows:
        return []
    return [
        "## What can be known without labels",
        "",
        "Mean gain of soft Dice by the next line, in states on the way of the policy (λ = 1) on test cases: "
        "of the line that the blind twin, the policy and the oracle choose. The last column is the part of "
        "the oracle's gain beyond the blind twin that the policy finds (mean and range over units).",
        "",
        *table(["setting", "blind twin", "policy", "oracle", "found"], rows),
        "",
    ]


def brain(content: Mapping[str, Any]) -> list[str]:
    """The measured slice."""
    names = {
        "zf": "Zero-filled, root sum of squares",
        "sense": "CG-SENSE, sensitivities from the initial lines",
    }
    lines = [
        "## A measured brain",
        "",
        f"One slice with eight coils, {content['columns']} columns, 12 of them there first: real phase and "
        "real coils. It is one slice, so that no policy is trained on it and there is no interval; random "
        "masks are means of ten draws (CG-SENSE: three). SSIM / PSNR in dB / NMSE against the image from all "
        "lines.",
        "",
    ]
    for kind, name in names.items():
        totals = list(content[kind]["all lines"])
        rows = []
        for policy, by_total in content[kind].items():
            words = "one-step oracle (knows the image)" if policy == "greedy-oracle" else title(policy)
            rows.append([words, *[scores(by_total.get(total)) for total in totals]])
        lines += [f"### {name}", "", *table(["lines in all", *totals], rows), ""]
    return lines


def closing(work: Path, found: Mapping[str, Found]) -> list[str]:
    """Caveats and cost."""
    seconds = [float(json.loads(path.read_text())["cpu_seconds"]) for path in work.rglob("results/*.json")]
    caveats = {note for one in found.values() for note in one.caveats}
    return [
        "## What these numbers are not",
        "",
        *[f"- {note}" for note in sorted(caveats)],
        "- Real slices are scaled by a percentile of the fully sampled frame, alike for all policies.",
        "- Folds and seeds are not crossed: the spread over seeds cannot be told from that over folds.",
        "- Settings were chosen on other synthetic patients (`--group tune`), never on these. There are no "
        "other real patients: what differs for them (steps, augmentation, shares of patients) was chosen "
        "with a look at another dealing of the same twelve.",
        "- On real slices there were four attempts (`real`, its smaller agent and agent of the phantoms, "
        "`real-crossed`, `real-stack`), each after the results of those before on the same patients had been "
        "seen, each set before it was run and run once; all are shown. The fastest policy was added so too.",
        "- The aims of the default weights (λ = 0.5) and of the blind twin as a mask of its own were written "
        "down after their results had been seen; with so many rows some intervals lie off zero by chance. "
        "The fixed mask of `real-stack` was first fitted on 8 volumes, then, to be fair to it, on all.",
        "- Not run: further rounds of seeds (`--rounds`)"
        + ("" if "standard-128" in found else ", 128 columns")
        + ("." if "real-128" in found else ", real slices with 128 columns."),
        "",
        f"{len(seconds)} jobs, {sum(seconds) / 60:.0f} CPU-minutes on one thread.",
    ]


# -- cells -------------------------------------------------------------------------------------------


def title(name: str) -> str:
    """A policy in words."""
    kind, _, value = name.rpartition(" ")
    return TITLES[kind].format(value) if kind in TITLES else evaluate.TITLES.get(name, name)


def interval(numbers: Sequence[float], *, signed: bool = False) -> str:
    """Mean with its 95 % bootstrap interval."""
    if not numbers:
        return "–"
    found = bootstrap_ci(numbers, n=5000)
    form = "+.4f" if signed else ".4f"
    if not math.isfinite(found.low):
        return f"{found.mean:{form}}"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def mean(numbers: Sequence[float]) -> str:
    """A mean alone."""
    return f"{float(np.mean(numbers)):.4f}" if numbers else "–"


def scores(values: Sequence[float | None] | None) -> str:
    """SSIM, PSNR and NMSE."""
    if values is None:
        return "–"
    forms = zip(values, (".4f", ".2f", ".4f"), strict=True)
    return " / ".join("∞" if value is None else f"{value:{form}}" for value, form in forms)


def wrapped(line: str) -> str:
    """A paragraph or item within the width of a page; tables and headings as they are."""
    if line.startswith(("|", "#")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 120, subsequent_indent=indent, break_on_hyphens=False)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
