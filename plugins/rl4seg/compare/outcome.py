"""What a comparison found: rows, gains over the rivals, and whether the method may claim anything."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medrl.core.stats import Interval

from ..scoring import EPI, VALID, Scores
from ..uncertainty import averages
from .catalogue import BY_KEY, RIVALS, Method
from .statistics import Gain, gain, level_of

KNOWING = ("more", "refined", "post_hoc")
"""Kinds of rivals that use the same knowledge as the method."""

BySeed = Mapping[int, Scores]
NUMBERS = ("dice", VALID, "hd", "hd95")
"""Numbers of a row, besides ``dice_epi`` where it exists."""


@dataclass(frozen=True)
class Row:
    """One method, or one iteration of it.

    Attributes:
        key: Key of the method, with ``@i`` for iteration i.
        numbers: Mean with interval of each number.
        gains: Gains in Dice and validity by rival and number.
        spread: Least and greatest mean Dice of a seed.
    """

    key: str
    title: str
    start: str
    role: str
    seeds: tuple[int, ...]
    numbers: Mapping[str, Interval]
    gains: Mapping[str, Mapping[str, Gain]]
    spread: tuple[float, float]


@dataclass
class Outcome:
    """All scores of a comparison.

    Attributes:
        scores: Scores by row key and seed.
        finding: How well each reward finds the errors of the source-only predictions, by name and seed.
        trust: How far each confidence can be trusted, by name and seed.
        seconds: Seconds of work of each method, by key and seed.
        notes: What was left out, and why.
    """

    scores: dict[str, dict[int, Scores]] = field(default_factory=dict)
    finding: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    trust: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[Row]:
        """Return one row for each method, iterations after their method."""
        return [
            self._row(key, by) for key, by in sorted(self.scores.items(), key=lambda item: _order(item[0]))
        ]

    def _row(self, key: str, by: BySeed) -> Row:
        method, iteration = method_of(key)
        first = next(iter(by.values()))
        names = [name for name in (*NUMBERS, f"dice_{EPI}") if name in first.values]
        means = [scores.mean() for scores in by.values()]
        rivals = [rival for rival in rivals_of(method) if rival in self.scores and rival != key]
        return Row(
            key=key,
            title=method.title + (f", iteration {iteration}" if iteration else ""),
            start=method.start,
            role=method.role,
            seeds=tuple(sorted(by)),
            numbers={name: level_of(by, name) for name in names},
            gains={
                rival: {
                    name: gain(by, self.scores[rival], name)
                    for name in ("dice", VALID)
                    if name in names and name in next(iter(self.scores[rival].values())).values
                }
                for rival in rivals
            },
            spread=(min(means), max(means)),
        )

    def claims(self) -> list[str]:
        """Say in sentences what the numbers allow to claim about the method, from each start."""
        found: list[str] = []
        for key in ("ppo", "style-ppo"):
            if key in self.scores:
                found += self._claims_of(key)
        return found

    def _claims_of(self, key: str) -> list[str]:
        row = self._row(key, self.scores[key])
        name = f"rl4seg from the {row.start} actor"
        sentences = []
        beaten: dict[str, bool] = {}
        for rival, gains in row.gains.items():
            method = BY_KEY[rival]
            words = f"{method.title}" + (f" ({method.start})" if method.start else "")
            dice = gains["dice"]
            verdict = _verdict(dice)
            extra = ""
            if VALID in gains:
                extra = f"; validity {gains[VALID].text()}: {_verdict(gains[VALID])}"
            sentences.append(f"{name} against {words}: Dice {dice.text()}: {verdict}{extra}.")
            if method.kind in KNOWING:
                beaten[method.kind] = dice.clear
        verdict = "met." if all(beaten.values()) else "not met."
        if set(beaten) != set(KNOWING) and all(beaten.values()):
            verdict = "open, because not all of them took part."
        sentences.append(
            f"{name}: reinforcement learning may be credited with a gain in Dice only if it beats the three "
            "rivals that use the same knowledge without it (more style tuning, self-training on refined "
            f"labels, post-processing); it beats {sum(beaten.values())}: {verdict}"
        )
        return sentences

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain types for JSON."""
        return {
            "schema": 1,
            "methods": {row.key: _row_dict(row, self) for row in self.rows()},
            "claims": self.claims(),
            "error_finding": _quality_dict(self.finding),
            "confidence": _quality_dict(self.trust),
            "notes": self.notes,
        }

    def write(self, path: Path) -> Path:
        """Write `as_dict` as JSON; numbers that are not finite become null."""
        text = json.dumps(_plain(self.as_dict()), indent=1, allow_nan=False) + "\n"
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        return path


def method_of(key: str) -> tuple[Method, int]:
    """Return the method of a row key, and its iteration; 0 for the final result."""
    name, _, iteration = key.partition("@")
    return BY_KEY[name], int(iteration or 0)


def rivals_of(method: Method) -> tuple[str, ...]:
    """Return the keys that a row is compared with: from its own start first."""
    if method.start == "source":
        return ("source", "self-refined", "posthoc-both", "style-steps")
    return RIVALS


def _order(key: str) -> tuple[int, int]:
    method, iteration = method_of(key)
    return list(BY_KEY).index(method.key), iteration or 10**6


def _verdict(found: Gain) -> str:
    if found.seeds == 0 or not math.isfinite(found.interval.low):
        return "not enough values"
    return "better" if found.clear else "worse" if found.lost else "no clear difference"


def _row_dict(row: Row, outcome: Outcome) -> dict[str, Any]:
    by = outcome.scores[row.key]
    return {
        "title": row.title,
        "start": row.start,
        "role": row.role,
        "seeds": list(row.seeds),
        **{name: asdict(interval) for name, interval in row.numbers.items()},
        "gains": {
            rival: {
                name: {**asdict(found.interval), "better": found.better, "of": found.seeds}
                for name, found in gains.items()
            }
            for rival, gains in row.gains.items()
        },
        "by_seed": {str(seed): scores.summary() for seed, scores in sorted(by.items())},
        "seconds": {str(seed): value for seed, value in outcome.seconds.get(row.key, {}).items()},
    }


def _quality_dict(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, Any]:
    return {
        name: {
            "mean": averages(list(by.values())),
            "by_seed": {str(seed): dict(values) for seed, values in sorted(by.items())},
        }
        for name, by in found.items()
    }


def _plain(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_plain(value) for value in content]
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content
