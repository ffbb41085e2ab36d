"""Students: sizes, names of tensors, taps, shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medrl.core.errors import ConfigError, DataError
from medrl.plugins.graft.models import (
    BratsUNet,
    FullResUNet,
    LargeUNet,
    LogitsOnly,
    MediumUNet,
    PlainConvUNet,
    StudentOutput,
    SwinUNETRStudent,
    TinyUNet,
    UNet3D,
    as_output,
    tap,
)

SMALL = (2, 2, 2, 2, 2, 2, 2)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (FullResUNet, 44_577_932),
        (MediumUNet, 100_285_644),
        (LargeUNet, 178_272_524),
        (BratsUNet, 31_198_991),
        (TinyUNet, 323_366),
    ],
)
def test_each_network_has_its_stated_number_of_parameters(network, expected):
    with torch.device("meta"):
        assert parameters(network()) == expected


def test_fullres_returns_six_resolutions_for_20_slices_of_256():
    with torch.device("meta"):
        network = FullResUNet(features=SMALL, deep_supervision=True)
        output = network(torch.empty(1, 3, 20, 256, 256))
    sizes = [(logits.shape[2], logits.shape[3]) for logits in output.logits]
    assert sizes == [(20, 256), (20, 128), (20, 64), (10, 32), (5, 16), (5, 8)]
    assert output.features["neg1"].shape == (1, 2, 20, 256, 256)
    assert output.features["neg2"].shape == (1, 2, 20, 128, 128)


def test_tensor_names_are_those_of_nnunet():
    names = set(FullResUNet(features=SMALL).state_dict())
    assert len(names) == 128
    for expected in (
        "encoder.stages.0.0.convs.0.conv.weight",
        "encoder.stages.6.0.convs.1.norm.bias",
        "decoder.stages.5.convs.1.conv.bias",
        "decoder.transpconvs.0.weight",
        "decoder.seg_layers.5.bias",
    ):
        assert expected in names


def test_taps_are_raw_outputs_of_the_second_convolution():
    network = TinyUNet()
    seen = {}
    for name, stage in (("neg1", 2), ("neg2", 1)):
        conv = network.decoder.stages[stage].convs[1].conv
        conv.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    output = network(torch.randn(1, 3, 4, 16, 16))
    for name in ("neg1", "neg2"):
        assert torch.equal(output.features[name], seen[name])
        assert output.features[name].shape[1] == network.feature_channels[name]
        assert (output.features[name] < 0).any()


@pytest.mark.parametrize("where", ["decoder", "bottleneck", "first_conv"])
def test_the_second_tap_can_sit_where_each_original_variant_has_it(where):
    network = TinyUNet(neg2=where)
    output = network(torch.randn(1, 3, 4, 16, 16))
    sizes = {"decoder": (4, 8, 8), "bottleneck": (2, 2, 2), "first_conv": (4, 16, 16)}
    assert tuple(output.features["neg2"].shape[2:]) == sizes[where]
    assert output.features["neg2"].shape[1] == network.feature_channels["neg2"]


def test_without_deep_supervision_one_output_and_unused_heads_do_not_train():
    network = TinyUNet()
    output = network(torch.randn(1, 3, 4, 16, 16))
    assert len(output.logits) == 1
    output.main.square().mean().backward()
    idle = {name for name, p in network.named_parameters() if p.grad is None}
    assert idle == {name for name, p in network.named_parameters() if not p.requires_grad}
    assert all(name.startswith("decoder.seg_layers.") for name in idle)


def test_sizes_that_the_strides_cannot_divide_are_refused_with_the_divisor():
    network = FullResUNet(features=SMALL)
    assert network.divisor == (4, 64, 64)
    with pytest.raises(DataError, match=r"multiples of \(4, 64, 64\)"):
        network(torch.zeros(1, 3, 6, 64, 64))
    with pytest.raises(DataError, match="single voxel"):
        network(torch.zeros(1, 3, 4, 64, 64))
    assert network(torch.zeros(1, 3, 8, 64, 64)).main.shape == (1, 2, 8, 64, 64)


def test_settings_that_do_not_fit_are_all_named_at_once():
    with pytest.raises(ConfigError) as error:
        PlainConvUNet(
            in_channels=0,
            out_channels=1,
            features=[4, 8],
            kernels=[(3, 3, 3)],
            strides=[(1, 1, 1), (2, 2, 2)],
        )
    assert len(error.value.problems) == 2


def test_under_bf16_convolutions_give_bfloat16():
    with torch.autocast("cpu", torch.bfloat16):
        output = TinyUNet()(torch.randn(1, 3, 4, 16, 16))
    assert output.features["neg1"].dtype == torch.bfloat16
    assert output.main.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make",
    [
        lambda: UNet3D(features=(2, 4, 4, 8, 8), deep_supervision=True),
        lambda: SwinUNETRStudent(feature_size=12, num_heads=(1, 2, 3, 4), deep_supervision=True),
    ],
    ids=["unet3d", "swin"],
)
def test_library_networks_fit_any_size_have_taps_and_train_every_parameter(make):
    network = make()
    image = torch.randn(1, 3, 9, 17, 32)
    output = network(image)
    assert output.main.shape == (1, 2, 9, 17, 32)
    assert output.features["neg1"].shape == (1, network.feature_channels["neg1"], 9, 17, 32)
    assert output.features["neg2"].shape[1] == network.feature_channels["neg2"]
    heights = [logits.shape[3] for logits in output.logits]
    assert len(heights) >= 4
    assert heights == sorted(heights, reverse=True)
    sum(logits.square().mean() for logits in output.logits).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_a_copy_of_a_tapped_network_gives_its_own_features():
    network = UNet3D(features=(2, 2, 2, 2, 2))
    other = copy.deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    image = torch.randn(1, 3, 16, 16, 32)
    assert not torch.equal(network(image).features["neg1"], other(image).features["neg1"])
    assert not network.network.upcat_1.convs.conv_1.conv._forward_hooks


def test_foreign_outputs_are_read_and_missing_taps_named():
    logits = torch.zeros(1, 2, 4, 4, 4)
    assert as_output(logits).main is logits
    assert len(as_output([logits, logits]).logits) == 2
    with pytest.raises(ConfigError, match="neg1"):
        tap(as_output(logits), "neg1")
    with pytest.raises(ConfigError):
        as_output({"out": logits})
    network = TinyUNet()
    image = torch.randn(1, 3, 4, 16, 16)
    assert torch.equal(LogitsOnly(network)(image), network(image).main)
    assert isinstance(network(image), StudentOutput)


def test_he_start_has_zero_biases_and_the_original_start_has_not():
    assert float(TinyUNet().encoder.stages[0][0].convs[0].conv.bias.detach().abs().max()) == 0.0
    original = TinyUNet(init="pytorch").encoder.stages[0][0].convs[0].conv.bias
    assert float(original.detach().abs().max()) > 0.0
