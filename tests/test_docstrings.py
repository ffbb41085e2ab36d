"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import medrl.core

ROOT = Path(medrl.core.__file__).parent.parent
MODULES = sorted(
    ".".join(("medrl", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for part in ("core", "plugins", "cli")
    for path in (ROOT / part).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_give_what_they_show(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
