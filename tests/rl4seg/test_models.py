"""Networks: sizes, shapes, initialisation, and what they do with odd images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medrl.core.errors import ConfigError
from medrl.plugins.rl4seg.models import ResNet18, SmallUNet, UNet


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("channels", "expected"), [((1, 3), 7_781_363), ((1, 1), 7_781_329), ((2, 1), 7_781_473)]
)
def test_the_unet_has_the_parameters_of_the_original(channels, expected):
    with torch.device("meta"):
        assert parameters(UNet(in_channels=channels[0], out_channels=channels[1])) == expected


def test_the_other_networks_have_their_stated_number_of_parameters():
    assert parameters(UNet(init_channels=8)) == 488_159
    assert parameters(SmallUNet()) == 319_548
    assert parameters(ResNet18()) == 11_170_753


@pytest.mark.parametrize("labels", [2, 3, 4, 5])
@pytest.mark.parametrize("size", [(100, 70), (33, 64)])
def test_unets_label_every_pixel_of_images_of_any_size(labels, size):
    image = torch.rand(2, 1, *size)
    for network in (UNet(out_channels=labels, init_channels=4), SmallUNet(out_channels=labels)):
        assert network(image).shape == (2, labels, *size)


def test_networks_take_any_number_of_channels():
    image = torch.rand(2, 4, 40, 36)
    assert UNet(in_channels=4, out_channels=1, init_channels=4)(image).shape == (2, 1, 40, 36)
    assert SmallUNet(in_channels=4, out_channels=1)(image).shape == (2, 1, 40, 36)
    assert ResNet18(in_channels=4, out_channels=2)(image).shape == (2, 2)


def test_images_smaller_than_the_deepest_level_are_padded():
    image = torch.rand(1, 1, 7, 40)
    assert UNet(init_channels=4).eval()(image).shape == (1, 3, 7, 40)
    assert SmallUNet().eval()(image).shape == (1, 3, 7, 40)
    assert ResNet18().eval()(image).shape == (1, 1)


def test_the_unet_has_six_levels_of_doubling_channels():
    found = []
    network = UNet(init_channels=8).eval()
    for block in network.encoder:
        block.register_forward_hook(lambda _m, _i, out: found.append(tuple(out.shape[1:])))
    network(torch.rand(1, 1, 64, 96))
    assert found == [(4, 64, 96), (8, 32, 48), (16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]


def test_the_small_unet_begins_at_half_resolution():
    found = []
    network = SmallUNet().eval()
    for block in network.encoder:
        block.register_forward_hook(lambda _m, _i, out: found.append(tuple(out.shape[1:])))
    network(torch.rand(1, 1, 64, 96))
    assert found == [(16, 32, 48), (32, 16, 24), (64, 8, 12), (64, 4, 6)]
    assert SmallUNet(channels=(8, 8, 8), fold=1).multiple == 4


def test_convolutions_begin_xavier_uniform_and_everything_has_a_bias():
    torch.manual_seed(0)
    network = UNet()
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            fans = module.weight[0].numel() + module.weight[:, 0].numel()
            limit = (6.0 / fans) ** 0.5
            largest = float(module.weight.detach().abs().max())
            assert 0.9 * limit < largest <= limit * (1 + 1e-6)
            assert module.bias is not None


def test_every_parameter_of_a_network_gets_a_gradient():
    for network in (UNet(init_channels=4), SmallUNet(), ResNet18()):
        network(torch.rand(2, 1, 64, 64)).square().mean().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_resnet_begins_with_a_wide_convolution_of_stride_two_without_bias():
    first = ResNet18().network.conv1
    assert (first.kernel_size, first.stride, first.padding, first.bias) == ((7, 7), (2, 2), (3, 3), None)
    assert first.in_channels == 1


def test_impossible_networks_are_refused():
    for broken in ({"init_channels": 7}, {"levels": 1}):
        with pytest.raises(ConfigError, match="unet"):
            UNet(**broken)
    for broken in ({"channels": (16,)}, {"channels": (8, 0)}, {"fold": 0}):
        with pytest.raises(ConfigError, match="unet_small"):
            SmallUNet(**broken)
