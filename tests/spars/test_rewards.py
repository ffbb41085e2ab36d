"""What a move is paid: rewards by registry key, also those of other plugins."""

from __future__ import annotations

import pytest
import torch

from medrl.core.discovery import PluginEntry
from medrl.core.errors import ConfigError, PluginError
from medrl.core.manager import PluginManager
from medrl.plugins.spars import rewards, running
from medrl.plugins.spars.play_config import EnvConfig
from medrl.plugins.spars.rewards import Outcome, build_reward

OTHERS = """
import torch

from medrl.core import PluginInfo, hookimpl


class Highest:
    scales = ()
    needs_before = False

    def __init__(self, *, factor=1.0, tie="zero"):
        self.factor, self.tie = factor, tie

    def __call__(self, outcome):
        return self.factor * outcome.scores[..., 0]


class Flat(Highest):
    def __call__(self, outcome):
        return outcome.scores


class Broken(Highest):
    def __call__(self, outcome):
        raise RuntimeError("no idea")


class Dice:
    def __call__(self, actions, truth):
        return actions


@hookimpl
def medrl_plugin_info():
    return PluginInfo(name="others", api=1, summary="rewards of somebody else", license="Apache-2.0")


@hookimpl
def medrl_register_rewards(registry):
    for part in (Highest, Flat, Broken, Dice):
        registry.add(part.__name__.lower(), part, summary="a reward")
"""
OWN = ("spars.difference", "spars.multiscale", "spars.shaped", "spars.sign")


def outcome():
    scores, before = torch.tensor([[0.4, 0.2], [0.1, 0.3]]), torch.tensor([[0.1, 0.2], [0.2, 0.3]])
    fresh = torch.ones(2, 2, dtype=torch.bool)
    return Outcome(scores=scores, before=before, wide=1.0 - scores, wide_before=before, fresh=fresh)


@pytest.fixture
def others(tmp_path, monkeypatch, manager):
    """A manager with a plugin of somebody else, which has rewards."""
    (tmp_path / "others_plugin.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(tmp_path)
    entry = PluginEntry(
        name="others", distribution="others", version="", module="others_plugin", origin="bundled"
    )
    return PluginManager([*manager.entries(), entry], policy=manager.policy)


def test_every_reward_of_spars_has_a_key_and_pays_as_it_does_by_itself(manager):
    registered = [entry.key for entry in manager.registry("rewards").entries() if entry.plugin == "spars"]
    assert tuple(registered) == OWN
    same = {
        "spars.difference": rewards.DifferenceReward(),
        "spars.multiscale": rewards.MultiscaleReward(),
        "spars.shaped": rewards.ShapedReward(shaping=3.0),
        "spars.sign": rewards.SignReward(),
    }
    for name, expected in same.items():
        found = build_reward(EnvConfig(reward=name, shaping=3.0), manager, dense=True)
        assert type(found) is type(expected)
        assert (found.scales, found.needs_before) == (expected.scales, expected.needs_before)
        assert torch.equal(found(outcome()), expected(outcome()))


def test_a_name_without_a_plugin_is_a_reward_of_spars(manager):
    assert EnvConfig(reward="shaped").reward == "spars.shaped"
    assert EnvConfig().reward == "spars.sign"


def test_settings_of_the_environment_and_own_ones_reach_the_reward(manager):
    tied = build_reward(EnvConfig(reward="sign", tie="win"), manager, dense=True)
    assert tied.tie == "win"
    found = build_reward(EnvConfig(reward="shaped", reward_params={"found": 0.5}), manager, dense=True)
    assert (found.shaping, found.found, found.scales) == (10.0, 0.5, (1.0, 2.0, 4.0))


def test_without_a_dense_scorer_the_shaped_reward_takes_the_score_itself(manager):
    found = build_reward(EnvConfig(reward="shaped"), manager, dense=False)
    assert (found.scales, found.needs_before) == ((), True)


def test_a_reward_of_another_plugin_is_chosen_by_its_key(others):
    env = EnvConfig(reward="others.highest", reward_params={"factor": 2.0}, tie="win")
    found = build_reward(env, others, dense=True)
    assert found.tie == "win"
    assert found(outcome()).tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"reward": "sgn"}, "unknown key, did you mean 'spars.sign'"),
        ({"reward": "spar.sign"}, "no plugin 'spar', did you mean 'spars.sign'"),
        ({"reward": "sign", "reward_params": {"scale": 2.0}}, "parameters do not fit"),
        ({"reward": "others.dice"}, "no scales and no needs_before"),
        ({"reward": "others.flat"}, r"gave \[3, 2\], expected \[3\]"),
        ({"reward": "shaped", "reward_params": {"scales": [-1.0]}}, "-1"),
    ],
)
def test_what_is_no_reward_of_moves_is_refused_in_one_line(others, env, why):
    with pytest.raises(ConfigError, match=why) as error:
        build_reward(EnvConfig(**env), others, dense=True)
    assert "\n" not in f"{error.value.what}: {error.value.why}"


def test_a_reward_that_breaks_is_named(others):
    with pytest.raises(PluginError, match=r"env\.reward 'others\.broken'.*no idea"):
        build_reward(EnvConfig(reward="others.broken"), others, dense=True)


def test_an_unknown_reward_is_refused_before_a_run_folder_is_made(make_job, tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean 'spars\.shaped'"):
        running.run(make_job(tmp_path / "run", {"env": {"reward": "shapd"}}))
    assert not (tmp_path / "run").exists()
