"""A method of somebody else, installed with pip: it is listed, trained with PPO, resumed, and used by key."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow

GREEDY = """
import json, sys
from pathlib import Path
import torch
from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.manager import PluginManager

manager = PluginManager.create()
env = manager.registry("environments").build("cine.columns", columns=8, budget=2, num_envs=64)
policy = manager.registry("agents").build("cine.column", columns=8)
captured = manager.registry("metrics").get("cine.captured")

def greedy():
    observation = env.reset(seed=5)
    for _ in range(2):
        observation, *_ = env.step(policy.best(observation, env.action_masks()))
    return captured(env.profiles, env.acquired)

env.reset(seed=5)
possible = env.profiles.topk(2, dim=-1).values.sum(-1) / env.profiles.sum(-1)
untrained = greedy()
checkpoint = load_checkpoint(find_checkpoint(Path(sys.argv[1]), "last"), method="cine")
policy.load_state_dict(checkpoint.states["policy"])
print(json.dumps([untrained.mean().item(), greedy().mean().item(), possible.mean().item()]))
"""

CONFORMS = """
from medrl.core.testing import check_plugin
print([str(finding) for finding in check_plugin("cine")])
"""

CHECK_ENV = """
import warnings
from gymnasium.utils.env_checker import check_env
from medrl.core.manager import PluginManager
from medrl.core.rl.env import GymnasiumAdapter
env = PluginManager.create().registry("environments").build("cine.columns", num_envs=1)
with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", message=".*render.*|.*spec.*|.*not within the observation space.*")
    check_env(GymnasiumAdapter(env), skip_render_check=True)
print("checked")
"""


@pytest.fixture(scope="module")
def trained(plugin_environment, tmp_path_factory):
    """Train the fixture method once through the command line and return its run folder."""
    folder = tmp_path_factory.mktemp("cine") / "run"
    done = plugin_environment.medrl("train", "cine", "-o", str(folder), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return folder


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_method_is_listed_with_its_distribution(plugin_environment):
    done = plugin_environment.medrl("methods", "--json")
    assert done.returncode == 0, done.stderr
    assert "choose the k-space columns of a cine scan" in done.stdout
    done = plugin_environment.medrl("plugins", "info", "cine", "--json")
    assert done.returncode == 0, done.stderr
    assert "medrl-cine" in done.stdout
    assert "1.2.0" in done.stdout


def test_the_plugin_passes_the_conformance_suite(plugin_environment):
    done = plugin_environment.run("-c", CONFORMS)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_its_environment_passes_the_checker_of_gymnasium(plugin_environment):
    done = plugin_environment.run("-c", CHECK_ENV)
    assert done.stdout.strip() == "checked", done.stderr


def test_its_agent_learns_with_the_ppo_of_core(plugin_environment, trained):
    done = plugin_environment.run("-c", GREEDY, str(trained))
    assert done.returncode == 0, done.stderr
    untrained, learnt, possible = json.loads(done.stdout)
    assert untrained < 0.1 * possible
    assert learnt > 0.95 * possible


def test_the_run_folder_is_complete(trained):
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert "1.2.0" in json.dumps(manifest)
    rewards = [record["reward"] for record in records(trained) if "reward" in record]
    assert len(rewards) == 40
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])


def test_its_observer_saw_the_end_of_the_run(trained):
    assert (trained / "cine_outcome.txt").read_text() == "finished"


def test_its_options_and_presets_reach_the_config(plugin_environment, tmp_path):
    run = tmp_path / "run"
    done = plugin_environment.medrl(
        "train", "cine", "-o", str(run), "--preset", "smoke", "--budget", "3", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    config = (run / "config.yaml").read_text()
    assert "budget: 3" in config
    assert "max_steps: 2" in config


def test_an_interrupted_run_goes_on_to_the_same_weights(plugin_environment, tmp_path):
    same = """
import sys
from pathlib import Path
import torch
from medrl.core.checkpoint import find_checkpoint, load_checkpoint
found = [load_checkpoint(find_checkpoint(Path(path), "last")) for path in sys.argv[1:]]
first, second = (checkpoint.states["policy"] for checkpoint in found)
print(first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first))
"""
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    for arguments in (
        ("train", "cine", "-o", str(straight), "--max-steps", "4", "--device", "cpu"),
        ("train", "cine", "-o", str(halved), "--max-steps", "2", "--device", "cpu"),
        ("resume", str(halved), "--extend-to", "4"),
    ):
        done = plugin_environment.medrl(*arguments)
        assert done.returncode == 0, done.stderr
    done = plugin_environment.run("-c", same, str(straight), str(halved))
    assert done.stdout.strip() == "True", done.stderr


def test_its_tool_is_a_command_of_its_own(plugin_environment):
    done = plugin_environment.medrl("cine", "show-profile", "--columns", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.072", "0.197", "0.534", "0.197"]


def test_another_method_may_name_its_agent_but_not_one_that_does_not_exist(plugin_environment, tmp_path):
    done = plugin_environment.medrl(
        "train", "cine", "-o", str(tmp_path / "run"), "--set", "agent.name=cine.colunm", "--device", "cpu"
    )
    assert done.returncode == 2
    assert "did you mean 'cine.column'" in done.stderr
    assert "Traceback" not in done.stderr
