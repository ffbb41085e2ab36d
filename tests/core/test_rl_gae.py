import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from medrl.core.rl.gae import discounted_returns, generalised_advantage


def column(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


def test_two_steps_with_termination_agree_with_hand_computed_numbers():
    advantages, returns = generalised_advantage(
        column(1, 2), column(0.5, 0.25), column(0, 1), torch.tensor([9.0]), gamma=0.99, lam=0.95
    )
    torch.testing.assert_close(advantages, column(2.393375, 1.75))
    torch.testing.assert_close(returns, column(2.893375, 2.0))


def test_three_steps_without_end_agree_with_hand_computed_numbers():
    advantages, _ = generalised_advantage(
        column(1, 1, -1), column(0, 0, 0), column(0, 0, 0), torch.tensor([0.0]), gamma=0.99, lam=0.95
    )
    torch.testing.assert_close(advantages, column(1.05596, 0.0595, -1.0), atol=1e-5, rtol=0)


def test_a_rollout_that_is_cut_bootstraps_from_the_last_value():
    advantages, _ = generalised_advantage(
        column(0.0), column(1.0), column(0), torch.tensor([10.0]), gamma=0.5, lam=0.9
    )
    assert advantages.item() == pytest.approx(0.5 * 10.0 - 1.0)


def test_a_termination_ignores_even_a_non_finite_value_after_it():
    advantages, _ = generalised_advantage(
        column(1.0), column(0.25), column(1), torch.tensor([float("nan")]), gamma=0.99, lam=0.95
    )
    assert advantages.item() == pytest.approx(0.75)


def test_a_truncation_keeps_the_final_value_and_stops_the_trace():
    rewards, values = column(1, 5), column(0.5, 0.25)
    advantages, _ = generalised_advantage(
        rewards,
        values,
        column(0, 0),
        torch.tensor([3.0]),
        gamma=0.9,
        lam=0.8,
        truncated=column(1, 0),
        final_values=column(2.0, 0.0),
    )
    torch.testing.assert_close(advantages, column(1 + 0.9 * 2 - 0.5, 5 + 0.9 * 3 - 0.25))


def test_random_rollouts_agree_with_stable_baselines3():
    steps, envs, gamma, lam = 13, 4, 0.97, 0.9
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, steps, envs)).astype(np.float32)
    dones = rng.random((steps, envs)) < 0.25
    last_value = rng.normal(size=envs).astype(np.float32)

    oracle = RolloutBuffer(
        steps,
        spaces.Box(-1, 1, (1,)),
        spaces.Discrete(2),
        device="cpu",
        gae_lambda=lam,
        gamma=gamma,
        n_envs=envs,
    )
    starts = np.concatenate([np.zeros((1, envs), dtype=bool), dones[:-1]])
    for t in range(steps):
        zeros = np.zeros((envs, 1), dtype=np.float32)
        value, log_prob = torch.from_numpy(values[t]), torch.zeros(envs)
        oracle.add(zeros, zeros, rewards[t], starts[t], value, log_prob)
    oracle.compute_returns_and_advantage(torch.from_numpy(last_value), dones[-1])

    advantages, returns = generalised_advantage(
        *(torch.from_numpy(item) for item in (rewards, values, dones, last_value)), gamma=gamma, lam=lam
    )
    torch.testing.assert_close(advantages, torch.from_numpy(oracle.advantages), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, torch.from_numpy(oracle.returns), atol=1e-5, rtol=1e-5)


def test_a_truncated_rollout_agrees_with_the_way_stable_baselines3_adds_the_final_value_to_the_reward():
    rng = np.random.default_rng(1)
    rewards, values, final = (torch.from_numpy(item) for item in rng.normal(size=(3, 9, 3)))
    truncated = torch.from_numpy(rng.random((9, 3)) < 0.3)
    last = torch.from_numpy(rng.normal(size=3))
    ours, _ = generalised_advantage(
        rewards,
        values,
        torch.zeros(9, 3),
        last,
        gamma=0.9,
        lam=0.8,
        truncated=truncated,
        final_values=final,
    )
    folded, _ = generalised_advantage(
        rewards + 0.9 * final * truncated, values, truncated, last, gamma=0.9, lam=0.8
    )
    torch.testing.assert_close(ours, folded)


def test_with_lambda_one_returns_are_the_discounted_sums():
    rewards = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.randn(7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    last = torch.tensor([2.0, -1.0], dtype=torch.float64)
    _, returns = generalised_advantage(rewards, values, torch.zeros(7, 2), last, gamma=0.9, lam=1.0)
    torch.testing.assert_close(returns, discounted_returns(rewards, gamma=0.9, terminal=last))


@pytest.mark.parametrize(
    ("terminal", "expected"), [(60.0, [50.99375, 52.625, 57.5]), (0.0, [-0.44875, -1.525, 0.5])]
)
def test_discounted_returns_agree_with_hand_computed_numbers(terminal, expected):
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = discounted_returns(rewards, gamma=0.95, terminal=terminal)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_half_precision_rewards_are_summed_in_float32():
    rewards = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    assert discounted_returns(rewards, gamma=1.0)[0].item() == 4096.0


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        generalised_advantage(
            torch.zeros(3, 1), torch.zeros(3, 2), torch.zeros(3, 1), torch.zeros(1), gamma=1, lam=1
        )
    with pytest.raises(ValueError, match="last_value"):
        generalised_advantage(
            torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(1), gamma=1, lam=1
        )
    with pytest.raises(ValueError, match="final_values"):
        generalised_advantage(
            torch.zeros(3, 2),
            torch.zeros(3, 2),
            torch.zeros(3, 2),
            torch.zeros(2),
            gamma=1,
            lam=1,
            truncated=torch.ones(3, 2),
        )
