"""Anatomical rules as YAML: named labels, regions made of them, and limits of measures on regions.

A rule file::

    medrl_rules: 1
    rows: y                               # array axis that runs down the picture
    labels: {background: 0, lv: 1, myo: 2}
    unlisted: background                  # or: refuse
    regions: {epi: [lv, myo]}
    rules:
      holes_in_epi: {measure: holes, region: epi}
      thin_wall: {measure: width_ratio, region: lv, other: myo, max: 4.15}

The label called ``background`` is special: it is everything that no other label names (unless
``unlisted: refuse``), and it may be left out. `medrl.core.validity.measures` says what each measure is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from medrl.core.config import Block, load_yaml
from medrl.core.errors import ConfigError, did_you_mean

Measure = Literal[
    "exists", "area", "holes", "components", "gap", "frontier_ratio", "width_ratio", "erosion_ratio"
]
Axis = Literal["x", "y"]
Unit = Literal["px", "mm2", "fraction"]

BACKGROUND = "background"
MEASURES: tuple[Measure, ...] = (
    "exists", "area", "holes", "components", "gap", "frontier_ratio", "width_ratio", "erosion_ratio",
)  # fmt: skip
BETWEEN_TWO = ("gap", "frontier_ratio", "width_ratio")
WITH_SIZE_LIMIT = ("gap", "erosion_ratio")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Rule:
    """One measure with its limits.

    Attributes:
        name: Name of the rule in reports.
        measure: What is measured.
        region: Label or region that it is measured on.
        other: Second label or region of ``gap``, ``frontier_ratio`` and ``width_ratio``.
        low: Least value that passes.
        high: Largest value that passes.
        ignore_one_in: Gaps of at most, and eroded pieces below, image pixels / this are ignored; 0 ignores
            none.
        unit: Unit of ``area``.
    """

    name: str
    measure: Measure
    region: str
    other: str = ""
    low: float = 0.0
    high: float = 0.0
    ignore_one_in: int = 0
    unit: Unit = "px"

    def passes(self, value: float) -> bool:
        """Whether a value lies within the limits; NaN never does."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Rules:
    """A validated rule file.

    Attributes:
        name: Name of the built-in file, or path.
        rows: Array axis that runs down the picture; ``x`` is the first axis of the array, ``y`` the second.
        labels: Label value by name.
        regions: Names of the labels of each region; every label is also a region of its own.
        rules: In the order of the file.
        unlisted: What values are that no label names.
    """

    name: str
    rows: Axis
    labels: Mapping[str, int]
    regions: Mapping[str, tuple[str, ...]]
    rules: tuple[Rule, ...]
    unlisted: Literal["background", "refuse"] = "background"
    summary: str = ""

    @property
    def row_axis(self) -> int:
        """Axis of a mask ``(X, Y)`` along which rows are counted."""
        return 0 if self.rows == "x" else 1

    def cheapest_first(self) -> Iterator[Rule]:
        """Give the rules so that those which are measured in the shortest time come first."""
        return iter(sorted(self.rules, key=lambda rule: _COST[rule.measure]))

    def union(self, *regions: str) -> frozenset[str]:
        """Return the labels of one or more regions."""
        return frozenset(label for region in regions for label in self.regions[region])

    def wider_union(self, labels: frozenset[str]) -> frozenset[str]:
        """Return the largest union of labels that holds these and whose surroundings some rule needs."""
        return max((union for union in self._enclosing if union >= labels), key=len, default=labels)

    @cached_property
    def _enclosing(self) -> list[frozenset[str]]:
        """Unions of labels that may enclose something, in a fixed order."""
        single = [self.union(rule.region) for rule in self.rules if rule.measure == "holes"]
        return single + [self.union(rule.region, rule.other) for rule in self.rules if rule.measure == "gap"]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for manifests and hashes."""
        return {
            "name": self.name,
            "rows": self.rows,
            "labels": dict(self.labels),
            "regions": {name: list(labels) for name, labels in self.regions.items()},
            "unlisted": self.unlisted,
            "rules": {
                rule.name: {
                    "measure": rule.measure,
                    "region": rule.region,
                    "other": rule.other,
                    "min": rule.low,
                    "max": rule.high if math.isfinite(rule.high) else None,
                    "ignore_one_in": rule.ignore_one_in,
                    "unit": rule.unit,
                }
                for rule in self.rules
            },
        }


_COST = {
    name: cost
    for cost, name in enumerate(
        ("exists", "area", "width_ratio", "components", "frontier_ratio", "holes", "gap", "erosion_ratio")
    )
}


class _RuleBlock(Block):
    measure: Measure
    region: str
    other: str | None = None
    min: float | None = None
    max: float | None = None
    ignore_one_in: int = Field(default=0, ge=0)
    unit: Unit | None = None

    @model_validator(mode="after")
    def _fits_its_measure(self) -> _RuleBlock:
        if (self.other is not None) != (self.measure in BETWEEN_TWO):
            verb = "needs" if self.measure in BETWEEN_TWO else "takes no"
            raise ValueError(f"{self.measure} {verb} 'other'")
        if self.ignore_one_in and self.measure not in WITH_SIZE_LIMIT:
            raise ValueError(f"{self.measure} takes no 'ignore_one_in'")
        if self.unit is not None and self.measure != "area":
            raise ValueError(f"{self.measure} takes no 'unit'")
        if self.measure == "area" and self.min is None and self.max is None:
            raise ValueError("area needs 'min', 'max' or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is larger than max {self.max:g}")
        return self


class _RuleFile(Block):
    medrl_rules: Literal[1]
    summary: str = ""
    source: str = ""
    rows: Axis
    labels: dict[str, int] = Field(min_length=1)
    unlisted: Literal["background", "refuse"] = "background"
    regions: dict[str, tuple[str, ...]] = Field(default={})
    rules: dict[str, _RuleBlock] = Field(min_length=1)

    @field_validator("labels", "regions", "rules")
    @classmethod
    def _plain_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values:
            if not _NAME.fullmatch(name):
                raise ValueError(f"'{name}' is no name; use letters, digits and _")
        return values


def builtin_rules() -> tuple[str, ...]:
    """Return the names of the rule files that medrl brings."""
    return tuple(sorted(path.stem for path in _HERE.glob("*.yaml")))


def load_rules(
    name_or_path: str | Path, *, labels: Mapping[str, int] | None = None, rows: str | None = None
) -> Rules:
    """Read a rule file and check it completely.

    Args:
        name_or_path: A built-in name (`builtin_rules`), or the path of a YAML file.
        labels: Label values that replace those of the file, by name.
        rows: ``x`` or ``y``; replaces that of the file, for masks stored the other way round.

    Raises:
        ConfigError: The file is missing or not valid; every problem is listed with its key.
    """
    text = str(name_or_path)
    path = Path(name_or_path)
    if text in builtin_rules():
        path = _HERE / f"{text}.yaml"
    elif not path.is_file():
        near = did_you_mean(text, builtin_rules())
        raise ConfigError(f"rules {text}", why=f"neither a file nor built in; {near}")
    values = load_yaml(path)
    if rows is not None:
        values = {**values, "rows": rows}
    if labels and isinstance(values.get("labels"), Mapping):
        unknown = [name for name in labels if name not in values["labels"]]
        if unknown:
            raise ConfigError(
                f"label {unknown[0]}",
                why=f"the rules {text} have no such label; {did_you_mean(unknown[0], values['labels'])}",
            )
        values = {**values, "labels": {**values["labels"], **labels}}
    return _rules(text, values)


def _rules(name: str, values: Mapping[str, Any]) -> Rules:
    try:
        file = _RuleFile.model_validate(values)
    except ValidationError as error:
        raise _not_valid(name, [_problem(item) for item in error.errors(include_url=False)]) from error
    problems = list(_wrong_names(file))
    if problems:
        raise _not_valid(name, problems)
    return Rules(
        name=name,
        rows=file.rows,
        labels=dict(file.labels),
        regions={**{label: (label,) for label in file.labels}, **file.regions},
        rules=tuple(_rule(key, block) for key, block in file.rules.items()),
        unlisted=file.unlisted,
        summary=file.summary,
    )


def _rule(name: str, block: _RuleBlock) -> Rule:
    free = block.min is None and block.max is None
    return Rule(
        name=name,
        measure=block.measure,
        region=block.region,
        other=block.other or "",
        low=block.min if block.min is not None else 0.0,
        high=0.0 if free else block.max if block.max is not None else math.inf,
        ignore_one_in=block.ignore_one_in,
        unit=block.unit or "px",
    )


def _wrong_names(file: _RuleFile) -> Iterator[str]:
    """Give every name that is used but not declared, or declared twice."""
    owners: dict[int, str] = {}
    for label, value in file.labels.items():
        other = owners.setdefault(value, label)
        if other != label:
            yield f"labels.{label}: the value {value} already belongs to '{other}'"
    if set(file.labels) == {BACKGROUND}:
        yield "labels: only the background is named"
    for region, members in file.regions.items():
        if region in file.labels:
            yield f"regions.{region}: is already a label"
        if not members:
            yield f"regions.{region}: has no label"
        for member in members:
            if member not in file.labels:
                yield f"regions.{region}: '{member}' is no label; {did_you_mean(member, file.labels)}"
    known = {**file.labels, **file.regions}
    for name, block in file.rules.items():
        for key, used in (("region", block.region), ("other", block.other)):
            if used is None:
                continue
            if used not in known:
                hint = did_you_mean(used, known)
                yield f"rules.{name}.{key}: '{used}' is no label and no region; {hint}"
            elif BACKGROUND in (used, *file.regions.get(used, ())) and (
                key != "other" or block.measure != "frontier_ratio"
            ):
                yield f"rules.{name}.{key}: the background can only be the 'other' of a frontier_ratio"


def _not_valid(name: str, problems: list[str]) -> ConfigError:
    count = len(problems)
    return ConfigError(
        f"the rules {name} are not valid",
        why=f"{count} problem" + ("s" if count != 1 else ""),
        problems=problems,
    )


def _problem(item: Any) -> str:
    place = [str(part) for part in item["loc"]]
    key = ".".join(place) or "file"
    if item["type"] == "extra_forbidden":
        fields = _RuleBlock.model_fields if len(place) > 1 else _RuleFile.model_fields
        return f"{key}: unknown key; {did_you_mean(place[-1], fields)}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in {"missing", "value_error"}:
        return f"{key}: {message}"
    got = repr(item.get("input"))
    return f"{key}: {message}, got {got if len(got) <= 60 else got[:57] + '...'}"
