"""Temporal rules as YAML: which attributes are followed through a sequence, and how far they may jump.

A rule file::

    medrl_temporal_rules: 1
    rows: y                               # array axis that runs down the picture
    labels: {background: 0, lv: 1, myo: 2}
    regions: {epi: [lv, myo]}
    attributes: {
      lv_area: {measure: area, region: lv, max_jump: 0.2},
      hd_frames_epi: {measure: neighbour_hausdorff, region: epi, max_mm: 7.5}}

Measures are ``area`` (mm²), ``center_column`` and ``center_row`` (mm from the first pixel), ``base_width``
and ``length`` (mm, of `region` with the wall `other`; see `medrl.core.metrics.landmarks`), limited by
`max_jump`; and ``neighbour_hausdorff``, limited by `max_mm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from medrl.core.config import Block, load_yaml
from medrl.core.errors import ConfigError, did_you_mean

TemporalMeasure = Literal[
    "area", "center_column", "center_row", "base_width", "length", "neighbour_hausdorff"
]
WITH_WALL = ("base_width", "length")
DISTANCE = "neighbour_hausdorff"

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Attribute:
    """One attribute with its limit.

    Attributes:
        name: Name in reports.
        measure: What is measured in each frame.
        labels: Values of the region's labels.
        wall: Values of the other region's labels, for ``base_width`` and ``length``.
        limit: Largest value that is no error: of the jump, or in mm for ``neighbour_hausdorff``.
    """

    name: str
    measure: TemporalMeasure
    labels: tuple[int, ...]
    wall: tuple[int, ...]
    limit: float


@dataclass(frozen=True)
class TemporalRules:
    """A validated file of temporal rules.

    Attributes:
        name: Name of the built-in file, or path.
        rows: Array axis that runs down the picture; ``x`` is the first axis of a frame, ``y`` the second.
        attributes: In the order of the file.
        summary: One line for people.
    """

    name: str
    rows: Literal["x", "y"]
    attributes: tuple[Attribute, ...]
    summary: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for manifests and hashes."""
        return {
            "name": self.name,
            "rows": self.rows,
            "attributes": {
                item.name: {
                    "measure": item.measure,
                    "labels": list(item.labels),
                    "wall": list(item.wall),
                    "max_mm" if item.measure == DISTANCE else "max_jump": item.limit,
                }
                for item in self.attributes
            },
        }


class _AttributeBlock(Block):
    measure: TemporalMeasure
    region: str
    other: str | None = None
    max_jump: float | None = Field(default=None, gt=0.0)
    max_mm: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _fits_its_measure(self) -> _AttributeBlock:
        if (self.other is not None) != (self.measure in WITH_WALL):
            verb = "needs" if self.measure in WITH_WALL else "takes no"
            raise ValueError(f"{self.measure} {verb} 'other'")
        wanted, wrong = ("max_mm", "max_jump") if self.measure == DISTANCE else ("max_jump", "max_mm")
        if getattr(self, wanted) is None or getattr(self, wrong) is not None:
            raise ValueError(f"{self.measure} is limited by '{wanted}' alone")
        return self


class _RuleFile(Block):
    medrl_temporal_rules: Literal[1]
    summary: str = ""
    source: str = ""
    rows: Literal["x", "y"]
    labels: dict[str, int] = Field(min_length=1)
    regions: dict[str, tuple[str, ...]] = Field(default={})
    attributes: dict[str, _AttributeBlock] = Field(min_length=1)


def builtin_temporal_rules() -> tuple[str, ...]:
    """Return the names of the files of temporal rules that medrl brings."""
    return tuple(sorted(path.stem for path in _HERE.glob("*.yaml")))


def load_temporal_rules(
    name_or_path: str | Path, *, labels: Mapping[str, int] | None = None, rows: str | None = None
) -> TemporalRules:
    """Read a file of temporal rules and check it completely.

    Args:
        name_or_path: A built-in name (`builtin_temporal_rules`), or the path of a YAML file.
        labels: Label values that replace those of the file, by name.
        rows: ``x`` or ``y``; replaces that of the file, for frames stored the other way round.

    Raises:
        ConfigError: The file is missing or not valid; every problem is listed with its key.
    """
    text = str(name_or_path)
    path = Path(name_or_path)
    if text in builtin_temporal_rules():
        path = _HERE / f"{text}.yaml"
    elif not path.is_file():
        near = did_you_mean(text, builtin_temporal_rules())
        raise ConfigError(f"temporal rules {text}", why=f"neither a file nor built in; {near}")
    values = load_yaml(path)
    if rows is not None:
        values = {**values, "rows": rows}
    if labels and isinstance(values.get("labels"), Mapping):
        unknown = [name for name in labels if name not in values["labels"]]
        if unknown:
            raise ConfigError(
                f"label {unknown[0]}",
                why=f"the temporal rules {text} have no such label; "
                f"{did_you_mean(unknown[0], values['labels'])}",
            )
        values = {**values, "labels": {**values["labels"], **labels}}
    return _rules(text, values)


def _rules(name: str, values: Mapping[str, Any]) -> TemporalRules:
    try:
        file = _RuleFile.model_validate(values)
    except ValidationError as error:
        raise _not_valid(name, [_problem(item) for item in error.errors(include_url=False)]) from error
    problems = list(_wrong_names(file))
    if problems:
        raise _not_valid(name, problems)

    def values_of(region: str | None) -> tuple[int, ...]:
        if region is None:
            return ()
        return tuple(file.labels[label] for label in file.regions.get(region, (region,)))

    return TemporalRules(
        name=name,
        rows=file.rows,
        attributes=tuple(
            Attribute(
                name=key,
                measure=block.measure,
                labels=values_of(block.region),
                wall=values_of(block.other),
                limit=float(block.max_mm or block.max_jump or 0.0),
            )
            for key, block in file.attributes.items()
        ),
        summary=file.summary,
    )


def _wrong_names(file: _RuleFile) -> Iterator[str]:
    """Give every name that is used but not declared."""
    for region, members in file.regions.items():
        if region in file.labels:
            yield f"regions.{region}: is already a label"
        if not members:
            yield f"regions.{region}: has no label"
        for member in members:
            if member not in file.labels:
                yield f"regions.{region}: '{member}' is no label; {did_you_mean(member, file.labels)}"
    known = {**file.labels, **file.regions}
    for name, block in file.attributes.items():
        for key, used in (("region", block.region), ("other", block.other)):
            if used is not None and used not in known:
                hint = did_you_mean(used, known)
                yield f"attributes.{name}.{key}: '{used}' is no label and no region; {hint}"


def _not_valid(name: str, problems: list[str]) -> ConfigError:
    count = len(problems)
    return ConfigError(
        f"the temporal rules {name} are not valid",
        why=f"{count} problem" + ("s" if count != 1 else ""),
        problems=problems,
    )


def _problem(item: Any) -> str:
    place = [str(part) for part in item["loc"]]
    key = ".".join(place) or "file"
    if item["type"] == "extra_forbidden":
        fields = _AttributeBlock.model_fields if len(place) > 1 else _RuleFile.model_fields
        return f"{key}: unknown key; {did_you_mean(place[-1], fields)}"
    return f"{key}: {item['msg'].removeprefix('Value error, ')}"
