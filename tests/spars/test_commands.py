"""The command line of spars: light to import, options as config keys, errors that help."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from medrl.core.config import known_keys
from medrl.core.errors import ConfigError, DataError
from medrl.core.jobs import ConfigOption
from medrl.plugins.spars import commands
from medrl.plugins.spars.config import SparsConfig

HEAVY = ("torch", "monai", "torchio", "nibabel", "numpy", "scipy", "pydantic")


def test_plugin_and_commands_import_nothing_heavy():
    code = "import sys, medrl.plugins.spars.plugin, medrl.plugins.spars.commands; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in HEAVY if f"'{name}'" in done.stdout] == []


def test_every_option_names_a_config_key():
    keys = known_keys(SparsConfig)
    options = [item for item in commands.train.params if isinstance(item, ConfigOption)]
    assert len(options) >= 8
    assert [item.config_key for item in options if item.config_key not in keys] == []


def test_every_command_explains_itself_and_each_option():
    for command in (
        commands.train,
        commands.predict,
        commands.train_classifier,
        commands.evaluate,
        commands.sweep,
    ):
        assert command.help
        for item in command.params:
            if isinstance(item, click.Option):
                assert item.help, f"{command.name} {item.opts}"


def test_the_policies_of_the_option_are_those_that_can_be_made():
    from medrl.plugins.spars.hunting import NAMES
    from medrl.plugins.spars.play_config import MapConfig

    allowed = MapConfig.model_json_schema()["properties"]["policy"]["enum"]
    assert set(commands.POLICIES) == set(allowed) == set(NAMES)


def test_every_registered_part_can_be_imported(manager):
    for kind in ("models", "agents", "environments", "rewards", "datasets"):
        registry = manager.registry(kind)
        own = [key for key in registry.keys() if key.startswith("spars.")]  # noqa: SIM118
        assert own, kind
        for key in own:
            assert callable(registry.get(key))


def test_without_labels_of_images_training_says_what_to_write(manager, make_job, tmp_path):
    from medrl.core.phantoms.abdomen import write_abdomen
    from medrl.plugins.spars import running

    root = write_abdomen(
        tmp_path / "data", cases=4, test_cases=0, shape=(16, 16, 8), radius=(1.5, 2.0), distractors=(0, 0)
    )
    (root / "presence.csv").unlink()
    with pytest.raises(DataError, match=r"presence\.csv") as error:
        running.run(make_job(tmp_path / "run", {"data": {"root": str(root)}}))
    assert "case_id,label" in error.value.do
    assert not (tmp_path / "run").exists()


def test_without_a_dataset_training_says_how_to_name_one(make_job, tmp_path):
    from medrl.plugins.spars import running

    with pytest.raises(ConfigError, match=r"data\.root"):
        running.run(make_job(tmp_path / "run", {"data": {"root": None}}))


def test_the_tool_trains_the_classifier_alone(manager, phantoms, tiny, tmp_path):
    import yaml

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"method": "spars", **tiny()}))
    words = ["-c", str(config), "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(commands.train_classifier, words, obj=manager, catch_exceptions=False)
    assert done.exit_code == 0
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()
    assert not (tmp_path / "run" / "stages").exists()
