"""Sums over boxes."""

from __future__ import annotations

import torch

from medrl.plugins.spars.boxsum import box_sums, integral, lattice_means, scaled_window, window_means
from medrl.plugins.spars.lattice import Lattice


def test_means_in_windows_are_those_of_slices():
    volume = torch.rand(12, 11, 9, generator=torch.Generator().manual_seed(0))
    lattice = Lattice.of(volume.shape, (4, 3, 5), (2, 3, 1))
    sums = integral(volume)
    direct = torch.stack(
        [volume[x : x + 4, y : y + 3, z : z + 5].mean() for x, y, z in lattice.corners().tolist()]
    )
    assert torch.allclose(window_means(sums, lattice.corners(), lattice.window), direct, atol=1e-6)
    assert torch.allclose(lattice_means(sums, lattice).flatten(), direct, atol=1e-6)


def test_boxes_that_stick_out_count_zero_outside():
    sums = integral(torch.ones(4, 4, 4))
    low, high = torch.tensor([[-2, 0, 0], [3, 3, 3]]), torch.tensor([[2, 4, 4], [9, 9, 9]])
    assert box_sums(sums, low, high).tolist() == [32.0, 1.0]


def test_larger_windows_have_the_same_centre():
    volume = torch.zeros(16, 16, 16)
    volume[7:9, 7:9, 7:9] = 1.0
    lattice = Lattice.of(volume.shape, (4, 4, 4), 2)
    large = lattice_means(integral(volume), lattice, (8, 8, 8))
    middle = tuple(lattice.start_node().tolist())
    assert lattice.start == (6, 6, 6)
    assert large[middle] == 8 / 512
    assert torch.equal(large, large.flip(0))
    assert large[0, 0, 0] == 0.0
    assert scaled_window((16, 16, 8), 2.0) == (32, 32, 16)


def test_sums_of_large_volumes_are_exact():
    volume = torch.full((96, 96, 96), 0.1)
    found = window_means(integral(volume), torch.tensor([[90, 90, 90]]), (6, 6, 6))
    assert abs(float(found) - 0.1) < 1e-7
