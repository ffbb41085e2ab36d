"""Networks: sizes of the originals, images of any size, and what each does beside segmenting."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.models import (
    CompactNet,
    ReconUNet,
    SmallUNeXt,
    UNet,
    UNetPlusPlus,
    UNeXt,
    consistent,
    deep_supervision_weights,
    folded,
)
from medrl.plugins.kspace.models.unext import _shifted


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (UNet, 31_036_676),
        (lambda: UNet(bilinear=True), 17_262_020),
        (UNetPlusPlus, 24_000_352),
        (lambda: UNeXt(in_channels=3), 1_471_972),
        (lambda: SmallUNeXt(in_channels=3), 253_588),
        (CompactNet, 42_392),
        (ReconUNet, 7_756_097),
    ],
)
def test_networks_have_the_parameters_of_the_originals(build, expected):
    with torch.device("meta"):
        assert parameters(build()) == expected


@pytest.mark.parametrize(
    "network",
    [
        UNet(base=4, out_channels=3),
        UNet(base=4, out_channels=3, bilinear=True),
        UNetPlusPlus(base=4, out_channels=3),
        SmallUNeXt(out_channels=3),
        CompactNet(out_channels=3),
    ],
    ids=lambda network: type(network).__name__,
)
@pytest.mark.parametrize("size", [(32, 32), (7, 30)])
def test_segmentation_networks_give_logits_for_every_pixel_of_any_image(network, size):
    network = network.eval()
    with torch.no_grad():
        logits = network(torch.rand(2, 1, *size))
    assert logits.shape == (2, 3, *size)
    total = logits.sum(dim=1)
    assert not torch.allclose(total, torch.ones_like(total), atol=1e-3)  # no softmax inside


@pytest.mark.parametrize("build", [UNet, UNetPlusPlus])
def test_unets_segment_volumes_with_three_spatial_dimensions(build):
    network = build(base=2, out_channels=3, spatial_dims=3).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 1, 4, 16, 16)).shape == (1, 3, 4, 16, 16)
    with pytest.raises(ConfigError, match="spatial_dims is 4"):
        build(spatial_dims=4)


def test_channels_of_the_nested_unet_are_capped():
    with torch.device("meta"):
        flat = [block[0].out_channels for block in UNetPlusPlus().encoder]
        deep = [block[0].out_channels for block in UNetPlusPlus(spatial_dims=3).encoder]
    assert flat == [32, 64, 128, 256, 480, 480]
    assert deep == [32, 64, 128, 256, 320, 320]


def test_the_nested_unet_gives_five_outputs_while_it_learns():
    network = UNetPlusPlus(base=4)
    image = torch.rand(2, 1, 32, 32)
    outputs = network(image)
    assert [tuple(item.shape) for item in outputs] == [(2, 4, 32, 32)] * 5
    torch.testing.assert_close(network.eval()(image), outputs[0])
    assert UNetPlusPlus(base=4, deep_supervision=False)(image).shape == (2, 4, 32, 32)
    weights = deep_supervision_weights(5)
    assert sum(weights) == pytest.approx(1.0)
    assert weights[0] == pytest.approx(16 / 31)
    assert all(a == pytest.approx(2 * b) for a, b in pairwise(weights))


def test_all_weights_take_part():
    for network in (UNet(base=2), UNetPlusPlus(base=4), SmallUNeXt(), CompactNet(widths=(4, 6))):
        if isinstance(network, CompactNet):
            out = sum(item.abs().sum() for item in network.both(torch.rand(2, 1, 32, 32))[:2])
        else:
            out = network(torch.rand(2, 1, 32, 32))
            out = sum(item.square().sum() for item in (out if isinstance(out, list) else [out]))
        out.backward()
        idle = [name for name, value in network.named_parameters() if value.grad is None]
        assert idle == []


def test_channels_roll_by_minus_two_to_two_and_zeros_come_in():
    maps = torch.arange(1.0, 6.0).view(1, 1, 5, 1).expand(1, 5, 5, 5)
    rolled = _shifted(maps, axis=2)[0, :, :, 0]
    assert rolled.tolist() == [
        [3, 4, 5, 0, 0],
        [2, 3, 4, 5, 0],
        [1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4],
        [0, 0, 1, 2, 3],
    ]
    along_width = _shifted(maps.transpose(2, 3), axis=3)
    torch.testing.assert_close(along_width, _shifted(maps, axis=2).transpose(2, 3))


@pytest.mark.parametrize(
    ("width", "groups"),
    [
        (160, [32] * 5),
        (256, [52, 52, 52, 52, 48]),
        (128, [26, 26, 26, 26, 24]),
    ],
)
def test_channels_are_shifted_in_the_groups_of_the_original(width, groups):
    maps = torch.zeros(1, width, 5, 1)
    maps[:, :, 2] = 1.0
    rows = _shifted(maps, axis=2)[0, :, :, 0].argmax(dim=1)
    assert torch.bincount(rows, minlength=5).tolist() == groups
    assert bool((rows.diff() >= 0).all())


def test_milesials_weights_keep_their_names():
    with torch.device("meta"):
        names = set(UNet().state_dict())
    for name in (
        "inc.double_conv.0.weight",
        "down4.maxpool_conv.1.double_conv.4.running_mean",
        "up1.up.bias",
        "up4.conv.double_conv.3.weight",
        "outc.conv.bias",
    ):
        assert name in names


def test_the_compact_network_predicts_the_image_beside_the_labels():
    network = CompactNet().eval()
    image = torch.rand(2, 1, 30, 32)
    with torch.no_grad():
        logits, prediction, deep = network.both(image)
        torch.testing.assert_close(network(image), logits)
    assert prediction.shape == (2, 1, 30, 32)
    assert deep.shape == (2, 32, 4, 4)
    assert CompactNet(reconstructs=False).both(image)[1] is None


def test_folding_batch_normalisation_changes_nothing_but_the_layers():
    network = CompactNet()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(4, 1, 32, 32))
    image = torch.rand(2, 1, 32, 32)
    quick = folded(network)
    assert network.training
    torch.testing.assert_close(quick(image), network.eval()(image), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in quick.modules())
    assert not any(value.requires_grad for value in quick.parameters())


def test_the_reconstruction_follows_the_scale_of_the_image():
    network = ReconUNet(base=4, levels=2).eval()
    image = torch.rand(2, 1, 30, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(image * 1e-5), network(image) * 1e-5, atol=1e-9, rtol=1e-4)
        assert bool((network(image) >= 0).all())
        assert bool(torch.isfinite(network(torch.zeros(1, 1, 16, 16))).all())


def test_measured_lines_return_exactly_and_a_full_mask_ignores_the_prediction():
    generator = torch.Generator().manual_seed(0)
    image = torch.complex(*torch.rand(2, 2, 8, 8, generator=generator))
    kspace = torch.fft.fft2(image, norm="ortho")
    mask = torch.zeros(1, 1, 8, dtype=torch.bool)
    mask[..., :3] = True
    measured = kspace * mask
    transforms = {
        "to_k": lambda x: torch.fft.fft2(x, norm="ortho"),
        "to_image": lambda y: torch.fft.ifft2(y, norm="ortho"),
    }
    zero_filled = torch.fft.ifft2(measured, norm="ortho")
    better = consistent(torch.rand(2, 8, 8), zero_filled, measured, mask, **transforms)
    back = torch.fft.fft2(better, norm="ortho")
    torch.testing.assert_close(back[..., :3], kspace[..., :3])
    assert not torch.allclose(back[..., 3:], measured[..., 3:])
    full = consistent(torch.rand(2, 8, 8), image, kspace, torch.ones_like(mask), **transforms)
    torch.testing.assert_close(full, image)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: UNet(base=3, bilinear=True),
        lambda: UNetPlusPlus(base=0),
        lambda: UNeXt(widths=(8, 16, 32, 64)),
        lambda: UNeXt(widths=(4, 16, 32, 64, 64)),
        lambda: UNeXt(widths=(8, 16, 32, 6, 64)),
        lambda: UNeXt(widths=(8, 16, 32, 64, 12)),
        lambda: CompactNet(widths=(8,)),
        lambda: ReconUNet(in_channels=2),
    ],
)
def test_sizes_without_a_meaning_are_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()


def test_pixels_that_pad_an_image_do_not_move_it():
    """An impulse in the image stays where it is in the logits of untouched convolutions."""
    image = torch.zeros(1, 1, 13, 15)
    image[..., 6, 7] = 5.0
    change = torch.zeros(13, 15)
    with torch.no_grad():
        for _ in range(16):
            network = CompactNet(widths=(4, 6)).eval()
            change += (network(image) - network(torch.zeros_like(image))).abs().sum(dim=1)[0]
    weight = change / change.sum()
    rows = (weight.sum(dim=1) * torch.arange(13)).sum()
    columns = (weight.sum(dim=0) * torch.arange(15)).sum()
    assert abs(float(rows) - 6) < 1
    assert abs(float(columns) - 7) < 1
