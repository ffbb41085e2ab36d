"""Every hook has an example in its specification; here each example is run as a plugin.

The names in the examples are those of the fixture method `cine`, so that what they register can be used.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from medrl.core import hookspecs
from medrl.core.manager import HOOKS, PluginManager
from medrl.core.registry import KINDS

CINE = Path(__file__).parents[1] / "plugin_host" / "fixtures" / "cine"


@dataclass
class Run:
    """Stands in for a run folder."""

    dir: Path


def example(hook: str) -> str:
    """Return the code in the docstring of a hook."""
    _, _, code = inspect.getdoc(getattr(hookspecs, hook)).partition("Example::")
    return textwrap.dedent(code).strip()


@pytest.fixture
def load(write_plugin, monkeypatch):
    """Return a function that loads the example of a hook as the plugin `cine`."""
    monkeypatch.syspath_prepend(str(CINE))

    def loaded(hook):
        write_plugin("cine", example(hook))
        manager = PluginManager.create()
        manager.load("cine")
        return manager

    yield loaded
    for name in [name for name in sys.modules if name.partition(".")[0] == "medrl_cine"]:
        del sys.modules[name]


def registered(manager, kind):
    entries = [entry for entry in manager.registry(kind).entries() if entry.plugin == "cine"]
    assert len(entries) == 1
    return entries[0].key, manager.registry(kind).get(entries[0].key)


def test_hook_medrl_plugin_info(load):
    info = load("medrl_plugin_info").info("cine")
    assert (info.name, info.api, info.license) == ("cine", 1, "Apache-2.0")


def test_hook_medrl_register_models(load):
    key, target = registered(load("medrl_register_models"), "models")
    assert (key, target.__name__) == ("cine.line", "LineNet")


def test_hook_medrl_register_losses(load):
    key, target = registered(load("medrl_register_losses"), "losses")
    assert (key, target.__name__) == ("cine.energy", "missed_energy")


def test_hook_medrl_register_agents(load):
    key, target = registered(load("medrl_register_agents"), "agents")
    assert (key, target.__name__) == ("cine.column", "ColumnPolicy")


def test_hook_medrl_register_environments(load):
    key, target = registered(load("medrl_register_environments"), "environments")
    assert (key, target.__name__) == ("cine.columns", "ColumnEnv")


def test_hook_medrl_register_rewards(load):
    key, target = registered(load("medrl_register_rewards"), "rewards")
    assert (key, target.__name__) == ("cine.gain", "energy_gain")


def test_hook_medrl_register_metrics(load):
    key, target = registered(load("medrl_register_metrics"), "metrics")
    assert (key, target.__name__) == ("cine.captured", "captured_energy")


def test_hook_medrl_register_datasets(load):
    key, target = registered(load("medrl_register_datasets"), "datasets")
    assert (key, target.__name__) == ("cine.profiles", "read_profiles")


def test_hook_medrl_register_commands(load):
    commands = load("medrl_register_commands").commands("cine")
    assert commands.train.name == "train"
    assert list(commands.tools) == ["show-profile"]


def test_hook_medrl_run_started(load, tmp_path):
    load("medrl_run_started").notify("medrl_run_started", run=Run(tmp_path))
    assert (tmp_path / "started.txt").read_text() == "yes"


def test_hook_medrl_metrics_logged(load, tmp_path):
    manager = load("medrl_metrics_logged")
    for step in (1, 2):
        manager.notify("medrl_metrics_logged", run=Run(tmp_path), step=step, metrics={"loss": 0.5 / step})
    assert (tmp_path / "loss.csv").read_text() == "1,0.5\n2,0.25\n"


def test_hook_medrl_checkpoint_saved(load, tmp_path):
    manager = load("medrl_checkpoint_saved")
    manager.notify("medrl_checkpoint_saved", run=Run(tmp_path), path=tmp_path / "last.pt", step=7)
    assert (tmp_path / "newest.txt").read_text() == "last.pt at step 7"


def test_hook_medrl_case_predicted(load, tmp_path):
    manager = load("medrl_case_predicted")
    manager.notify("medrl_case_predicted", run=None, case="case_1", path=tmp_path / "case_1.nii.gz")
    assert (tmp_path / "done.txt").read_text() == "case_1"


def test_hook_medrl_run_finished(load, tmp_path):
    load("medrl_run_finished").notify("medrl_run_finished", run=Run(tmp_path), outcome="interrupted")
    assert (tmp_path / "outcome.txt").read_text() == "interrupted"


def test_every_hook_has_a_test_of_its_own_here():
    tests = {name for name in globals() if name.startswith("test_hook_")}
    assert tests == {f"test_hook_{hook}" for hook in HOOKS}


def test_every_kind_of_part_has_its_hook():
    assert {f"medrl_register_{kind}" for kind in KINDS} < set(HOOKS)


def test_every_hook_is_described_in_one_first_line_and_typed():
    for hook in HOOKS:
        function = getattr(hookspecs, hook)
        assert inspect.getdoc(function).splitlines()[0].endswith((".", ":"))
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(item.annotation is not inspect.Parameter.empty for item in signature.parameters.values())


def test_the_reference_in_the_documentation_is_that_of_the_code():
    page = Path(__file__).parents[2] / "docs" / "hooks.md"
    assert page.read_text() == hookspecs.reference(), "run: make docs"


def test_the_front_door_for_plugins_imports_nothing_heavy():
    code = (
        "import sys; from medrl.core import hookimpl, PluginInfo, config_option;"
        "heavy = ('torch', 'monai', 'numpy', 'nibabel', 'torchio', 'scipy', 'pydantic', 'rich');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
