"""YAML read strictly and written so that the strict reader gives the same values back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from medrl.core.errors import ConfigError

MAX_BYTES = 1 << 20
"""A config file larger than this is refused before it is parsed."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without aliases, duplicate keys, octal numbers, or words taken for booleans."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys are not allowed", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float)):
                raise yaml.constructor.ConstructorError(None, None, "keys must be plain", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key '{key}'", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"^(?:true|false)$", "tf"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|)$", ["~", "n", ""]),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF|nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
):
    _StrictLoader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


def parse_yaml(text: str, *, origin: str = "<text>") -> dict[str, Any]:
    """Parse YAML strictly: no aliases, no duplicate keys, ``1e-3`` is a float, only true/false are booleans.

    Raises:
        ConfigError: The text is too large, is no valid YAML, or its top level is no mapping.
    """
    if len(text.encode()) > MAX_BYTES:
        raise ConfigError(f"{origin}", why=f"larger than {MAX_BYTES} bytes", do="split the file")
    try:
        values = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a restricted SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(origin, why=_yaml_reason(error), do="correct the YAML") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(origin, why="the top level must be a mapping of keys to values")
    return cast(dict[str, Any], values)


def _yaml_reason(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error) or type(error).__name__
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return place + " ".join(str(problem).split())


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file strictly; see `parse_yaml`."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(str(path), why=f"larger than {MAX_BYTES} bytes", do="split the file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path}", why=str(getattr(error, "strerror", None) or error)
        ) from error
    return parse_yaml(text, origin=str(path))


def parse_scalar(text: str) -> Any:
    """Parse the value of ``--set key=value`` as YAML."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a restricted SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set value {text!r}", why=_yaml_reason(error)) from error


def parse_set(text: str) -> tuple[str, Any]:
    """Split ``a.b=value`` into the dotted key and the parsed value.

    Raises:
        ConfigError: There is no ``=`` or no key.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {text}", why="expected KEY=VALUE", do="for example --set train.lr=1e-3")
    return key.strip(), parse_scalar(value)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Write nested plain values as YAML that the strict loader reads back unchanged."""
    return yaml.dump(dict(values), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=110)


class _PlainDumper(yaml.SafeDumper):
    """SafeDumper without aliases that quotes every string the strict loader would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None
    if not text.isprintable():
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
    try:
        if not isinstance(yaml.load(text, Loader=_StrictLoader), str):  # noqa: S506 - a restricted SafeLoader
            style = "'"
    except yaml.YAMLError:
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_float(dumper: yaml.SafeDumper, number: float) -> yaml.ScalarNode:
    if not math.isfinite(number):
        return dumper.represent_float(number)
    text = repr(number)
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_PlainDumper.add_representer(str, _represent_text)
_PlainDumper.add_representer(float, _represent_float)
