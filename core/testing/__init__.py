"""The conformance suite for plugins: what every plugin must hold, checked on an installed one.

In the tests of a plugin::

    from medrl.core.testing import check_plugin

    def test_the_plugin_keeps_the_rules_of_medrl():
        assert check_plugin("cine", train=True) == []

or, one test for each rule, in its pyproject.toml::

    [tool.pytest.ini_options]
    medrl_plugins = ["cine"]

``medrl plugins check cine`` does the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medrl.core.errors import PluginError
from medrl.core.manager import PluginManager
from medrl.core.testing.findings import Finding, NotChecked, Outcome
from medrl.core.testing.rules import RULES, TRAINING_RULES, Subject, check_rule, examine_rule
from medrl.core.testing.static import (
    HEAVY,
    check_commands,
    check_config,
    check_import_weight,
    check_parts,
)

__all__ = [
    "HEAVY",
    "RULES",
    "TRAINING_RULES",
    "Finding",
    "NotChecked",
    "Outcome",
    "Subject",
    "check_commands",
    "check_config",
    "check_import_weight",
    "check_parts",
    "check_plugin",
    "check_rule",
    "examine_rule",
]


def check_plugin(
    name: str,
    *,
    manager: PluginManager | None = None,
    train: bool = False,
    values: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> list[Finding]:
    """Return every rule that an installed plugin breaks; an empty list means that it conforms.

    Checked are: it loads and its hooks are well formed; `plugin.py` and the command modules import nothing
    heavy; every registered part can be imported and is of its kind; commands are named lazily, resolve, and
    their options name existing config keys; the config model and ``defaults.yaml`` have the same keys, every
    own key is described, and every preset is valid.

    Args:
        name: Of the plugin.
        manager: Knows it; by default one under the policy that applies.
        train: Also train it on a small synthetic dataset: a loss falls, checkpoints are equal, a stopped run
            goes on bit for bit, two ranks work, predictions lie on their images, environments pass the
            checker of gymnasium. Takes a minute or so.
        values: Nested config values for these runs.
        folder: Where they write; by default a temporary folder, removed at the end.
    """
    manager = manager or PluginManager.create()
    try:
        plugin = manager.load(name)
    except PluginError as error:
        return [Finding("loads", str(error), error.do or "medrl plugins info " + name)]
    findings: list[Finding] = []
    with Subject(plugin, manager, values=values or {}, folder=folder) as subject:
        for rule in [rule for rule in RULES if train or rule not in TRAINING_RULES]:
            findings += check_rule(rule, subject)
    return findings
