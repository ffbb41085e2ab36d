"""The trunk of the column agent."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.plugins.kspace.agent.trunk import Trunk, summary


def plain(trunk: Trunk, columns: Tensor, pooled: Tensor) -> Tensor:
    """The same network, one recorded operation after the other, channels first."""
    known = trunk.embedding.unsqueeze(0).expand(len(columns), -1, -1)
    maps = trunk.stem(torch.cat([columns.transpose(1, 2), known], dim=1))
    if trunk.whole is not None:
        maps = maps + trunk.whole(pooled).unsqueeze(-1)
    for block in trunk.blocks:
        inner = F.relu(block.norm(maps))
        seen = torch.cat([inner.mean(dim=-1), inner.amax(dim=-1)], dim=1)
        outer = block.near(inner) + block.context(seen).unsqueeze(-1)
        maps = maps + block.mix(F.relu(outer))
    return F.relu(maps).transpose(1, 2)


@pytest.mark.parametrize(("width", "pooled"), [(16, 3), (13, 0)])
def test_maps_and_derivatives_are_those_of_the_plain_network(width: int, pooled: int):
    torch.manual_seed(0)
    trunk = Trunk(width, 5, pooled, 8, 2).double()
    columns = torch.randn(3, width, 5, dtype=torch.float64, requires_grad=True)
    whole = torch.randn(3, pooled, dtype=torch.float64)
    weight = torch.randn(3, width, 8, dtype=torch.float64)
    found, given = [], [*trunk.parameters(), columns]
    for network in (plain, lambda *arguments: trunk(*arguments[1:])):
        maps = network(trunk, columns, whole)
        found.append((maps.detach(), torch.autograd.grad((maps * weight).sum(), given)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-12, atol=1e-12)
    for own, expected in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


def test_the_derivative_is_that_of_finite_differences():
    torch.manual_seed(1)
    trunk = Trunk(7, 2, 0, 4, 1).double()
    columns = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(2, 0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: trunk(values, none), (columns,))


def test_float32_maps_do_not_depend_on_the_size_of_the_batch():
    torch.manual_seed(2)
    trunk = Trunk(32, 5, 3, 28, 8)
    columns, pooled = torch.randn(20, 32, 5), torch.randn(20, 3)
    whole = trunk(columns, pooled)
    parts = torch.cat([trunk(columns[i : i + 3], pooled[i : i + 3]) for i in range(0, 20, 3)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 2, 5, 16, 31])
def test_a_summary_is_mean_and_largest_value(columns: int):
    maps = torch.randn(3, columns, 4)
    torch.testing.assert_close(summary(maps), torch.cat([maps.mean(dim=1), maps.amax(dim=1)], dim=1))


def test_equal_largest_values_share_the_derivative():
    trunk = Trunk(8, 1, 0, 4, 0).double()
    columns = torch.ones(1, 8, 1, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(1, 0, dtype=torch.float64)
    (own,) = torch.autograd.grad(trunk(columns, none).square().sum(), columns)
    (expected,) = torch.autograd.grad(plain(trunk, columns, none).square().sum(), columns)
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


def test_weights_have_the_names_and_shapes_of_earlier_checkpoints():
    found = {name: tuple(value.shape) for name, value in Trunk(16, 5, 3, 8, 2).state_dict().items()}
    block = {
        "norm.weight": (8,),
        "norm.bias": (8,),
        "near.weight": (8, 8, 5),
        "near.bias": (8,),
        "context.weight": (8, 16),
        "context.bias": (8,),
        "mix.weight": (8, 8, 1),
        "mix.bias": (8,),
    }
    expected = {f"blocks.{number}.{name}": shape for number in range(3) for name, shape in block.items()}
    stem = {"embedding": (2, 16), "stem.weight": (8, 7, 1), "stem.bias": (8,), "whole.weight": (8, 3)}
    assert found == {**expected, **stem}
