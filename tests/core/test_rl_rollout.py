import pytest
import torch

from medrl.core.errors import RuntimeFault
from medrl.core.rl.rollout import Collector, RolloutBuffer


class Count:
    """Observations count the steps of an episode; it terminates after `stop` or is cut after `cut` steps."""

    num_envs, observation_space, action_space = 2, None, None

    def __init__(self, stop, cut):
        self.stop, self.cut = torch.tensor(stop), torch.tensor(cut)
        self.time = torch.zeros(2)
        self.resets = []

    def reset(self, seed=None, indices=None):
        self.resets.append((seed, None if indices is None else indices.tolist()))
        self.time[slice(None) if indices is None else indices] = 0
        return self.time.unsqueeze(-1)

    def step(self, actions):
        self.time += 1
        terminated, truncated = self.time >= self.stop, self.time >= self.cut
        return self.time.unsqueeze(-1), self.time * 10, terminated, truncated, {}

    def action_masks(self):
        return torch.tensor([[True, False], [True, True]])


class Watch:
    """Acts 0; its value is ten times what it sees."""

    def __init__(self):
        self.masks = []

    def act(self, observation, mask, generator):
        self.masks.append(mask)
        return torch.zeros(2, dtype=torch.int64), torch.full((2,), -0.5), self.value(observation)

    def value(self, observation):
        return observation[:, 0] * 10


def steps(buffer, count, **more):
    for t in range(count):
        e = torch.full((2,), float(t))
        no = torch.zeros(2, dtype=torch.bool)
        buffer.add(e.unsqueeze(-1), torch.tensor([t, t + 100]), e, e, e, no, no, **more)


def test_a_collected_rollout_resets_ended_episodes_and_values_the_observation_left_behind():
    env, policy, buffer = Count(stop=[3, 99], cut=[99, 2]), Watch(), RolloutBuffer(4)
    collector = Collector(env, seed=5)
    last = collector.collect(policy, buffer)
    assert buffer["observations"][..., 0].tolist() == [[0, 0], [1, 1], [2, 0], [0, 1]]
    assert buffer["rewards"].tolist() == [[10, 10], [20, 20], [30, 10], [10, 20]]
    assert buffer["terminated"].tolist() == [[False, False], [False, False], [True, False], [False, False]]
    assert buffer["truncated"].tolist() == [[False, False], [False, True], [False, False], [False, True]]
    assert buffer["final_values"][1].tolist() == [20, 20]
    assert last.tolist() == [10, 0]
    assert env.resets == [(5, None), (None, [1]), (None, [0]), (None, [1])]
    assert [(item.reward, item.length) for item in collector.episodes] == [(30, 2), (60, 3), (30, 2)]


def test_collecting_goes_on_where_it_stopped():
    env, buffer = Count(stop=[99, 99], cut=[99, 99]), RolloutBuffer(2)
    collector = Collector(env)
    collector.collect(Watch(), buffer)
    collector.collect(Watch(), buffer)
    assert buffer["observations"][..., 0].tolist() == [[2, 2], [3, 3]]


def test_masks_reach_the_policy_and_the_buffer():
    policy, buffer = Watch(), RolloutBuffer(1)
    Collector(Count(stop=[9, 9], cut=[9, 9])).collect(policy, buffer)
    assert policy.masks[0].tolist() == [[True, False], [True, True]]
    assert buffer["masks"][0].tolist() == [[True, False], [True, True]]


def test_flattening_keeps_each_step_together():
    buffer = RolloutBuffer(3)
    steps(buffer, 3, masks=torch.tensor([[True, False], [True, True]]))
    batch = buffer.compute(torch.zeros(2), gamma=1.0, lam=1.0)
    assert len(batch) == 6
    assert batch.actions.tolist() == [0, 100, 1, 101, 2, 102]
    assert batch.observations[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.returns.tolist() == [3, 3, 3, 3, 2, 2]
    assert batch.masks.tolist() == [[True, False], [True, True]] * 3


def test_minibatches_hold_every_step_once_in_an_order_of_the_generator():
    buffer = RolloutBuffer(5)
    steps(buffer, 5)
    batch = buffer.compute(torch.zeros(2), gamma=1.0, lam=1.0)

    def order(seed):
        parts = list(batch.minibatches(4, torch.Generator().manual_seed(seed)))
        assert [len(part) for part in parts] == [4, 4, 2]
        for part in parts:
            assert part.log_probs.tolist() == [action % 100 for action in part.actions.tolist()]
        return [action for part in parts for action in part.actions.tolist()]

    assert sorted(order(0)) == sorted(batch.actions.tolist())
    assert order(0) == order(0)
    assert order(0) != order(1)


def test_dict_observations_are_stored_by_name():
    buffer = RolloutBuffer(2)
    no, zero = torch.zeros(1, dtype=torch.bool), torch.zeros(1)
    for t in range(2):
        seen = {"image": torch.full((1, 2, 2), float(t)), "left": torch.tensor([[t]])}
        buffer.add(seen, zero, zero, zero, zero, no, no)
    batch = buffer.compute(zero, gamma=1.0, lam=1.0)
    assert batch.observations["image"].shape == (2, 2, 2)
    assert batch.select(torch.tensor([1])).observations["left"].tolist() == [[1]]


def test_what_is_stored_does_not_follow_later_changes():
    buffer = RolloutBuffer(1)
    seen, no, zero = torch.zeros(1, 1), torch.zeros(1, dtype=torch.bool), torch.zeros(1)
    buffer.add(seen, zero, zero, zero, zero, no, no)
    seen += 1
    assert buffer["observations"].item() == 0


def test_a_full_buffer_takes_no_more_until_it_is_cleared():
    buffer = RolloutBuffer(2)
    steps(buffer, 2)
    with pytest.raises(RuntimeFault, match="all 2 steps"):
        steps(buffer, 1)
    buffer.clear()
    steps(buffer, 1)
    assert len(buffer) == 1


def test_a_non_finite_reward_is_refused_with_its_episode_and_step():
    buffer = RolloutBuffer(2)
    steps(buffer, 1)
    no, zero = torch.zeros(2, dtype=torch.bool), torch.zeros(2)
    with pytest.raises(RuntimeFault, match="episode 1 is not finite at step 1"):
        buffer.add(zero.unsqueeze(-1), zero.long(), zero, zero, torch.tensor([0.0, float("nan")]), no, no)


def test_a_truncation_without_a_final_value_is_refused():
    buffer, zero = RolloutBuffer(1), torch.zeros(1)
    with pytest.raises(RuntimeFault, match="no final value"):
        buffer.add(zero, zero, zero, zero, zero, torch.tensor([False]), torch.tensor([True]))


def test_masks_in_some_steps_only_are_refused():
    buffer = RolloutBuffer(2)
    steps(buffer, 1)
    with pytest.raises(RuntimeFault, match="masks"):
        steps(buffer, 1, masks=torch.ones(2, 2, dtype=torch.bool))
