"""Frozen copies, pools, and the opponents of the original."""

from __future__ import annotations

import pytest
import torch

from medrl.core.errors import ConfigError
from medrl.plugins.spars.agent import CompactAgent
from medrl.plugins.spars.env import HuntEnv
from medrl.plugins.spars.observer import Observer
from medrl.plugins.spars.opponents import DUMMY, LIVE, Opponents
from medrl.plugins.spars.rewards import SignReward


@pytest.fixture
def game(make_table):
    """A learner, its observer and an environment."""
    torch.manual_seed(0)
    table = make_table()
    env = HuntEnv(table, SignReward(), num_envs=32, tau=None, seed=1)
    env.reset()
    return CompactAgent(8), Observer.of(table), env


def change(agent):
    """Other weights."""
    with torch.no_grad():
        for weights in agent.parameters():
            weights.add_(0.1 * torch.rand_like(weights))


def logits(agent, observer, env):
    return agent.logits_and_values(observer.seen(env.observation(1), agent.needs))[0]


def test_a_frozen_opponent_stays_what_it_was_until_it_is_refreshed(game):
    agent, observer, env = game
    opponents = Opponents(agent, observer, every=32)
    before = logits(opponents.member(0), observer, env)
    change(agent)
    assert torch.equal(logits(opponents.member(0), observer, env), before)
    assert not torch.equal(logits(agent, observer, env), before)
    assert not opponents.tick(16)
    assert torch.equal(logits(opponents.member(0), observer, env), before)
    assert opponents.tick(16)
    assert opponents.numbers == (32,)
    at_refresh = logits(agent, observer, env)
    assert torch.equal(logits(opponents.member(32), observer, env), at_refresh)
    change(agent)
    assert torch.equal(logits(opponents.member(32), observer, env), at_refresh)


def test_a_live_opponent_changes_with_the_learner(game):
    agent, observer, env = game
    opponents = Opponents(agent, observer, kind="live")
    assert opponents.live
    assert opponents.numbers == ()
    with torch.no_grad():
        agent.policy.bias.copy_(torch.tensor([50.0, 0, 0, 0, 0, 0]))
    legal = env.action_masks(1)[:, 0]
    assert bool((opponents.act(env)[legal] == 0).all())
    with torch.no_grad():
        agent.policy.bias.copy_(torch.tensor([0, 50.0, 0, 0, 0, 0]))
    assert bool((opponents.act(env)[env.action_masks(1)[:, 1]] == 1).all())
    assert set(opponents.assigned(env).tolist()) == {LIVE}


def test_a_pool_keeps_eight_copies_and_meets_the_latest_most_often(game, make_table):
    agent, observer, _ = game
    opponents = Opponents(agent, observer, kind="pool", pool=8, latest=0.8, every=1)
    for _ in range(11):
        opponents.tick(1)
    assert opponents.numbers == tuple(range(4, 12))
    env = HuntEnv(make_table(), SignReward(), num_envs=4000, horizon=1, seed=3)
    env.reset()
    assigned = opponents.assigned(env)
    shares = [(assigned == number).float().mean().item() for number in opponents.numbers]
    assert shares[-1] == pytest.approx(0.8 + 0.2 / 8, abs=0.02)
    assert shares[:-1] == pytest.approx([0.2 / 8] * 7, abs=0.012)


def test_games_of_a_pool_are_moved_by_their_own_copies(game):
    agent, observer, env = game
    opponents = Opponents(agent, observer, kind="pool", pool=2, latest=0.5, every=1)
    change(agent)
    opponents.tick(1)
    with torch.no_grad():
        opponents.member(0).policy.bias.copy_(torch.tensor([50.0, 0, 0, 0, 0, 0]))
        opponents.member(1).policy.bias.copy_(torch.tensor([0, 0, 50.0, 0, 0, 0]))
    actions, assigned, legal = opponents.act(env), opponents.assigned(env), env.action_masks(1)
    assert set(assigned.tolist()) == {0, 1}
    for number, action in ((0, 0), (1, 2)):
        own = (assigned == number) & legal[:, action]
        assert bool((actions[own] == action).all())


def test_the_dummy_of_the_original_moves_up_until_the_first_copy(game):
    agent, observer, env = game
    for kind in ("frozen", "live"):
        opponents = Opponents(agent, observer, kind=kind, every=4, dummy_first=True)
        assert not opponents.live
        assert not opponents.act(env).any()
        assert set(opponents.assigned(env).tolist()) == {DUMMY}
        opponents.tick(4)
        assert opponents.act(env).any()
        assert opponents.live == (kind == "live")


def test_steps_won_drawn_and_lost_are_counted_for_each_member(game):
    agent, observer, env = game
    opponents = Opponents(agent, observer, every=1)
    scores = torch.zeros(32, 2)
    scores[:8, 0], scores[8:12, 1] = 0.5, 0.5
    opponents.record(env, scores)
    opponents.tick(1)
    opponents.record(env, scores.flip(1))
    assert opponents.results == {0: [8, 20, 4], 1: [4, 20, 8]}
    assert opponents.rates()[0] == (0.25, 0.625, 0.125)


def test_a_state_that_is_loaded_plays_the_same_moves(game):
    agent, observer, env = game
    opponents = Opponents(agent, observer, kind="pool", pool=3, latest=0.5, every=2)
    for _ in range(4):
        change(agent)
        opponents.tick(1)
    opponents.record(env, torch.rand(32, 2))
    state = opponents.state_dict()
    other = Opponents(CompactAgent(8), observer, kind="pool", pool=3, latest=0.5, every=2)
    other.load_state_dict(state)
    assert torch.equal(other.act(env), opponents.act(env))
    assert (other.steps, other.numbers, other.results) == (4, opponents.numbers, opponents.results)
    assert not any(weights.requires_grad for weights in other.member(4).parameters())


@pytest.mark.parametrize(
    "wrong", [{"pool": 9, "kind": "pool"}, {"every": 0}, {"latest": 1.5}, {"kind": "none"}]
)
def test_numbers_out_of_range_are_refused(game, wrong):
    agent, observer, _ = game
    with pytest.raises(ConfigError, match="opponents"):
        Opponents(agent, observer, **wrong)
