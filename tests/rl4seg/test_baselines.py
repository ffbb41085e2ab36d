"""Baselines change what they say they change, leave their start alone, and repeat bit for bit."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medrl.core.adaptation.rewards import RandomReward
from medrl.core.errors import ConfigError, DataError, RuntimeFault
from medrl.core.learned_reward.correctors.base import CorrectorModule
from medrl.core.learned_reward.net import RewardNet
from medrl.plugins.rl4seg import baselines
from medrl.plugins.rl4seg.baselines import Budget, Refiner
from medrl.plugins.rl4seg.baselines.adaptation import entropy
from medrl.plugins.rl4seg.baselines.budget import indices
from medrl.plugins.rl4seg.baselines.self_training import IGNORED
from medrl.plugins.rl4seg.data import ImageSet


def image_set(images: Tensor, labels: Tensor | None) -> ImageSet:
    names = tuple(map(str, range(len(images))))
    return ImageSet(
        ids=names,
        subjects=names,
        images=images,
        labels=labels,
        spacing_mm=torch.ones(len(images), 2, dtype=torch.float64),
        label_names={"background": 0, "LV": 1, "MYO": 2},
    )


def bands(count: int, *, shift: float = 0.0, seed: int = 0) -> ImageSet:
    """Images of three grey levels; the level is the class."""
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (count, 4, 4)))
    labels = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    images = (0.15 + 0.35 * labels.float() + shift)[:, None]
    return image_set(images, labels.to(torch.uint8))


def unlabelled(images: ImageSet) -> ImageSet:
    return images.without_labels()


class Net(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = [nn.BatchNorm2d(8)] if norm else []
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 1), *middle, nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def states_equal(one: nn.Module, two: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return baselines.supervise(Net(), bands(16), Budget(steps=150, batch=8, lr=3e-2, clip=0))


def accuracy(network: nn.Module, images: ImageSet) -> float:
    return float((network(images.images).argmax(1) == images.labels).float().mean())


def test_every_image_comes_once_in_an_epoch_and_the_order_depends_on_the_seed():
    epoch = np.concatenate([indices(10, 5, 1, step, "a") for step in (1, 2)])
    assert sorted(epoch.tolist()) == list(range(10))
    assert indices(10, 5, 1, 1, "a").tolist() == epoch[:5].tolist()
    assert indices(10, 5, 2, 1, "a").tolist() != epoch[:5].tolist()
    assert indices(10, 5, 1, 1, "b").tolist() != epoch[:5].tolist()
    assert len(indices(3, 8, 1, 1)) == 8


def test_the_rate_rises_over_the_warm_up_and_falls_to_almost_nothing():
    budget = Budget(steps=100, lr=1.0, warmup=10)
    rates = [budget.rate(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == pytest.approx(1.0) == rates[10]
    assert rates[-1] == pytest.approx(1 / 90)
    assert Budget(steps=100, lr=1.0, warmup=0, decay=False).rate(100) == 1.0


def test_supervised_loss_can_fall_below_the_floor_of_a_double_softmax(trained):
    images = bands(16)
    loss = nn.functional.cross_entropy(trained(images.images), images.labels.long())
    assert float(loss.detach()) < 0.05
    assert accuracy(trained, images) > 0.99


def test_baselines_leave_their_start_alone_and_repeat(trained):
    before = copy.deepcopy(trained)
    target, budget = unlabelled(bands(8, shift=0.1, seed=1)), Budget(steps=5, batch=4)
    for method in (
        lambda: baselines.adapt_batch_norm(trained, target, budget),
        lambda: baselines.minimise_entropy(trained, target, budget),
        lambda: baselines.self_train_sure(trained, target, budget),
    ):
        one, two = method(), method()
        assert states_equal(trained, before)
        assert not states_equal(one, trained)
        assert states_equal(one, two)
        assert not one.training
        assert all(parameter.requires_grad for parameter in one.parameters())


def test_batch_norm_adaptation_takes_the_statistics_of_the_target_and_no_parameter(trained):
    target = unlabelled(bands(12, shift=0.25, seed=1))
    adapted = baselines.adapt_batch_norm(trained, target, Budget(steps=1, batch=4))
    for one, two in zip(adapted.parameters(), trained.parameters(), strict=True):
        assert torch.equal(one, two)
    seen = adapted.layers[0](target.images)
    assert torch.allclose(adapted.layers[1].running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert adapted.layers[1].momentum == trained.layers[1].momentum == 0.1


def test_batch_norm_adaptation_undoes_a_shift_of_grey_levels(trained):
    target = bands(24, shift=0.3, seed=2)
    adapted = baselines.adapt_batch_norm(trained, unlabelled(target), Budget(steps=1, batch=8))
    assert accuracy(trained, target) < 0.75
    assert accuracy(adapted, target) > 0.95


def test_entropy_minimisation_sharpens_and_moves_gains_and_shifts_only(trained):
    target = unlabelled(bands(8, shift=0.05, seed=1))
    adapted = baselines.minimise_entropy(
        trained, target, Budget(steps=30, batch=8, lr=1e-2, batch_norm="frozen")
    )
    assert float(entropy(adapted(target.images)).detach()) < float(entropy(trained(target.images)).detach())
    assert torch.equal(adapted.layers[0].weight, trained.layers[0].weight)
    assert not torch.equal(adapted.layers[1].weight, trained.layers[1].weight)
    assert torch.equal(adapted.layers[1].running_mean, trained.layers[1].running_mean)


def test_entropy_minimisation_of_a_network_without_norms_moves_all_of_it():
    plain = Net(norm=False)
    adapted = baselines.minimise_entropy(plain, unlabelled(bands(8)), Budget(steps=2, batch=4))
    assert not torch.equal(adapted.layers[0].weight, plain.layers[0].weight)


def test_entropy_is_one_for_even_and_zero_for_certain_predictions():
    assert float(entropy(torch.zeros(1, 3, 2, 2))) == pytest.approx(1.0)
    certain = torch.zeros(1, 3, 2, 2)
    certain[:, 1] = 99.0
    assert float(entropy(certain)) == pytest.approx(0.0, abs=1e-6)


def test_self_training_learns_the_labels_that_it_is_given(trained):
    target = bands(16, shift=0.3, seed=2)
    adapted = baselines.self_train(
        trained, unlabelled(target), target.labels, Budget(steps=100, batch=8, lr=2e-2, clip=0)
    )
    assert accuracy(adapted, target) > 0.95


def test_self_training_refuses_labels_of_another_shape(trained):
    with pytest.raises(DataError, match="instead of"):
        baselines.self_train(trained, bands(4), torch.zeros(4, 3, 3), Budget(steps=1))


def test_pixels_without_a_sure_label_teach_nothing(trained):
    target = unlabelled(bands(8))
    same = baselines.self_train(
        trained,
        target,
        torch.full((8, 8, 8), IGNORED),
        Budget(steps=3, batch=4, batch_norm="frozen"),
    )
    assert states_equal(same, trained)


def test_training_images_without_labels_are_refused(trained):
    with pytest.raises(DataError, match="no labels"):
        baselines.supervise(trained, unlabelled(bands(4)), Budget(steps=1))


def test_three_losses_in_a_row_that_are_not_finite_end_a_baseline():
    network = Net()
    before = copy.deepcopy(network)
    with pytest.raises(RuntimeFault, match="step 3"):
        baselines.optimise(network, lambda _step: network.layers[0].weight.sum() * math.nan, Budget(steps=9))
    assert states_equal(network, before)


class Bright(nn.Module):
    """A network of a reward net: class 2 where the image is bright, else what the mask says."""

    def forward(self, seen: Tensor) -> Tensor:
        image, mask = seen[:, :1], seen[:, 1:]
        two = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
        return 2.0 * torch.where(image > 0.5, two, mask)


class ToBackground(CorrectorModule):
    """Sets the first row to background."""

    def probabilities(self, masks: Tensor) -> Tensor:
        masks = masks.clone()
        masks[:, 0] = 0
        return nn.functional.one_hot(masks, 3).movedim(-1, 1).float()


def reward_net() -> RewardNet:
    return RewardNet([Bright()], classes=3)


def test_refining_asks_reward_net_and_corrector_in_the_order_it_says():
    images = torch.tensor([[[[0.9, 0.1], [0.9, 0.1]]]]).repeat(3, 1, 1, 1)
    masks = torch.ones(3, 2, 2, dtype=torch.uint8)
    refiner = Refiner(reward=reward_net(), corrector=ToBackground(3), batch=2)
    expected = {
        "corrector": [[0, 0], [1, 1]],
        "reward": [[2, 1], [2, 1]],
        "both": [[0, 0], [2, 1]],
        "mixed": [[0, 0], [2, 1]],
    }
    for way, found in expected.items():
        assert refiner.refine(way, masks, images).tolist() == [found] * 3
    trusting = Refiner(reward=reward_net(), corrector=ToBackground(3), weight=0.75)
    assert trusting.mixed(masks, images).tolist() == [[[2, 1], [2, 1]]] * 3


def test_refining_without_what_it_needs_is_refused():
    masks, images = torch.zeros(1, 2, 2), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ConfigError, match="no corrector"):
        Refiner(reward=reward_net()).corrected(masks)
    with pytest.raises(ConfigError, match="no reward net"):
        Refiner(corrector=ToBackground(3)).rewarded(masks, images)


def test_the_reward_of_noise_prefers_no_label_and_repeats():
    reward = RandomReward(seed=2).bind()
    actions = torch.randint(0, 3, (8, 64, 64), generator=torch.Generator().manual_seed(0))
    paid = reward(actions, torch.zeros(8, 1, 64, 64))
    assert torch.equal(paid, reward(actions, torch.ones(8, 1, 64, 64)))
    assert not torch.equal(paid, RandomReward(seed=3).bind()(actions, torch.zeros(8, 1, 64, 64)))
    assert 0.0 <= float(paid.min()) < float(paid.max()) < 1.0
    for label in range(3):
        assert float(paid[actions == label].mean()) == pytest.approx(0.5, abs=0.01)
