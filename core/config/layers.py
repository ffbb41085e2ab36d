"""Layers of values over each other, validated, with the origin of every value remembered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from medrl.core.config.strict_yaml import dump_yaml
from medrl.core.errors import ConfigError, did_you_mean


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"a.b": 1}`` into ``{"a": {"b": 1}}``.

    Raises:
        ConfigError: One key is both a value and a block.
    """
    root: dict[str, Any] = {}
    for dotted, value in flat.items():
        node = root
        *parents, last = dotted.split(".")
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"key {dotted}", why=f"'{part}' is already a value")
        node[last] = value
    return root


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn ``{"a": {"b": 1}}`` into ``{"a.b": 1}``; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{dotted}."))
        else:
            flat[dotted] = value
    return flat


def _merge(
    base: dict[str, Any], over: Mapping[str, Any], model: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Lay `over` on `base`; a registered part with another name starts without the old one's parameters.

    Such a part is a block that takes any parameter. In a block with fields of its own, `name` is a value like
    the others.
    """
    merged = dict(base)
    fields = model.model_fields if model is not None else {}
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            block = _block_of(fields[key].annotation) if key in fields else None
            open_ended = block is None or block.model_config.get("extra") == "allow"
            renamed = "name" in value and "name" in old and value["name"] != old["name"]
            merged[key] = dict(value) if renamed and open_ended else _merge(dict(old), value, block)
        else:
            merged[key] = value
    return merged


ConfigT = TypeVar("ConfigT", bound=BaseModel)


@dataclass(frozen=True)
class Layer:
    """Values from one origin; later layers win.

    Attributes:
        origin: Where they come from, as shown by ``--print-config``.
        values: Nested values.
        base_dir: Folder from which relative paths are taken; None leaves them to the working folder.
    """

    origin: str
    values: Mapping[str, Any]
    base_dir: Path | None = None


@dataclass(frozen=True)
class Resolved(Generic[ConfigT]):
    """A validated config with the origin of each value.

    Attributes:
        config: The frozen model.
        origins: Dotted key to origin.
    """

    config: ConfigT
    origins: Mapping[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Return the config as plain nested values that YAML and JSON can hold."""
        return self.config.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the whole config as YAML that `parse_yaml` reads back to the same values."""
        return dump_yaml(self.values())

    @property
    def hash(self) -> str:
        """Return eight hexadecimal digits over every value that belongs to the experiment."""
        text = json.dumps(self._experiment(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def _experiment(self) -> dict[str, Any]:
        machine = machine_keys(type(self.config))
        return {key: value for key, value in flatten(self.values()).items() if key not in machine}

    def difference(self, other: Mapping[str, Any]) -> list[str]:
        """Compare with the nested values of another config; machine values are left out.

        Returns:
            One line a differing key: ``train.lr: 0.001 -> 0.01`` (other, then this one).
        """
        machine = machine_keys(type(self.config))
        mine = self._experiment()
        theirs = {key: value for key, value in flatten(other).items() if key not in machine}
        lines = []
        for key in sorted(set(mine) | set(theirs)):
            left, right = theirs.get(key, "absent"), mine.get(key, "absent")
            if left != right:
                lines.append(f"{key}: {left} -> {right}")
        return lines


def resolve(model: type[ConfigT], layers: Sequence[Layer]) -> Resolved[ConfigT]:
    """Lay the layers over each other, validate, and remember where each value came from.

    Raises:
        ConfigError: With every problem found: unknown keys with the nearest known one, wrong types, ranges.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    for layer in layers:
        values = _absolute_paths(model, layer.values, layer.base_dir)
        known, bad = _split_unknown(model, values)
        problems.extend(f"{key}: unknown key ({layer.origin}); {hint}" for key, hint in bad)
        merged = _merge(merged, known, model)
        for key in flatten(known):
            origins[key] = layer.origin
    try:
        config = model.model_validate(merged)
    except ValidationError as error:
        problems.extend(_validation_problems(error, origins))
        raise _all_problems(problems) from error
    if problems:
        raise _all_problems(problems)
    every = flatten(config.model_dump(mode="json"))
    return Resolved(
        config=config, origins={key: origins.get(key, _parent_origin(key, origins)) for key in every}
    )


def _parent_origin(key: str, origins: Mapping[str, str]) -> str:
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:end]) in origins:
            return origins[".".join(parts[:end])]
    return "built in"


def _all_problems(problems: Sequence[str]) -> ConfigError:
    count = len(problems)
    return ConfigError(
        "the configuration is not valid",
        why=f"{count} problem" + ("s" if count != 1 else ""),
        do="medrl init METHOD shows every key with its meaning",
        problems=problems,
    )


def _validation_problems(error: ValidationError, origins: Mapping[str, str]) -> Iterable[str]:
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        origin = origins.get(key)
        got = item.get("input")
        shown = "" if item["type"] in {"missing", "value_error"} else f", got {_short(got)}"
        message = item["msg"].removeprefix("Value error, ")
        yield f"{key or 'config'}: {message}{shown}" + (f" ({origin})" if origin else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _block_of(annotation: Any) -> type[BaseModel] | None:
    """Return the config block inside an annotation, looking through Optional and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is Annotated:
        return _block_of(get_args(annotation)[0])
    if get_origin(annotation) in {Union, UnionType}:
        blocks = [block for block in map(_block_of, get_args(annotation)) if block is not None]
        return blocks[0] if len(blocks) == 1 else None
    return None


def _split_unknown(
    model: type[BaseModel], values: Mapping[str, Any], prefix: str = ""
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    known: dict[str, Any] = {}
    bad: list[tuple[str, str]] = []
    fields = model.model_fields
    open_ended = model.model_config.get("extra") == "allow"
    for key, value in values.items():
        if key not in fields:
            if open_ended:
                known[key] = value
            else:
                bad.append((f"{prefix}{key}", did_you_mean(str(key), fields)))
            continue
        block = _block_of(fields[key].annotation)
        if block is not None and isinstance(value, Mapping):
            inner, inner_bad = _split_unknown(block, value, f"{prefix}{key}.")
            known[key] = inner
            bad.extend(inner_bad)
        else:
            known[key] = value
    return known, bad


def _holds_path(annotation: Any) -> bool:
    if annotation is Path:
        return True
    return any(_holds_path(argument) for argument in get_args(annotation))


def _absolute_paths(model: type[BaseModel], values: Mapping[str, Any], base: Path | None) -> dict[str, Any]:
    """Resolve relative values of path fields against the folder of their config file."""
    if base is None:
        return dict(values)

    def absolute(value: Any) -> Any:
        if isinstance(value, str):
            return str((base / Path(value).expanduser()).resolve())
        if isinstance(value, (list, tuple)):
            return [absolute(item) for item in value]
        if isinstance(value, Mapping):
            return {key: absolute(item) for key, item in value.items()}
        return value

    done: dict[str, Any] = {}
    for key, value in values.items():
        info = model.model_fields.get(key)
        if info is None:
            done[key] = value
            continue
        block = _block_of(info.annotation)
        if block is not None and isinstance(value, Mapping):
            done[key] = _absolute_paths(block, value, base)
        elif _holds_path(info.annotation):
            done[key] = absolute(value)
        else:
            done[key] = value
    return done


def machine_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Return the dotted keys of values that belong to the machine and not to the experiment."""
    keys: set[str] = set()
    for name, info in model.model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("machine"):
            keys.add(f"{prefix}{name}")
        block = _block_of(info.annotation)
        if block is not None:
            keys |= machine_keys(block, f"{prefix}{name}.")
    return keys


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every dotted key of a config model, in order of definition; used by shell completion."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        block = _block_of(info.annotation)
        keys.extend(known_keys(block, f"{prefix}{name}.") if block is not None else [f"{prefix}{name}"])
    return keys
