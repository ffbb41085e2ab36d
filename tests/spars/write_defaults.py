"""Write ``plugins/spars/defaults.yaml`` from the config model: run this after changing a field.

::

    python tests/spars/write_defaults.py
"""

from __future__ import annotations

import json
import re
import textwrap
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from medrl.plugins.spars.config import SparsConfig

HEAD = """\
# Every setting of spars with its default, written by tests/spars/write_defaults.py from config.py.
# `medrl train spars --print-config` shows where each value of a run comes from.
method: spars
"""


def render() -> str:
    """Return the text of the file."""
    lines: list[str] = []
    _block(SparsConfig, SparsConfig(method="spars").model_dump(mode="json"), "", lines)
    return HEAD + "\n".join(lines) + "\n"


def path() -> Path:
    """The file."""
    return Path(str(resources.files("medrl.plugins.spars") / "defaults.yaml"))


def _block(model: type[BaseModel], values: dict[str, Any], pad: str, lines: list[str]) -> None:
    for name, field in model.model_fields.items():
        if name in ("medrl", "method"):
            continue
        text = " ".join((field.description or "").replace("``", "`").split())
        mark = pad + "# "
        lines += textwrap.wrap(
            text,
            110,
            initial_indent=mark,
            subsequent_indent=mark,
            break_long_words=False,
            break_on_hyphens=False,
        )
        value, kind = values[name], field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines.append(f"{pad}{name}:")
            if kind.model_config.get("extra") == "allow":
                lines += [f"{pad}  {key}: {_value(item)}" for key, item in value.items()]
            else:
                _block(kind, value, pad + "  ", lines)
        else:
            lines.append(f"{pad}{name}: {_value(value)}")


def _value(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.]*", value):
        return value
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    path().write_text(render(), encoding="utf-8")
