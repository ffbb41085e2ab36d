"""Write ``plugins/METHOD/defaults.yaml`` from its config model: run this after changing a field.

::

    python tests/write_defaults.py METHOD...
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from medrl.core.config import config_model
from medrl.core.manager import PluginManager

HEAD = """\
# Every setting of {0} with its default, written by tests/write_defaults.py from config.py.
# `medrl train {0} --print-config` shows where each value of a run comes from.
method: {0}
"""


def render(method: str) -> str:
    """Return the text of the file."""
    model = config_model(PluginManager.create(third_party=False), method)
    lines: list[str] = []
    _block(model, model(method=method).model_dump(mode="json"), "", lines)
    return HEAD.format(method) + "\n".join(lines) + "\n"


def path(method: str) -> Path:
    """The file."""
    return Path(str(resources.files(f"medrl.plugins.{method}") / "defaults.yaml"))


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
    for name in sys.argv[1:]:
        path(name).write_text(render(name), encoding="utf-8")
