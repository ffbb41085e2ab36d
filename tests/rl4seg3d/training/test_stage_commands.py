"""Tools that do one stage alone give what the stages of a loop give, and say what they lack."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from medrl.core.errors import ConfigError
from medrl.plugins.rl4seg3d import commands_stages as commands


@pytest.fixture
def settings(small, tmp_path):
    """The small config as a file, for the tools."""
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({"method": "rl4seg3d", **small()}))  # which is YAML too
    return ["-c", str(path)]


def run(manager, command, *arguments):
    return CliRunner().invoke(command, [str(item) for item in arguments], obj=manager)


def test_every_stage_can_be_done_by_a_tool_of_its_own(manager, settings, tmp_path, loop_run, tools):
    names = ("source", "style", "corrector", "anatomical", "landmark", "ppo")
    made = {name: tmp_path / name for name in names}
    pairs = tools.stage_of(loop_run, "pairs_1")
    calls = [
        (commands.pretrain, "source", []),
        (commands.pretrain, "style", ["--style", "--source-run", made["source"]]),
        (commands.train_corrector, "corrector", []),
        (commands.train_reward, "anatomical", ["--pairs", pairs, "--actor", made["style"]]),
        (commands.train_reward, "landmark", ["--pairs", pairs, "--net", "landmark"]),
        (
            commands.ppo,
            "ppo",
            [
                *("--actor", made["style"], "--style-run", made["style"]),
                *("--anatomical-run", made["anatomical"], "--landmark-run", made["landmark"]),
                *("--corrector-run", made["corrector"]),
            ],
        ),
    ]
    for command, name, arguments in calls:
        done = run(manager, command, *settings, "-o", made[name], *arguments)
        assert done.exit_code == 0, (name, done.output, done.exception)
        assert f"done: {made[name]}" in done.output
        assert "next: medrl" in done.output
    for name, part, stage in (
        ("style", "actor", "style"),
        ("corrector", "corrector", "corrector"),
        ("anatomical", "reward", "anatomical_1"),
        ("landmark", "reward", "landmark_1"),
        ("ppo", "actor", "ppo_1"),
    ):
        mine, theirs = tools.states(made[name])[part], tools.states(tools.stage_of(loop_run, stage))[part]
        assert tools.same(mine, theirs), name


@pytest.mark.parametrize(
    ("command", "arguments", "what"),
    [
        (commands.ppo, [], "inputs.actor"),
        (commands.train_reward, [], "inputs.pairs"),
        (commands.pretrain, ["--style"], "inputs.source"),
        (commands.ppo, ["--set", "target.root=null"], "target.root"),
        (commands.train_reward, ["--set", "reward.init=random", "--actor", "x"], "--actor"),
        (commands.train_reward, ["--net", "landmark", "--actor", "x"], "--actor"),
    ],
    ids=["actor", "pairs", "source", "target", "no use", "landmark"],
)
def test_what_a_tool_lacks_is_named(manager, settings, tmp_path, command, arguments, what):
    done = run(manager, command, *settings, "-o", tmp_path / "run", *arguments)
    assert isinstance(done.exception, ConfigError)
    assert done.exception.what == what
    assert done.exception.do
