"""The command line of graft: light to import, options as config keys, tools end to end."""

from __future__ import annotations

import json
import subprocess
import sys

import click
from click.testing import CliRunner

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.config import known_keys
from medrl.core.jobs import ConfigOption
from medrl.plugins.graft import commands
from medrl.plugins.graft.config import GraftConfig

HEAVY = ("torch", "monai", "torchio", "nibabel", "numpy", "scipy", "pydantic")


def test_plugin_and_commands_import_nothing_heavy():
    code = "import sys, medrl.plugins.graft.plugin, medrl.plugins.graft.commands; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in HEAVY if f"'{name}'" in done.stdout] == []


def test_every_option_names_a_config_key():
    keys = known_keys(GraftConfig)
    options = [item for item in commands.train.params if isinstance(item, ConfigOption)]
    assert len(options) > 8
    assert [item.config_key for item in options if item.config_key not in keys] == []


def test_every_command_explains_itself_and_each_option():
    for command in (
        commands.train,
        commands.predict,
        commands.demo,
        commands.train_teachers,
        commands.extract_features,
    ):
        assert command.help
        for item in command.params:
            if isinstance(item, click.Option):
                assert item.help, f"{command.name} {item.opts}"


def run(manager, command, *arguments):
    return CliRunner().invoke(command, [str(item) for item in arguments], obj=manager)


def settings(phantoms):
    assignments = ["model.name=graft.tiny", "model.features=[4,8]", "sample.size=[8,32,32]", "data.folds=3"]
    assignments += ["train.batch_size=1", "train.device=cpu", "train.checkpoint_every=2"]
    return ["--data", phantoms, *(part for text in assignments for part in ("--set", text))]


def test_teachers_features_and_student_by_the_tools(manager, phantoms, tmp_path):
    shared = settings(phantoms)
    done = run(
        manager, commands.train_teachers, *shared, "-o", tmp_path / "t", "--teachers", 2, "--max-steps", 2
    )
    assert done.exit_code == 0, done.output
    assert "teacher 2 of 2" in done.output
    meta = load_checkpoint(find_checkpoint(tmp_path / "t" / "teacher_1")).meta
    assert meta["config"]["data"]["fold"] == 1
    done = run(
        manager,
        commands.extract_features,
        *shared,
        "--teachers",
        tmp_path / "t",
        "-o",
        tmp_path / "f",
        "--taps",
        "neg1,neg2",
        "--storage",
        "fp16",
    )
    assert done.exit_code == 0, done.output
    assert "8 cases written, 0 kept" in done.output
    record = json.loads((tmp_path / "f" / "teacher_0" / "teacher.json").read_text())
    assert record["dtype"] == "fp16"
    assert set(record["channels"]) == {"neg1", "neg2", "logits"}
    assert "pooled" not in record
    small = ["--teacher-storage", "pooled", "--trust-checkpoint"]
    done = run(
        manager,
        commands.extract_features,
        *shared,
        "--teachers",
        tmp_path / "t",
        "-o",
        tmp_path / "s",
        *small,
    )
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "s" / "teacher_1" / "teacher.json").read_text())["pooled"] is True


def test_unknown_config_keys_are_told_all_at_once(manager, phantoms, tmp_path):
    done = run(
        manager,
        commands.train_teachers,
        "--data",
        phantoms,
        "-o",
        tmp_path / "t",
        "--set",
        "train.max_step=3",
        "--set",
        "modle.name=graft.tiny",
    )
    assert "train.max_step: unknown key" in str(done.exception)
    assert "modle" in str(done.exception)


def test_a_wrong_tap_is_one_clear_error(manager, phantoms, tmp_path):
    done = run(
        manager,
        commands.extract_features,
        "--data",
        phantoms,
        "--teachers",
        tmp_path,
        "-o",
        tmp_path / "f",
        "--taps",
        "neg3",
    )
    assert "is not neg1, neg2" in str(done.exception)
