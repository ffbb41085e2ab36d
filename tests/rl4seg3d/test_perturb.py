"""Perturbations: strengths that cost the wanted Dice, moved bases, frames made wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.learned_reward import PredictionRecipe
from medrl.core.learned_reward.correctors import dice_per_image
from medrl.core.learned_reward.pairs.predictions import noisy_weights
from medrl.core.metrics.landmarks import base_points
from medrl.plugins.rl4seg3d.perturb import (
    DROPS,
    calibrate,
    calibrated_recipe,
    glitch_frames,
    move_base,
)


class Threshold(nn.Module):
    """Three classes by brightness, computed by two convolutions whose weights can be disturbed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 8, 3, padding=1, padding_mode="replicate")
        self.last = nn.Conv3d(8, 3, 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.first.weight.copy_(torch.full((8, 1, 3, 3, 3), 1 / 27))
            self.first.weight.add_(0.2 / 27 * torch.randn(8, 1, 3, 3, 3, generator=generator))
            self.first.bias.zero_()
            slopes = torch.tensor([0.0, 1.0, 2.0])
            self.last.weight.copy_(slopes[:, None, None, None, None].expand(3, 8, 1, 1, 1).contiguous())
            self.last.bias.copy_(torch.tensor([0.0, -2.4, -8.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    x, y = np.mgrid[:24, :24]
    bright = np.clip(1.1 - np.hypot(x - 12, y - 12) / 10, 0, 1)
    stack = np.stack([np.roll(bright, k, axis=0) for k in range(3)])
    generator = np.random.default_rng(0)
    frames = stack[:, None, :, :, None] + 0.02 * generator.standard_normal((3, 1, 24, 24, 4))
    return torch.from_numpy(np.clip(frames, 0, 1).astype(np.float32))


def test_the_network_of_these_tests_finds_three_classes(images):
    labels = Threshold()(images).argmax(dim=1)
    assert [(labels == k).float().mean() > 0.03 for k in range(3)] == [True] * 3


@pytest.mark.parametrize("kind", ["weight_noise", "image_noise", "contrast"])
def test_strengths_cost_the_dice_that_is_asked_for_and_grow_with_it(kind, images):
    found = calibrate(Threshold(), images, classes=3, kind=kind, seed=1)
    assert tuple(item.target for item in found) == DROPS
    for item in found:
        assert item.drop == pytest.approx(item.target, abs=0.03)
    strengths = [item.strength for item in found]
    assert strengths == sorted(strengths, reverse=kind == "contrast")


def test_fresh_noise_of_a_calibrated_strength_costs_about_as_much(images):
    network = Threshold()
    strength = calibrate(network, images, classes=3, kind="weight_noise", drops=(0.12,), draws=16)[0].strength
    clean = network(images).argmax(dim=1)
    dice = []
    for seed in range(16):
        weights = noisy_weights(network, strength, torch.Generator().manual_seed(100 + seed), relative=True)
        labels = torch.func.functional_call(network, weights, (images,)).argmax(dim=1)
        dice.append(float(dice_per_image(labels, clean, 3).mean()))
    assert 1 - np.mean(dice) == pytest.approx(0.12, abs=0.08)


def test_noise_is_relative_to_the_norm_of_each_parameter():
    network = Threshold()
    with torch.no_grad():
        network.last.weight.mul_(100.0)
    noisy = noisy_weights(network, 0.1, torch.Generator().manual_seed(0), relative=True)
    for name, parameter in network.named_parameters():
        size = float(parameter.detach().square().mean().sqrt())
        change = float((noisy[name] - parameter.detach()).square().mean().sqrt())
        assert change == pytest.approx(0.1 * size, rel=0.6)
    assert torch.equal(noisy["first.bias"], network.first.bias.detach())


def test_calibration_leaves_the_network_and_the_global_stream_alone(images):
    network = Threshold().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    first, again = (calibrate(network, images, classes=3, kind="weight_noise", drops=(0.1,)) for _ in "ab")
    assert first == again
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_a_drop_that_no_strength_reaches_gets_the_strongest(images):
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(x.shape[0], 3, *x.shape[2:])
            logits[:, 1, 5:15] = 1.0
            return logits

    found = calibrate(Fixed(), images, classes=3, kind="contrast", drops=(0.1,))[0]
    assert (found.strength, found.drop) == (0.0, 0.0)
    recipe, _ = calibrated_recipe(Fixed(), images, classes=3, kinds=("contrast",))
    assert recipe.contrast == ()


def test_a_recipe_takes_the_strengths_and_keeps_everything_else(images):
    base = PredictionRecipe(minimum_dice=0.9, swap=False)
    recipe, found = calibrated_recipe(
        Threshold(), images, classes=3, drops=(0.05, 0.2), kinds=("weight_noise", "image_noise"), base=base
    )
    assert recipe.weight_noise == tuple(item.strength for item in found[:2])
    assert recipe.image_noise == tuple(item.strength for item in found[2:])
    assert (recipe.contrast, recipe.noise_scale) == ((), "relative")
    assert (recipe.minimum_dice, recipe.swap) == (0.9, False)


@pytest.mark.parametrize(("kind", "drops"), [("weights", (0.1,)), ("contrast", (0.0,)), ("contrast", (1.0,))])
def test_calibrations_that_make_no_sense_are_refused(kind, drops, images):
    with pytest.raises(ConfigError, match="calibrated perturbation"):
        calibrate(Threshold(), images, classes=3, kind=kind, drops=drops)


def heart() -> torch.Tensor:
    """One window of a U of wall around a cavity that is open below."""
    mask = torch.zeros(1, 64, 64, 2, dtype=torch.uint8)
    mask[:, 20:44, 10:46] = 2
    mask[:, 26:38, 16:46] = 1
    return mask


@pytest.mark.parametrize("shift", [6, -8])
def test_a_moved_base_misses_the_valve_by_as_much_as_is_asked_for(shift):
    moved = move_base(heart(), [shift])
    assert moved.dtype == torch.uint8
    for t in range(2):
        before, after = (base_points(mask[0, ..., t].numpy()) for mask in (heart(), moved))
        assert np.abs(after - before - [0, shift]).max() <= 1
    rows = torch.nonzero((moved[0, ..., 0] != 0).any(dim=0)).flatten()
    assert int(rows[0]) == 10


def test_a_tilt_moves_one_end_further():
    after = base_points(move_base(heart(), [8], [0.8])[0, ..., 0].numpy())
    left, right = after[:, 1] - 45
    assert right > left + 3


def test_a_base_stays_in_the_image_and_empty_frames_stay_empty():
    moved = move_base(heart(), [60])
    assert (moved[:, :, -1] == 0).all()
    assert (moved != 0).any()
    assert not move_base(torch.zeros_like(heart()), [5]).any()
    assert torch.equal(move_base(heart(), [0]), heart())
    assert torch.equal(move_base(heart()[..., 0], [6]), move_base(heart(), [6])[..., 0])
    with pytest.raises(RuntimeFault, match="moved base"):
        move_base(heart(), [1, 2])


def test_other_structures_stay_where_they_are():
    masks = heart()
    masks[:, 26:38, 46:56] = 3
    moved = move_base(masks, [-6], structures=(1, 2))
    assert torch.equal(moved == 3, masks == 3)
    assert (moved[:, 28:36, 41:46] == 0).all()
    beyond = move_base(masks, [4], structures=(1, 2))
    assert (beyond[:, 28:36, 46:49] == 1).all()
    assert (beyond[:, 28:36, 51:56] == 3).all()


def test_glitches_change_some_frames_and_no_others():
    masks = heart()[..., :1].expand(3, 64, 64, 8).contiguous()
    made = glitch_frames(masks, 3, seed=0, keys="abc", share=0.3)
    changed = (made != masks).any(dim=1).any(dim=1)
    assert 2 <= int(changed.sum()) <= 15
    assert torch.equal(made, glitch_frames(masks, 3, seed=0, keys="abc", share=0.3))
    one = glitch_frames(masks[1:2], 3, seed=0, keys="b", share=0.3)
    assert torch.equal(one, made[1:2])
    assert torch.equal(glitch_frames(masks, 3, seed=0, keys="abc", share=0.0), masks)
    assert made.dtype == masks.dtype
    assert int(made.max()) <= 2
    with pytest.raises(RuntimeFault, match="glitches"):
        glitch_frames(masks, 3, seed=0, keys="ab")
