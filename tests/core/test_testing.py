"""The conformance suite: each broken rule is found, named and comes with an advice."""

from __future__ import annotations

import pytest

from medrl.core.manager import PluginManager
from medrl.core.testing import Finding, check_plugin


def findings(name, rule=None):
    found = check_plugin(name, manager=PluginManager.create())
    assert all(item.what and item.do for item in found)
    return [item.what for item in found if rule in (None, item.rule)]


def test_a_plugin_that_only_registers_parts_conforms(write_plugin):
    write_plugin(
        "parts",
        """
        @hookimpl
        def medrl_register_losses(registry):
            registry.add("counter", "collections:Counter", summary="counts")
        """,
    )
    assert findings("parts") == []


def test_a_plugin_that_does_not_load_is_the_only_finding(write_plugin):
    write_plugin("bad", "raise ValueError('no')")
    found = check_plugin("bad", manager=PluginManager.create())
    assert [item.rule for item in found] == ["loads"]
    assert "ValueError: no" in found[0].what
    assert found[0].do == "pip install --upgrade --force-reinstall medrl-bad"


@pytest.mark.parametrize("module", ["numpy", "pydantic"])
def test_a_heavy_import_of_the_front_door_is_found(write_plugin, module):
    name = write_plugin("heavy", f"import {module}")
    assert findings("heavy", "import weight") == [f"importing {name} imports {module}"]


def test_a_heavy_import_of_the_commands_is_found(write_plugin, tmp_path):
    (tmp_path / "site" / "medrl_heavy_commands.py").write_text(
        "import click, numpy\n@click.command('train')\ndef train(job): 'Train.'\n"
    )
    write_plugin(
        "heavy",
        "@hookimpl\ndef medrl_register_commands(commands): commands.train('medrl_heavy_commands:train')\n",
    )
    assert findings("heavy", "import weight") == ["importing medrl_heavy_commands imports numpy"]


def test_a_part_that_cannot_be_imported_or_is_registered_as_an_object_is_found(write_plugin):
    write_plugin(
        "parts",
        """
        @hookimpl
        def medrl_register_losses(registry):
            registry.add("gone", "collections:Gone", summary="absent")
            registry.add("eager", abs, summary="an object")
        """,
    )
    eager, gone = findings("parts", "parts")
    assert eager == "'parts.eager' of losses is registered as an object"
    assert "'collections' has no 'Gone'" in gone


def test_wrong_commands_are_found(write_plugin):
    write_plugin(
        "wrong",
        """
        import click

        @click.command("train")
        @click.option("--speed")
        def train(job):
            "Train."

        @click.command("predict")
        def predict(job, overlap):
            "Predict."

        @click.command("demo")
        def demo():
            "Demonstrate."

        @click.command("silent")
        def silent(): ...

        @hookimpl
        def medrl_register_commands(commands):
            commands.train(train)
            commands.predict(f"{__name__}:predict")
            commands.demo(f"{__name__}:demo")
            commands.evaluate(f"{__name__}:absent")
            commands.tool(f"{__name__}:silent")
        """,
    )
    found = findings("wrong", "commands")
    for expected in (
        "registered as objects: train",
        "tool 'silent' has no help text",
        "the train command does not take its option 'speed'",
        "there is a train command but no config model",
        "the predict command waits for 'overlap', which is no option of it",
        "the demo command takes no job",
    ):
        assert expected in found
    assert any("has no 'absent'" in item for item in found)
    assert len(found) == 7


CONFIG = """
from medrl.core.config import Block, MethodConfig

class Inner(Block):
    depth: int = 1

class TheConfig(MethodConfig):
    inner: Inner = Inner()
    "An inner block."
    width: int = 2
    "Width in voxels."
"""

TRAINED = """
import click
from medrl.core import config_option

@hookimpl
def medrl_plugin_info():
    return PluginInfo(name="trained", api=1, summary="x", config="{package}.config:TheConfig")

@click.command("train")
@config_option("--width", key="width", type=int)
@config_option("--deep", key="inner.dept", type=int)
def train(job):
    "Train."

@hookimpl
def medrl_register_commands(commands):
    commands.train(f"{{__name__}}:train")
"""


def write_trained(write_plugin, tmp_path, package, defaults):
    folder = tmp_path / "site" / package
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "config.py").write_text(CONFIG)
    for name, text in defaults.items():
        (folder / name).write_text(text)
    write_plugin("trained", TRAINED.format(package=package))


def test_defaults_descriptions_and_option_keys_are_compared_with_the_config_model(write_plugin, tmp_path):
    write_trained(write_plugin, tmp_path, "medrl_trained_a", {"defaults.yaml": "method: trained\nwidth: 2\n"})
    found = check_plugin("trained", manager=PluginManager.create())
    assert found == [
        Finding(
            "commands",
            "option '--deep' of train is for the unknown config key 'inner.dept'",
            "did you mean 'inner.depth'?",
        ),
        Finding(
            "config",
            "defaults.yaml lacks 'inner.depth'",
            "add it with its value and a comment on its source",
        ),
        Finding(
            "config",
            "the field 'inner.depth' of the config model has no description",
            "write it below the field",
        ),
    ]


def test_an_invalid_default_or_preset_is_found(write_plugin, tmp_path):
    files = {
        "defaults.yaml": "method: trained\nwidth: 2\ninner: {depth: 1}\n",
        "preset_smoke.yaml": "widht: 3\n",
    }
    write_trained(write_plugin, tmp_path, "medrl_trained_b", files)
    found = findings("trained", "config")
    assert len(found) == 1
    assert "preset_smoke.yaml over defaults.yaml" in found[0]
    assert "widht: unknown key" in found[0]


def test_missing_defaults_are_found(write_plugin, tmp_path):
    write_trained(write_plugin, tmp_path, "medrl_trained_c", {})
    assert findings("trained", "config") == ["there is no defaults.yaml beside the config model"]
