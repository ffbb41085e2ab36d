"""The command line of kspace: light to import, options as config keys, tools, errors that help."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from medrl.core.config import known_keys
from medrl.core.errors import ConfigError
from medrl.core.jobs import ConfigOption
from medrl.plugins.kspace import commands
from medrl.plugins.kspace.config import KspaceConfig
from medrl.plugins.kspace.data_config import ScanConfig

HEAVY = ("torch", "monai", "torchio", "nibabel", "numpy", "scipy", "pydantic")
TOOLS = (
    commands.train_reward,
    commands.train_recon,
    commands.make_sampler,
    commands.export_png,
    commands.evaluate,
    commands.baselines,
    commands.export_mask,
)


def test_plugin_and_commands_import_nothing_heavy():
    code = (
        "import sys, medrl.plugins.kspace.plugin, medrl.plugins.kspace.commands; print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in HEAVY if f"'{name}'" in done.stdout] == []


def test_every_option_names_a_config_key():
    keys = known_keys(KspaceConfig)
    options = [item for item in commands.train.params if isinstance(item, ConfigOption)]
    assert len(options) >= 10
    assert [item.config_key for item in options if item.config_key not in keys] == []


def test_every_command_explains_itself_and_each_option():
    for command in (commands.train, commands.predict, *TOOLS):
        assert command.help
        for item in command.params:
            if isinstance(item, click.Option):
                assert item.help, f"{command.name} {item.opts}"


def test_the_readers_of_the_option_are_those_of_the_config():
    allowed = ScanConfig.model_json_schema()["properties"]["reader"]["enum"]
    assert list(commands.READERS) == allowed


def test_budgets_are_a_list_of_positive_numbers():
    assert commands._numbers(" 8,4,8 ") == (4, 8)
    assert commands._numbers("") == ()
    for text in ("4,x", "0", "-3"):
        with pytest.raises(ConfigError, match="no list of numbers"):
            commands._numbers(text)


def test_the_sampler_is_written_for_the_training_cases(manager, phantoms, tmp_path):
    target = tmp_path / "sampler.json"
    words = ["--data", str(phantoms), "-o", str(target), "--set", "sample.shape=[16,16]"]
    words += ["--set", "budget.train=[1,4]", "--set", "budget.eval=[2]"]
    done = CliRunner().invoke(commands.make_sampler, words, obj=manager, catch_exceptions=False)
    assert done.exit_code == 0
    content = json.loads(target.read_text())
    # Four of five patients with two frames of two slices each.
    assert len(content["ids"]) == len(content["weights"]) == 16
    assert sum(content["weights"]) == pytest.approx(round(sum(content["weights"])))


def test_png_are_written_with_a_sidecar(manager, phantoms, tmp_path):
    words = ["--data", str(phantoms), "-o", str(tmp_path / "png")]
    done = CliRunner().invoke(commands.export_png, words, obj=manager, catch_exceptions=False)
    assert done.exit_code == 0
    # Five patients to train on and two for the test.
    assert len(list((tmp_path / "png").glob("*/images/*.png"))) == 28
    assert len(list((tmp_path / "png").glob("*/meta.json"))) == 7
