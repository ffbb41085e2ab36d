"""The documentation is that of the code."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def made():
    spec = importlib.util.spec_from_file_location("medrl_docs_make", DOCS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_every_page_that_is_made_from_the_code_is_up_to_date(made):
    stale = [
        name
        for name, text in made.items()
        if not (DOCS / name).is_file() or (DOCS / name).read_text() != text
    ]
    assert stale == [], "run: make docs"


def test_every_config_page_belongs_to_a_method(made):
    there = {f"config/{path.name}" for path in (DOCS / "config").iterdir()}
    assert there == {name for name in made if name.startswith("config/")}


def test_every_command_and_every_config_key_is_documented(made):
    from medrl.cli.main import COMMANDS
    from medrl.core.config import config_model, known_keys
    from medrl.core.manager import PluginManager

    for name in COMMANDS:
        assert f"### medrl {name}\n" in made["cli.md"]
    manager = PluginManager.create(third_party=False)
    for method in ("graft", "kspace", "rl4seg", "rl4seg3d", "spars"):
        for key in known_keys(config_model(manager, method)):
            parent = key.rpartition(".")[0]
            assert (
                f"`{key}`" in made[f"config/{method}.md"] or f"`{parent}`" in made[f"config/{method}.md"]
            ), key


def test_no_page_names_a_folder_of_the_machine_that_made_it(made):
    for name, text in made.items():
        assert str(Path.home()) + os.sep not in text, name
        assert str(DOCS.parent) not in text, name


def test_every_link_between_pages_leads_somewhere():
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
