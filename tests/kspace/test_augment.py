"""Changes of slices in image space before training."""

from __future__ import annotations

import pytest
import torch

from medrl.plugins.kspace.augment import augmented
from medrl.plugins.kspace.config import AugmentConfig

NOTHING = {"flip": 0.0, "rotation": 0.0, "scale": 0.0, "shift": 0.0, "gamma": 0.0, "phase": 0.0, "noise": 0.0}


def square(count=3):
    """A square of 4 x 4 pixels in the middle of 16 x 16, and its label."""
    images = torch.zeros(count, 16, 16, dtype=torch.complex64)
    images[:, 6:10, 6:10] = 1.0
    return images, (images.abs() > 0).to(torch.uint8)


def sources(count=3):
    return [torch.Generator().manual_seed(number) for number in range(count)]


def centre(maps):
    """Mean row and column of maps ``(B, H, W)``."""
    weight = maps.abs().float()
    place = torch.arange(16.0)
    total = weight.sum(dim=(1, 2))
    rows = (weight.sum(dim=2) * place).sum(dim=1) / total
    return torch.stack([rows, (weight.sum(dim=1) * place).sum(dim=1) / total], dim=1)


def test_nothing_changes_where_nothing_is_asked_for():
    images, labels = square()
    found, same = augmented(images, labels, AugmentConfig(**NOTHING), sources())
    assert torch.equal(found, images)
    assert torch.equal(same, labels)


def test_image_and_labels_are_displaced_together_and_no_further_than_asked_for():
    images, labels = square()
    found, moved = augmented(images, labels, AugmentConfig(**{**NOTHING, "shift": 0.25}), sources())
    way = centre(found) - 7.5
    assert float(way.abs().max()) <= 4.0 + 1e-4
    assert float(way.abs().max()) > 1.0
    assert found.abs().sum(dim=(1, 2)).tolist() == pytest.approx([16.0] * 3, abs=1e-3)
    assert float((centre(moved) - 7.5 - way).abs().max()) <= 0.5 + 1e-4


def test_a_slice_changes_as_its_own_generator_says_whatever_its_neighbours_are():
    images, labels = square()
    config = AugmentConfig()
    found, _ = augmented(images, labels, config, sources())
    alone, _ = augmented(images[1:2], labels[1:2], config, sources()[1:2])
    assert torch.allclose(found[1], alone[0], atol=1e-6)
