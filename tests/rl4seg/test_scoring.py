"""Scores of images, against the numbers of the specification and counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medrl.core.errors import DataError
from medrl.plugins.rl4seg import scoring
from medrl.plugins.rl4seg.data import ImageSet

LABELS = {"background": 0, "LV": 1, "MYO": 2}


def images_with(labels: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)) -> ImageSet:
    count = len(labels)
    return ImageSet(
        ids=tuple(f"case_{k}" for k in range(count)),
        subjects=tuple(f"patient_{k // 2}" for k in range(count)),
        images=torch.zeros(count, 1, *labels.shape[1:]),
        labels=torch.from_numpy(labels.astype(np.uint8)),
        spacing_mm=torch.tensor(spacing, dtype=torch.float64).repeat(count, 1),
        label_names=LABELS,
    )


def phantom() -> np.ndarray:
    """The mask M0 of the specification, §15."""
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[10:50, 20:44] = 2
    mask[16:50, 26:38] = 1
    return mask


def test_dice_and_distance_of_a_mask_moved_by_two_rows_are_those_of_the_specification():
    truth = phantom()[None]
    moved = np.roll(truth, 2, axis=1)
    found = scoring.score_masks(moved, images_with(truth, (0.5, 0.3))).summary()
    assert found["dice_LV"] == pytest.approx(0.94118, abs=5e-6)
    assert found["dice_MYO"] == pytest.approx(0.91304, abs=5e-6)
    assert found["dice_epi"] == pytest.approx(0.95, abs=1e-12)
    assert found["hd_LV"] == pytest.approx(1.0)
    assert found["hd_MYO"] == pytest.approx(1.0)
    assert found["hd_epi"] == pytest.approx(1.0)
    assert found["dice"] == pytest.approx((found["dice_LV"] + found["dice_MYO"]) / 2)


def test_dice_is_a_mean_over_images_and_not_over_their_pooled_pixels():
    truth, predicted = np.zeros((2, 20, 20), np.uint8), np.zeros((2, 20, 20), np.uint8)
    truth[0, :10, :10] = predicted[0, :10, :10] = 1
    truth[1, :2, :5], predicted[1, 10:12, :5] = 1, 1
    found = scoring.score_masks(predicted, images_with(truth))
    assert found.values["dice_LV"] == (1.0, 0.0)
    assert found.mean("dice_LV") == 0.5


def test_the_largest_piece_is_connected_by_faces_and_counts_all_labels_together():
    mask = np.zeros((1, 6, 6), np.uint8)
    mask[0, 0:2, 0:2] = 1
    mask[0, 2, 2] = 2  # touches by a corner only
    mask[0, 4, 0:5] = [1, 1, 2, 2, 2]
    kept = scoring.largest_blob(mask)
    assert np.array_equal(kept[0] != 0, np.isin(np.arange(36).reshape(6, 6), range(24, 29)))
    assert kept[0, 4, :5].tolist() == [1, 1, 2, 2, 2]
    assert mask[0, 0, 0] == 1


def test_the_largest_piece_of_an_empty_mask_is_empty():
    assert not scoring.largest_blob(np.zeros((2, 4, 4), np.uint8)).any()


def test_an_empty_prediction_scores_zero_and_its_infinite_distance_is_counted():
    truth = np.stack([phantom(), phantom()])
    predicted = np.stack([phantom(), np.zeros_like(phantom())])
    found = scoring.score_masks(predicted, images_with(truth)).summary()
    assert found["dice"] == 0.5
    assert found["hd"] == 0.0
    assert found["hd_infinite"] == 1.0


def test_a_network_is_scored_greedily_on_its_largest_piece():
    truth = phantom()[None]
    logits = torch.zeros(1, 3, 64, 64)
    logits.scatter_(1, torch.from_numpy(truth[:, None].astype(np.int64)), 5.0)
    logits[0, 1, 0, 0] = 9.0  # a stray pixel

    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert not self.training
            return logits

    network = Fixed()
    network.train()
    found = scoring.score(network, images_with(truth))
    assert found.mean() == 1.0
    assert network.training
    same = scoring.score(logits.softmax(1), images_with(truth))
    assert same == found


def test_scores_survive_their_json_form_with_infinity_and_nan():
    found = scoring.Scores(("a", "b"), ("p", "p"), {"hd": (math.inf, 2.0), "dice": (0.0, math.nan)})
    again = scoring.Scores.from_dict(found.as_dict())
    assert again.values["hd"] == (math.inf, 2.0)
    assert math.isnan(again.values["dice"][1])
    assert again.by_subject("hd") == {"p": 2.0}


def test_images_without_references_and_wrong_shapes_are_refused():
    truth = phantom()[None]
    nothing = images_with(truth).without_labels()
    with pytest.raises(DataError, match="no references"):
        scoring.score_masks(truth, nothing)
    with pytest.raises(DataError, match="do not fit"):
        scoring.score_masks(truth[:, :60], images_with(truth))


def test_epi_is_scored_only_where_both_of_its_labels_exist():
    assert scoring.regions({"background": 0, "lv": 1, "Myo": 2, "LA": 3}) == {
        "lv": 1,
        "Myo": 2,
        "LA": 3,
        "epi": (1, 2),
    }
    assert scoring.regions({"background": 0, "LV": 1}) == {"LV": 1}
