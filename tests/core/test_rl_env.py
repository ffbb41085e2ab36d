import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO

from medrl.core.errors import ConfigError
from medrl.core.rl.env import BatchedEnv, GymnasiumAdapter, action_masks


class Search:
    """Find a hidden number: each guess is answered with warmer or colder; dict observations."""

    def __init__(self, num_envs=1, size=6, horizon=5):
        self.num_envs, self.size, self.horizon = num_envs, size, horizon
        self.observation_space = gymnasium.spaces.Dict(
            {
                "last": gymnasium.spaces.Box(0.0, 1.0, (size,), np.float32),
                "left": gymnasium.spaces.Box(0, horizon, (1,), np.int64),
            }
        )
        self.action_space = gymnasium.spaces.Discrete(size)
        self.generator = torch.Generator().manual_seed(0)
        self.goal = torch.zeros(num_envs, dtype=torch.int64)
        self.guessed = torch.zeros(num_envs, size)
        self.count = torch.zeros(num_envs, dtype=torch.int64)

    def reset(self, seed=None, indices=None):
        if seed is not None:
            self.generator.manual_seed(seed)
        chosen = torch.arange(self.num_envs) if indices is None else indices
        self.goal[chosen] = torch.randint(self.size, (len(chosen),), generator=self.generator)
        self.guessed[chosen] = 0.0
        self.guessed[chosen, self.goal[chosen]] = 0.5
        self.count[chosen] = 0
        return self.observe()

    def step(self, actions):
        self.count += 1
        reward = -(actions - self.goal).abs().float()
        terminated = actions == self.goal
        truncated = (self.count >= self.horizon) & ~terminated
        info = {"goal": self.goal.clone(), "map": self.guessed.clone(), "method": "search"}
        return self.observe(), reward, terminated, truncated, info

    def action_masks(self):
        return torch.ones(self.num_envs, self.size, dtype=torch.bool)

    def observe(self):
        return {"last": self.guessed.clone(), "left": (self.horizon - self.count).unsqueeze(-1)}


def test_the_example_is_a_batched_environment():
    assert isinstance(Search(), BatchedEnv)
    assert not isinstance(object(), BatchedEnv)


@pytest.mark.filterwarnings("error")
def test_the_adapter_passes_the_checker_of_gymnasium():
    check_env(GymnasiumAdapter(Search()), skip_render_check=True)


def test_the_adapter_gives_plain_values_of_the_declared_types():
    env = GymnasiumAdapter(Search())
    observation, info = env.reset(seed=3)
    assert info == {}
    assert env.observation_space.contains(observation)
    observation, reward, terminated, truncated, info = env.step(np.int64(2))
    assert env.observation_space.contains(observation)
    assert [type(item) for item in (reward, terminated, truncated)] == [float, bool, bool]
    assert isinstance(info["goal"], int)
    assert info["map"].shape == (6,)
    assert info["method"] == "search"


def test_an_observation_does_not_change_when_the_environment_goes_on():
    env = GymnasiumAdapter(Search())
    observation, _ = env.reset(seed=0)
    kept = observation["left"].copy()
    env.step(0)
    np.testing.assert_array_equal(observation["left"], kept)


def test_episodes_without_a_seed_follow_from_the_seed_before():
    def goals(seed):
        env = GymnasiumAdapter(Search(size=50))
        env.reset(seed=seed)
        found = []
        for _ in range(5):
            env.reset()
            found.append(int(env.env.goal[0]))
        return found

    assert goals(1) == goals(1)
    assert goals(1) != goals(2)
    assert len(set(goals(1))) > 1


def test_masks_are_handed_on_and_all_true_without_them():
    env = Search()
    env.action_masks = lambda: torch.tensor([[True, False, True, True, True, True]])
    assert GymnasiumAdapter(env).action_masks().tolist() == [True, False, True, True, True, True]

    class Free:
        num_envs, observation_space = 1, gymnasium.spaces.Box(0, 1, (1,))
        action_space = gymnasium.spaces.Discrete(3)

    assert GymnasiumAdapter(Free()).action_masks().tolist() == [True] * 3
    assert action_masks(Free()) is None


def test_the_adapter_refuses_more_than_one_episode():
    with pytest.raises(ConfigError, match="2 episodes"):
        GymnasiumAdapter(Search(num_envs=2))


def test_resetting_some_episodes_leaves_the_others():
    env = Search(num_envs=3)
    env.reset(seed=0)
    env.step(torch.tensor([0, 1, 2]))
    goals = env.goal.clone()
    observation = env.reset(indices=torch.tensor([1]))
    assert observation["left"].flatten().tolist() == [4, 5, 4]
    assert env.goal[[0, 2]].tolist() == goals[[0, 2]].tolist()


def test_stable_baselines3_learns_a_few_steps_on_the_adapter():
    model = PPO(
        "MultiInputPolicy",
        GymnasiumAdapter(Search()),
        n_steps=32,
        batch_size=16,
        n_epochs=1,
        seed=0,
        device="cpu",
    )
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(64)
    assert model.num_timesteps == 64
    changed = [not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True)]
    assert any(changed)
