"""The project that ``medrl plugins new`` writes: templates, and the function that fills them."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import re
from pathlib import Path
from string import Template

from medrl.core.errors import ConfigError
from medrl.core.types import PLUGIN_API

FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "init.py": "$package/__init__.py",
    "defaults.yaml": "$package/defaults.yaml",
    "preset_smoke.yaml": "$package/preset_smoke.yaml",
    **{
        f"{name}.py": f"$package/{name}.py"
        for name in (
            "plugin",
            "commands",
            "config",
            "models",
            "losses",
            "rewards",
            "agent",
            "env",
            "data",
            "parts",
            "train",
            "predict",
            "exporting",
        )
    },
    "test.py": "tests/test_$name.py",
}
"""Template to the file that it becomes."""

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


def write_project(name: str, folder: Path) -> list[Path]:
    """Write a plugin project; returns its files.

    Args:
        name: Of the plugin: lower-case letters, digits and underscores.
        folder: Of the project; it must be new or empty.

    Raises:
        ConfigError: The name is malformed, or the folder holds something.
    """
    if not NAME.fullmatch(name) or name.endswith("_"):
        raise ConfigError(
            f"plugin name {name!r}",
            why="expected lower-case letters, digits and underscores, a letter first, at most 40",
            do="medrl plugins new my_method",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"folder {folder}", why="it is not empty", do="name another one with -o FOLDER")
    values = {
        "name": name,
        "package": f"medrl_{name}",
        "distribution": distribution_of(name),
        "Class": "".join(word.capitalize() for word in name.split("_")),
        "medrl": importlib.metadata.version("medrl"),
        "api": str(PLUGIN_API),
    }
    source = importlib.resources.files(__package__)
    written = []
    for template, target in FILES.items():
        text = (source / f"{template}.tmpl").read_text(encoding="utf-8")
        path = folder / Template(target).substitute(values)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(text).substitute(values), encoding="utf-8")
        written.append(path)
    return written


def distribution_of(name: str) -> str:
    """Return the distribution that a project written for a plugin makes."""
    return f"medrl-{name.replace('_', '-')}"
