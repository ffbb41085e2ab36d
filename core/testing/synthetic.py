"""Small synthetic data that a plugin brings for its own trial runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medrl.core.registry import import_target
from medrl.core.types import PluginInfo


def write_trial(info: PluginInfo, folder: Path) -> dict[str, Any]:
    """Let a plugin write the data of its trial runs; return its config values by dotted names.

    Args:
        info: Of a plugin that names a function in `trial`.
        folder: To write below; it need not exist.

    Raises:
        PluginError: The function cannot be imported.
    """
    from medrl.core.config import flatten

    write = import_target(info.trial, what=f"plugin '{info.name}', trial data")
    return {key: _plain(value) for key, value in flatten(write(folder)).items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
