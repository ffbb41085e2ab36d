"""Networks: the original to the number, its fast form, and the compact one."""

import pytest
import torch

from medrl.core.errors import ConfigError
from medrl.plugins.spars.models import CompactNet, FaithfulNet, FusedFaithfulNet
from medrl.plugins.spars.models.compact import MARGIN
from medrl.plugins.spars.models.faithful import INPUT, check_size, feature_size

SMALL = (236, 236, 172)


@pytest.fixture(scope="module")
def faithful():
    torch.manual_seed(0)
    network = FaithfulNet()
    for norm in network.norms:
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.data.uniform_(-1.5, 1.5)
        norm.bias.data.uniform_(-0.3, 0.3)
    return network.eval()


def test_faithful_network_has_the_parameters_of_the_original():
    network = FaithfulNet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 3_570_738
    assert [tuple(layer.weight.shape) for layer in network.linears] == [
        (1600, 1152),
        (800, 1600),
        (400, 800),
        (128, 400),
        (2, 128),
    ]


def test_faithful_network_has_the_shapes_of_the_original():
    shapes = []
    network = FaithfulNet().eval()
    for conv in network.convs:
        conv.register_forward_hook(lambda _module, _given, made: shapes.append(tuple(made.shape[1:])))
    with torch.no_grad():
        assert network(torch.zeros(1, 1, *INPUT)).shape == (1, 2)
    assert shapes == [(8, 254, 254, 178), (16, 63, 63, 44), (32, 15, 15, 10), (64, 3, 3, 2)]


@pytest.mark.parametrize("size", [(235, 256, 180), (256, 256, 236), (64, 64, 48), (256, 300, 180)])
def test_other_sizes_are_refused_with_advice(size):
    with pytest.raises(ConfigError, match="does not leave 3 × 3 × 2") as refusal:
        check_size(size)
    assert "spars.compact" in refusal.value.do
    with pytest.raises(ConfigError):
        FaithfulNet()(torch.zeros(1, 1, *size).expand(1, 1, *size))


@pytest.mark.parametrize("size", [(236, 299, 172), (299, 236, 235), INPUT])
def test_sizes_that_leave_the_same_features_are_taken(size):
    assert feature_size(size) == (3, 3, 2)
    check_size(size)


def test_fused_network_gives_the_logits_of_the_plain_one(faithful):
    images = torch.rand(1, 1, *SMALL, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = faithful(images)
    fused = FusedFaithfulNet(faithful)(images)
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)


def test_fused_network_does_not_change_the_plain_one(faithful):
    before = {name: value.clone() for name, value in faithful.state_dict().items()}
    fused = FusedFaithfulNet(faithful)
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    for name, value in faithful.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_half_precision_stays_near():
    torch.manual_seed(1)
    network = FaithfulNet().eval()
    images = torch.rand(1, 1, *SMALL)
    exact = torch.softmax(FusedFaithfulNet(network)(images), dim=1)
    half = torch.softmax(FusedFaithfulNet(network, torch.bfloat16)(images), dim=1)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.01, rtol=0)


@pytest.mark.parametrize("window", [(8, 8, 4), (48, 48, 24), (16, 16, 8)])
def test_compact_network_takes_windows_of_any_size(window):
    network = CompactNet(channels=(4, 4, 8, 8)).eval()
    assert network(torch.rand(2, 1, *window)).shape == (2, 2)


def test_compact_network_in_evaluation_computes_what_the_plain_one_does():
    torch.manual_seed(0)
    network = CompactNet()
    for norm in network.norms:
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.data.uniform_(-1.5, 1.5)
    images = torch.rand(1, 1, 24, 20, 16)
    network.eval()
    plain = network.cells(images)
    with torch.no_grad():
        fast = network.cells(images)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)


def test_cells_see_no_further_than_the_margin():
    torch.manual_seed(0)
    network = CompactNet().eval()
    images = torch.rand(1, 1, 40, 8, 8)
    other = images.clone()
    other[:, :, : 20 - MARGIN] = torch.rand(1, 1, 20 - MARGIN, 8, 8)
    with torch.no_grad():
        first, second = network.cells(images), network.cells(other)
    assert torch.equal(first[:, :, 5:], second[:, :, 5:])
    assert not torch.equal(first[:, :, :3], second[:, :, :3])


def test_too_few_blocks_are_refused():
    with pytest.raises(ConfigError, match="channels"):
        CompactNet(channels=(4, 4))
