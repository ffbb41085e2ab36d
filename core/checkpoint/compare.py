"""Whether a checkpoint fits the run that wants to go on from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from medrl.core.checkpoint.file import Checkpoint
from medrl.core.errors import CheckpointError


def check_fits(
    found: Checkpoint,
    *,
    facts: Mapping[str, Any],
    described: Mapping[str, Any],
    names: Collection[str],
    machine: Collection[str],
) -> None:
    """Raise unless method, config, labels and registered names fit this run.

    Args:
        found: The loaded checkpoint.
        facts: Method and config of this run.
        described: Labels and channels of this run; None where it does not say.
        names: Names of the registered objects.
        machine: Dotted config keys that may differ.

    Raises:
        CheckpointError: With the first kind of difference, and everything that differs in it.
    """
    theirs = found.meta
    if theirs.get("method") != facts.get("method"):
        raise CheckpointError(
            f"checkpoint {found.path} belongs to method '{theirs.get('method')}'",
            why=f"this run is of method '{facts.get('method')}'",
            do="use another run folder with -o",
        )
    if not isinstance(theirs.get("step"), int) or theirs["step"] < 0:
        raise CheckpointError(
            f"checkpoint {found.path} cannot be used", why=f"its step is {theirs.get('step')!r}"
        )
    changed = config_difference(theirs.get("config"), facts.get("config"), machine)
    if changed:
        raise CheckpointError(
            f"checkpoint {found.path} was saved with another config",
            why="; ".join(changed),
            do="give the same settings again, or train into another folder with -o",
        )
    for key in ("label_names", "channel_names"):
        if described.get(key) is not None and theirs.get(key) is not None:
            a, b = _listed(theirs[key]), _listed(described[key])
            if a != b:
                raise CheckpointError(
                    f"checkpoint {found.path} has other {key.replace('_', ' ')}",
                    why=f"{len(a)} there ({', '.join(a)}), {len(b)} in this run ({', '.join(b)})",
                    do="train on the same dataset, or into another folder with -o",
                )
    stored = set(found.states)
    missing, unknown = sorted(set(names) - stored), sorted(stored - set(names))
    if missing or unknown:
        parts = ([f"missing: {', '.join(missing)}"] if missing else []) + (
            [f"unknown: {', '.join(unknown)}"] if unknown else []
        )
        raise CheckpointError(
            f"checkpoint {found.path} holds other objects than this run registered",
            why="; ".join(parts),
            do="use the version of the plugin that wrote it"
            + (f": {theirs['plugin_version']}" if theirs.get("plugin_version") else ""),
        )


def config_difference(stored: Any, current: Any, machine: Collection[str] = ()) -> list[str]:
    """Return lines ``key: stored → current`` where configs differ in what a resumed run must share.

    Left out are the keys of the machine (see `medrl.core.config.machine_keys`) and a larger
    ``train.max_steps``, which extends a run.
    """
    before, after = _flat(stored), _flat(current)
    lines: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        a, b = before.get(key), after.get(key)
        if key in machine or (a == b and (key in before) == (key in after)):
            continue
        if key == "train.max_steps" and isinstance(a, int) and isinstance(b, int) and b > a:
            continue
        lines.append(f"{key}: {_shown(before, key)} → {_shown(after, key)}")
    return lines


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, item in value.items():
            found.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
        return found
    if isinstance(value, (list, tuple)):
        return {prefix: [list(item) if isinstance(item, tuple) else item for item in value]}
    return {prefix: value}


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"


def _listed(names: Any) -> list[str]:
    if isinstance(names, Mapping):
        return [f"{name}={number}" for name, number in sorted(names.items(), key=lambda item: str(item[1]))]
    return [str(name) for name in names]
