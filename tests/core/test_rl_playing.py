"""Playing environments, and finding out those that break the rules."""

from __future__ import annotations

import re

import gymnasium
import numpy as np
import pytest
import torch

from medrl.core.errors import ConfigError
from medrl.core.rl.playing import play, problems_of


class Corridor:
    """Collect what lies behind each of four doors, each of which opens once; two doors an episode."""

    doors = 4

    def __init__(self, num_envs=1):
        self.num_envs = num_envs
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (self.doors,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(self.doors)
        self.generator = torch.Generator()
        self.prizes = torch.zeros(num_envs, self.doors)
        self.opened = torch.zeros(num_envs, self.doors)

    def reset(self, seed=None, indices=None):
        if seed is not None:
            self.generator.manual_seed(seed)
        rows = torch.arange(self.num_envs) if indices is None else indices
        self.prizes[rows] = torch.rand(len(rows), self.doors, generator=self.generator)
        self.opened[rows] = 0.0
        return self.opened.clone()

    def step(self, actions):
        rows = torch.arange(self.num_envs)
        if bool((self.opened[rows, actions] > 0).any()):
            raise ValueError("this door is open")
        self.opened[rows, actions] = 1.0
        done = self.opened.sum(-1) >= 2
        return self.opened.clone(), self.prizes[rows, actions], done, torch.zeros_like(done), {}

    def action_masks(self):
        return self.opened == 0


def test_an_environment_that_keeps_the_rules_has_no_problems():
    assert problems_of(Corridor) == []


def test_greedy_takes_the_best_doors_and_random_any():
    env = Corridor()
    (greedy,) = play(env, "greedy", seed=3)
    best = env.prizes[0].topk(2)
    assert list(greedy.actions) == best.indices.tolist()
    assert greedy.rewards == tuple(best.values.tolist())
    assert greedy.ended == "terminated"
    firsts = {episode.actions[0] for episode in play(env, "random", episodes=30, seed=3)}
    assert firsts == {0, 1, 2, 3}


def test_an_episode_is_the_same_however_many_are_played():
    (first, second) = play(Corridor(), episodes=2, seed=5)
    assert [first] == list(play(Corridor(), episodes=1, seed=5))
    assert second != first


def test_play_refuses_batches_unknown_policies_and_greed_without_doors():
    with pytest.raises(ConfigError, match="holds 2 episodes"):
        next(play(Corridor(2)))
    with pytest.raises(ConfigError, match="unknown: 'best'"):
        next(play(Corridor(), "best"))
    env = Corridor()
    env.action_space = gymnasium.spaces.Box(0.0, 1.0, (2,))
    with pytest.raises(ConfigError, match="it tries every action"):
        next(play(env, "greedy"))


class Endless(Corridor):
    def step(self, actions):
        observation, reward, done, truncated, info = super().step(actions)
        self.opened[:] = 0.0
        return observation, reward, torch.zeros_like(done), truncated, info


class Forgetful(Corridor):
    def reset(self, seed=None, indices=None):
        return super().reset(seed, None)


class Unseeded(Corridor):
    def reset(self, seed=None, indices=None):
        found = super().reset(None, indices)
        self.prizes[:] = torch.rand(self.num_envs, self.doors)
        return found


class FlatRewards(Corridor):
    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        return observation, reward.sum(), *rest


class NumberedEnds(Corridor):
    def step(self, actions):
        observation, reward, done, truncated, info = super().step(actions)
        return observation, reward, done.float(), truncated, info


class Outside(Corridor):
    def step(self, actions):
        observation, *rest = super().step(actions)
        return observation * 2.0, *rest


class Raising(Corridor):
    def step(self, actions):
        raise LookupError("no door")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (Endless, "did not end within 1000 steps"),
        (Forgetful, r"reset\(indices=\[1\]\) changed episodes 0 and 2"),
        (Unseeded, "two environments with one seed take different courses"),
        (Unseeded, "it draws from the global random streams"),
        (FlatRewards, r"rewards are \(\) torch.float32, expected \(3,\) floating point"),
        (NumberedEnds, r"terminated is \(3,\) torch.float32, expected \(3,\) torch.bool"),
        (Outside, "step: observation .* lies outside of Box"),
        (Raising, "a batch of three: LookupError: .*no door"),
    ],
)
def test_a_broken_rule_is_named(broken, said):
    found = "\n".join(problems_of(broken))
    assert re.search(said, found), found
