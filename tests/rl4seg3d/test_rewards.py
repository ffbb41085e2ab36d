"""Rewards of rl4seg3d: fusion, finite frames, temperature, the penalty of frames that jump."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medrl.core.adaptation.rewards import Reward
from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.learned_reward import RewardNet
from medrl.plugins.rl4seg3d.rewards import (
    FusedReward,
    fuse,
    normalise,
    temporal_penalty,
    temporal_severity,
)

A, B = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.4, 0.6, 0.2])


class Constant(nn.Module):
    """A reward network whose logit is the same everywhere."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((x.shape[0], 1, *x.shape[2:]), self.logit)


def windows(jump: bool = False) -> torch.Tensor:
    """Two windows of a growing square; the third frame of the second one may lie elsewhere."""
    actions = torch.zeros(2, 24, 24, 6, dtype=torch.int64)
    for t in range(6):
        actions[:, 6:16, 6 : 16 + t, t] = 2
        actions[:, 8:14, 8 : 16 + t, t] = 1
    if jump:
        actions[1, :, :, 2] = actions[1, :, :, 2].roll(6, dims=0)
    return actions


def test_two_rewards_become_their_minimum_mean_or_product():
    assert fuse([A, B]).tolist() == pytest.approx([0.0, 0.5, 0.2])
    assert fuse([A, B], "mean").tolist() == pytest.approx([0.2, 0.55, 0.6])
    assert fuse([A, B], "product").tolist() == pytest.approx([0.0, 0.3, 0.2])


def test_any_number_of_rewards_is_fused():
    third = torch.tensor([0.9, 0.1, 0.3])
    assert fuse([A, B, third]).tolist() == pytest.approx([0.0, 0.1, 0.2])
    assert torch.equal(fuse([A]), A)


def test_rewards_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeFault, match="0 rewards"):
        fuse([])
    with pytest.raises(RuntimeFault, match="2 rewards of shapes"):
        fuse([A, B[:2]])
    with pytest.raises(ConfigError, match="maximum"):
        fuse([A, B], "maximum")  # type: ignore[arg-type]


def test_every_frame_is_stretched_by_itself():
    rewards = torch.rand(2, 5, 5, 3, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.2
    stretched = normalise(rewards)
    assert stretched.amin(dim=(1, 2)).tolist() == torch.zeros(2, 3).tolist()
    assert stretched.amax(dim=(1, 2)).tolist() == torch.ones(2, 3).tolist()
    one = rewards[1, :, :, 2]
    assert torch.allclose(stretched[1, :, :, 2], (one - one.min()) / (one.max() - one.min()))


@pytest.mark.parametrize("value", [0.0, 0.37, 1.0])
def test_a_constant_frame_stays_finite(value):
    rewards = torch.rand(1, 4, 4, 2, generator=torch.Generator().manual_seed(0))
    rewards[..., 1] = value
    stretched = normalise(rewards)
    assert torch.isfinite(stretched).all()
    assert (stretched[..., 1] == value).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_earns_nothing(broken):
    rewards = torch.full((1, 4, 4, 2), 0.5)
    rewards[0, 0, 0, 0], rewards[0, 1, 1, 0] = broken, 1.0
    stretched = normalise(rewards)
    assert torch.isfinite(stretched).all()
    assert stretched[0, 0, 0, 0] == 0
    assert stretched[0, 1, 1, 0] == 1


@pytest.mark.parametrize(("temperature", "reward"), [(1.0, 0.8808), (4.5989, 0.6070)])
def test_the_reward_of_a_logit_has_its_temperature(temperature, reward):
    net = RewardNet([Constant(2.0)], classes=3, head="binary", encoding="scalar", temperature=temperature)
    actions = windows()
    fused = FusedReward({"anatomical": net.reward}, stretch=False)
    found = fused(actions, torch.zeros(2, 1, 24, 24, 6))
    assert found.shape == actions.shape
    assert round(float(found.mean()), 4) == reward


def test_nets_are_stretched_and_fused_by_name():
    def first(actions, images):
        return images[:, 0] * 0.5

    def second(actions, images):
        return 1.0 - images[:, 0]

    images = torch.rand(2, 1, 24, 24, 6, generator=torch.Generator().manual_seed(0))
    plain = FusedReward({"anatomical": first, "landmark": second}, stretch=False)
    assert torch.equal(plain(windows(), images), torch.minimum(images[:, 0] * 0.5, 1 - images[:, 0]))
    assert tuple(plain.maps(windows(), images)) == ("anatomical", "landmark")
    stretched = FusedReward({"anatomical": first, "landmark": second})
    expected = torch.minimum(normalise(images[:, 0]), normalise(1 - images[:, 0]))
    assert torch.allclose(stretched.bind()(windows(), images), expected, atol=1e-6)
    assert isinstance(plain, Reward)
    assert not plain.needs_truth


def test_rewards_without_a_network_or_of_an_unknown_kind_are_refused():
    with pytest.raises(ConfigError, match="no network"):
        FusedReward({})
    with pytest.raises(ConfigError, match="fusion 'least'"):
        FusedReward({"a": lambda actions, images: A}, fusion="least")  # type: ignore[arg-type]


def test_sequences_that_move_smoothly_are_not_penalised():
    actions = windows()
    rewards = torch.rand(actions.shape, generator=torch.Generator().manual_seed(0))
    assert not temporal_severity(actions).any()
    assert torch.equal(temporal_penalty(rewards, actions), rewards)


def test_a_jump_lowers_the_reward_of_its_own_sequence_around_its_frame():
    actions = windows(jump=True)
    severity = temporal_severity(actions)
    assert not severity[0].any()
    assert int(severity[1].argmax()) == 2
    rewards = torch.rand(actions.shape, generator=torch.Generator().manual_seed(0))
    lowered = temporal_penalty(rewards, actions, blur_px=2.0)
    assert torch.equal(lowered[0], rewards[0])
    assert (lowered <= rewards).all()
    assert torch.isfinite(lowered).all()
    assert lowered.min() >= 0
    lost = (rewards[1] - lowered[1]).mean(dim=(0, 1))
    assert lost[2] > 0.05


def test_the_penalty_spreads_what_is_doubtful():
    actions = windows(jump=True)
    rewards = torch.ones(actions.shape)
    rewards[1, 12, 12, 2] = 0.0
    lowered = temporal_penalty(rewards, actions, blur_px=1.0)[1, ..., 2]
    assert lowered[12, 12] == 0
    assert lowered[12, 13] < lowered[12, 15] < lowered[12, 20] <= 1
    wider = temporal_penalty(rewards, actions, blur_px=3.0)[1, ..., 2]
    assert wider[12, 16] < lowered[12, 16]


def test_strength_mixes_the_lowered_reward_with_the_plain_one():
    actions = windows(jump=True)
    rewards = torch.rand(actions.shape, generator=torch.Generator().manual_seed(0))
    full, half, none = (temporal_penalty(rewards, actions, strength=part) for part in (1.0, 0.5, 0.0))
    assert torch.allclose(half, 0.5 * (full + rewards), atol=1e-6)
    assert torch.equal(none, rewards)
    with pytest.raises(RuntimeFault, match="strength 2"):
        temporal_penalty(rewards, actions, strength=2.0)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_even_and_empty_frames_survive_the_penalty(value):
    actions = windows(jump=True)
    actions[0, :, :, 3] = 0
    rewards = torch.full(actions.shape, value)
    assert torch.equal(temporal_penalty(rewards, actions), rewards)
    nothing = torch.zeros_like(actions)
    assert torch.isfinite(temporal_penalty(torch.rand(actions.shape), nothing)).all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeFault, match="temporal reward"):
        temporal_penalty(torch.zeros(1, 4, 4, 2), torch.zeros(1, 4, 4, 3))
    with pytest.raises(RuntimeFault, match="expected"):
        temporal_severity(torch.zeros(4, 4, 2))
