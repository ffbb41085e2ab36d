"""The pooled maps of the policy's state are exact means, whatever the sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medrl.plugins.graft.agent import make_state


def pooled(maps, size):
    alike = torch.zeros(maps.shape[0], 1)
    state = make_state(
        [{"neg1": maps}],
        [maps[:, :1]],
        taps=["neg1"],
        similarity={"neg1": alike},
        quality=alike,
        size=size,
        normalise=False,
    )
    return state.spatial[0][:, :-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((20, 64, 64), (5, 32, 32)),
        ((10, 16, 24), (5, 4, 3)),
        ((5, 8, 8), (5, 8, 8)),
        ((7, 9, 11), (5, 4, 3)),
        ((4, 16, 16), (5, 32, 32)),
    ],
)
def test_maps_are_pooled_to_the_means_of_their_cells(shape, size, dtype):
    maps = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = F.adaptive_avg_pool3d(maps.double(), size)
    found = pooled(maps, size)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, atol=1e-6, rtol=1e-6)


def test_maps_that_lie_channels_last_are_pooled_alike():
    maps = torch.randn(2, 4, 10, 16, 16)
    last = maps.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(pooled(last, (5, 4, 4)), pooled(maps, (5, 4, 4)))


def test_pooling_leaves_the_features_as_they_are():
    maps = torch.randn(1, 2, 10, 16, 16)
    before = maps.clone()
    pooled(maps, (5, 4, 4))
    assert torch.equal(maps, before)
