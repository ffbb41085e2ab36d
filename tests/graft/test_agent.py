"""The agent: states, policies, episodes, and that it learns from the reward and not from the clock."""

from __future__ import annotations

import math

import pytest
import torch

from medrl.core.errors import CheckpointError, ConfigError
from medrl.core.rl.distributions import DirichletPolicy
from medrl.core.rl.gae import discounted_returns
from medrl.core.rl.reinforce import standardise
from medrl.plugins.graft.agent import (
    AgentSettings,
    Correlation,
    FreePolicy,
    PolicyState,
    StoredEpisode,
    TeacherAgent,
    TeacherPolicy,
    TraceEpisode,
    make_state,
    published_losses,
    published_step_loss,
    state_channels,
    state_scalars,
)
from medrl.plugins.graft.weighting import from_quality, legacy_weights

SIZE = (2, 4, 4)


def state(batch=2, teachers=3, channels=4, scalars=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = tuple(torch.randn(batch, channels, *SIZE, generator=generator) for _ in range(teachers))
    return PolicyState(maps, torch.rand(batch, teachers, scalars, generator=generator))


def policy(teachers=3, channels=4, scalars=3, **kwargs):
    torch.manual_seed(0)
    return TeacherPolicy([channels] * teachers, scalars, **kwargs)


# -- state ------------------------------------------------------------------------------------------


def test_a_pooled_state_of_a_full_size_teacher_stays_under_one_megabyte():
    features = [{"neg1": torch.randn(1, 32, 5, 64, 64)}]
    logits = [torch.randn(1, 2, 20, 64, 64)]
    built = make_state(
        features, logits, taps=["neg1"], similarity={"neg1": torch.zeros(1, 1)}, quality=torch.ones(1, 1)
    )
    assert built.spatial[0].shape == (1, 34, 5, 32, 32)
    assert built.scalars.shape == (1, 1, 2)
    assert built.nbytes < 1_000_000


def test_the_scale_of_a_teacher_does_not_change_its_state():
    features = [{"neg1": torch.randn(1, 4, 4, 8, 8)}]
    logits = [torch.randn(1, 2, 4, 8, 8)]
    common = {"taps": ["neg1"], "similarity": {"neg1": torch.zeros(1, 1)}, "quality": torch.ones(1, 1)}
    plain = make_state(features, logits, **common)
    louder = make_state([{"neg1": features[0]["neg1"] * 100}], logits, **common)
    assert torch.allclose(plain.spatial[0], louder.spatial[0], atol=1e-4)


def test_every_part_of_the_state_has_its_place():
    taps = ["neg1", "neg2"]
    features = [{"neg1": torch.randn(2, 4, 2, 8, 8), "neg2": torch.randn(2, 6, 2, 4, 4)} for _ in range(3)]
    logits = [torch.randn(2, 2, 2, 8, 8) for _ in range(3)]
    built = make_state(
        features,
        logits,
        taps=taps,
        similarity={"neg1": torch.full((2, 3), 0.1), "neg2": torch.full((2, 3), 0.2)},
        quality=torch.full((2, 3), 0.3),
        disagreement=torch.full((2, 3), 0.4),
        in_sample=torch.full((2, 3), 0.5),
    )
    channels = state_channels({"neg1": 4, "neg2": 6, "logits": 2}, taps)
    assert built.spatial[0].shape[1] == channels == 12
    assert built.scalars[0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert state_scalars(taps, disagreement=True, in_sample=True) == 5
    whole = make_state(
        features,
        logits,
        taps=taps,
        similarity={"neg1": torch.zeros(2, 3), "neg2": torch.zeros(2, 3)},
        quality=torch.zeros(2, 3),
        pooled_first=False,
    )
    assert whole.spatial[0].shape == (2, 12, 2, 8, 8)


# -- policy -----------------------------------------------------------------------------------------


def test_the_policy_has_its_stated_number_of_parameters():
    assert sum(p.numel() for p in TeacherPolicy([34] * 5, 3).parameters()) == 463_125


def test_every_parameter_of_the_policy_exists_at_once_and_trains():
    net = policy(heads=("neg1", "neg2", "logits"), residual=False)
    names = [name for name, _ in net.named_parameters()]
    assert "encoders.0.conv1.weight" in names
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    scores = net(state())
    assert set(scores) == {"neg1", "neg2", "logits"}
    sum((torch.softmax(s, 1)[:, 0]).sum() for s in scores.values()).backward()
    optimizer.step()
    assert [name for name, p in net.named_parameters()] == names
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_residual_policy_starts_exactly_at_its_prior():
    agent = TeacherAgent(policy(), AgentSettings(floor=0.0))
    prior = torch.tensor([0.7, 0.2, 0.1])
    assert torch.allclose(agent.means(state(), {"neg1": prior})["neg1"], prior.expand(2, 3))
    assert torch.allclose(agent.means(state(), {})["neg1"], torch.full((2, 3), 1 / 3))


def test_half_precision_states_leave_the_policy_in_float32():
    net = policy(residual=False)
    half = state()
    half = PolicyState(tuple(m.bfloat16() for m in half.spatial), half.scalars.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        scores = net(half)
    assert scores["neg1"].dtype == torch.float32
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_the_original_order_of_pooling_is_kept_for_comparison():
    net = policy(pooled_first=False, residual=False)
    assert net(state())["neg1"].shape == (2, 3)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in policy().parameters())


# -- acting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [True, False])
def test_drawn_weights_always_lie_on_the_simplex(dtype, share):
    agent = TeacherAgent(FreePolicy(5), AgentSettings(kappa=0.05, share_action=share))
    seen = state(batch=4, teachers=5)
    for seed in range(200):
        prior = from_quality(torch.rand(5, generator=torch.Generator().manual_seed(seed))).to(dtype)
        action = agent.act(seen, {"neg1": prior})
        for weights in (action.weights["neg1"], action.mean["neg1"]):
            assert bool((weights >= 0).all())
            assert float((weights.sum(1) - 1).abs().max()) < 1e-6
        assert math.isfinite(float(action.log_prob.detach()))


def test_the_action_is_shared_by_the_batch_when_the_reward_is():
    shared = TeacherAgent(policy(residual=False), AgentSettings()).act(state(), {}).raw["neg1"]
    assert torch.equal(shared[0], shared[1])
    own = TeacherAgent(policy(residual=False), AgentSettings(share_action=False)).act(state(), {}).raw["neg1"]
    assert not torch.equal(own[0], own[1])


def test_log_probability_is_that_of_the_raw_action_before_the_blend():
    agent = TeacherAgent(FreePolicy(3), AgentSettings(floor=0.0, kappa=9.0))
    action = agent.act(None, {}, alpha=0.25)
    expected = DirichletPolicy(torch.full((3,), 3.0 + 1e-3)).log_prob(action.raw["neg1"][0])
    assert torch.allclose(action.log_prob, expected)
    assert torch.allclose(action.weights["neg1"], 0.75 / 3 + 0.25 * action.raw["neg1"])


def test_an_agent_that_is_off_gives_exactly_the_starting_weights():
    agent = TeacherAgent(FreePolicy(3))
    assert torch.equal(agent.act(None, {}, alpha=0.0).weights["neg1"], torch.full((1, 3), 1 / 3))
    start = {"neg1": torch.tensor([0.5, 0.25, 0.25])}
    assert torch.equal(agent.act(None, {}, alpha=0.0, start=start).weights["neg1"], start["neg1"][None])


def test_without_exploration_the_mean_is_the_action():
    agent = TeacherAgent(FreePolicy(3))
    action = agent.act(None, {"neg1": torch.tensor([0.6, 0.3, 0.1])}, explore=False)
    assert torch.equal(action.raw["neg1"], action.mean["neg1"])


def test_density_and_entropy_of_the_worked_example():
    dirichlet = DirichletPolicy(torch.full((3,), 3.0))
    assert float(dirichlet.log_prob(torch.tensor([0.5, 0.3, 0.2]))) == pytest.approx(1.5120, abs=5e-5)
    assert float(dirichlet.entropy()) == pytest.approx(-1.2180, abs=5e-5)


# -- learning ---------------------------------------------------------------------------------------


def test_returns_of_the_worked_example():
    episode = TraceEpisode([], gamma=0.95)
    episode.rewards = [1.0, -2.0, 0.5]
    assert episode.returns(60.0).tolist() == pytest.approx([50.99375, 52.625, 57.5])
    assert standardise(episode.returns(60.0)).tolist() == pytest.approx(
        [-0.80128, -0.31940, 1.12068], abs=5e-6
    )
    assert episode.returns(0.0).tolist() == pytest.approx([-0.44875, -1.525, 0.5])


def test_the_trace_gives_the_gradient_of_an_episode_with_all_its_states():
    net = policy(residual=False)
    agent = TeacherAgent(net, AgentSettings(gamma=0.9, entropy=0.01, scale="episode"))
    agent.baseline.update(7.0)
    rewards, kept = [1.0, -2.0, 0.5, 3.0], []
    for t, reward in enumerate(rewards):
        seen = state(seed=t)
        action = agent.act(seen, {})
        kept.append((seen, action.raw["neg1"]))
        agent.record(action, reward)
    loss, report = agent.loss(terminal=10.0)
    found = torch.autograd.grad(loss, list(net.parameters()))
    returns = discounted_returns(torch.tensor(rewards, dtype=torch.float64), gamma=0.9, terminal=10.0)
    advantages = standardise(returns, centre=7.0)
    expected = torch.zeros(())
    for (seen, raw), advantage in zip(kept, advantages, strict=True):
        mean = agent.means(seen, {})["neg1"].mean(0)
        dirichlet = DirichletPolicy.around(mean, kappa=20.0)
        expected = expected - (float(advantage) * dirichlet.log_prob(raw[0]) + 0.01 * dirichlet.entropy()) / 4
    wanted = torch.autograd.grad(expected, list(net.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    assert any(float(g.abs().max()) > 1e-3 for g in found)
    assert (report.steps, report.baseline) == (4, 7.0)
    assert len(agent.episode) == 0


def test_the_size_of_the_agents_checkpoint_does_not_depend_on_the_length_of_the_episode():
    def tensors(steps):
        agent = TeacherAgent(policy())
        for t in range(steps):
            agent.record(agent.act(state(seed=t), {}), float(t))
        sums = agent.state_dict()["episode"]
        return sum(t.numel() for name, ts in sums.items() if name != "rewards" for t in ts)

    assert tensors(1) == tensors(7)


@pytest.mark.parametrize("scale", ["episode", "running"])
def test_an_episode_of_one_step_gives_a_finite_update_towards_what_was_rewarded(scale):
    agent = TeacherAgent(FreePolicy(2), AgentSettings(scale=scale, entropy=0.0))
    agent.record(agent.act(None, {}), 1.0)
    loss, _ = agent.loss()
    assert torch.autograd.grad(loss, agent.policy.scores["neg1"])[0].tolist() == [0.0, 0.0]
    action = agent.act(None, {})
    agent.record(action, 1e6)
    loss, report = agent.loss()
    (gradient,) = torch.autograd.grad(loss, agent.policy.scores["neg1"])
    assert report.scale > 1.0
    (score,) = torch.autograd.grad(agent.act(None, {}, explore=False).entropy, agent.policy.scores["neg1"])
    assert bool(torch.isfinite(gradient).all())
    more = int(action.raw["neg1"][0].argmax())
    assert gradient[more] < 0
    assert float(gradient.abs().max()) <= 3.0 * 20.0
    assert torch.isfinite(score).all()


def test_constant_rewards_teach_nothing():
    agent = TeacherAgent(FreePolicy(3), AgentSettings(gamma=0.0, entropy=0.0))
    for _ in range(10):
        agent.record(agent.act(None, {}), 2.5)
    loss, _ = agent.loss()
    assert float(torch.autograd.grad(loss, agent.policy.scores["neg1"])[0].abs().max()) < 1e-3


def test_rewards_that_are_not_finite_are_left_out_with_their_action():
    agent = TeacherAgent(FreePolicy(3))
    agent.record(agent.act(None, {}), float("nan"))
    assert len(agent.episode) == 0
    loss, report = agent.loss()
    assert report.steps == 0
    assert float(loss.detach()) == 0.0


def bandit(update, episodes=150, steps=50, seed=0, until=1.0):
    """Mean weight of the best of five arms after learning, or as soon as it reaches `until`."""
    quality = torch.tensor([0.2, 0.2, 0.9, 0.2, 0.2])
    noise = torch.Generator().manual_seed(1000 + seed)
    net = FreePolicy(5)
    agent = TeacherAgent(net, AgentSettings(gamma=0.0, seed=seed, entropy=0.0))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)

    def reward(weights):
        return float((weights * quality).sum()) + 0.05 * float(torch.randn((), generator=noise))

    for _ in range(episodes):
        optimizer.zero_grad()
        update(agent, reward, steps)
        optimizer.step()
        found = float(agent.means(None, {})["neg1"][0, 2].detach())
        if found >= until:
            break
    return found


def reinforce(agent, reward, steps):
    for _ in range(steps):
        action = agent.act(None, {})
        agent.record(action, reward(action.raw["neg1"][0]))
    agent.loss()[0].backward()


def published(agent, reward, steps):
    episode = StoredEpisode()
    seen = PolicyState((), torch.zeros(1, 5, 1))
    for _ in range(steps):
        weights = torch.softmax(agent.policy(None)["neg1"], 1)
        episode.add(seen, reward(weights.detach()[0]))
    losses = published_losses(
        episode, lambda s: torch.softmax(agent.policy(s)["neg1"], 1), gamma=0.0, terminal=0.0, minibatch=steps
    )
    next(iter(losses)).backward()


@pytest.mark.parametrize("seed", range(5))
def test_reinforce_finds_the_best_of_five_teachers(seed):
    assert bandit(reinforce, seed=seed, until=1.0 if seed == 0 else 0.95) >= 0.95


def test_the_published_update_never_leaves_uniform():
    assert bandit(published, episodes=20) == pytest.approx(0.2, abs=1e-6)


def test_a_random_reward_moves_no_teacher_far():
    def random_reward(agent, reward, steps):
        reinforce(agent, lambda weights: reward(weights * 0.0), steps)

    assert bandit(random_reward, episodes=30) < 0.5


def test_resuming_in_the_middle_of_an_episode_changes_nothing():
    def run(break_at):
        net = policy(residual=False)
        agent = TeacherAgent(net, AgentSettings(seed=4))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for t in range(8):
            if t == break_at:
                saved = agent.state_dict(), net.state_dict(), optimizer.state_dict()
                net = policy()
                net.load_state_dict(saved[1])
                agent = TeacherAgent(net, AgentSettings(seed=99))
                agent.load_state_dict(saved[0])
                optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
                optimizer.load_state_dict(saved[2])
            action = agent.act(state(seed=t), {})
            agent.record(action, float(action.raw["neg1"][0, 0]))
            if t % 3 == 2:
                optimizer.zero_grad()
                agent.loss(terminal=1.0)[0].backward()
                optimizer.step()
        return [*net.parameters()], agent

    straight, first = run(None)
    resumed, second = run(4)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert first.baseline.state_dict() == second.baseline.state_dict()
    assert first.correlation["neg1"].values == second.correlation["neg1"].values


def test_an_episode_of_another_policy_is_refused():
    saved = TeacherAgent(FreePolicy(3)).state_dict()
    with pytest.raises(CheckpointError, match="another shape"):
        TeacherAgent(FreePolicy(4)).load_state_dict(saved)
    with pytest.raises(CheckpointError):
        TeacherAgent(FreePolicy(3)).load_state_dict({})
    with pytest.raises(ConfigError):
        TeacherAgent(FreePolicy(3), AgentSettings(scale="none"))


# -- the published update ---------------------------------------------------------------------------


def test_the_published_episode_update_sees_each_minibatch_and_survives_one_step():
    net = policy(residual=False, factors=True)
    episode = StoredEpisode()
    for t in range(5):
        episode.add(state(seed=t), float(t))

    def weights(seen):
        h = torch.softmax(net(seen)["neg1"], 1)
        return legacy_weights(h, seen.scalars[..., 1], seen.scalars[..., 0], factors=net.factors)

    losses = list(published_losses(episode, weights, gamma=0.95, terminal=60.0, minibatch=4))
    assert len(losses) == 2
    sum(losses).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())
    other = StoredEpisode()
    other.load_state_dict(episode.state_dict())
    assert other.rewards == episode.rewards
    assert torch.equal(other.states[3].scalars, episode.states[3].scalars)
    episode.clear()
    episode.add(state(), 1.0)
    (single,) = published_losses(episode, weights, gamma=0.95, terminal=60.0)
    assert float(single.detach()) == 0.0


def test_the_published_step_update_pulls_towards_one_with_fixed_strengths_for_two_samples():
    weights = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]], requires_grad=True)
    loss = published_step_loss(weights, torch.tensor([5.0, -300.0]))
    strong, weak = (1 / (1 + math.exp(-x)) for x in (0.70711, -0.70711))
    logs = weights.detach().log()
    expected = -float((strong * logs[0].sum() + weak * logs[1].sum()) / 6)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)
    loss.backward()
    assert bool((weights.grad < 0).all())


# -- correlation ------------------------------------------------------------------------------------


def test_the_logged_correlation_agrees_with_torch():
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(50, 3, generator=generator)
    rewards = shares[:, 1] - shares[:, 2] + 0.3 * torch.randn(50, generator=generator)
    tracker = Correlation(3)
    for share, reward in zip(shares, rewards, strict=True):
        tracker.update(share, float(reward))
    expected = torch.corrcoef(torch.cat((shares.T, rewards[None])))[3, :3]
    assert tracker.values == pytest.approx(expected.tolist(), abs=1e-5)
    assert Correlation(2).values == [0.0, 0.0]
