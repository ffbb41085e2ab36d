"""Which labels are evaluated: from a file, a dataset, the prediction folder, or what the references hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medrl.core.errors import ConfigError
from medrl.core.metrics import LabelValues

LABELS_NAME = "labels.json"


def read_labels(path: Path) -> dict[str, LabelValues]:
    """Read label names from JSON: a ``dataset.json``, a ``labels.json``, or a plain mapping.

    Names map to a value or to a list of values that make a region: ``{"whole": [1, 2], "core": 2}``. The
    older form ``{"0": "background", "1": "liver"}`` is understood too.

    Raises:
        ConfigError: The file is missing, damaged or maps something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"label file {path}", why=f"cannot be read: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("labels"), Mapping):
        content = content["labels"]
    try:
        return _labels(content)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"label file {path}",
            why=f"maps no names to label values ({error})",
            do='write {"liver": 1, "tumour": 2}',
        ) from error


def name_values(values: Iterable[int]) -> dict[str, LabelValues]:
    """Return names for label values that nobody has named: ``label_1`` and so on."""
    return {f"label_{value}": value for value in sorted(set(values)) if value != 0}


def all_values(labels: Mapping[str, LabelValues]) -> set[int]:
    """Return every value that some label has, and background."""
    found = {0}
    for value in labels.values():
        found |= {value} if isinstance(value, int) else set(value)
    return found


def _labels(content: Any) -> dict[str, LabelValues]:
    found: dict[str, LabelValues] = {}
    for key, value in content.items():
        if isinstance(value, str) and str(key).isdigit() and not value.isdigit():
            found[value] = int(key)
        elif isinstance(value, list):
            found[str(key)] = tuple(_value(item) for item in value)
        else:
            found[str(key)] = _value(value)
    if not any(value != 0 for value in found.values()):
        raise ValueError("there is no label but background")
    return found


def _value(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"{value!r} is no label value")
    number = int(value)
    if number < 0:
        raise ValueError(f"{number} is no label value")
    return number
