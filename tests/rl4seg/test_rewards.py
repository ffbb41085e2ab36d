"""Rewards of rl4seg: oracles, the reward net, the composite, and how they are built by key."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medrl.core.adaptation import rewards as r
from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.learned_reward import CompositeReward, RewardNet, build_corrector
from medrl.core.registry import Registry

PRED = torch.tensor([[[0, 1, 2]]])
GT = torch.tensor([[[0, 2, 2]]])
IMAGE = torch.zeros(1, 1, 1, 3)


class Constant(nn.Module):
    """Logits that are the same everywhere."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, seen):
        return self.logits.view(1, -1, 1, 1).expand(seen.shape[0], -1, *seen.shape[2:])


class LabelOf(nn.Module):
    """Shows the second channel, where a scalar action enters."""

    def forward(self, seen):
        return seen[:, 1:2]


@pytest.fixture
def registry():
    found = Registry("rewards")
    add = found.recorder("rl4seg").add
    here = "medrl.core.adaptation.rewards"
    for name, target in (
        ("pixelwise_accuracy", "PixelwiseAccuracy"),
        ("accuracy_map", "AccuracyMap"),
        ("accuracy", "Accuracy"),
        ("dice", "Dice"),
        ("reward_unet", "LearnedReward"),
        ("composite", "Composite"),
    ):
        add(name, f"{here}:{target}", summary="for a test")
    found.recorder("other").add("plain", lambda: 3.0, summary="no reward of label maps")
    return found


def test_oracles_of_the_worked_example():
    assert r.PixelwiseAccuracy()(PRED, IMAGE, GT).tolist() == [[[1.0, 0.0, 1.0]]]
    assert r.AccuracyMap()(PRED, IMAGE, GT).flatten().tolist() == pytest.approx([0.6667] * 3, abs=5e-5)
    accuracy = r.Accuracy()(PRED, IMAGE, GT)
    assert accuracy.shape == (1, 1, 1)
    assert float(accuracy) == pytest.approx(2 / 3)
    dice = r.Dice(3)(PRED, IMAGE, GT)
    assert dice.shape == (1, 1, 1)
    assert float(dice) == pytest.approx((0 + 2 / 3) / 2)


def test_oracles_look_at_each_image_by_itself_and_at_windows():
    actions, truth = torch.zeros(2, 4, 3, 2, dtype=torch.int64), torch.zeros(2, 4, 3, 2, dtype=torch.uint8)
    truth[1] = 1
    images = torch.zeros(2, 1, 4, 3, 2)
    assert r.AccuracyMap()(actions, images, truth)[:, 0, 0, 0].tolist() == [1.0, 0.0]
    assert r.Accuracy()(actions, images, truth).shape == (2, 1, 1, 1)
    assert r.Dice(2)(actions, images, truth).flatten().tolist() == [1.0, 0.0]


def test_the_original_reward_is_the_sigmoid_of_logit_by_temperature():
    net = RewardNet([Constant(2.0)], classes=3, head="binary", encoding="scalar")
    assert r.LearnedReward(net)(PRED, IMAGE).flatten().tolist() == pytest.approx([0.8808] * 3, abs=5e-5)
    warm = r.LearnedReward(net, temperature=2.0)
    assert warm(PRED, IMAGE).flatten().tolist() == pytest.approx([0.7311] * 3, abs=5e-5)


def test_the_original_reward_net_sees_the_raw_label_value():
    net = RewardNet([LabelOf()], classes=3, head="binary", encoding="scalar")
    assert torch.equal(r.LearnedReward(net)(PRED, IMAGE), torch.sigmoid(PRED.float()))


def test_the_composite_is_that_of_core():
    net = RewardNet([Constant(1.0, 0.0, 2.0)], classes=3)
    none = build_corrector("none", classes=3)
    expected = CompositeReward(net, none, weight=0.4).reward(PRED, IMAGE)
    assert torch.equal(r.Composite(net, none, weight=0.4)(PRED, IMAGE), expected)
    chosen = torch.softmax(torch.tensor([1.0, 0.0, 2.0]), 0)
    expected = 0.25 * chosen[PRED] + 0.75 * (PRED == 2).float()
    assert torch.allclose(r.Composite(net, none)(PRED, IMAGE), expected)


def test_a_bound_reward_is_a_function_of_actions_and_images():
    bound = r.PixelwiseAccuracy().bind(GT)
    assert bound(PRED, IMAGE).tolist() == [[[1.0, 0.0, 1.0]]]
    net = RewardNet([Constant(2.0)], classes=3, head="binary")
    learned = r.LearnedReward(net)
    assert torch.equal(learned.bind()(PRED, IMAGE), learned(PRED, IMAGE))


def test_several_actions_of_an_image_are_compared_with_its_labels():
    truth = torch.tensor([[[0, 0]], [[1, 1]]])
    actions = torch.tensor([[[0, 0]], [[0, 1]], [[1, 1]], [[1, 0]]])
    reward = r.Accuracy().bind(truth)(actions, torch.zeros(4, 1, 1, 2))
    assert reward.flatten().tolist() == [1.0, 0.5, 1.0, 0.5]
    with pytest.raises(RuntimeFault, match="reference labels"):
        r.Accuracy().bind(truth)(actions[:3], torch.zeros(3, 1, 1, 2))


@pytest.mark.parametrize("oracle", [r.PixelwiseAccuracy(), r.AccuracyMap(), r.Accuracy(), r.Dice(3)])
def test_an_oracle_without_labels_says_so(oracle):
    assert oracle.needs_truth
    with pytest.raises(ConfigError, match="compares with reference labels"):
        oracle.bind()
    with pytest.raises(ConfigError, match="compares with reference labels"):
        oracle(PRED, IMAGE)
    with pytest.raises(RuntimeFault, match="reference labels"):
        oracle(PRED, IMAGE, GT[..., :2])


def test_every_key_builds_a_reward_from_the_parts_it_asks_for(registry):
    net = RewardNet([Constant(1.0, 0.0, 2.0)], classes=3)
    none = build_corrector("none", classes=3)
    for key in registry.keys():  # noqa: SIM118
        if key.startswith("rl4seg."):
            made = r.build_reward(registry, key, classes=3, reward_net=net, corrector=none)
            assert isinstance(made, r.Reward)
            assert made.needs_truth == (key not in ("rl4seg.reward_unet", "rl4seg.composite"))
            assert float(made(PRED, IMAGE, GT).max()) <= 1.0
    weighted = r.build_reward(
        registry, "rl4seg.composite", classes=3, reward_net=net, corrector=none, weight=1.0
    )
    assert torch.equal(weighted(PRED, IMAGE), net.reward(PRED, IMAGE))


def test_missing_parts_misspelt_settings_and_foreign_rewards_are_one_line(registry):
    net = RewardNet([Constant(1.0, 0.0, 2.0)], classes=3)
    with pytest.raises(ConfigError, match="it needs a reward net and a corrector"):
        r.build_reward(registry, "rl4seg.composite", classes=3)
    with pytest.raises(ConfigError, match="did you mean 'weight'"):
        r.build_reward(
            registry,
            "rl4seg.composite",
            classes=3,
            reward_net=net,
            corrector=build_corrector("none", classes=3),
            wieght=0.5,
        )
    with pytest.raises(ConfigError, match="does not reward label maps"):
        r.build_reward(registry, "other.plain", classes=3)
    with pytest.raises(ConfigError, match="did you mean 'rl4seg.composite'"):
        r.build_reward(registry, "rl4seg.composit", classes=3)
