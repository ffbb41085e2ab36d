"""Targets of the landmark reward net: acceptance numbers of the specification (§12.14) and edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medrl.core.errors import DataError
from medrl.core.metrics.landmarks import base_points
from medrl.plugins.rl4seg3d.landmark_targets import blur_px, landmark_target, landmark_targets


def heart(shift: int = 0, width: int = 96) -> np.ndarray:
    """A U of wall around a cavity that is open below, (x, y); moved along x."""
    mask = np.zeros((width, 64), dtype=np.uint8)
    mask[20:50, 10:50] = 2
    mask[26:44, 16:50] = 1
    return np.roll(mask, shift, axis=0)


def test_the_blur_grows_with_the_error_and_the_image():
    assert blur_px(20, 400) == 10
    assert blur_px(10, 400) == 5


def test_errors_up_to_four_millimetres_cost_nothing():
    spacing = (0.39, 0.39)
    assert (landmark_target(heart(10), heart(), spacing) == 1).all()  # 3.9 mm
    assert landmark_target(heart(11), heart(), spacing).min() == 0  # 4.29 mm
    assert landmark_target(heart(10), heart(), spacing, limit_mm=3.5).min() == 0


def test_reward_is_missing_between_where_the_annulus_is_and_where_it_should_be():
    target = landmark_target(heart(8), heart(), (1.0, 1.0))
    assert target.shape == (96, 64)
    assert target.dtype == np.float32
    assert target.min() == 0
    assert target.max() <= 1
    (left, y), (right, _) = base_points(heart()).astype(int)
    assert target[left + 4, y] < 0.2
    assert target[right + 4, y] < 0.2
    assert target[left + 4, y] < target[left + 4, 5]


def test_only_the_end_that_is_wrong_lacks_reward():
    action = heart()
    action[38:44, 16:50] = 2  # the right end lies 6 columns inwards
    (left, y), (right, _) = base_points(heart()).astype(int)
    assert base_points(action)[:, 0].tolist() == [left, right - 6]
    target = landmark_target(action, heart(), (1.0, 1.0))
    assert target[right - 3, y] < 0.05
    assert target[left, y] > target[right - 3, y] + 0.3


def test_stray_blobs_do_not_move_the_landmarks():
    action = heart()
    action[80:84, 55:60] = 1
    action[84:88, 55:60] = 2
    assert (landmark_target(action, heart(), (1.0, 1.0)) == 1).all()


@pytest.mark.parametrize("fill", [0, 1, 2])
def test_an_action_without_landmarks_lacks_reward_around_those_of_the_reference(fill):
    action = np.full((96, 64), fill, dtype=np.uint8)
    target = landmark_target(action, heart(), (1.0, 1.0))
    (left, y), _ = base_points(heart()).astype(int)
    assert np.isfinite(target).all()
    assert target[left, y] == pytest.approx(0, abs=0.3)
    assert target[95, 0] > target[left, y]


def test_a_reference_without_landmarks_judges_nothing():
    assert (landmark_target(heart(), np.zeros((96, 64), dtype=np.uint8), (1.0, 1.0)) == 1).all()


def test_windows_are_made_frame_by_frame_with_the_spacing_of_each():
    actions = torch.from_numpy(np.stack([heart(8), heart()], axis=-1)).expand(2, 96, 64, 2)
    truths = torch.from_numpy(np.stack([heart()] * 2, axis=-1)).expand(2, 96, 64, 2)
    made = landmark_targets(actions, truths, [(1.0, 1.0), (0.4, 0.4)])
    assert made.dtype == torch.float32
    assert made.shape == (2, 96, 64, 2)
    assert torch.equal(made[0, ..., 0], torch.from_numpy(landmark_target(heart(8), heart(), (1.0, 1.0))))
    assert (made[0, ..., 1] == 1).all()
    assert (made[1] == 1).all()  # 3.2 mm
    assert torch.equal(landmark_targets(actions, truths, (1.0, 1.0))[1], made[0])


def test_windows_that_do_not_fit_are_refused():
    one = torch.zeros(2, 8, 8, 2)
    for actions, truths, spacing in (
        (one, one[:1], (1.0, 1.0)),
        (one[0], one[0], (1.0, 1.0)),
        (one, one, (1.0, 1.0, 1.0)),
    ):
        with pytest.raises(DataError, match="landmark targets"):
            landmark_targets(actions, truths, spacing)
