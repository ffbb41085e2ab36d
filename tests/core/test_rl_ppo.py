import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from torch import nn

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.rl.distributions import MaskedCategorical
from medrl.core.rl.ppo import PPOConfig, explained_variance, ppo_loss, ppo_update
from medrl.core.rl.rollout import Collector, RolloutBatch, RolloutBuffer


class Policy(nn.Module):
    """A small masked policy with a value head."""

    def __init__(self, inputs, actions, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(inputs, 32), nn.Tanh())
        self.actor, self.critic = nn.Linear(32, actions), nn.Linear(32, 1)

    def act(self, observation, mask, generator):
        policy, value = self.both(observation, mask)
        actions = policy.sample(generator)
        return actions, policy.log_prob(actions), value

    def evaluate_actions(self, observation, actions, mask):
        policy, value = self.both(observation, mask)
        return policy.log_prob(actions), policy.entropy(), value

    def value(self, observation):
        return self.both(observation, None)[1]

    def both(self, observation, mask):
        hidden = self.body(observation)
        return MaskedCategorical(self.actor(hidden), mask), self.critic(hidden).squeeze(-1)


class Corridor:
    """Eight rooms in a row, the goal in the last; walking into a wall is illegal, each step costs 0.05.

    The third action teleports to the first room; it is legal in odd rooms only.
    """

    rooms, horizon = 8, 30
    observation_space = gymnasium.spaces.Box(0, 1, (8,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.place, self.time = (torch.zeros(num_envs, dtype=torch.int64) for _ in range(2))

    def reset(self, seed=None, indices=None):
        chosen = slice(None) if indices is None else indices
        self.place[chosen], self.time[chosen] = 0, 0
        return self.observe()

    def step(self, actions):
        legal = self.action_masks().gather(1, actions.unsqueeze(1))
        if not legal.all():
            raise AssertionError("an illegal action was taken")
        self.place = torch.where(actions == 2, 0, self.place + 2 * actions - 1)
        self.time += 1
        terminated = self.place == self.rooms - 1
        truncated = (self.time >= self.horizon) & ~terminated
        return self.observe(), terminated.float() - 0.05, terminated, truncated, {}

    def action_masks(self):
        return torch.stack([self.place > 0, self.place < self.rooms - 1, self.place % 2 == 1], dim=1)

    def observe(self):
        return torch.nn.functional.one_hot(self.place, self.rooms).float()


class Matching(Corridor):
    """A contextual bandit: one of six contexts, reward 1 for its own action, two others are illegal."""

    size = 6

    def __init__(self, num_envs, seed=0):
        super().__init__(num_envs)
        self.generator = torch.Generator().manual_seed(seed)

    def reset(self, seed=None, indices=None):
        count = self.num_envs if indices is None else len(indices)
        drawn = torch.randint(self.size, (count,), generator=self.generator)
        self.place[slice(None) if indices is None else indices] = drawn
        return self.observe()

    def step(self, actions):
        reward = (actions == (self.place * 5 + 1) % self.size).float()
        done = torch.ones(self.num_envs, dtype=torch.bool)
        return self.observe(), reward, done, ~done, {}

    def action_masks(self):
        actions = torch.arange(self.size)
        return (actions - (self.place.unsqueeze(1) * 5 + 1)) % self.size < 4

    def observe(self):
        return torch.nn.functional.one_hot(self.place, self.size).float()


def train(env, policy, config, *, steps, updates, lr, seed=0):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    collector, buffer, rewards = Collector(env), RolloutBuffer(steps), []
    for _ in range(updates):
        last = collector.collect(policy, buffer, generator=generator)
        rewards.append([episode.reward for episode in collector.episodes])
        batch = buffer.compute(last, gamma=config.gamma, lam=config.lam)
        ppo_update(policy, optimizer, batch, config, generator=generator)
    return rewards


def test_three_pixels_agree_with_hand_computed_numbers():
    new = torch.tensor([0.7, 0.7, 0.3]).log().requires_grad_()
    old = torch.tensor([0.5, 0.5, 0.5]).log()
    rewards, values = torch.tensor([0.9, 0.1, 0.9]), torch.full((3,), 0.4)
    advantages = rewards - 0.05 * (new.detach() - old) - values
    torch.testing.assert_close(advantages, torch.tensor([0.48318, -0.31682, 0.52554]), atol=1e-5, rtol=0)
    loss = ppo_loss(new, old, advantages, clip=0.2, values=values, returns=rewards, value_coef=0.5)
    assert loss.policy.item() == pytest.approx(-0.15053, abs=1e-5)
    assert loss.value.item() == pytest.approx(0.19667, abs=1e-5)
    assert loss.total.item() == pytest.approx(-0.15053 + 0.5 * 0.19667, abs=2e-5)
    assert loss.clip_fraction.item() == 1.0
    loss.total.backward()
    torch.testing.assert_close(new.grad, torch.tensor([0.0, 0.1479, -0.1051]), atol=1e-4, rtol=0)


def test_at_the_old_policy_the_gradient_is_the_mean_advantage():
    log_probs = torch.full((3,), 0.5).log().requires_grad_()
    loss = ppo_loss(log_probs, log_probs.detach(), torch.tensor([0.5, -0.3, 0.5]), clip=0.2)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(-0.23333, abs=1e-5)
    torch.testing.assert_close(log_probs.grad, torch.tensor([-0.16667, 0.1, -0.16667]), atol=1e-5, rtol=0)
    assert loss.approx_kl.item() == 0.0


@pytest.mark.parametrize(("advantage", "expected"), [(0.2985, -0.4932), (-0.2985, 0.3646 - 0.135)])
def test_one_voxel_agrees_with_hand_computed_numbers(advantage, expected):
    loss = ppo_loss(
        torch.tensor([-0.5]),
        torch.tensor([-0.7]),
        torch.tensor([advantage]),
        clip=0.2,
        entropy=torch.tensor([0.9]),
        entropy_coef=0.15,
    )
    assert loss.total.item() == pytest.approx(expected, abs=1e-4)


def test_the_kl_estimate_agrees_with_a_hand_computed_number():
    loss = ppo_loss(torch.tensor([0.0]), torch.tensor([-0.5]), torch.tensor([1.0]), clip=0.2)
    assert loss.approx_kl.item() == pytest.approx(np.exp(0.5) - 1 - 0.5, abs=1e-6)


def test_clipped_values_agree_with_hand_computed_numbers():
    zero = torch.zeros(2)
    values, old, returns = torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([1.0, 1.0])
    given = {"values": values, "old_values": old, "returns": returns, "value_clip": 0.2}
    plain = ppo_loss(zero, zero, zero, clip=0.2, **given)
    worse = ppo_loss(zero, zero, zero, clip=0.2, **given, pessimistic_value=True)
    assert plain.value.item() == pytest.approx((0.8**2 + 0.9**2) / 2)
    assert worse.value.item() == pytest.approx((0.8**2 + 0.9**2) / 2)
    given["returns"] = torch.tensor([0.0, 1.0])
    assert ppo_loss(zero, zero, zero, clip=0.2, **given).value.item() == pytest.approx((0.04 + 0.81) / 2)
    worse = ppo_loss(zero, zero, zero, clip=0.2, **given, pessimistic_value=True)
    assert worse.value.item() == pytest.approx((1.0 + 0.81) / 2)


def test_a_policy_in_every_voxel_gives_the_loss_of_the_flattened_policy():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(3))
    full = ppo_loss(new, old, advantages, clip=0.2)
    flat = ppo_loss(new.flatten(), old.flatten(), advantages.flatten(), clip=0.2)
    torch.testing.assert_close(full.total, flat.total)


def test_tensors_that_do_not_fit_are_refused():
    zero = torch.zeros(2)
    with pytest.raises(ValueError, match="shapes"):
        ppo_loss(zero, zero, torch.zeros(2, 1), clip=0.2)
    with pytest.raises(ValueError, match="returns"):
        ppo_loss(zero, zero, zero, clip=0.2, values=zero)
    with pytest.raises(ValueError, match="entropy"):
        ppo_loss(zero, zero, zero, clip=0.2, entropy_coef=0.1)
    with pytest.raises(ValueError, match="old_values"):
        ppo_loss(zero, zero, zero, clip=0.2, values=zero, returns=zero, value_clip=0.1)


class Borrowed:
    """The policy of Stable-Baselines3 behind our interface."""

    def __init__(self, policy):
        self.policy = policy

    def evaluate_actions(self, observation, actions, mask):
        values, log_probs, entropy = self.policy.evaluate_actions(observation, actions)
        return log_probs, entropy, values.flatten()


@pytest.mark.parametrize("value_clip", [0.0, 0.1])
def test_one_minibatch_gives_the_loss_and_the_update_of_stable_baselines3(value_clip):
    settings = {
        "n_steps": 64,
        "batch_size": 64,
        "n_epochs": 1,
        "gamma": 0.97,
        "gae_lambda": 0.9,
        "ent_coef": 0.02,
        "vf_coef": 0.4,
        "max_grad_norm": 0.3,
        "learning_rate": 0.01,
        "clip_range": 0.15,
        "clip_range_vf": value_clip or None,
    }
    model = PPO("MlpPolicy", "CartPole-v1", seed=1, device="cpu", **settings)
    model.set_logger(Logger(None, []))
    _, callback = model._setup_learn(64)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 64)
    stored = model.rollout_buffer
    # Move off the policy that acted, so that ratios, clipping and the value limit matter.
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    twin = PPO("MlpPolicy", "CartPole-v1", seed=1, device="cpu", **settings)
    twin.policy.load_state_dict(model.policy.state_dict())

    buffer = RolloutBuffer(64)
    ended = np.concatenate([stored.episode_starts[1:], model._last_episode_starts[None]])
    for t in range(64):
        buffer.add(
            *(torch.as_tensor(item[t]) for item in (stored.observations, stored.actions[..., 0])),
            *(torch.as_tensor(item[t]) for item in (stored.log_probs, stored.values, stored.rewards)),
            torch.as_tensor(ended[t] > 0),
            torch.tensor([False]),
        )
    with torch.no_grad():
        # The last value that Stable-Baselines3 used is not stored; its last return gives it back.
        last = (stored.returns[-1] - stored.rewards[-1]) / 0.97
    batch = buffer.compute(torch.as_tensor(last), gamma=0.97, lam=0.9)
    torch.testing.assert_close(
        batch.advantages, torch.as_tensor(stored.advantages.flatten()), atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(batch.returns, torch.as_tensor(stored.returns.flatten()), atol=1e-4, rtol=1e-5)

    config = PPOConfig(
        clip=0.15,
        epochs=1,
        minibatch=64,
        value_coef=0.4,
        entropy_coef=0.02,
        max_grad_norm=0.3,
        value_clip=value_clip,
    )
    stats = ppo_update(Borrowed(twin.policy), twin.policy.optimizer, batch, config, generator=generator)
    model.train()
    log = model.logger.name_to_value
    assert stats.loss == pytest.approx(log["train/loss"], rel=1e-4)
    assert stats.policy_loss == pytest.approx(log["train/policy_gradient_loss"], abs=1e-5)
    assert stats.value_loss == pytest.approx(log["train/value_loss"], rel=1e-4)
    assert stats.entropy == pytest.approx(-log["train/entropy_loss"], rel=1e-5)
    assert stats.approx_kl == pytest.approx(log["train/approx_kl"], abs=1e-6)
    assert stats.clip_fraction == pytest.approx(log["train/clip_fraction"], abs=1e-6)
    assert stats.clip_fraction > 0
    assert stats.explained_variance == pytest.approx(log["train/explained_variance"], abs=1e-3)
    for ours, theirs in zip(twin.policy.parameters(), model.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def batch_for(policy, count=16):
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(count, 4, generator=generator)
    with torch.no_grad():
        actions, log_probs, values = policy.act(seen, None, generator)
    advantages = torch.randn(count, generator=generator)
    return RolloutBatch(
        observations=seen,
        actions=actions,
        log_probs=log_probs,
        values=values,
        advantages=advantages,
        returns=values + advantages,
    )


def test_in_the_first_minibatch_the_ratio_is_one_and_the_kl_zero():
    policy = Policy(4, 3)
    config = PPOConfig(epochs=1, minibatch=16)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    stats = ppo_update(policy, optimizer, batch_for(policy), config, generator=torch.Generator())
    assert abs(stats.approx_kl) < 1e-6
    assert stats.clip_fraction == 0
    assert stats.updates == 1


def test_a_large_kl_stops_before_the_step_that_would_go_on():
    policy = Policy(4, 3)
    config = PPOConfig(epochs=50, minibatch=16, target_kl=0.01)
    optimizer = torch.optim.SGD(policy.parameters(), lr=5.0)
    stats = ppo_update(policy, optimizer, batch_for(policy), config, generator=torch.Generator())
    assert stats.stopped
    assert 1 <= stats.updates < 50


def test_ranks_agree_on_stopping_through_the_reduced_kl():
    policy = Policy(4, 3)
    config = PPOConfig(epochs=5, minibatch=16, target_kl=0.01)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    other = [torch.tensor(0.0), torch.tensor(1.0)]
    stats = ppo_update(
        policy,
        optimizer,
        batch_for(policy),
        config,
        generator=torch.Generator(),
        reduce=lambda kl: kl + other.pop(0),
    )
    assert stats.stopped
    assert stats.updates == 1


def test_a_step_given_from_outside_replaces_our_own():
    policy, losses = Policy(4, 3), []
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = [parameter.clone() for parameter in policy.parameters()]
    ppo_update(
        policy,
        optimizer,
        batch_for(policy),
        PPOConfig(epochs=2, minibatch=8),
        generator=torch.Generator(),
        step=losses.append,
    )
    assert len(losses) == 4
    assert all(loss.requires_grad for loss in losses)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_a_non_finite_loss_is_never_stepped():
    policy = Policy(4, 3)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    batch = batch_for(policy)
    batch.returns[3] = float("nan")
    before = [parameter.clone() for parameter in policy.parameters()]
    with pytest.raises(RuntimeFault, match="loss is nan"):
        ppo_update(policy, optimizer, batch, PPOConfig(minibatch=16), generator=torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_numbers_out_of_range_are_all_named():
    with pytest.raises(ConfigError) as caught:
        PPOConfig(gamma=1.5, clip=0.0, epochs=0, value_coef=float("nan"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "gamma",
        "clip",
        "epochs",
        "value_coef",
    ]


def test_explained_variance_is_one_for_perfect_values_and_undefined_for_equal_returns():
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((3,), 2.0), returns) == pytest.approx(0.0)
    assert np.isnan(explained_variance(returns, torch.ones(3)))


@pytest.mark.parametrize("seed", range(2))
def test_ppo_learns_the_corridor_and_never_takes_an_illegal_action(seed):
    config = PPOConfig(gamma=0.95, minibatch=64, epochs=4, entropy_coef=0.01)
    rewards = train(Corridor(8), Policy(8, 3, seed), config, steps=32, updates=20, lr=0.01, seed=seed)
    best = 1 - 0.05 * 7
    assert np.mean(rewards[0]) < best - 0.5
    assert np.mean(rewards[-1]) > best - 0.05


def test_ppo_learns_a_contextual_bandit_with_masks():
    policy = Policy(6, 6)
    rewards = train(Matching(16), policy, PPOConfig(minibatch=64, epochs=4), steps=8, updates=40, lr=0.01)
    assert np.mean(rewards[0]) < 0.5
    contexts = Matching(6)
    contexts.place = torch.arange(6)
    with torch.no_grad():
        chosen = policy.both(contexts.observe(), contexts.action_masks())[0].mode()
    assert chosen.tolist() == [(context * 5 + 1) % 6 for context in range(6)]


def test_training_twice_with_one_seed_gives_equal_parameters():
    first, second = Policy(8, 3), Policy(8, 3)
    for policy in (first, second):
        train(Corridor(4), policy, PPOConfig(epochs=2), steps=16, updates=2, lr=0.01)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
