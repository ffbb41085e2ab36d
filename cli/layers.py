"""The config of one run: defaults < preset < file < named flags < ``--set``, all errors at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medrl.core.errors import ConfigError
from medrl.core.jobs import ConfigOption

if TYPE_CHECKING:
    from medrl.core.config import Layer, Resolved
    from medrl.core.manager import PluginManager

FAST_DEV_RUN = {
    "train.max_steps": 2,
    "train.validate_every": 2,
    "train.checkpoint_every": 2,
    "train.batch_size": 1,
}
"""What ``--fast-dev-run`` sets; ``--set`` may still change it."""


def flag_layers(parameters: Sequence[click.Parameter], values: Mapping[str, Any]) -> list[Layer]:
    """Return one layer for each config option that was given, so that its origin names the flag."""
    from medrl.core.config import Layer, nest

    layers = []
    for parameter in parameters:
        if not isinstance(parameter, ConfigOption) or parameter.name is None:
            continue
        value = values.get(parameter.name)
        if value is None or value == ():
            continue
        plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        flag = max(parameter.opts, key=len)
        layers.append(Layer(flag, nest({parameter.config_key: plain}), base_dir=Path.cwd()))
    return layers


def resolve_all(
    manager: PluginManager,
    method: str,
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    layers: Sequence[Layer] = (),
    assignments: Sequence[str] = (),
) -> Resolved[Any]:
    """Resolve the config of a method.

    Args:
        manager: Where the method is.
        method: Its name.
        preset: Values over the defaults.
        config_file: Values over those.
        layers: Named flags, the weakest first.
        assignments: ``KEY=VALUE`` of ``--set``.

    Raises:
        ConfigError: With every problem found, those of ``--set`` and of all layers together.
    """
    from medrl.core.config import Layer, nest, parse_set, resolve_method

    problems: list[str] = []
    chosen: list[Layer] = []
    for text in assignments:
        try:
            key, value = parse_set(text)
            chosen.append(Layer("--set", nest({key: value}), base_dir=Path.cwd()))
        except ConfigError as error:
            problems.append(f"{error.what}: {error.why}")
    try:
        resolved = resolve_method(
            manager, method, preset=preset, config_file=config_file, layers=[*layers, *chosen]
        )
    except ConfigError as error:
        if not problems:
            raise
        problems += error.problems or [f"{error.what}: {error.why}"]
    if problems:
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        do = f"medrl train {method} --print-config shows every key"
        raise ConfigError("the configuration is not valid", why=count, do=do, problems=problems)
    return resolved


def config_with_origins(resolved: Resolved[Any]) -> str:
    """Return the config as YAML with the origin of each value as a comment; it can be used as a file."""
    text: list[tuple[str, str]] = []
    _lines(resolved.values(), resolved.origins, "", 0, text)
    size = min(max((len(line) for line, origin in text if origin), default=0), 60)
    lines = [f"{line.ljust(size)}  # {origin}" if origin else line for line, origin in text]
    return "\n".join(lines) + "\n"


def _lines(
    values: Mapping[str, Any],
    origins: Mapping[str, str],
    prefix: str,
    depth: int,
    found: list[tuple[str, str]],
) -> None:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found.append((f"{'  ' * depth}{key}:", ""))
            _lines(value, origins, f"{dotted}.", depth + 1, found)
            continue
        first, *rest = yaml_lines(key, value)
        found.append((f"{'  ' * depth}{first}", origins.get(dotted, "")))
        found.extend((f"{'  ' * depth}{line}", "") for line in rest)


def yaml_lines(key: str, value: Any) -> list[str]:
    """Return one key and its value as lines of YAML; lists stay on one line."""
    from medrl.core.config import dump_yaml

    if isinstance(value, (list, dict)):
        return [f"{key}: {json.dumps(value, ensure_ascii=False)}"]  # JSON is YAML on one line
    return dump_yaml({key: value}).rstrip().splitlines()
