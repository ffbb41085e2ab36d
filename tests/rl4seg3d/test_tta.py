"""The 25 views: what they show, what they bring back, and their mean."""

from __future__ import annotations

import pytest
import torch

from medrl.plugins.rl4seg3d.tta import (
    IDENTITY,
    MeanOfViews,
    View,
    adjust_contrast,
    rotated,
    shifted,
    views,
)


def mean_over(chosen, network, image):
    """Mean of a network over the views of one frame `(X, Y)`."""
    gather = MeanOfViews(chosen, *image.shape)
    mean = None
    for number, view in enumerate(chosen):
        seen = network(view.apply(image[None, :, :, None]))
        mean = gather.add(mean, number, view.invert(seen)[..., 0])
    return mean


def threshold(image):
    """Two probabilities that say 1 above 0.5."""
    yes = (image > 0.5).float()
    return torch.cat([1 - yes, yes])


def test_there_are_twenty_five_views_and_smaller_images_have_fewer_shifts():
    assert len(views(256, 256)) == 25
    assert views(256, 256)[0] is IDENTITY
    assert len(set(views(256, 256))) == 25
    assert [view.amount for view in views(50, 256) if view.kind == "shift" and view.axis == 0] == [40, -40]
    assert len(views(16, 16)) == 9


def test_contrast_is_that_of_the_specification():
    frame = torch.rand(1, 9, 8, 3, generator=torch.Generator().manual_seed(0))
    result = adjust_contrast(frame, 1.25)
    for t in range(3):
        x = frame[..., t]
        assert torch.allclose(result[..., t], (1.25 * x - 0.25 * x.mean()).clamp(0, 1), atol=1e-6)


def test_shifts_bring_in_zeros_and_come_back():
    image = torch.rand(1, 10, 6, 2)
    for axis, pixels in ((0, 3), (0, -4), (1, 2), (1, -5)):
        moved = shifted(image, pixels, axis)
        expected = torch.roll(image, pixels, dims=1 + axis)
        place = [slice(None)] * 4
        place[1 + axis] = slice(0, pixels) if pixels > 0 else slice(pixels, None)
        expected[tuple(place)] = 0
        assert torch.equal(moved, expected)
        assert torch.equal(View("shift", pixels, axis).apply(image), moved)
    assert not shifted(image, 10, 0).any()


def test_rotations_turn_all_frames_and_a_quarter_turn_is_exact():
    image = torch.rand(2, 7, 7, 3)
    turned = rotated(image, 90.0)
    assert torch.equal(turned, torch.rot90(image, -1, dims=(1, 2))) or torch.equal(
        turned, torch.rot90(image, 1, dims=(1, 2))
    )
    assert torch.equal(rotated(turned, -90.0), image)


@pytest.mark.parametrize("angle", [5.0, 10.0, -5.0, -10.0])
def test_a_rotation_there_and_back_keeps_an_object(angle, tools):
    mask = torch.from_numpy(tools.ellipse(128, 96, 2))
    view = View("rotate", angle)
    back = view.invert(view.apply(mask))
    dice = 2 * (back * mask).sum() / (back.sum() + mask.sum())
    assert dice > 0.99
    assert view.apply(mask).sum() == pytest.approx(mask.sum().item(), rel=0.01)


def test_probabilities_sum_to_one_everywhere_for_any_network():
    generator = torch.Generator().manual_seed(3)

    def network(image):
        noise = torch.rand(3, *image.shape[1:], generator=generator)
        return (noise / noise.sum(dim=0)).float()

    mean = mean_over(views(64, 130), network, torch.rand(64, 130))
    assert (mean.sum(dim=0) - 1.0).abs().max() < 1e-6


def test_a_network_that_always_says_the_same_is_not_changed_by_views():
    answer = torch.tensor([0.2, 0.7, 0.1])[:, None, None, None]
    mean = mean_over(views(130, 70), lambda image: answer.expand(3, *image.shape[1:]), torch.rand(130, 70))
    assert torch.allclose(mean, answer[..., 0].expand(3, 130, 70), atol=1e-6)
    assert torch.equal(mean.argmax(dim=0), torch.ones(130, 70, dtype=torch.int64))


def test_without_rotations_an_object_off_the_borders_keeps_its_labels(tools):
    mask = torch.from_numpy(tools.ellipse(256, 256, radii=(20, 30))[..., 0])
    mean = mean_over(views(256, 256, rotations=False), threshold, mask)
    assert torch.equal(mean.argmax(dim=0), mask.long())


def test_the_mean_is_the_weighted_mean_of_the_views_that_saw_a_pixel():
    chosen = views(64, 64)
    gather = MeanOfViews(chosen, 64, 64)
    generator = torch.Generator().manual_seed(0)
    outputs = [view.invert(torch.rand(2, 64, 64, 1, generator=generator))[..., 0] for view in chosen]
    mean = None
    for number, output in enumerate(outputs):
        mean = gather.add(mean, number, output)
    ones = torch.ones(64, 64)
    weights = [ones if (seen := view.seen(64, 64)) is None else seen for view in chosen]
    total = sum(w[None] * output for w, output in zip(weights, outputs, strict=True))
    assert torch.allclose(mean, total / sum(weights), atol=1e-5)
