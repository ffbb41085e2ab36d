"""The plugin for pytest: one test for each rule on each plugin that a project names."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from medrl.core.testing import RULES, TRAINING_RULES

ROOT = Path(__file__).parents[2]
QUICK = ["loads", *(rule for rule in RULES if rule not in TRAINING_RULES)]


@pytest.fixture
def run(write_plugin, tmp_path, no_policy):
    """Return a function that runs pytest in a process of its own, beside the plugins that were written."""

    def runner(*arguments):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MEDRL")}
        environment |= {"PYTHONPATH": str(tmp_path / "site"), "XDG_CONFIG_HOME": str(tmp_path / "xdg")}
        installed = ["-p", "no:medrl", "-p", "medrl.core.testing.pytest_plugin"]  # as its entry point does
        return subprocess.run(
            [sys.executable, "-m", "pytest", *installed, "-p", "no:cacheprovider", *arguments],
            cwd=no_policy,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return runner


def test_a_project_that_names_its_plugin_gets_one_test_for_each_rule(write_plugin, run, no_policy):
    write_plugin("healthy")
    (no_policy / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmedrl_plugins = ["healthy"]\n')
    done = run("--medrl-quick", "-v")
    assert done.returncode == 0, done.stdout
    lines = [line.split(" ")[0:3] for line in done.stdout.splitlines() if "medrl::healthy::" in line]
    assert len(lines) == len(QUICK)
    assert f"2 passed, {len(QUICK) - 2} skipped" in done.stdout


def test_a_rule_that_does_not_apply_is_skipped_with_its_reason(write_plugin, run):
    write_plugin("healthy")
    done = run("--medrl-plugin", "healthy", "--medrl-quick", "-rs")
    for reason in ("it registers no parts", "it registers no commands", "it has no config model"):
        assert reason in done.stdout


def test_a_broken_rule_fails_with_what_and_do_and_without_a_traceback(write_plugin, run):
    write_plugin("heavy", "import numpy")
    done = run("--medrl-plugin", "heavy", "--medrl-quick")
    assert done.returncode == 1
    assert "imports numpy" in done.stdout
    assert "do: import them inside the functions that use them" in done.stdout
    assert "Traceback" not in done.stdout
    assert f"1 failed, 1 passed, {len(QUICK) - 2} skipped" in done.stdout


def test_a_plugin_that_does_not_load_fails_with_its_reason(write_plugin, run):
    write_plugin("bad", "raise ValueError('no')")
    done = run("--medrl-plugin", "bad", "--medrl-quick", "-k", "loads")
    assert done.returncode == 1
    assert "ValueError: no" in done.stdout
    assert "do: pip install --upgrade --force-reinstall medrl-bad" in done.stdout


def test_rules_are_chosen_by_their_name(write_plugin, run):
    write_plugin("healthy")
    done = run("--medrl-plugin", "healthy", "-k", "config or learning")
    assert done.returncode == 0, done.stdout
    assert f"2 skipped, {len(RULES) - 1} deselected" in done.stdout


def test_a_project_that_names_no_plugin_gets_no_test(run):
    assert run().returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_medrl_offers_it_by_an_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"medrl": "medrl.core.testing.pytest_plugin"}


def test_it_costs_pytest_no_heavy_import():
    code = (
        "import sys, medrl.core.testing.pytest_plugin;"
        "print([name for name in ('torch', 'numpy', 'monai', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
