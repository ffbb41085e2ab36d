"""Pixel-wise PPO: arithmetic, draws, rollouts, inner steps, the collapse guard, and the runtime."""

from __future__ import annotations

import copy
import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.rl.pixelwise import (
    CollapseGuard,
    PixelwisePPOConfig,
    action_log_probs,
    binary_log_probs,
    categorical_kl,
    categorical_log_probs,
    correlated_categorical,
    group_mean,
    most_probable,
    pixel_entropy,
    plain_steps,
    policy_gradient_loss,
    policy_gradient_update,
    ppo_terms,
    rollout,
    smooth_normal,
    update,
    value_loss,
)
from medrl.core.rl.pixelwise.sampling import inverse_cdf

sys.path.insert(0, str(Path(__file__).parent / "ranks"))
import toy_run as toy


class Policy(nn.Module):
    """Two convolutions; counts how often it is asked."""

    def __init__(self, labels=3, dims=2, seed=0, dropout=0.0):
        super().__init__()
        torch.manual_seed(seed)
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.body = nn.Sequential(
            conv(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout(dropout), conv(8, labels, 1)
        )
        self.passes = 0

    def log_probs(self, images):
        self.passes += 1
        return categorical_log_probs(self.body(images))


class Critic(nn.Module):
    """A convolution with weights of zero behind one that learns: V is 0.5 whatever the first weights are."""

    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, images):
        return torch.sigmoid(self.last(self.first(images)))[:, 0]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=4, size=(8, 6), seed=3):
    return torch.rand(count, 1, *size, generator=generator(seed))


def bright(actions, rows):
    """Reward label 1 where the image is bright, label 0 elsewhere."""
    return (actions == (rows[:, 0] > 0.5).long()).float()


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def sgd(**parts):
    return {name: torch.optim.SGD(module.parameters(), lr=0.1) for name, module in parts.items()}


# -- arithmetic ---------------------------------------------------------------------------------------

OLD = torch.full((1, 3), 0.5).log()
REWARD = torch.tensor([[0.9, 0.1, 0.9]])


def test_three_pixels_give_the_numbers_of_the_specification():
    now = torch.tensor([[0.7, 0.7, 0.3]]).log().requires_grad_()
    value = torch.full((1, 3), 0.4, requires_grad=True)
    terms = ppo_terms(now, OLD, OLD, REWARD, value, clip=0.2, kl=0.05)
    near = {"atol": 5e-6, "rtol": 0}
    torch.testing.assert_close(terms.advantages, torch.tensor([[0.48318, -0.31682, 0.52554]]), **near)
    torch.testing.assert_close(terms.ratio, torch.tensor([[1.4, 1.4, 0.6]]), **near)
    torch.testing.assert_close(terms.actor, torch.tensor(-0.15053), **near)
    torch.testing.assert_close(terms.critic, torch.tensor(0.19667), **near)
    torch.testing.assert_close(terms.clip_fraction, torch.tensor(1.0), **near)
    (gradient,) = torch.autograd.grad(terms.actor, now, retain_graph=True)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.1479, -0.1051]]), atol=5e-5, rtol=0)
    assert torch.autograd.grad(terms.actor, value, allow_unused=True) == (None,), (
        "V is a constant for the actor"
    )


def test_the_unchanged_policy_has_the_plain_gradient():
    now = OLD.clone().requires_grad_()
    terms = ppo_terms(now, OLD, OLD, REWARD, torch.full((1, 3), 0.4), clip=0.2, kl=0.05)
    assert terms.actor.item() == pytest.approx(-0.23333, abs=5e-6)
    (gradient,) = torch.autograd.grad(terms.actor, now)
    torch.testing.assert_close(gradient, torch.tensor([[-1 / 6, 0.1, -1 / 6]]), atol=1e-6, rtol=0)
    assert torch.equal(terms.ratio, torch.ones(1, 3))


@pytest.mark.parametrize(("reward", "surrogate", "loss"), [(0.8, 0.3582, -0.4932), (0.203, -0.3646, 0.2296)])
def test_one_voxel_gives_the_numbers_of_the_three_dimensional_specification(reward, surrogate, loss):
    def log(value):
        return torch.full((1, 1, 1, 1), value)

    terms = ppo_terms(
        log(-0.5),
        log(-0.7),
        log(-0.6),
        log(reward),
        log(0.5),
        clip=0.2,
        kl=0.015,
        entropy=log(0.9),
        entropy_coef=0.15,
    )
    assert float(terms.ratio) == pytest.approx(1.2214, abs=5e-5)
    assert float(terms.advantages) == pytest.approx(math.copysign(0.2985, surrogate), abs=5e-6)
    assert float(terms.actor) == pytest.approx(loss, abs=1e-4)
    assert -(float(terms.actor) + 0.15 * 0.9) == pytest.approx(surrogate, abs=1e-4)


def test_divergence_and_entropy_have_their_known_values():
    first = torch.tensor([0.7, 0.2, 0.1]).log().view(1, 3, 1)
    second = torch.tensor([0.5, 0.3, 0.2]).log().view(1, 3, 1)
    assert float(categorical_kl(first, second)) == pytest.approx(0.0851, abs=5e-5)
    assert float(categorical_kl(first, first)) == 0.0
    assert float(pixel_entropy(torch.zeros(1, 3, 1).log_softmax(1))) == pytest.approx(1.0986, abs=5e-5)


@pytest.mark.parametrize("kl", [0.0, 0.05, 3.0])
@pytest.mark.parametrize("reward", [0.0, 0.7])
def test_the_advantage_of_a_forced_action_is_one_minus_the_value(kl, reward):
    now, value = torch.tensor([[-0.1, -2.0], [-0.1, -2.0]]), torch.tensor([[0.4, 0.9], [0.4, 0.9]])
    rewards, reference = torch.full((2, 2), reward), torch.full((2, 2), -5.0)
    forced = torch.tensor([True, False])
    terms = ppo_terms(now, now, reference, rewards, value, kl=kl, forced=forced)
    assert torch.equal(terms.advantages[0], 1.0 - value[0])
    torch.testing.assert_close(terms.advantages[1], reward - kl * (now[1] + 5.0) - value[1])


def test_the_critic_learns_the_reward_of_forced_actions_or_one():
    now, value, rewards = torch.zeros(2, 1), torch.full((2, 1), 0.5), torch.full((2, 1), 0.2)
    forced = torch.tensor([True, False])
    raw = ppo_terms(now, now, now, rewards, value, forced=forced)
    one = ppo_terms(now, now, now, rewards, value, forced=forced, forced_target="one")
    assert float(raw.critic) == pytest.approx(0.09)
    assert float(one.critic) == pytest.approx((0.25 + 0.09) / 2)


def test_without_penalty_the_reference_does_not_matter():
    now = torch.tensor([[-0.3, -1.0]])
    losses = [
        ppo_terms(now, now - 0.1, torch.full_like(now, gap), now.exp(), 0.5).actor for gap in (-0.1, -40.0)
    ]
    assert torch.equal(*losses)


def test_one_value_of_an_image_learns_the_mean_reward():
    rewards = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    assert float(value_loss(torch.full((1, 1, 1), 0.75), rewards)) == 0.0
    assert float(value_loss(torch.full((1, 1, 1), 0.25), rewards)) == 0.25


def test_values_of_falling_resolution_are_weighted_by_halves():
    rewards = torch.rand(2, 8, 8, 4, generator=generator())
    small = rewards[:, ::2, ::2]
    full = torch.zeros(2, 8, 8, 4)
    expected = (rewards.square().mean() + 0.5 * (small - 0.3).square().mean()) / 1.5
    torch.testing.assert_close(value_loss([full, torch.full((2, 4, 4, 4), 0.3)], rewards), expected)


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        value_loss(torch.zeros(2, 3), torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="shapes"):
        ppo_terms(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), 0.5)


def test_a_binary_policy_has_two_labels_and_stays_finite_for_large_logits():
    log_probs = binary_log_probs(torch.tensor([[[-200.0, 0.0, 200.0]]]))
    assert log_probs.shape == (1, 2, 3)
    torch.testing.assert_close(log_probs[0, 1], torch.tensor([-200.0, -math.log(2), 0.0]))
    assert bool(torch.isfinite(pixel_entropy(log_probs)).all())
    with pytest.raises(ValueError, match="one channel"):
        binary_log_probs(torch.zeros(1, 2, 3))


def test_log_probabilities_are_float32_under_bfloat16():
    log_probs = categorical_log_probs(torch.randn(2, 3, 16, generator=generator()).bfloat16())
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(2, 16), atol=1e-6, rtol=0)


def test_the_first_of_equally_probable_labels_is_taken():
    log_probs = torch.randn(3, 5, 9, generator=generator())
    log_probs[0, 2:4] = 9.0
    log_probs[1] = 0.0
    assert torch.equal(most_probable(log_probs), log_probs.argmax(dim=1))
    assert most_probable(log_probs)[:2].unique().tolist() == [0, 2]


def test_the_group_mean_is_taken_over_the_actions_of_one_image():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 1.0], [0.5, 0.0]])
    expected = torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.5, 0.5], [0.5, 0.5]])
    assert torch.equal(group_mean(rewards, 2), expected)


# -- policy gradient ----------------------------------------------------------------------------------


def test_policy_gradient_standardises_rewards():
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss = policy_gradient_loss(log_probs, torch.tensor([[1.0, 0.0]]))
    assert float(loss.detach()) == pytest.approx(-math.sqrt(0.5) / 2)


@pytest.mark.parametrize("reward", [0.0, 0.7, 0.1])
def test_equal_rewards_teach_nothing_and_give_no_nan(reward):
    log_probs = torch.randn(3, 7, 11, generator=generator()).requires_grad_()
    loss = policy_gradient_loss(log_probs, torch.full((3, 7, 11), reward))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert float(loss.detach()) == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_policy_gradient_raises_the_reward():
    policy, batch = Policy(2), images(8)
    step = plain_steps({"actor": torch.optim.Adam(policy.parameters(), lr=0.05)})
    draws, config = generator(), PixelwisePPOConfig(baseline="constant")
    stats = [
        policy_gradient_update(
            policy, rollout(policy, None, batch, bright, config, generator=draws), step=step
        )
        for _ in range(40)
    ]
    assert stats[-1].reward > stats[0].reward + 0.3
    assert stats[0].ratio == 1.0
    assert policy.passes == 40, "the acting pass is the learning pass"


# -- draws --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 0.7, 2.0, (3.0, 0.0)])
def test_every_pixel_has_exactly_its_probabilities(sigma):
    count = 60_000
    probs = torch.softmax(1.5 * torch.randn(1, 4, 5, 3, generator=generator(1)), dim=1)
    labels = correlated_categorical(probs.expand(count, -1, -1, -1), sigma, generator(2))
    found = torch.stack([(labels == label).double().mean(dim=0) for label in range(4)])
    error = (found - probs[0].double()) / (probs[0].double() * (1 - probs[0].double()) / count).sqrt()
    assert float(error.abs().max()) < 4.0, "standard errors, 60 comparisons"


def test_the_inverse_of_the_distribution_gives_exact_counts():
    uniform = (torch.arange(1000, dtype=torch.float32) + 0.5).div(1000).view(1, 1000)
    labels = inverse_cdf(torch.tensor([0.2, 0.5, 0.3]).view(1, 3, 1).expand(1, 3, 1000), uniform)
    assert torch.bincount(labels.flatten()).tolist() == [200, 500, 300]


@pytest.mark.parametrize(
    ("probs", "allowed"),
    [((0.0, 0.3, 0.7), {1, 2}), ((0.3, 0.0, 0.7), {0, 2}), ((0.1, 0.2, 0.0), {0, 1}), ((0.0, 1.0, 0.0), {1})],
)
def test_a_label_without_probability_is_never_drawn(probs, allowed):
    uniform = torch.tensor([[0.0, 1e-30, 0.3, 0.333333343, 0.5, 0.99999994, 1.0]])
    table = torch.tensor(probs).view(1, 3, 1).expand(1, 3, uniform.shape[1])
    assert set(inverse_cdf(table, uniform).flatten().tolist()) == allowed


@pytest.mark.parametrize("shape", [(9, 12), (6, 5, 4)])
def test_smooth_fields_have_unit_variance_in_every_pixel(shape):
    count = 40_000
    field = smooth_normal((count, *shape), 1.5, generator(4)).double()
    limit = 4.5 * math.sqrt(2 / count)
    assert float((field.square().mean(dim=0) - 1).abs().max()) < limit
    assert float(field.mean(dim=0).abs().max()) < 4.5 / math.sqrt(count)


def test_neighbours_are_correlated_as_the_scale_says():
    field = smooth_normal((40_000, 25, 2), (2.0, 0.0), generator(5)).double()
    for distance in (1, 2, 4):
        expected = math.exp(-(distance**2) / (4 * 2.0**2))
        found = float((field[:, 12, 0] * field[:, 12 - distance, 0]).mean())
        assert found == pytest.approx(expected, abs=0.025)
    assert float((field[:, 12, 0] * field[:, 12, 1]).mean()) == pytest.approx(0.0, abs=0.025)


def test_draws_repeat_and_leave_the_global_stream_alone():
    probs = torch.softmax(torch.randn(2, 3, 8, 8, generator=generator(1)), dim=1)
    before = torch.get_rng_state()
    first, second = (correlated_categorical(probs, 1.0, generator(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert first.dtype == torch.int64
    assert not torch.equal(first, correlated_categorical(probs, 1.0, generator(8)))


def test_wrong_scales_and_shapes_are_refused():
    probs = torch.full((1, 2, 4, 4), 0.5)
    with pytest.raises(ValueError, match="3 scales for 2"):
        correlated_categorical(probs, (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="negative"):
        correlated_categorical(probs, -1.0)
    with pytest.raises(ValueError, match=r"\(N, K"):
        correlated_categorical(torch.full((1, 2), 0.5))


# -- rollout ------------------------------------------------------------------------------------------


def test_one_pass_of_actor_and_reference_serves_the_rollout_and_five_inner_steps():
    policy, reference, critic = Policy(), Policy(), Critic()
    step = plain_steps(sgd(actor=policy, critic=critic))
    config = PixelwisePPOConfig(kl=0.05, entropy=0.01)
    update(
        policy,
        critic,
        rollout(policy, reference, images(), bright, config, generator=generator()),
        config,
        step=step,
    )
    assert (policy.passes, reference.passes) == (5, 1)


@pytest.mark.parametrize(("dims", "size", "labels"), [(2, (10, 7), 2), (2, (10, 7), 5), (3, (6, 5, 4), 4)])
def test_rollouts_fit_images_and_windows_of_any_size(dims, size, labels):
    policy, config = Policy(labels, dims), PixelwisePPOConfig(baseline="constant", sigma_px=1.5)
    batch = rollout(policy, Policy(labels, dims, seed=9), images(3, size), bright, config)
    assert batch.actions.shape == batch.log_probs.shape == batch.rewards.shape == (3, *size)
    assert batch.actions.dtype == torch.int64
    assert batch.shares.shape == (2, labels)
    torch.testing.assert_close(batch.shares.sum(dim=1), torch.ones(2))
    log_probs = policy.log_probs(batch.images)
    assert torch.equal(batch.log_probs, action_log_probs(log_probs, batch.actions))
    assert float(batch.kl) > 0.0


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_ratios_of_the_first_inner_step_are_exactly_one(keep_graph, dropout):
    policy = Policy(dropout=dropout)
    config = PixelwisePPOConfig(baseline="constant", inner_steps=1, kl=0.3)
    batch = rollout(policy, policy, images(), bright, config, generator=generator(), keep_graph=keep_graph)
    stats = update(policy, None, batch, config, step=plain_steps(sgd(actor=policy)))
    exact = keep_graph or dropout == 0.0
    assert (stats.ratio_error == 0.0) is exact
    assert (stats.ratio == 1.0) is exact
    if dropout == 0.0:
        assert stats.approx_kl == stats.kl == 0.0


def test_the_kept_graph_and_a_new_pass_give_the_same_weights():
    results = []
    for keep in (True, False):
        policy, critic = Policy(), Critic()
        config = PixelwisePPOConfig(kl=0.05, entropy=0.02)
        batch = rollout(
            policy, Policy(seed=5), images(), bright, config, generator=generator(), keep_graph=keep
        )
        update(policy, critic, batch, config, step=plain_steps(sgd(actor=policy, critic=critic)))
        results.append(state(policy) | {f"critic.{k}": v for k, v in state(critic).items()})
    assert same(*results)


def test_forced_images_get_the_given_action_and_its_own_reward():
    policy, config = Policy(2), PixelwisePPOConfig(baseline="constant")
    batch = images(3)
    given = (batch[:, 0] > 0.5).long()
    forced = torch.tensor([False, True, False])
    found = rollout(
        policy, None, batch, bright, config, generator=generator(), forced=forced, forced_actions=given
    )
    plain = rollout(policy, None, batch, bright, config, generator=generator())
    assert torch.equal(found.actions[1], given[1])
    assert torch.equal(found.rewards[1], torch.ones(8, 6)), "the reward is that of the given action"
    assert torch.equal(found.log_probs, action_log_probs(policy.log_probs(batch), found.actions))
    assert torch.equal(found.actions[[0, 2]], plain.actions[[0, 2]])
    legacy = rollout(
        policy,
        None,
        batch,
        bright,
        PixelwisePPOConfig(baseline="constant", recompute_forced=False),
        generator=generator(),
        forced=forced,
        forced_actions=given,
    )
    assert torch.equal(legacy.rewards, plain.rewards), "the original keeps the reward of the drawn action"
    with pytest.raises(ValueError, match="forced_actions"):
        rollout(policy, None, batch, bright, config, forced=forced)


def test_a_group_holds_several_actions_of_each_image_and_one_forced_action():
    policy = Policy(2)
    config = PixelwisePPOConfig(baseline="group", samples=3, inner_steps=1)
    batch = images(2)
    given = (batch[:, 0] > 0.5).long()
    found = rollout(
        policy,
        None,
        batch,
        bright,
        config,
        generator=generator(),
        forced=torch.tensor([False, True]),
        forced_actions=given,
    )
    assert found.actions.shape == (6, 8, 6)
    assert found.forced.tolist() == [False, False, False, True, False, False]
    assert not torch.equal(found.actions[0], found.actions[1])
    log_probs = policy.log_probs(batch)
    for row in range(6):
        alone = action_log_probs(log_probs[row // 3 : row // 3 + 1], found.actions[row : row + 1])
        assert torch.equal(found.log_probs[row], alone[0])
    expected = (found.rewards - group_mean(found.rewards, 3)).mean()
    stats = update(policy, None, found, config, step=plain_steps(sgd(actor=policy)))
    assert stats.advantage == pytest.approx(float(expected), abs=1e-7)


def test_greedy_rollouts_take_the_most_probable_labels():
    policy, batch = Policy(), images()
    best = policy.log_probs(batch).argmax(dim=1)
    for config, greedy in (
        (PixelwisePPOConfig(), True),
        (PixelwisePPOConfig(eps_greedy=1.0), False),
    ):
        found = rollout(policy, None, batch, bright, config, generator=generator(), greedy=greedy)
        assert torch.equal(found.actions, best)


def test_greedy_rows_appear_with_their_probability():
    policy, batch = Policy(), images(400, (4, 4))
    best = policy.log_probs(batch).argmax(dim=1)
    found = rollout(policy, None, batch, bright, PixelwisePPOConfig(eps_greedy=0.25), generator=generator())
    rows = int((found.actions == best).flatten(1).all(dim=1).sum())
    assert 70 <= rows <= 130


def test_rewards_of_whole_images_are_spread_over_their_pixels():
    policy = Policy()

    def accuracy(actions, rows):
        return bright(actions, rows).mean(dim=(1, 2), keepdim=True)

    found = rollout(policy, None, images(), accuracy, PixelwisePPOConfig(), generator=generator())
    assert found.rewards.shape == (4, 8, 6)
    assert bool((found.rewards == found.rewards[:, :1, :1]).all())


def test_bad_rewards_and_probabilities_are_named():
    policy, config = Policy(), PixelwisePPOConfig()
    with pytest.raises(RuntimeFault, match="shape"):
        rollout(policy, None, images(), lambda actions, rows: torch.zeros(4), config)

    def holed(actions, rows):
        reward = bright(actions, rows)
        reward[2, 0, 0] = torch.nan
        return reward

    with pytest.raises(RuntimeFault, match="action 2"):
        rollout(policy, None, images(), holed, config)
    nn.init.constant_(policy.body[3].bias, torch.nan)
    with pytest.raises(RuntimeFault, match="log-probability"):
        rollout(policy, None, images(), bright, config)


def test_rollouts_under_bfloat16_learn_in_float32():
    policy, critic = Policy(), Critic()
    config = PixelwisePPOConfig(kl=0.05, entropy=0.01)

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    batch = rollout(
        policy, Policy(seed=4), images(), bright, config, generator=generator(), autocast=autocast
    )
    assert batch.log_probs.dtype == batch.ref_log_probs.dtype == batch.rewards.dtype == torch.float32
    before = state(policy)
    stats = update(
        policy,
        critic,
        batch,
        config,
        step=plain_steps(sgd(actor=policy, critic=critic)),
        autocast=autocast,
    )
    assert stats.ratio_error == 0.0
    assert not same(before, state(policy))


# -- update -------------------------------------------------------------------------------------------


def run(critic, *, inner_steps=1, joint=False):
    """One update of a fixed policy beside a critic; the policy's weights afterwards."""
    policy = Policy()
    config = PixelwisePPOConfig(inner_steps=inner_steps, max_grad_norm=0.01, kl=0.05)
    batch = rollout(policy, Policy(seed=5), images(), bright, config, generator=generator())
    optimizers = sgd(actor=policy, critic=critic)
    if joint:  # the original: one norm over both parts, with the critic's gradient of the step before

        def step(part, loss):
            optimizers[part].zero_grad()
            loss.backward()
            if part == "critic":
                both = [*policy.parameters(), *critic.parameters()]
                nn.utils.clip_grad_norm_(both, config.max_grad_norm)
                for optimizer in optimizers.values():
                    optimizer.step()
    else:
        step = plain_steps(optimizers, {"actor": config.max_grad_norm})
    update(policy, critic, batch, config, step=step)
    return state(policy)


def test_a_critic_of_thousandfold_weights_leaves_the_update_of_the_actor_unchanged():
    def scaled():
        critic = Critic()
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter.mul_(1000.0)
        return critic

    assert same(run(Critic()), run(scaled()))
    assert not same(run(Critic(), joint=True), run(scaled(), joint=True)), "a joint norm would show it"


def test_separate_limits_reach_each_part():
    policy, critic = Policy(), Critic()
    config = PixelwisePPOConfig(inner_steps=1, max_grad_norm=1e-3, critic_max_grad_norm=2e-3)
    before = {"actor": state(policy), "critic": state(critic)}
    norms = {"actor": config.max_grad_norm, "critic": config.critic_max_grad_norm}
    batch = rollout(policy, None, images(), bright, config, generator=generator())
    update(policy, critic, batch, config, step=plain_steps(sgd(actor=policy, critic=critic), norms))
    for part, module in (("actor", policy), ("critic", critic)):
        moved = sum(
            float((value - before[part][name]).square().sum()) for name, value in state(module).items()
        )
        assert math.sqrt(moved) == pytest.approx(0.1 * norms[part], rel=1e-3)


@pytest.mark.parametrize("baseline", ["critic", "constant", "group"])
def test_training_raises_the_reward(baseline):
    policy, critic = Policy(2), Critic()
    config = PixelwisePPOConfig(baseline=baseline, samples=4 if baseline == "group" else 1, kl=0.01)
    optimizers = {
        "actor": torch.optim.Adam(policy.parameters(), lr=0.02),
        "critic": torch.optim.Adam(critic.parameters(), lr=0.02),
    }
    reference, draws, batch = Policy(2), generator(), images(8)
    found = [
        update(
            policy,
            critic if baseline == "critic" else None,
            rollout(policy, reference, batch, bright, config, generator=draws),
            config,
            step=plain_steps(optimizers, {"actor": config.max_grad_norm}),
        )
        for _ in range(25)
    ]
    assert found[-1].reward > found[0].reward + 0.3
    if baseline == "critic":
        assert found[-1].critic_loss < found[0].critic_loss


def test_training_twice_gives_equal_weights():
    def train():
        policy, critic, draws = Policy(), Critic(), generator()
        config = PixelwisePPOConfig(kl=0.05, entropy=0.01, sigma_px=1.0)
        for _ in range(3):
            batch = rollout(policy, Policy(seed=2), images(), bright, config, generator=draws)
            update(policy, critic, batch, config, step=plain_steps(sgd(actor=policy, critic=critic)))
        return state(policy)

    assert same(train(), train())


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError) as caught:
        PixelwisePPOConfig(clip=0.0, inner_steps=0, baseline="group", sigma_px=(1.0, -1.0))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "clip",
        "inner_steps",
        "samples",
        "sigma_px",
    ]
    policy = Policy()
    batch = rollout(policy, None, images(), bright, PixelwisePPOConfig(), generator=generator())
    step = plain_steps(sgd(actor=policy))
    with pytest.raises(ConfigError, match="critic"):
        update(policy, None, batch, PixelwisePPOConfig(), step=step)
    with pytest.raises(ConfigError, match="group"):
        update(policy, None, batch, PixelwisePPOConfig(baseline="group", samples=2), step=step)


# -- collapse guard -----------------------------------------------------------------------------------


def collapse(policy, label=0):
    """Give one label all probability."""
    with torch.no_grad():
        policy.body[3].bias[label] += 1000.0


def balanced(seed=0):
    """A policy that uses all three labels."""
    policy = Policy(3, seed=seed)
    with torch.no_grad():
        policy.body[3].bias.zero_()
        maps = policy.log_probs(images(16))
        policy.body[3].bias -= maps.mean(dim=(0, 2, 3))
    return policy


def guarded(**options):
    policy = balanced()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    return policy, optimizer, CollapseGuard({"actor": policy}, [optimizer], **options)


def acts(policy, reference):
    return rollout(policy, reference, images(16), bright, PixelwisePPOConfig(), generator=generator())


def test_a_healthy_policy_passes_and_its_weights_are_kept_now_and_then():
    policy, _, guard = guarded(every=2)
    reference, first = balanced(), state(policy)
    assert guard.check(acts(policy, reference))
    with torch.no_grad():
        policy.body[0].weight += 1e-3
    second = state(policy)
    assert guard.check(acts(policy, reference)), "the second batch is kept"
    assert not same(first, second)
    collapse(policy)
    assert not guard.check(acts(policy, reference))
    assert same(second, state(policy))


def test_an_empty_mask_restores_the_weights_forgets_moments_and_halves_the_rate(caplog):
    policy, optimizer, guard = guarded()
    reference, good = balanced(), state(policy)
    assert guard.check(acts(policy, reference))
    policy.body(images(2)).sum().backward()
    optimizer.step()
    collapse(policy)
    with caplog.at_level(logging.WARNING, logger="medrl.rl"):
        assert not guard.check(acts(policy, reference))
    assert "gave up foreground" in caplog.text
    assert same(good, state(policy))
    assert len(optimizer.state) == 0
    assert (guard.rate, guard.restored) == (0.5, 1)
    collapse(policy, label=2)
    assert guard.check(acts(policy, reference)) is False, "lost background counts as well"
    assert (guard.rate, guard.restored) == (0.25, 2)


def test_a_single_lost_label_counts_as_a_collapse_if_asked():
    for per_label in (True, False):
        policy, _, guard = guarded(per_label=per_label)
        reference = balanced()
        assert guard.check(acts(policy, reference))
        with torch.no_grad():
            policy.body[3].bias[2] -= 1000.0
        assert guard.check(acts(policy, reference)) is not per_label


def test_a_reference_without_foreground_raises_no_alarm():
    policy, _, guard = guarded()
    empty = balanced()
    collapse(empty)
    collapse(policy)
    assert guard.check(acts(policy, empty))


def test_a_policy_that_begins_with_less_is_measured_by_its_beginning():
    policy, _, guard = guarded()
    reference = balanced()
    with torch.no_grad():
        maps = policy.log_probs(images(16))
        lead = (maps[:, 1:].amax(dim=1) - maps[:, 0]).flatten().sort().values
        policy.body[3].bias[0] += float(lead[-3])  # two pixels of 768 keep foreground
    assert guard.check(acts(policy, reference))
    assert guard.check(acts(policy, reference)), "small from the beginning is no collapse"
    assert guard.rate == 1.0


def test_endless_collapse_ends_the_run():
    policy, _, guard = guarded(limit=2)
    reference = balanced()
    guard.check(acts(policy, reference))
    for _ in range(2):
        collapse(policy)
        assert not guard.check(acts(policy, reference))
    collapse(policy)
    with pytest.raises(RuntimeFault, match="foreground, now 3 times"):
        guard.check(acts(policy, reference))


def test_ranks_decide_on_the_mean_of_their_shares():
    policy, _, guard = guarded()
    reference = balanced()
    healthy = acts(policy, reference).shares
    assert guard.check(acts(policy, reference))
    collapse(policy)
    assert guard.check(acts(policy, reference), reduce=lambda shares: healthy)
    assert not guard.check(acts(policy, reference), reduce=lambda shares: (shares + shares) / 2)


def test_the_guard_goes_on_from_its_state():
    policy, _, guard = guarded()
    reference, good = balanced(), state(policy)
    guard.check(acts(policy, reference))
    collapse(policy)
    guard.check(acts(policy, reference))
    other = balanced(seed=3)
    twin = CollapseGuard({"actor": other})
    twin.load_state_dict(copy.deepcopy(guard.state_dict()))
    assert (twin.rate, twin.restored) == (0.5, 1)
    collapse(other)
    assert not twin.check(acts(other, reference))
    assert same(good, state(other))


def test_impossible_guards_are_refused():
    with pytest.raises(ConfigError, match="floor"):
        CollapseGuard({"actor": Policy()}, floor=0.6, keep_above=0.5)


# -- through the runtime ------------------------------------------------------------------------------


def fit(rt):
    """Pixel-wise PPO as a method writes it."""
    actor, reference, critic = rt.prepare(
        balanced(), balanced().requires_grad_(requires_grad=False), Critic()
    )
    parts = {"actor": actor, "critic": critic}
    optimizers = {name: torch.optim.Adam(part.parameters(), lr=0.003) for name, part in parts.items()}
    guard = CollapseGuard(parts, list(optimizers.values()), every=2)
    draws = generator(rt.rank)
    rt.checkpoint.register(
        **parts, **{f"{name}_optimizer": item for name, item in optimizers.items()}, guard=guard, draws=draws
    )
    config = PixelwisePPOConfig(kl=0.05, sigma_px=1.0, inner_steps=2)
    limits = {"actor": config.max_grad_norm, "critic": config.critic_max_grad_norm}

    def advance(part, loss):
        rt.backward(loss, cases=["a", "b"])
        return rt.step(optimizers[part], clip_norm=limits[part])

    for step in rt.steps(rt.checkpoint.resume(), rt.job.config.train.max_steps):
        batch = rollout(actor, reference, images(8), bright, config, generator=draws, autocast=rt.autocast)
        if step == 4:
            batch.shares[0] = torch.tensor([1.0, 0.0, 0.0])  # as if everything were background
        if guard.check(batch, reduce=rt.reduce):
            stats = update(actor, critic, batch, config, step=advance, autocast=rt.autocast)
            rt.log(step, **stats.as_dict(), rate=guard.rate)
    return guard


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_with_guard_resumes_bit_for_bit(tmp_path, precision):
    def train(folder, steps):
        with toy.make_job(folder, steps, precision=precision).runtime() as rt:
            return fit(rt)

    whole = train(tmp_path / "a", 6)
    train(tmp_path / "b", 3)
    resumed = train(tmp_path / "b", 6)
    assert (whole.restored, resumed.restored, resumed.rate) == (1, 1, 0.5)
    assert toy.state_of(tmp_path / "a") == toy.state_of(tmp_path / "b")
