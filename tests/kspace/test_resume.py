"""A run that was killed and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import json
import signal

import pytest

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.core.runtime import Runtime
from medrl.plugins.kspace import running

config, manager = json.loads(Path(sys.argv[1]).read_text()), PluginManager.create(third_party=False)
original = Runtime.log

def fit(run, *, die_at=0, stage=""):
    def log(self, step, **values):
        original(self, step, **values)
        here = self.run.dir.name == stage if stage else self.run.dir == Path(run)
        if here and step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    Runtime.log = log
    running.run(build_train_job(manager, "kspace", config, Path(run)))

for task in sys.argv[2:]:
    name, run = task.split("=")
    kind, _, where = name.partition("@")
    stage, _, step = where.partition(":")
    fit(run, die_at=int(step or 0), stage=stage)
"""


@pytest.fixture
def compare(tmp_path, tools):
    """Train a config once as it is, and once killed at some steps and resumed; return both run folders."""

    def run(values, *kills):
        config = tmp_path / "config.json"
        config.write_text(json.dumps(values))
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        codes, said = tools.launch(tmp_path, SCRIPT, config, f"fit={whole}")
        assert codes == [0], said
        for where in kills:
            codes, said = tools.launch(tmp_path, SCRIPT, config, f"kill@{where}={broken}")
            assert codes == [-signal.SIGKILL], said
        codes, said = tools.launch(tmp_path, SCRIPT, config, f"fit={broken}")
        assert codes == [0], said
        return whole, broken

    return run


def same(tools, whole, broken):
    found = tools.differences(tools.states(whole), tools.states(broken))
    rows = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in tools.records(run)]
        for run in (whole, broken)
    ]
    return found, rows


def test_a_reward_run_goes_on_bit_for_bit(compare, tiny, tools):
    whole, broken = compare(tiny({"stage": "reward", "seg": {"steps": 6}}), ":3")
    found, rows = same(tools, whole, broken)
    assert found == []
    assert rows[0] == rows[1]


def test_a_policy_run_goes_on_bit_for_bit_in_every_phase(compare, tiny, tools, reward_run):
    values = tiny({"inputs": {"reward": str(reward_run)}, "train": {"checkpoint_every": 1}})
    # Killed while imitating, while the policy collects, and in PPO.
    whole, broken = compare(values, ":3", ":6", ":10")
    found, rows = same(tools, whole, broken)
    assert found == []
    assert rows[0] == rows[1]


def test_a_policy_run_that_was_killed_in_its_reward_model_goes_on_bit_for_bit(compare, tiny, tools):
    values = tiny({"warm": {"states": 8}, "ppo": {"updates": 2}})
    whole, broken = compare(values, "reward:3")
    found, rows = same(tools, whole, broken)
    assert found == []
    assert rows[0] == rows[1]
    stages = [run / "stages" / "reward" for run in (whole, broken)]
    assert tools.differences(*(tools.states(run) for run in stages)) == []


def test_a_faithful_policy_from_nothing_goes_on_bit_for_bit(compare, tiny, tools, reward_run):
    values = tiny(
        {
            "inputs": {"reward": str(reward_run)},
            "agent": {"name": "kspace.faithful", "steps_dim": 8, "feature_dim": 8},
            "reward": {"mode": "asmr", "rec": 0.0, "seg": 1.0, "delay_step": 1},
            "budget": {"shared": True},
            "sampler": {"kind": "weighted"},
            "warm": {"kind": "none"},
            "ppo": {"updates": 3, "group": 1, "normalise": "minibatch", "epochs": 1},
            "train": {"checkpoint_every": 1},
        },
        without=("agent",),
    )
    whole, broken = compare(values, ":2")
    found, rows = same(tools, whole, broken)
    assert found == []
    assert rows[0] == rows[1]


def test_a_policy_run_that_was_killed_in_a_crossed_reward_model_goes_on_bit_for_bit(compare, tiny, tools):
    values = tiny({"seg": {"crossed": 2}, "warm": {"states": 8}, "ppo": {"updates": 2}})
    whole, broken = compare(values, "1:3", ":2")
    found, rows = same(tools, whole, broken)
    assert found == []
    assert rows[0] == rows[1]
    for part in ("0", "1"):
        stages = [run / "stages" / "reward" / "crossed" / part for run in (whole, broken)]
        assert tools.differences(*(tools.states(run) for run in stages)) == []
