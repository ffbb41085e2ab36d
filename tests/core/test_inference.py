"""Sliding window, views and ensembles: exact where they can be, and equal to MONAI."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.inference import View, augmented, ensemble, sliding_window, tta_views, window_starts


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 90), patch=st.integers(1, 40), overlap=st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_windows_cover_every_voxel_and_overlap_as_asked(size, patch, overlap):
    starts = window_starts(size, patch, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(0, size - patch)
    step = max(1, int(patch * (1 - overlap)))
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert all(1 <= gap <= step for gap in gaps)


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize("size", [(17, 23, 9), (16, 16, 16), (5, 40, 7)])
def test_a_constant_network_gives_exactly_its_constant(blend, size):
    def net(windows):
        return torch.full((windows.shape[0], 2, *windows.shape[2:]), 0.1)

    found = sliding_window(net, image(1, 1, *size), (8, 8, 8), overlap=0.6, batch=3, blend=blend)
    assert found.shape == (1, 2, *size)
    assert torch.equal(found, torch.full_like(found, 0.1))


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 19)] * 3),
    patch=st.tuples(*[st.integers(2, 11)] * 3),
    overlap=st.sampled_from([0.0, 0.3, 0.5, 0.8]),
    batch=st.integers(1, 4),
    blend=st.sampled_from(["gaussian", "constant"]),
)
def test_a_pointwise_network_gives_exactly_its_full_forward(size, patch, overlap, batch, blend):
    def net(windows):
        return torch.cat([windows * 3.0 + 1.0, windows.abs()], dim=1)

    volume = image(1, 1, *size)
    found = sliding_window(net, volume, patch, overlap=overlap, batch=batch, blend=blend)
    assert torch.equal(found, net(volume))


def test_a_two_dimensional_image_and_a_batch_of_images_work_alike():
    volumes = image(3, 2, 21, 13)
    found = sliding_window(lambda windows: windows * 2, volumes, (8, 6), overlap=0.5, batch=4)
    assert torch.equal(found, volumes * 2)


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_blending_equals_monai_where_the_windows_are_the_same(blend):
    from monai.inferers import sliding_window_inference

    torch.manual_seed(0)
    net = torch.nn.Conv3d(1, 3, 3, padding=1)
    volume = image(1, 1, 16, 24, 20)
    line = torch.exp(-0.5 * (torch.arange(8) - 3.5) ** 2) if blend == "gaussian" else torch.ones(8)
    # MONAI's own Gaussian raises the weights in the corners to 1e-3; here it gets the plain product.
    weights = line[:, None, None] * line[:, None] * line
    with torch.no_grad():
        theirs = sliding_window_inference(
            volume, (8, 8, 8), 2, net, overlap=0.5, mode=blend, roi_weight_map=weights
        )
    ours = sliding_window(net, volume, (8, 8, 8), overlap=0.5, batch=2, blend=blend)
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)


def test_a_gaussian_window_is_the_weighted_mean_written_out():
    torch.manual_seed(0)
    net = torch.nn.Conv1d(1, 2, 3, padding=1).double()
    volume = image(1, 1, 14).double()
    found = sliding_window(net, volume, (6,), overlap=0.5)
    weight = torch.exp(-0.5 * ((torch.arange(6).double() - 2.5) / 0.75) ** 2)
    above, below = torch.zeros(1, 2, 14).double(), torch.zeros(14).double()
    with torch.no_grad():
        for start in window_starts(14, 6, 0.5):
            above[..., start : start + 6] += net(volume[..., start : start + 6]) * weight
            below[start : start + 6] += weight
    assert found.dtype == torch.float64
    assert torch.allclose(found, above / below, atol=1e-6, rtol=0)


def test_padding_is_symmetric_and_has_the_value_asked_for():
    seen = []

    def net(windows):
        seen.append(windows.clone())
        return windows

    volume = image(1, 1, 3, 4, 5)
    found = sliding_window(net, volume, (8, 4, 8), pad_value=-7.0)
    assert torch.equal(found, volume)
    assert (seen[0][0, 0, :2] == -7).all()
    assert (seen[0][0, 0, 5:] == -7).all()
    assert torch.equal(seen[0][0, 0, 2:5, :, 1:6], volume[0, 0])


def test_low_precision_outputs_are_blended_in_float32():
    found = sliding_window(lambda x: x.to(torch.bfloat16), image(1, 1, 9, 9, 9), (4, 4, 4))
    assert found.dtype == torch.float32


def test_the_result_can_be_changed_in_place_and_needs_no_gradient():
    net = torch.nn.Conv3d(1, 1, 1)
    found = sliding_window(net, image(1, 1, 6, 6, 6), (4, 4, 4))
    assert not found.requires_grad
    found += 1
    assert (found * torch.ones((), requires_grad=True)).requires_grad


def test_a_wrong_patch_overlap_and_batch_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        sliding_window(lambda x: x, image(1, 1, 4, 4, 4), (4, 4), overlap=1.0, batch=0)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("wrong", [lambda x: [x], lambda x: x[..., ::2], lambda x: x[0]])
def test_an_output_that_does_not_fit_is_an_error_that_says_so(wrong):
    with pytest.raises(RuntimeFault, match="network"):
        sliding_window(wrong, image(1, 1, 8, 8, 8), (4, 4, 4))


# -- views and ensembles ----------------------------------------------------------------------------------


def test_views_are_all_combinations_of_axes_and_their_own_inverse():
    views = tta_views((0, 1, 2))
    assert len(views) == 8
    assert views[0] == View(())
    volume = image(2, 1, 3, 4, 5)
    shown = {tuple(view.apply(volume).flatten().tolist()) for view in views}
    assert len(shown) == 8
    for view in views:
        assert torch.equal(view.invert(view.apply(volume)), volume)


def test_views_of_a_pointwise_network_change_nothing():
    volume = image(1, 1, 6, 5, 7)
    found = augmented(lambda x: x * 2, tta_views())(volume)
    assert torch.equal(found, volume * 2)


def test_the_mean_over_views_is_as_symmetric_as_the_views():
    torch.manual_seed(0)
    net = augmented(torch.nn.Conv3d(1, 2, 3, padding=1), tta_views((0, 2)), activation=torch.sigmoid)
    volume = image(1, 1, 6, 5, 4)
    mirrored = net(volume.flip([2, 4])).flip([2, 4])
    assert torch.allclose(net(volume), mirrored, atol=1e-6)
    assert not torch.allclose(net(volume), net(volume.flip([3])).flip([3]), atol=1e-3)


def test_an_ensemble_averages_after_the_activation():
    nets = [lambda x: x, lambda x: x * 0]
    found = ensemble(nets, activation=torch.sigmoid)(torch.tensor([[2.0]]))
    assert torch.allclose(found, (torch.sigmoid(torch.tensor([[2.0]])) + 0.5) / 2)
    with pytest.raises(ConfigError):
        ensemble([])
