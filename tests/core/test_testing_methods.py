"""The bundled methods keep every rule of ``medrl plugins check``, each on the tiny data of its own trial."""

from __future__ import annotations

import pytest

from medrl.core.manager import PluginManager
from medrl.core.testing import RULES, Subject, examine_rule

pytestmark = [pytest.mark.slow, pytest.mark.ddp]

NO_ENVIRONMENT = {"environments": "it registers no environment"}
METHODS = {
    "graft": (NO_ENVIRONMENT, 1),
    "kspace": ({}, 1),
    "rl4seg": (NO_ENVIRONMENT, 2),
    "rl4seg3d": (NO_ENVIRONMENT, 2),
    "spars": ({}, 1),
}
"""By method: rules that do not apply, with the reason; and how often its run is stopped and resumed."""


@pytest.mark.parametrize("name", METHODS)
def test_a_bundled_method_keeps_every_rule_that_applies_to_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path / "cache"))
    not_checked, stops = METHODS[name]
    manager = PluginManager.create(third_party=False)
    with Subject(manager.load(name), manager, folder=tmp_path / "check") as subject:
        outcomes = {rule: examine_rule(rule, subject) for rule in RULES}
        stopped = subject.trial.resumed[1]
    assert [str(item) for outcome in outcomes.values() for item in outcome.findings] == []
    assert {rule: item.skipped for rule, item in outcomes.items() if item.skipped} == not_checked
    assert len(stopped) == stops
    assert any((tmp_path / "check" / "predicted").glob("*.nii.gz"))
