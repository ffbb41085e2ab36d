"""Reward net: encodings, heads, ensembles, temperature, quality on held-out pairs, composite reward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medrl.core.errors import ConfigError, DataError, RuntimeFault
from medrl.core.learned_reward import (
    CompositeReward,
    RewardNet,
    build_corrector,
    encode,
    fit_temperature,
    fuse,
    held_out_quality,
    input_channels,
    near_foreground,
    one_hot,
    reward_quality,
    stretch_frames,
    widen_input,
)
from medrl.core.learned_reward.encoding import cross_entropy
from medrl.core.learned_reward.modes import class_logits, evaluating
from medrl.core.learned_reward.temperature import HIGHEST, LOWEST, nll


class Constant(nn.Module):
    """Logits that are the same everywhere."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, seen):
        shape = (seen.shape[0], len(self.logits), *seen.shape[2:])
        return self.logits.view(1, -1, *[1] * (seen.dim() - 2)).expand(shape)


class Copy(nn.Module):
    """Logits that are the one-hot channels of the action, times a number."""

    def __init__(self, channels: int, scale: float = 5.0) -> None:
        super().__init__()
        self.channels, self.scale = channels, scale

    def forward(self, seen):
        return self.scale * seen[:, self.channels :]


def images_and_actions(shape=(6, 4), classes=3, n=2, channels=1):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, channels, *shape, generator=generator)
    return images, torch.randint(0, classes, (n, *shape), generator=generator)


# -- encoding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(10, 7), (6, 5, 4)])
def test_one_hot_and_scalar_actions_follow_the_channels_of_the_image(classes, shape):
    images, actions = images_and_actions(shape, classes, channels=2)
    hot, scalar = encode(images, actions, classes), encode(images, actions, classes, "scalar")
    assert hot.shape == (2, input_channels(2, classes), *shape)
    assert scalar.shape == (2, input_channels(2, classes, "scalar"), *shape)
    assert torch.equal(hot[:, :2], images)
    assert torch.equal(hot[:, 2:].argmax(1), actions)
    assert torch.equal(hot[:, 2:].sum(1), torch.ones(2, *shape))
    assert torch.equal(scalar[:, 2], actions.float())


def test_an_action_on_another_grid_and_an_unknown_encoding_are_refused():
    images, actions = images_and_actions()
    with pytest.raises(RuntimeFault, match=r"expected \(N, C, \*S\) and \(N, \*S\)"):
        encode(images, actions[:, :3], 3)
    with pytest.raises(ConfigError, match="did you mean 'onehot'"):
        encode(images, actions, 3, "one_hot")


def test_the_cross_entropy_and_its_gradient_are_those_of_torch():
    images, actions = images_and_actions((5, 4, 3))
    logits = torch.cat((images, 1 - images, images**2), dim=1).requires_grad_()
    own, other = cross_entropy(logits, actions), nn.functional.cross_entropy(logits, actions)
    assert float(own.detach()) == pytest.approx(float(other.detach()), rel=1e-6)
    (a,), (b,) = torch.autograd.grad(own, logits), torch.autograd.grad(other, logits)
    assert torch.allclose(a, b, atol=1e-7)


# -- rewards ----------------------------------------------------------------------------------------


def test_the_binary_reward_of_logit_two_is_881_and_731_at_temperature_two():
    images, actions = images_and_actions()
    net = RewardNet([Constant(2.0)], classes=3, head="binary", encoding="scalar")
    assert net.reward(actions, images).unique().tolist() == [pytest.approx(0.8808, abs=5e-5)]
    net.set_temperature(2.0)
    assert net.reward(actions, images).unique().tolist() == [pytest.approx(0.7311, abs=5e-5)]
    net.set_temperature(4.5989)
    assert net.reward(actions, images).unique().tolist() == [pytest.approx(0.6070, abs=5e-5)]


def test_the_class_reward_is_the_softmax_at_the_class_of_the_action():
    images, actions = images_and_actions()
    net = RewardNet([Constant(1.0, 0.0, -1.0)], classes=3)
    expected = torch.softmax(torch.tensor([1.0, 0.0, -1.0]), 0)[actions]
    assert torch.allclose(net.reward(actions, images), expected)
    warm = RewardNet([Constant(1.0, 0.0, -1.0)], classes=3, temperature=2.0)
    assert torch.allclose(
        warm.reward(actions, images), torch.softmax(torch.tensor([0.5, 0.0, -0.5]), 0)[actions]
    )


@pytest.mark.parametrize(("reduce", "expected"), [("min", 0.2), ("mean", 0.5), ("product", 0.16)])
def test_several_networks_become_one_reward(reduce, expected):
    images, actions = images_and_actions()
    logits = [math.log(p / (1 - p)) for p in (0.2, 0.8)]
    net = RewardNet([Constant(z) for z in logits], classes=3, head="binary", reduce=reduce)
    assert net.reward(actions, images).unique().tolist() == [pytest.approx(expected)]


def test_the_minimum_of_an_ensemble_is_taken_pixel_by_pixel():
    a, b = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.4, 0.6, 0.2])
    assert fuse(torch.stack([a, b])).tolist() == pytest.approx([0.0, 0.5, 0.2])


def test_class_probabilities_of_an_ensemble_are_their_mean_and_sum_to_one():
    images, actions = images_and_actions((5, 4, 3))
    net = RewardNet([Constant(1.0, 0.0, -1.0), Constant(0.0, 2.0, 0.0)], classes=3)
    probabilities = net.class_probabilities(images, actions)
    assert probabilities.shape == (2, 3, 5, 4, 3)
    assert torch.allclose(probabilities.sum(1), torch.ones(2, 5, 4, 3))
    assert float(probabilities[0, 1, 0, 0, 0]) == pytest.approx(
        (math.exp(0) / (math.e + 1 + 1 / math.e) + math.exp(2) / (2 + math.exp(2))) / 2
    )


def test_a_constant_frame_stays_and_others_are_stretched():
    rewards = torch.tensor([[[0.2, 0.5], [0.6, 0.5]]])[:, None]
    stretched = stretch_frames(rewards)
    assert stretched[0, 0, :, 0].tolist() == [0.0, 1.0]
    assert stretched[0, 0, :, 1].tolist() == [0.5, 0.5]


def test_rewarding_in_training_mode_changes_neither_weights_nor_statistics_nor_the_mode():
    images, actions = images_and_actions((8, 8))
    body = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3))
    net = RewardNet([body], classes=3).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first = net.reward(actions, images)
    assert net.training
    assert body[1].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net.eval().reward(actions, images), first)
    assert not first.requires_grad


def test_each_module_gets_its_own_mode_back_even_after_an_error():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout())
    model.train()
    model[0].eval()
    with evaluating(model, "no module"):
        assert not model[1].training
    with pytest.raises(ConfigError), evaluating(model):
        class_logits([1], 2)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


# -- losses -----------------------------------------------------------------------------------------


def test_losses_are_the_cross_entropies_of_class_and_of_correctness():
    images, actions = images_and_actions()
    truth = (actions + (images[:, 0] > 0.5)) % 3
    z = torch.tensor([1.0, 0.0, -1.0])
    by_class = RewardNet([Constant(*z)], classes=3).loss(images, actions, truth)
    assert float(by_class.detach()) == pytest.approx(float(-torch.log_softmax(z, 0)[truth].mean()))
    binary = RewardNet([Constant(2.0)], classes=3, head="binary").loss(images, actions, truth)
    right = float((actions == truth).float().mean())
    expected = -right * math.log(0.880797) - (1 - right) * math.log(1 - 0.880797)
    assert float(binary.detach()) == pytest.approx(expected, abs=1e-5)


def test_the_binary_head_learns_a_target_between_zero_and_one_also_by_squares():
    images, actions = images_and_actions()
    net = RewardNet([Constant(0.0)], classes=3, head="binary", criterion="mse")
    loss = net.loss(images, actions, torch.full(actions.shape, 0.9))
    assert float(loss.detach()) == pytest.approx(0.16)
    with pytest.raises(RuntimeFault, match="class head"):
        RewardNet([Constant(0.0, 0.0, 0.0)], classes=3).loss(images, actions, torch.rand(actions.shape))


def test_settings_that_do_not_fit_are_one_line():
    with pytest.raises(ConfigError, match="no network"):
        RewardNet([], classes=3)
    with pytest.raises(ConfigError, match="did you mean 'binary'"):
        RewardNet([Constant(0.0)], classes=3, head="binery")
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        RewardNet([Constant(0.0)], classes=3, reduce="meen")
    with pytest.raises(ConfigError, match="the class head has nll"):
        RewardNet([Constant(0.0)], classes=3, criterion="mse")
    with pytest.raises(ConfigError, match="one positive number"):
        RewardNet([Constant(0.0)], classes=3, temperature=[1.0, 2.0])
    images, actions = images_and_actions()
    with pytest.raises(ConfigError, match=r"the class head needs logits \(2, 3, 6, 4\)"):
        RewardNet([Constant(0.0)], classes=3).reward(actions, images)
    with pytest.raises(ConfigError, match="tells no class"):
        RewardNet([Constant(0.0)], classes=3, head="binary").class_probabilities(images, actions)


def test_the_temperature_travels_with_the_weights():
    net = RewardNet([Constant(0.0), Constant(1.0)], classes=3, head="binary", temperature=[2.0, 3.0])
    other = RewardNet([Constant(0.0), Constant(0.0)], classes=3, head="binary")
    other.load_state_dict(net.state_dict())
    assert other.temperature.tolist() == [2.0, 3.0]


def test_a_net_widened_from_an_actor_starts_with_its_outputs():
    actor = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    body.load_state_dict(widen_input(actor.state_dict(), body.state_dict()))
    images, actions = images_and_actions()
    net = RewardNet([body], classes=3)
    assert torch.allclose(
        net.class_probabilities(images, actions), torch.softmax(actor(images), 1), atol=1e-6
    )
    with pytest.raises(ConfigError, match="not of one kind"):
        widen_input(actor.state_dict(), nn.Conv2d(4, 4, 3).state_dict())


# -- temperature ------------------------------------------------------------------------------------


def test_the_temperature_of_logit_three_with_eight_of_ten_right_is_3_by_log_4():
    right = torch.tensor([1.0] * 8 + [0.0] * 2)
    assert fit_temperature(torch.full((10,), 3.0), right) == pytest.approx(3 / math.log(4), rel=1e-9)
    assert 3 / math.log(4) == pytest.approx(2.1640, abs=5e-5)


def test_the_temperature_of_two_classes_equals_that_of_their_difference():
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(500, generator=generator)
    right = (torch.rand(500, generator=generator) < torch.sigmoid(z / 1.7)).long()
    binary = fit_temperature(z, right.float())
    classes = fit_temperature(torch.stack((torch.zeros(500), z), 1), right)
    assert binary == pytest.approx(classes, rel=1e-6)
    assert binary == pytest.approx(1.7, rel=0.2)


@given(
    seed=st.integers(0, 1000), true=st.floats(0.3, 6.0), classes=st.integers(2, 5), scale=st.floats(1.0, 4.0)
)
@settings(max_examples=30, deadline=None)
def test_no_temperature_has_a_smaller_loss_than_the_fitted_one(seed, true, classes, scale):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(4, classes, 6, 5, generator=generator)
    chance = torch.softmax(z / true, 1).movedim(1, -1).reshape(-1, classes)
    labels = torch.multinomial(chance, 1, generator=generator).view(4, 6, 5)
    fitted = fit_temperature(z, labels)
    least = nll(z, labels, fitted)
    for other in (0.5 * fitted, 0.95 * fitted, 1.05 * fitted, 2.0 * fitted, 1.0):
        if LOWEST <= other <= HIGHEST:
            assert least <= nll(z, labels, other) + 1e-9


def test_logits_that_are_never_or_always_wrong_end_at_a_limit():
    z = torch.tensor([2.0, -1.0, 3.0])
    assert fit_temperature(z, (z > 0).float()) == LOWEST
    assert fit_temperature(z, (z < 0).float()) == HIGHEST


def test_a_fit_without_pixels_or_with_nan_is_refused():
    with pytest.raises(DataError, match="no held-out pixel"):
        fit_temperature(torch.zeros(0), torch.zeros(0))
    with pytest.raises(DataError, match="not finite"):
        fit_temperature(torch.tensor([math.nan]), torch.ones(1))
    with pytest.raises(DataError, match="do not fit"):
        fit_temperature(torch.zeros(2, 3), torch.zeros(4))


def test_only_so_many_pixels_are_looked_at():
    z = torch.full((1000,), 3.0)
    place = torch.arange(1000) % 10
    right = ((place != 0) & (place != 2)).float()
    assert fit_temperature(z, right, limit=500) == pytest.approx(3 / math.log(1.5))
    assert fit_temperature(z, right) == pytest.approx(3 / math.log(4))


@pytest.mark.parametrize("limit", [2**22, 30])
def test_calibration_of_a_net_fits_each_network_and_sets_it(limit):
    images, actions = torch.zeros(10, 1, 2, 2), torch.zeros(10, 2, 2, dtype=torch.int64)
    truth = torch.zeros(10, 2, 2, dtype=torch.int64)
    truth[::5] = 1
    batches = [(images[i : i + 5], actions[i : i + 5], truth[i : i + 5]) for i in (0, 5)]
    net = RewardNet([Constant(3.0), Constant(6.0)], classes=2, head="binary")
    assert net.calibrate(batches, use=False) == pytest.approx([3 / math.log(4), 6 / math.log(4)])
    assert net.temperature.tolist() == [1.0, 1.0]
    fitted = net.calibrate(batches, limit=limit)
    assert net.temperature.tolist() == pytest.approx(fitted)
    if limit > 40:
        assert net.reward(actions, images).unique().tolist() == [pytest.approx(0.8)]
    by_class = RewardNet([Constant(3.0, 0.0)], classes=2)
    assert by_class.calibrate(batches) == pytest.approx([3 / math.log(4)])
    with pytest.raises(DataError, match="no held-out pixel"):
        net.calibrate([])


# -- quality ----------------------------------------------------------------------------------------


def test_quality_of_a_reward_on_ten_pixels():
    rewards = torch.tensor([0.62] * 5 + [0.97] * 5)
    right = torch.tensor([True] * 3 + [False] * 2 + [True] * 5)
    found = reward_quality(rewards, right)
    assert found.ece == pytest.approx(0.025)
    assert found.accuracy == pytest.approx(0.8)
    assert found.reward == pytest.approx(0.795)
    assert found.auroc == pytest.approx((5 * 1.0 + 3 * 0.5) / 8)
    assert found.bce == pytest.approx(
        -(3 * math.log(0.62) + 2 * math.log(0.38) + 5 * math.log(0.97)) / 10, rel=1e-6
    )
    certain = reward_quality(torch.ones(10), torch.arange(10) < 5)
    assert certain.ece == pytest.approx(0.5)


def test_quality_without_wrong_pixels_leaves_the_auroc_out_of_the_log():
    found = reward_quality(torch.full((4,), 0.9), torch.ones(4, dtype=torch.bool))
    assert math.isnan(found.auroc)
    assert "val_auroc" not in found.as_dict("val_")
    nothing = reward_quality(torch.ones(4), torch.ones(4), mask=torch.zeros(4))
    assert nothing.pixels == 0
    assert nothing.as_dict() == {"pixels": 0}


def test_pixels_near_foreground_lie_within_the_radius_in_the_same_frame():
    labels = torch.zeros(1, 9, 9, dtype=torch.int64)
    labels[0, 4, 4] = 2
    near = near_foreground(labels, 2)
    assert near.sum() == 25
    assert near[0, 2:7, 2:7].all()
    assert torch.equal(near_foreground(labels, 0), labels != 0)
    window = torch.stack((labels, torch.zeros_like(labels)), dim=3)
    assert torch.equal(near_foreground(window, 2), torch.stack((near, torch.zeros_like(near)), dim=3))


@pytest.mark.parametrize("limit", [2**21, 200])
def test_held_out_quality_joins_batches_and_looks_near_foreground(limit):
    truth = torch.zeros(4, 16, 16, dtype=torch.int64)
    truth[:, 6:10, 6:10] = 1
    actions = truth.clone()
    actions[:, 9] = 0
    images = (actions == truth).float()[:, None]
    batches = [(images[i : i + 2], actions[i : i + 2], truth[i : i + 2]) for i in (0, 2)]
    found = held_out_quality(lambda a, x: 0.1 + 0.8 * x[:, 0], batches, limit=limit)
    assert found["all"].auroc == 1.0
    assert found["near"].pixels < found["all"].pixels
    assert found["near"].accuracy < found["all"].accuracy


# -- composite --------------------------------------------------------------------------------------


def test_the_composite_is_a_weighted_sum_of_net_and_corrector():
    mask = torch.zeros(1, 8, 8, dtype=torch.int64)
    mask[0, 2:6, 2:6] = 1
    mask[0, 0, 0] = 1  # a speck that morphology removes
    images = torch.zeros(1, 1, 8, 8)
    net = RewardNet([Copy(1)], classes=2)
    sure = float(torch.softmax(torch.tensor([5.0, 0.0]), 0)[0])
    corrector = build_corrector("morphology", classes=2)
    reward = CompositeReward(net, corrector).reward(mask, images)
    assert float(reward[0, 3, 3]) == pytest.approx(0.25 * sure + 0.75)
    assert float(reward[0, 0, 0]) == pytest.approx(0.25 * sure)
    assert torch.equal(CompositeReward(net, corrector, weight=1.0)(mask, images), net.reward(mask, images))
    whole = CompositeReward(net, corrector, weight=0.4)
    mixture = whole.class_probabilities(images, mask)
    assert torch.allclose(mixture.gather(1, mask[:, None])[:, 0], whole.reward(mask, images))
    assert torch.allclose(mixture.sum(1), torch.ones(1, 8, 8))
    refined = whole.refine(images, mask)
    assert refined[0, 0, 0] == 0
    assert torch.equal(refined[0, 2:6, 2:6], torch.ones(4, 4, dtype=torch.int64))


def test_the_composite_of_an_ensemble_keeps_its_minimum():
    images, actions = images_and_actions(classes=2)
    net = RewardNet([Constant(0.0, 0.0), Constant(0.0, 3.0)], classes=2)
    reward = CompositeReward(net, build_corrector("none", classes=2), weight=1.0).reward(actions, images)
    assert torch.equal(reward, net.reward(actions, images))


def test_a_composite_that_cannot_work_is_refused():
    none = build_corrector("none", classes=3)
    with pytest.raises(ConfigError, match="binary head"):
        CompositeReward(RewardNet([Constant(0.0)], classes=3, head="binary"), none)
    with pytest.raises(ConfigError, match="reward net of 2 classes, corrector of 3"):
        CompositeReward(RewardNet([Constant(0.0, 0.0)], classes=2), none)
    with pytest.raises(ConfigError, match="weight is 2"):
        CompositeReward(RewardNet([Constant(0.0, 0.0, 0.0)], classes=3), none, weight=2.0)


def test_one_logit_of_a_binary_policy_becomes_two():
    logits = class_logits(torch.full((1, 1, 2, 2), 3.0), 2)
    assert logits[0, :, 0, 0].tolist() == [0.0, 3.0]
    with pytest.raises(ConfigError, match="1 logits for 3 classes"):
        class_logits(torch.zeros(1, 1, 2, 2), 3)
    with pytest.raises(ConfigError, match="returned a list"):
        class_logits([1], 2)


@pytest.mark.parametrize("shape", [(100, 70), (12, 8, 4)])
def test_any_size_and_one_hot_of_any_type(shape):
    labels = torch.randint(0, 5, (1, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(one_hot(labels, 5).argmax(1), labels.long())
    net = RewardNet([Copy(1)], classes=5)
    reward = net.reward(labels, torch.zeros(1, 1, *shape))
    assert reward.shape == (1, *shape)
    assert float(reward.min()) == pytest.approx(math.exp(5) / (math.exp(5) + 4))
    assert np.isfinite(reward.numpy()).all()
