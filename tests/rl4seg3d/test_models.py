"""Networks: exact counts, names and shapes of the original; any size for the small one."""

from __future__ import annotations

import copy

import pytest
import torch

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.plugins.rl4seg3d.models import ConvLayer, SmallUNet3d, UNet3d


@pytest.mark.parametrize(
    ("channels", "outputs", "count"), [(1, 3, 30_431_104), (1, 1, 30_429_504), (2, 1, 30_429_792)]
)
def test_the_networks_have_the_parameters_of_the_original(channels, outputs, count):
    with torch.device("meta"):
        net = UNet3d(in_channels=channels, out_channels=outputs)
    assert sum(parameter.numel() for parameter in net.parameters()) == count
    assert len(net.state_dict()) == 98
    assert net.filters == [32, 64, 128, 256, 320, 320]
    assert net.divisor == (32, 32, 4)


def test_weights_have_the_names_of_the_original():
    with torch.device("meta"):
        names = set(UNet3d().state_dict())
    blocks = ["input_block", *(f"downsamples.{k}" for k in range(4)), "bottleneck"]
    blocks += [f"upsamples.{k}.conv_block" for k in range(5)]
    expected = {
        f"{block}.{layer}.{part}.{what}"
        for block in blocks
        for layer in ("conv1", "conv2")
        for part in ("conv", "norm")
        for what in ("weight", "bias")
    }
    expected |= {f"upsamples.{k}.transp_conv.weight" for k in range(5)} | {"output_block.conv.weight"}
    expected |= {f"deep_supervision_heads.{k}.conv.weight" for k in range(4)}
    assert names == expected


def test_the_output_has_the_size_of_the_image_and_a_training_critic_three_sizes():
    image = torch.rand(1, 1, 64, 64, 4)
    with torch.no_grad():
        assert UNet3d(base_filters=4)(image).shape == (1, 3, 64, 64, 4)
        critic = UNet3d(out_channels=1, base_filters=4, deep_supervision=True)
        assert [tuple(level.shape[2:]) for level in critic.train()(image)] == [
            (64, 64, 4),
            (32, 32, 4),
            (16, 16, 2),
        ]
        assert critic.eval()(image).shape == (1, 1, 64, 64, 4)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6])
def test_lengths_that_are_no_multiple_of_four_are_refused(frames):
    with pytest.raises(RuntimeFault, match="multiples of"):
        UNet3d(base_filters=4)(torch.rand(1, 1, 32, 32, frames))


def test_an_image_that_leaves_one_voxel_is_refused():
    with pytest.raises(RuntimeFault, match="one voxel"):
        UNet3d(base_filters=4)(torch.rand(1, 1, 32, 32, 4))


def test_heads_of_lower_levels_are_trained_only_where_they_are_used():
    plain = UNet3d(base_filters=4)
    assert not any(p.requires_grad for p in plain.deep_supervision_heads.parameters())
    critic = UNet3d(base_filters=4, deep_supervision=True)
    flags = [head.conv.weight.requires_grad for head in critic.deep_supervision_heads]
    assert flags == [True, True, False, False]


def test_weights_start_kaiming_normal_with_zero_biases():
    net = UNet3d(base_filters=16)
    weight = net.bottleneck.conv2.conv.weight
    expected = (2.0 / (1.0 + 0.01**2) / weight[0].numel()) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.02)
    assert not net.bottleneck.conv2.conv.bias.any()


@pytest.mark.parametrize("size", [(16, 16, 4), (17, 31, 3), (5, 9, 1)])
def test_the_small_network_takes_any_size(size):
    net = SmallUNet3d(channels=(4, 8, 8))
    with torch.no_grad():
        assert net(torch.rand(2, 1, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("frames", [1, 2])
def test_half_precision_is_right_where_one_frame_is_left(frames):
    torch.manual_seed(0)
    layer = ConvLayer(32, 64, (3, 3, 3), (2, 2, 2)).eval()
    maps = torch.randn(1, 32, 8, 8, frames)
    with torch.no_grad():
        exact = layer(maps)
        half = copy.deepcopy(layer).bfloat16()(maps.bfloat16()).float()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = layer(maps).float()
    assert exact.shape == half.shape == (1, 64, 4, 4, 1)
    assert (half - exact).abs().mean() < 0.02 * exact.abs().mean()
    assert (mixed - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_the_small_network_puts_pixels_back_where_they_were():
    image = torch.arange(2 * 3 * 4 * 6 * 5, dtype=torch.float32).reshape(2, 3, 4, 6, 5)
    from medrl.plugins.rl4seg3d.models import _fold, _unfold

    assert torch.equal(_unfold(_fold(image, 2), 2), image)
    assert torch.equal(_fold(image, 2)[:, 0, 1, 2], image[:, 0, 2, 4])


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="4 filters, 6 kernels"):
        UNet3d(filters=[4, 8, 16, 16])
    with pytest.raises(ConfigError, match="fold is 0"):
        SmallUNet3d(fold=0)
