"""Who visits windows, and what it costs."""

from __future__ import annotations

import pytest
import torch

from medrl.core.errors import ConfigError
from medrl.plugins.spars.agent import CompactAgent
from medrl.plugins.spars.lattice import move, moves
from medrl.plugins.spars.observer import Observer
from medrl.plugins.spars.policies import (
    Episodes,
    GreedyLookAhead,
    RandomTiles,
    RandomWalk,
    Scan,
    SelfPlay,
    run,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def everyone(table):
    agent = CompactAgent(8)
    return [RandomWalk(), GreedyLookAhead(), Scan(), RandomTiles(), SelfPlay(agent, Observer.of(table))]


def test_the_scan_visits_every_window_once_and_tiles_see_everything(make_table):
    table = make_table()
    found = run(Scan(), table, 1, Episodes(), generator())
    assert found.windows_scored == len(found) == table.lattices[1].size
    assert torch.equal(found.scores.view(table.lattices[1].counts), table.full(1))
    assert torch.equal(found.final[0], found.corners[found.scores.argmax()])
    tiles = run(RandomTiles(), table, 1, Episodes(), generator())
    assert tiles.windows_scored == len(tiles) == len(table.lattices[1].tiles())
    assert len(tiles.corners.unique(dim=0)) == len(tiles)


@pytest.mark.parametrize("budget", [1, 7, 20, 40, 74, 10_000])
def test_no_policy_scores_more_windows_than_its_budget(make_table, budget):
    table = make_table()
    size = table.lattices[0].size
    assert (size, len(table.lattices[0].tiles())) == (75, 18)
    for policy in everyone(table):
        found = run(policy, table, 0, Episodes(episodes=2, steps=6, budget=budget), generator())
        assert found.windows_scored <= min(budget, size), policy.name
        least = 1 if policy.name == "greedy" and budget < 7 else min(budget, size) - 14
        if policy.name in ("scan", "tiles", "random", "self-play"):
            assert found.windows_scored == min(budget, size), policy.name
        elif budget >= 7:
            assert found.windows_scored >= max(1, least), policy.name
        different = len(found.corners.unique(dim=0))
        assert different <= found.windows_scored


def test_walks_move_by_one_place_and_scores_are_those_of_the_table(make_table):
    table = make_table()
    for policy in (RandomWalk(), GreedyLookAhead(), SelfPlay(CompactAgent(8), Observer.of(table))):
        found = run(policy, table, 2, Episodes(episodes=3, steps=5), generator())
        assert len(found) == 3 * 5 * 2
        assert torch.equal(found.scores, table.scores(torch.full((30,), 2), found.corners))
        assert found.final.shape == (6, 3)
        node = table.lattices[2].node(found.corners).view(3, 5, 2, 3)
        assert bool(((node[:, 1:] - node[:, :-1]).abs().sum(-1) == 1).all())
        assert found.episode.tolist() == [k for k in range(3) for _ in range(10)]
        assert found.step.tolist() == [k for _ in range(3) for k in range(5) for _ in range(2)]
        assert found.agent.tolist() == [0, 1] * 15


def test_greedy_goes_to_the_best_neighbour_and_pays_for_all_it_looked_at(make_table):
    table = make_table()
    plan = Episodes(episodes=1, steps=4, agents=1, start="centre")
    found = run(GreedyLookAhead(), table, 0, plan, generator())
    lattice, full = table.lattices[0], table.full(0)
    place, looked = lattice.start_node(), set()
    for corner in found.corners:
        around = move(place.expand(6, 3), torch.arange(6), torch.tensor(lattice.counts))
        values = full[around[:, 0], around[:, 1], around[:, 2]]
        legal = lattice.legal(place)
        looked |= {tuple(node) for node in around.tolist()}
        place = lattice.node(corner)
        assert float(full[tuple(place.tolist())]) == float(values[legal].max())
    assert found.windows_scored == len(looked)


def test_equal_neighbours_are_chosen_by_chance(make_table, fakes):
    table = make_table(volumes=[torch.zeros(40, 40, 40)])
    plan = Episodes(episodes=200, steps=1, agents=1, start="centre")
    found = run(GreedyLookAhead(), table, 0, plan, generator())
    steps = table.lattices[0].node(found.corners) - table.lattices[0].start_node()
    counts = [int((steps == way).all(dim=1).sum()) for way in moves()]
    assert sum(counts) == 200
    assert min(counts) > 15


def test_expensive_windows_are_scored_only_where_the_budget_pays(make_table, fakes):
    table = make_table(scorer=fakes.LazyScorer())
    found = run(RandomWalk(), table, 0, Episodes(episodes=8, steps=4, budget=10), generator())
    assert found.windows_scored == 10
    assert table.scored == 10


def test_the_same_seed_gives_the_same_visits_and_another_seed_others(make_table):
    table = make_table()
    for policy in everyone(table):
        plan = Episodes(episodes=2, steps=4)
        one, two, other = (run(policy, table, 0, plan, generator(seed)).corners for seed in (1, 1, 2))
        assert torch.equal(one, two)
        assert policy.name == "scan" or not torch.equal(one, other)


def test_self_play_sees_what_the_environment_shows_and_no_score(make_table):
    from medrl.plugins.spars.env import HuntEnv
    from medrl.plugins.spars.policies import Walk
    from medrl.plugins.spars.rewards import SignReward

    table = make_table()
    env = HuntEnv(table, SignReward(), num_envs=2, tau=None, horizon=6)
    node = torch.tensor([[[0, 1, 2], [3, 3, 1]], [[2, 2, 2], [1, 1, 1]]])
    env.begin(torch.ones(2, dtype=torch.int64), node)
    walk = Walk(table, 1, node, 6)
    for _ in range(4):
        for agent in (0, 1):
            one, other = env.observation(agent), walk.observation(agent)
            assert list(one) == list(other)
            assert all(torch.equal(one[name], other[name]) for name in one)
        actions = torch.stack([env.noise(k).argmax(dim=1) for k in (0, 1)], dim=1)
        env.step_both(actions)
        walk.go(actions)
    agent = CompactAgent(8)
    torch.nn.init.normal_(agent.policy.weight, generator=generator())
    policy, plan = SelfPlay(agent, Observer.of(table), greedy=True), Episodes(episodes=2, steps=4)
    before = run(policy, table, 1, plan, generator()).corners
    table.full(1)
    table.values().fill_(0.5)
    assert torch.equal(run(policy, table, 1, plan, generator()).corners, before)


def test_episodes_without_a_meaning_are_refused():
    for wrong in ({"episodes": 0}, {"steps": 0}, {"agents": 3}, {"budget": 0}):
        with pytest.raises(ConfigError, match="episodes"):
            Episodes(**wrong)
