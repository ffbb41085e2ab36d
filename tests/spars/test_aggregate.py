"""From maps to masks."""

from __future__ import annotations

import pytest
import torch

from medrl.core.errors import ConfigError
from medrl.plugins.spars.aggregate import components, dice, dice_bound, normalised, segment


def test_one_window_around_the_whole_tumour_has_a_bounded_dice():
    assert dice_bound(4169, (48, 48, 24)) == pytest.approx(0.1402, abs=5e-5)
    box, ball = torch.zeros(12, 12, 12), torch.zeros(12, 12, 12)
    box[2:10, 2:10, 2:10] = 1
    ball[4:7, 4:7, 4:7] = 1
    assert dice(box, ball) == pytest.approx(dice_bound(27, (8, 8, 8)), abs=1e-12)
    # An object larger than the window: the window inside it.
    assert dice_bound(512, (3, 3, 3)) == pytest.approx(dice(box, ball), abs=1e-12)
    with pytest.raises(ConfigError, match="0 voxels"):
        dice_bound(0, (8, 8, 8))


def test_an_empty_map_gives_an_empty_mask_and_two_empty_masks_agree():
    empty = torch.zeros(4, 4, 4)
    assert not segment(empty, threshold=0.0).any()
    assert not normalised(empty).any()
    assert dice(segment(empty), torch.zeros(4, 4, 4)) == 1.0
    assert dice(segment(empty), torch.ones(4, 4, 4)) == 0.0


def test_the_map_is_divided_by_its_maximum_unless_told_otherwise():
    found = torch.zeros(4, 4, 4)
    found[0, 0, 0], found[2, 2, 2] = 0.2, 0.08
    assert int(segment(found, threshold=0.3).sum()) == 2
    assert int(segment(found, threshold=0.3, normalise=False).sum()) == 0
    assert int(segment(found, threshold=0.3, floor=0.21).sum()) == 0
    assert int(segment(found, threshold=0.3, floor=0.19).sum()) == 2


def test_components_are_kept_by_size():
    mask = torch.zeros(8, 8, 8, dtype=torch.bool)
    mask[0, 0, 0:2] = True
    mask[4, 4, 0:3] = True
    mask[5, 5, 3] = True  # shares only a corner
    assert int(components(mask, smallest=2).sum()) == 5
    assert int(components(mask, largest=True).sum()) == 3
    assert int(components(mask, smallest=4, largest=True).sum()) == 0
    assert int(components(mask).sum()) == 6
    assert not components(torch.zeros(2, 2, 2, dtype=torch.bool), largest=True).any()


def test_nothing_outside_the_organ_is_kept():
    organ = torch.zeros(4, 4, 4, dtype=torch.bool)
    organ[0] = True
    found = segment(torch.ones(4, 4, 4), organ=organ)
    assert torch.equal(found, organ)
    with pytest.raises(ConfigError, match="organ"):
        segment(torch.ones(4, 4, 4), organ=organ[:2])
