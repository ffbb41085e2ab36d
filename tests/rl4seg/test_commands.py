"""The command line of rl4seg: light to import, options as config keys, single stages, errors that help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import yaml
from click.testing import CliRunner

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.config import known_keys
from medrl.core.errors import ConfigError
from medrl.core.jobs import ConfigOption
from medrl.plugins.rl4seg import commands
from medrl.plugins.rl4seg.config import Rl4segConfig

HEAVY = ("torch", "monai", "torchio", "nibabel", "numpy", "scipy", "pydantic")
TOOLS = (commands.pretrain, commands.train_corrector, commands.train_reward, commands.ppo, commands.pg)


def test_plugin_and_commands_import_nothing_heavy():
    code = (
        "import sys, medrl.plugins.rl4seg.plugin, medrl.plugins.rl4seg.commands; print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in HEAVY if f"'{name}'" in done.stdout] == []


def test_every_option_names_a_config_key():
    keys = known_keys(Rl4segConfig)
    options = [item for item in commands.train.params if isinstance(item, ConfigOption)]
    assert len(options) >= 8
    assert [item.config_key for item in options if item.config_key not in keys] == []


def test_every_command_explains_itself_and_each_option():
    for command in (commands.train, commands.predict, *TOOLS):
        assert command.help
        for item in command.params:
            if isinstance(item, click.Option):
                assert item.help, f"{command.name} {item.opts}"


def test_the_stages_of_the_option_are_those_of_the_config():
    (option,) = [item for item in commands.train.params if item.name == "stage"]
    allowed = Rl4segConfig.model_json_schema()["properties"]["stage"]["enum"]
    assert list(option.type.choices) == allowed


@pytest.mark.parametrize(("text", "key"), [("composite", "rl4seg.composite"), ("other.judge", "other.judge")])
def test_a_reward_without_a_plugin_is_one_of_rl4seg(text, key):
    assert commands.RegistryKey().convert(text, None, None) == key


@pytest.fixture
def settings(small, tmp_path):
    """The small config as a file, for the tools."""
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({"method": "rl4seg", **small()}))  # which is YAML too
    return ["-c", str(path)]


def run(manager, command, *arguments):
    return CliRunner().invoke(command, [str(item) for item in arguments], obj=manager)


def test_every_stage_can_be_done_by_a_tool_of_its_own(manager, settings, tmp_path, loop_run, tools):
    """Done one by one, from the same config, the stages give the weights of the loop."""
    made = {name: tmp_path / name for name in ("source", "style", "corrector", "reward", "ppo")}
    pairs = tools.stage_of(loop_run, "pairs_1")
    calls = [
        (commands.pretrain, "source", []),
        (commands.pretrain, "style", ["--style", "--source-run", made["source"]]),
        (commands.train_corrector, "corrector", []),
        (commands.train_reward, "reward", ["--pairs", pairs, "--actor", made["style"]]),
        (
            commands.ppo,
            "ppo",
            [
                "--actor",
                made["style"],
                "--reward-run",
                made["reward"],
                "--corrector-run",
                made["corrector"],
            ],
        ),
    ]
    for command, name, arguments in calls:
        done = run(manager, command, *settings, "-o", made[name], *arguments)
        assert done.exit_code == 0, (name, done.output, done.exception)
        assert f"done: {made[name]}" in done.output
    for name, part, stage in (
        ("style", "actor", "style"),
        ("corrector", "corrector", "corrector"),
        ("reward", "reward", "reward_1"),
        ("ppo", "actor", "ppo_1"),
    ):
        mine, theirs = tools.states(made[name])[part], tools.states(tools.stage_of(loop_run, stage))[part]
        assert tools.differences(mine, theirs) == [], name


def test_pg_is_the_plain_policy_gradient(manager, settings, tmp_path, loop_run, tools):
    inputs = [
        *("--actor", tools.stage_of(loop_run, "style")),
        *("--reward-run", tools.stage_of(loop_run, "reward_1")),
        *("--corrector-run", tools.stage_of(loop_run, "corrector")),
    ]
    done = run(manager, commands.pg, *settings, "-o", tmp_path / "pg", *inputs)
    assert done.exit_code == 0, done.output
    meta = load_checkpoint(find_checkpoint(tmp_path / "pg", "last")).meta
    assert meta["config"]["ppo"]["algorithm"] == "pg"
    assert "guard" not in load_checkpoint(find_checkpoint(tmp_path / "pg", "last")).states


def test_the_corrector_needs_no_target(manager, settings, tmp_path):
    done = run(
        manager,
        commands.train_corrector,
        *settings,
        "--set",
        "target.root=null",
        "-o",
        tmp_path / "corrector",
    )
    assert done.exit_code == 0, done.output
    assert "inputs.corrector=" in done.output


@pytest.mark.parametrize(
    ("command", "arguments", "what"),
    [
        (commands.ppo, [], "inputs.actor"),
        (commands.train_reward, [], "inputs.pairs"),
        (commands.pretrain, ["--style"], "inputs.source"),
        (commands.ppo, ["--set", "target.root=null"], "target.root"),
        (commands.train_reward, ["--set", "reward.init=random", "--actor", "x"], "--actor"),
    ],
    ids=["actor", "pairs", "source", "target", "no use"],
)
def test_what_a_tool_lacks_is_named(manager, settings, tmp_path, command, arguments, what):
    done = run(manager, command, *settings, "-o", tmp_path / "run", *arguments)
    assert isinstance(done.exception, ConfigError)
    assert done.exception.what == what
    assert done.exception.do


def test_a_misspelt_setting_is_told_with_the_nearest(manager, settings, tmp_path):
    done = run(
        manager, commands.train_corrector, *settings, "--set", "corector.steps=3", "-o", tmp_path / "run"
    )
    assert "'corrector'" in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_wrong_paths_leave_no_run_folder_behind(manager, settings, tmp_path, make_job):
    from medrl.core.errors import MedrlError
    from medrl.plugins.rl4seg import loop

    wrong = [
        {"target": {"root": str(tmp_path / "nowhere")}},
        {"data": {"root": str(tmp_path / "nowhere")}},
        {"rules": "ekko"},
        {"model": {"name": "graft.tiny", "channels": None}},
        {"reward": {"name": "rl4seg.nothing"}},
    ]
    for values in wrong:
        with pytest.raises(MedrlError):
            loop.run(make_job(tmp_path / "run", values))
        assert not (tmp_path / "run").exists()


def test_a_trial_run_without_data_makes_its_own(tmp_path, monkeypatch):
    from medrl.cli.main import run as run_command_line

    monkeypatch.chdir(tmp_path)
    arguments = ["--plain", "train", "rl4seg", "--fast-dev-run", "-o", "run", "--device", "cpu"]
    assert run_command_line([*arguments, "--set", "pairs.count=16"]) == 0
    stages = json.loads((tmp_path / "run" / "stages.json").read_text())["stages"]
    assert len(stages) == 7
    assert {record["state"] for record in stages.values()} == {"done"}
    ppo = load_checkpoint(find_checkpoint(tmp_path / "run" / "stages" / "06_ppo_1", "last"))
    assert ppo.meta["step"] == 2
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"] == {"name": "rl4seg.unet_small", "channels": [4, 8]}
    assert config["pairs"]["count"] == 16
    assert Path(config["data"]["root"]).name == "source"
    assert Path(config["target"]["root"]).name == "target"
    assert not Path(config["data"]["root"]).exists()


def test_a_trial_run_of_a_preset_takes_the_data_of_the_trial_and_keeps_the_sizes_of_the_preset(
    manager, tmp_path
):
    from medrl.cli.train import write_synthetic
    from medrl.core.config import resolve_method

    config = resolve_method(manager, "rl4seg").config
    call = SimpleNamespace(manager=manager, method="rl4seg", shared={"preset": "small", "config": None})
    found = write_synthetic(call, config, tmp_path / "data")
    assert set(found) == {"data.root", "data.layout", "target.root", "target.layout"}
    assert (Path(found["target.root"]) / "imagesTs").is_dir()
