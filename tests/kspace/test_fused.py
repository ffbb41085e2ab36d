"""Networks made for evaluation alone: what they give is what the trained networks give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medrl.plugins.kspace.imaging import Imaging
from medrl.plugins.kspace.models import CompactNet, FusedCompact, UNeXt, fused


def trained(network: nn.Module) -> nn.Module:
    """A network whose batch normalisation has seen something."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight, 0.5)):
                value.detach().copy_(low + torch.rand(value.shape, generator=generator))
    return network.eval()


def entropy_slope(network: nn.Module, image: Tensor) -> Tensor:
    image = image.clone().requires_grad_()
    log_probs = torch.log_softmax(network(image), dim=1)
    (slope,) = torch.autograd.grad(-(log_probs.exp() * log_probs).sum(), image)
    return slope


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (16, 16)),
        ({}, (13, 18)),
        ({"widths": (4, 8), "fold": 1, "out_channels": 3}, (10, 8)),
        ({"widths": (4, 6, 8, 10), "reconstructs": False}, (32, 16)),
    ],
)
def test_the_fused_network_gives_what_the_trained_one_gives(options: dict, size: tuple[int, int]):
    torch.manual_seed(0)
    network = trained(CompactNet(**options))
    fast = fused(network)
    assert isinstance(fast, FusedCompact)
    image = torch.rand(3, 1, *size)
    expected = network.both(image)
    found = fast.sloped(image)
    pairs = [*zip(fast.both(image), expected, strict=True), (fast(image), expected[0])]
    pairs += [(found.logits, expected[0]), (found.prediction, expected[1]), (found.deep, expected[2])]
    for own, plain in pairs:
        if plain is None:
            assert own is None
        else:
            torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)
    probabilities = torch.softmax(expected[0], dim=1)
    torch.testing.assert_close(found.probabilities, probabilities, rtol=1e-4, atol=1e-5)
    entropy = -torch.xlogy(probabilities, probabilities).sum(dim=1)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.slope, entropy_slope(network, image), rtol=1e-3, atol=1e-6)


def test_the_fused_network_keeps_its_weights_when_training_goes_on():
    torch.manual_seed(0)
    network = trained(CompactNet())
    fast, image = fused(network), torch.rand(2, 1, 16, 16)
    before = fast(image)
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()
    assert torch.equal(fast(image), before)
    assert fused(fast) is fast


def test_bfloat16_stays_near_float32():
    torch.manual_seed(0)
    fast, image = fused(trained(CompactNet())), torch.rand(2, 1, 32, 32)
    exact = fast.sloped(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fast.sloped(image)
    assert {item.dtype for item in found} == {torch.float32}
    assert float((found.probabilities - exact.probabilities).abs().max()) < 0.02
    # The slope is a difference of near numbers: it keeps its direction.
    similar = torch.cosine_similarity(found.slope.flatten(), exact.slope.flatten(), dim=0)
    assert float(similar) > 0.97


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("build", [CompactNet, lambda: UNeXt(widths=(5, 6, 10, 10, 15))])
def test_a_settled_network_shows_the_same_view(make_cases, build, gradient: bool):
    torch.manual_seed(0)
    network, cases = trained(build()), make_cases()
    imaging = Imaging(network, channels_last=True)
    expected = imaging.look(cases.target, cases, gradient=gradient)
    imaging.settle(network)
    assert imaging.segmenter is not network
    found = imaging.look(cases.target, cases, gradient=gradient)
    for name in ("logits", "probabilities", "entropy", "magnitude", "prediction", "deep", "gradient"):
        own, plain = getattr(found, name), getattr(expected, name)
        assert (own is None) == (plain is None)
        if own is not None:
            torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-5)
