"""The environment of two windows."""

from __future__ import annotations

import pytest
import torch

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.rl.env import BatchedEnv
from medrl.core.rl.playing import problems_of
from medrl.plugins.spars import rewards
from medrl.plugins.spars.env import HuntEnv
from medrl.plugins.spars.gym_env import HuntGym
from medrl.plugins.spars.playing import hunt
from medrl.plugins.spars.rewards import Outcome, SignReward
from medrl.plugins.spars.table import ScoreTable

POSITIVE_X, NEGATIVE_X = 4, 5


def table_of(scores, fakes, *, window=(16, 16, 8), shape=(24, 16, 8), stride=8):
    """A table of one volume whose scores are given."""
    table = ScoreTable(
        [torch.zeros(shape)], fakes.DenseScorer(), window=window, stride=stride, start="corner_center"
    )
    table.full(0)
    table.values().copy_(torch.tensor(scores).flatten())
    return table


def two_windows(scores, fakes, **settings):
    """Two windows side by side along x, the first at node 0 and the second at node 1, in one volume."""
    env = HuntEnv(table_of(scores, fakes), SignReward(), num_envs=1, **settings)
    env.begin(torch.zeros(1, dtype=torch.int64), torch.tensor([[[0, 0, 0], [1, 0, 0]]]))
    return env


def test_the_sign_of_the_difference_is_paid_and_ties_earn_nothing_unless_told_otherwise():
    pairs = torch.tensor([[0.2, 0.1], [0.1, 0.2], [0.1, 0.1]])
    assert SignReward().of(pairs).tolist() == [1.0, -1.0, 0.0]
    assert SignReward("win").of(pairs).tolist() == [1.0, -1.0, 1.0]
    assert torch.equal(SignReward().of(pairs.flip(1)), -SignReward().of(pairs))
    with pytest.raises(ConfigError, match="tie"):
        SignReward("loss")


def test_a_score_above_tau_terminates_and_the_terminal_map_has_it(fakes):
    voxels = 16 * 16 * 8
    for score, ends in ((0.30, False), (0.31, True)):
        env = two_windows([0.1, score], fakes, tau=0.3, maps=True, writers="agent", horizon=9)
        _, _, over, cut, info = env.step_both(torch.tensor([[0, NEGATIVE_X]]))
        assert (bool(over[0]), bool(cut[0])) == (False, False)
        assert info["maps"] == {}
        before = float(env.map(0).sum.double().sum())
        assert before == pytest.approx(0.1 * voxels, rel=1e-4)
        _, _, over, cut, info = env.step_both(torch.tensor([[POSITIVE_X, 0]]))
        assert (bool(over[0]), bool(cut[0])) == (ends, False)
        found = info["maps"][0] if ends else env.map(0)
        assert float(found.sum.double().sum()) == pytest.approx(before + score * voxels, rel=1e-4)


def test_each_window_paints_its_own_score(fakes):
    env = two_windows([0.2, 0.0], fakes, writers="agent")
    env.step_both(torch.tensor([[0, 0]]))
    assert float(env.map(0).sum.double().sum()) == pytest.approx(409.6, rel=1e-5)


def test_the_original_painting_gives_the_first_window_the_score_of_the_second(fakes):
    env = two_windows([0.2, 0.05], fakes, writers="agent", painting="original", maps=True, horizon=2)
    _, _, _, _, info = env.step_both(torch.tensor([[0, 0]]))
    assert float(env.map(0).sum.max()) == pytest.approx(0.05, abs=1e-7)
    _, _, over, cut, info = env.step_both(torch.tensor([[0, 0]]))
    assert (bool(over[0]), bool(cut[0])) == (False, True)
    assert float(info["maps"][0].sum.max()) == pytest.approx(0.1, abs=1e-6)
    # An episode that terminates loses its map.
    lost = two_windows([0.2, 0.5], fakes, painting="original", maps=True)
    _, _, over, _, info = lost.step_both(torch.tensor([[0, 0]]))
    assert bool(over[0])
    assert not info["maps"][0].sum.any()


def test_both_windows_paint_where_both_write(fakes):
    env = two_windows([0.2, 0.1], fakes, writers="both")
    env.step_both(torch.tensor([[0, 0]]))
    found = env.map(0)
    assert float(found.sum.double().sum()) == pytest.approx(0.3 * 2048, rel=1e-5)
    assert int(found.count.sum()) == 2 * 2048
    assert float(found.maximum[12, 0, 0]) == pytest.approx(0.2)


def test_the_horizon_truncates_and_ended_episodes_take_no_step(fakes):
    env = two_windows([0.2, 0.1], fakes, tau=None, horizon=3)
    for number in range(3):
        observation, reward, over, cut, _ = env.step_both(torch.tensor([[0, 0]]))
        assert float(reward[0]) == 1.0
        assert (bool(over[0]), bool(cut[0])) == (False, number == 2)
    assert float(observation["time"][0]) == 0.0
    assert int(env.lead[0]) == 3
    with pytest.raises(RuntimeFault, match="have ended"):
        env.step_both(torch.tensor([[0, 0]]))
    with pytest.raises(RuntimeFault, match="expected 1 pairs"):
        env.step_both(torch.tensor([[6, 0]]))


def test_corners_stay_inside_for_1000_random_steps_and_masks_tell_what_moves(make_table):
    env = HuntEnv(make_table(), SignReward(), num_envs=8, tau=None, horizon=50, bounds="noop", seed=3)
    env.reset()
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        legal = HuntEnv.action_masks(_masked(env))
        before = env.node.clone()
        actions = torch.randint(6, (8, 2), generator=generator)
        _, _, over, cut, _ = env.step_both(actions)
        assert torch.equal((env.node[:, 0] != before[:, 0]).any(dim=1), legal.gather(1, actions[:, :1])[:, 0])
        corner = env.lattices.corner(env.case.unsqueeze(1), env.node)
        assert bool(((corner >= 0) & (corner + 8 <= env.lattices.shape[env.case].unsqueeze(1))).all())
        if bool((over | cut).any()):
            env.reset(indices=torch.nonzero(over | cut).flatten())
    assert bool(env.action_masks().all())


def _masked(env):
    """The same environment with masks."""
    import copy

    found = copy.copy(env)
    found.bounds = "mask"
    return found


@pytest.mark.parametrize("number", [0, 5, 63])
def test_one_game_has_the_same_course_alone_and_among_64(make_table, number):
    def play(num_envs, first):
        env = HuntEnv(make_table(), SignReward(), num_envs=num_envs, horizon=8, tau=0.4, seed=7, first=first)
        env.reset()
        course = []
        for _ in range(30):
            at = number - first
            seen = {name: value[at].clone() for name, value in env.observation().items()}
            actions = env.noise(0).masked_fill(~env.action_masks(), -torch.inf).argmax(dim=1)
            _, reward, over, cut, info = env.step(actions)
            course.append((seen, float(reward[at]), info["scores"][at].tolist(), bool(over[at])))
            if bool((over | cut).any()):
                env.reset(indices=torch.nonzero(over | cut).flatten())
        return course

    alone, among = play(1, number), play(64, 0)
    for one, other in zip(alone, among, strict=True):
        assert one[1:] == other[1:]
        assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def test_volumes_of_several_sizes_are_played_together(make_table, fakes):
    volumes = fakes.blobs(3, sizes=[(24, 24, 16), (16, 20, 12), (17, 12, 20)])
    env = HuntEnv(make_table(volumes=volumes), SignReward(), num_envs=16, tau=None, horizon=6, maps=True)
    env.reset()
    for _ in range(6):
        _, _, _, cut, info = env.step(env.action_masks().float().argmax(dim=1))
    assert bool(cut.all())
    assert set(env.case.tolist()) == {0, 1, 2}
    assert all(info["maps"][k].sum.shape == volumes[int(env.case[k])].shape for k in range(16))


def test_a_state_that_is_loaded_goes_on_in_the_same_way(make_table):
    def steps(env, count):
        found = []
        for _ in range(count):
            actions = env.noise(0).masked_fill(~env.action_masks(), -torch.inf).argmax(dim=1)
            observation, reward, over, cut, _ = env.step(actions)
            if bool((over | cut).any()):
                observation = env.reset(indices=torch.nonzero(over | cut).flatten())
            found.append([reward, *observation.values(), *env.observation(1).values()])
        return found

    def make(seed):
        reward = rewards.ShapedReward(scales=(1.0,), found=1.0)
        return HuntEnv(make_table(), reward, num_envs=3, horizon=5, seed=seed)

    env = make(1)
    env.reset()
    steps(env, 7)
    state = env.state_dict()
    expected = steps(env, 12)
    other = make(2)
    other.load_state_dict(state)
    for one, two in zip(expected, steps(other, 12), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_trail_tells_where_somebody_was_and_no_observation_tells_a_score(make_table):
    env = HuntEnv(make_table(), SignReward(), num_envs=1, tau=None)
    env.begin(torch.zeros(1, dtype=torch.int64), torch.tensor([[[1, 1, 1], [4, 4, 2]]]))
    assert not env.observation()["trail"].any()
    env.step_both(torch.tensor([[POSITIVE_X, 0]]))
    env.step_both(torch.tensor([[NEGATIVE_X, 1]]))
    trail = env.observation()["trail"][0]
    # It was at (2, 1, 1), is at (1, 1, 1): here, and at the neighbour by +x.
    assert trail[:7].tolist() == [1, 0, 0, 0, 0, 1, 0]
    assert trail[7:].tolist() == pytest.approx([0.5 / 5, 0.0, 0.0])
    swapped = env.observation(1)
    assert swapped["node"][0].tolist() == env.observation()["node"][0].flip(0).tolist()
    before = {name: value.clone() for name, value in env.observation().items()}
    env.table.values().mul_(0.5)
    assert all(torch.equal(before[name], value) for name, value in env.observation().items())


def test_dense_rewards_pay_what_a_move_gained(make_table):
    base = {
        "scores": torch.tensor([[0.3, 0.1]]),
        "before": torch.tensor([[0.1, 0.1]]),
        "wide": torch.tensor([[0.05, 0.1]]),
        "wide_before": torch.tensor([[0.02, 0.1]]),
        "fresh": torch.tensor([[True, False]]),
    }
    outcome = Outcome(**base)
    assert float(rewards.DifferenceReward(2.0)(outcome)) == pytest.approx(0.4)
    assert float(rewards.MultiscaleReward()(outcome)) == -1.0
    shaped = rewards.ShapedReward(sign=1.0, shaping=10.0, found=2.0)
    assert float(shaped(outcome)) == pytest.approx(1 + 0.3 + 0.6, abs=1e-6)
    narrow = rewards.ShapedReward(sign=0.0, shaping=10.0, scales=(1.0,))
    assert float(narrow(outcome)) == pytest.approx(2.0, abs=1e-6)
    assert (narrow.scales, narrow.needs_before) == ((), True)
    with pytest.raises(ConfigError, match="scales"):
        rewards.MultiscaleReward(scales=())


def test_wide_scores_and_scores_before_reach_the_reward(make_table):
    seen = []

    class Watching(rewards.ShapedReward):
        def __call__(self, outcome):
            seen.append(outcome)
            return super().__call__(outcome)

    table = make_table()
    for scales in ((1.0,), (1.0, 2.0)):
        env = HuntEnv(table, Watching(scales=scales), num_envs=2, tau=None, seed=1)
        env.reset()
        first = env.node.clone()
        env.step(env.action_masks().float().argmax(dim=1))
        pair = env.case.unsqueeze(1).expand(-1, 2)
        assert torch.equal(seen[-1].scores, table.at(pair, env.node))
        if scales == (1.0,):
            assert torch.equal(seen[-1].before, table.at(pair, first))
        else:
            wide = table.scaled(int(env.case[0]), scales)
            assert float(seen[-1].wide[0, 0]) == float(wide[tuple(env.node[0, 0].tolist())])
            assert float(seen[-1].wide_before[0, 1]) == float(wide[tuple(first[0, 1].tolist())])


@pytest.mark.parametrize("view", [False, True])
def test_the_environment_passes_all_checks(view):
    assert problems_of(lambda number: hunt(num_envs=number, volumes=2, horizon=4, view=view)) == []
    assert isinstance(hunt(volumes=1), BatchedEnv)


def test_the_gymnasium_view_hides_the_number_of_the_volume():
    from gymnasium.utils.env_checker import check_env

    env = HuntGym(hunt(num_envs=1, volumes=2, horizon=3, view=True))
    check_env(env, skip_render_check=True)
    observation, _ = env.reset(seed=1)
    assert set(observation) == {"node", "time", "trail", "view"}
    assert env.action_masks().any()


def test_gymnasium_makes_the_environment_by_its_name():
    import gymnasium

    env = gymnasium.make("medrl.plugins.spars.gym_env:medrl/SparsHunt-v0", volumes=1, horizon=2)
    observation, _ = env.reset(seed=3)
    assert env.observation_space.contains(observation)
    action = int(env.unwrapped.action_masks().argmax())
    observation, reward, _, _, info = env.step(action)
    assert reward in (-1.0, 0.0, 1.0)
    assert info["scores"].shape == (2,)
    assert env.unwrapped.env.num_envs == 1


def test_settings_that_do_not_fit_are_refused_together(make_table):
    with pytest.raises(ConfigError) as found:
        HuntEnv(
            make_table(),
            SignReward(),
            num_envs=0,
            observe=("score",),
            weights=torch.ones(2),
            start="corner_center",
        )
    for part in ("0 games", "score", "3 numbers", "corner_center"):
        assert part in str(found.value)
    env = HuntEnv(make_table(), SignReward(), num_envs=1)
    with pytest.raises(ConfigError, match="pairs of places"):
        env.begin(torch.zeros(1, dtype=torch.int64), torch.tensor([[[9, 0, 0], [0, 0, 0]]]))


def test_starts_are_drawn_or_where_the_lattice_begins(make_table):
    for start in ("centre", "corner_center"):
        env = HuntEnv(make_table(start=start), SignReward(), num_envs=4, start=start)
        env.reset()
        assert torch.equal(env.node, env.lattices.start[env.case].unsqueeze(1).expand(-1, 2, -1))
    env = HuntEnv(make_table(), SignReward(), num_envs=64, seed=1)
    env.reset()
    assert all(len(env.node[..., axis].unique()) == env.lattices.counts[0, axis] for axis in range(3))
    weighted = HuntEnv(make_table(), SignReward(), num_envs=32, weights=torch.tensor([0.0, 1.0, 0.0]))
    weighted.reset()
    assert set(weighted.case.tolist()) == {1}
