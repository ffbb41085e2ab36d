"""TS-IT: its weight, its consistency loss, and that it learns without target labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medrl.core.errors import DataError
from medrl.plugins.rl4seg import tsit
from medrl.plugins.rl4seg.baselines import Budget
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


def bands(count: int, *, labelled: bool, seed: int = 0) -> ImageSet:
    """Images of three grey levels; the level is the class."""
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (count, 4, 4))).repeat_interleave(
        4, 1
    )
    labels = labels.repeat_interleave(4, 2)
    images = (0.15 + 0.35 * labels.float())[:, None]
    return image_set(images, labels.to(torch.uint8) if labelled else None)


def one_logit() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 1), nn.ReLU(), nn.Conv2d(12, 1, 1)
    )


@pytest.mark.parametrize(("epoch", "expected"), [(24, 0.0), (25, 0.0677), (37, 0.1767), (49, 0.4616)])
def test_the_weight_of_target_images_rises_as_in_the_specification(epoch, expected):
    assert tsit.weight(epoch) == pytest.approx(expected, abs=5e-5)


def test_consistency_counts_only_pixels_that_are_sure_on_both_sides():
    before = torch.tensor([[0.9, 0.9, 0.1, 0.5]])
    after = torch.tensor([[0.95, 0.6, 0.05, 0.99]])
    expected = -(np.log(0.95) + np.log(0.95)) / 4
    found = tsit.consistency(before, torch.logit(after))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_consistency_has_no_gradient_where_nothing_is_sure():
    logits = torch.zeros(2, 3, 3, requires_grad=True)
    tsit.consistency(torch.full((2, 3, 3), 0.5), logits).backward()
    assert not logits.grad.any()


def test_the_class_with_the_highest_probability_above_one_half_wins():
    class Given(nn.Module):
        def __init__(self, p: list[float]) -> None:
            super().__init__()
            self.p = torch.tensor(p)

        def forward(self, images: Tensor) -> Tensor:
            return torch.logit(self.p).reshape(1, 1, 1, -1)

    network = tsit.OnePerClass([Given([0.4, 0.7, 0.6]), Given([0.3, 0.6, 0.9])])
    assert network(torch.zeros(1, 1, 1, 3)).argmax(1).ravel().tolist() == [0, 1, 2]


def test_jittered_images_stay_images_and_repeat_with_their_generator():
    images = torch.rand(6, 1, 16, 16)
    first = tsit.jittered(images, torch.Generator().manual_seed(1))
    assert torch.equal(first, tsit.jittered(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, tsit.jittered(images, torch.Generator().manual_seed(2)))
    assert first.shape == images.shape
    assert 0.0 <= float(first.min()) <= float(first.max()) <= 1.0


def test_it_learns_each_class_and_repeats_bit_for_bit():
    source, target = bands(12, labelled=True), bands(12, labelled=False, seed=1)
    budget = Budget(steps=200, batch=4, lr=2e-2, seed=3, clip=0)
    network = tsit.train(one_logit, source, target, 3, budget)
    truth = bands(12, labelled=True, seed=1).labels
    inside = (slice(None), slice(1, -1), slice(1, -1))
    right = network(target.images).argmax(1)[inside] == truth[inside]
    assert right.float().mean() > 0.9
    again = tsit.train(one_logit, source, target, 3, budget)
    for one, two in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_source_images_without_labels_are_refused():
    nothing = bands(4, labelled=False)
    with pytest.raises(DataError, match="no labels"):
        tsit.train(one_logit, nothing, nothing, 3, Budget(steps=1))
