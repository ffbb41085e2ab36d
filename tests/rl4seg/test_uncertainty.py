"""Calibration and agreement with errors, against hand-counted values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medrl.core.errors import DataError
from medrl.core.metrics import expected_calibration_error
from medrl.plugins.rl4seg import uncertainty
from medrl.plugins.rl4seg.uncertainty import Confidence


def test_calibration_errors_are_those_of_the_specification():
    confidence = np.array([0.62] * 5 + [0.97] * 5)
    right = np.array([1, 1, 1, 0, 0] + [1] * 5)
    assert expected_calibration_error(confidence, right, bins=20) == pytest.approx(0.025, abs=1e-12)
    sure, half = np.ones(10), np.array([1] * 5 + [0] * 5)
    assert expected_calibration_error(sure, half, bins=20) == pytest.approx(0.5, abs=1e-12)


def test_bins_are_open_below_and_closed_above():
    found = uncertainty.reliability(np.array([0.05, 0.0500001, 1.0]), np.array([1, 1, 1]), bins=20)
    assert found.count[0] == 1
    assert found.count[1] == 1
    assert found.count[19] == 1


def test_adaptive_calibration_error_weighs_bins_of_equal_size_by_pixels():
    confidence = np.array([0.1, 0.2, 0.8, 0.9])
    right = np.array([0, 1, 1, 1])
    two = uncertainty.adaptive_calibration_error(confidence, right, bins=2)
    assert two == pytest.approx((abs(0.15 - 0.5) + abs(0.85 - 1.0)) / 2)
    four = uncertainty.adaptive_calibration_error(confidence, right, bins=20)
    assert four == pytest.approx((0.1 + 0.8 + 0.2 + 0.1) / 4)
    assert math.isnan(uncertainty.adaptive_calibration_error(np.zeros(0), np.zeros(0)))


def test_mutual_information_is_one_for_a_copy_zero_for_noise_and_undefined_for_constants():
    right = np.array([0, 1, 1, 0, 1, 0] * 50)
    assert uncertainty.mutual_information(right, right.astype(float)) == pytest.approx(1.0)
    assert uncertainty.mutual_information(right, np.tile([0.2, 0.2, 0.7, 0.7], 75)) < 0.01
    assert math.isnan(uncertainty.mutual_information(np.ones(9), np.ones(9)))


def test_mutual_information_matches_a_count_by_hand():
    right = np.array([1, 1, 0, 0])
    confidence = np.array([1.0, 0.0, 0.0, 0.0])
    # joint: (1, high) 1/4, (1, low) 1/4, (0, low) 1/2
    shared = 0.25 * math.log(0.25 / (0.5 * 0.25)) + 0.25 * math.log(0.25 / (0.5 * 0.75))
    shared += 0.5 * math.log(0.5 / (0.5 * 0.75))
    entropies = math.log(2) - (0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert uncertainty.mutual_information(right, confidence) == pytest.approx(2 * shared / entropies)


def test_correlations_leave_out_what_is_not_finite_and_are_undefined_without_variation():
    assert uncertainty.pearson([1, 2, 3, 9], [2, 4, 6, math.nan]) == pytest.approx(1.0)
    assert math.isnan(uncertainty.pearson([1, 1, 1], [1, 2, 3]))


def test_a_confidence_that_knows_the_errors_is_told_from_one_that_does_not():
    rng = np.random.default_rng(0)
    truth = np.zeros((6, 24, 24), np.uint8)
    truth[:, 6:18, 6:18] = 1
    masks = truth.copy()
    for number in range(6):
        masks[number, 6 : 8 + number, 6:18] = 0
    right = masks == truth
    knows = np.where(right, 0.95, 0.05) + rng.uniform(-0.02, 0.02, right.shape)
    blind = rng.uniform(0.4, 0.6, right.shape)
    good = uncertainty.assess(Confidence(masks, knows), truth)
    bad = uncertainty.assess(Confidence(masks, blind), truth)
    assert good.error_auroc == 1.0
    assert good.near_auroc == 1.0
    assert good.ece == pytest.approx(0.05, abs=0.005)
    assert good.nmi > 0.5
    assert good.r_mean < -0.99
    assert abs(bad.error_auroc - 0.5) < 0.05
    assert bad.ece > good.ece
    assert bad.nmi < 0.05
    assert good.dice == bad.dice
    assert set(good.as_dict()) == {
        "ece", "mce", "ace", "nmi", "error_auroc", "near_auroc", "r_mean", "r_sum", "dice",
    }  # fmt: skip


def test_calibration_looks_at_foreground_pixels_only():
    truth = np.zeros((1, 8, 8), np.uint8)
    truth[0, 2:4, 2:4] = 1
    maps = np.full((1, 8, 8), 0.5)
    maps[truth == 1] = 1.0
    assert uncertainty.assess(Confidence(truth.copy(), maps), truth).ece == 0.0


def test_an_empty_prediction_has_numbers_where_they_are_defined():
    truth = np.zeros((2, 8, 8), np.uint8)
    truth[:, 2:4, 2:5] = 1
    found = uncertainty.assess(Confidence(np.zeros_like(truth), np.full(truth.shape, 0.75)), truth)
    assert found.ece == pytest.approx(0.75)
    assert found.dice == 0.0
    assert math.isnan(found.near_auroc)
    assert math.isnan(found.r_sum)


def test_shapes_that_differ_are_refused():
    truth = np.zeros((1, 8, 8), np.uint8)
    with pytest.raises(DataError, match="references"):
        uncertainty.assess(Confidence(truth, np.zeros((1, 8, 7))), truth)


class Net(nn.Module):
    """Classes by grey value, behind an activation that dropout hooks into."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def test_dropout_is_random_only_inside_its_block_and_leaves_the_global_streams_alone():
    network, images = Net(), torch.rand(3, 1, 16, 16)
    plain = uncertainty.probabilities(network, images)
    before = torch.get_rng_state()
    first = uncertainty.mc_dropout(network, images, passes=4, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, uncertainty.mc_dropout(network, images, passes=4, seed=1))
    assert not torch.equal(first, uncertainty.mc_dropout(network, images, passes=4, seed=2))
    assert not torch.equal(first, plain)
    assert torch.equal(plain, uncertainty.probabilities(network, images))
    assert torch.allclose(first.sum(1), torch.ones(3, 16, 16), atol=1e-5)


def test_an_ensemble_is_the_mean_of_its_members():
    one, two, images = Net(), Net(), torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        two.layers[0].weight.mul_(-1)
    both = uncertainty.ensemble([one, two], images)
    parts = [uncertainty.probabilities(network, images) for network in (one, two)]
    assert torch.allclose(both, (parts[0] + parts[1]) / 2)


def test_moved_views_are_moved_back_to_where_they_were():
    image = torch.rand(2, 3, 10, 12)
    there = uncertainty._moved(image, [2, -3])
    assert torch.equal(there[:, :, 2:, :-3], image[:, :, :-2, 3:])
    again = uncertainty._moved(there, [-2, 3])
    assert torch.equal(again[:, :, :-2, 3:], image[:, :, :-2, 3:])


def test_one_view_is_the_plain_prediction_and_more_views_are_repeatable():
    network, images = Net(), torch.rand(2, 1, 16, 16)
    plain = uncertainty.probabilities(network, images)
    assert torch.equal(uncertainty.augmented(network, images, views=1), plain)
    many = uncertainty.augmented(network, images, views=4, seed=3)
    assert torch.equal(many, uncertainty.augmented(network, images, views=4, seed=3))
    assert not torch.equal(many, plain)


def test_the_confidence_of_probabilities_and_of_a_reward_has_the_shape_of_the_masks():
    found = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]]).reshape(2, 3, 1, 1)
    confidence = uncertainty.of_probabilities(found)
    assert confidence.masks.ravel().tolist() == [1, 0]
    assert confidence.maps.ravel().tolist() == pytest.approx([0.7, 0.5])
    masks, images = torch.tensor([[[1, 2]], [[0, 1]]]), torch.zeros(2, 1, 1, 2)
    paid = uncertainty.of_reward(lambda actions, _images: actions / 2, masks, images, batch=1)
    assert paid.maps.tolist() == [[[0.5, 1.0]], [[0.0, 0.5]]]


def test_maps_are_written_with_the_keys_of_the_original(tmp_path):
    h5py = pytest.importorskip("h5py")
    masks = np.array([[[0, 1], [1, 1]]], np.uint8)
    truth = np.array([[[0, 1], [0, 1]]], np.uint8)
    path = uncertainty.save_maps(
        tmp_path / "maps.h5", ["a/b"], np.zeros((1, 1, 2, 2)), truth, Confidence(masks, np.ones((1, 2, 2)))
    )
    with h5py.File(path) as file:
        assert set(file["a_b"]) == {"img", "gt", "pred", "reward_map", "accuracy_map"}
        assert file["a_b"]["accuracy_map"][()].tolist() == [[1, 1], [0, 1]]


def test_means_over_seeds_leave_out_what_is_not_defined():
    assert uncertainty.averages([{"ece": 0.1, "nmi": math.nan}, {"ece": 0.3, "nmi": 0.5}]) == {
        "ece": pytest.approx(0.2),
        "nmi": 0.5,
    }
