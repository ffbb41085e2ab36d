"""Corners, nodes and moves."""

from __future__ import annotations

import pytest
import torch

from medrl.core.errors import ConfigError
from medrl.plugins.spars.lattice import Lattice, Lattices, move, moves


def test_the_main_config_has_53_by_53_by_39_windows_from_the_original_start():
    lattice = Lattice.of((256, 256, 180), (48, 48, 24), 4, "corner_center")
    assert lattice.start == (128, 128, 90)
    assert lattice.offset == (0, 0, 2)
    assert lattice.counts == (53, 53, 39)
    assert lattice.size == 109_551


def test_the_small_case_has_1859_windows_and_96_tiles():
    lattice = Lattice.of((64, 64, 48), (16, 16, 8), 4)
    assert lattice.counts == (13, 13, 11)
    assert lattice.size == 1859
    assert len(lattice.tiles()) == 96


def test_actions_0_to_5_move_along_z_y_and_x():
    lattice = Lattice.of((24, 24, 24), (8, 8, 8), 4)
    start = lattice.node(torch.tensor([[8, 8, 8]])).expand(6, 3)
    found = lattice.corner(move(start, torch.arange(6), torch.tensor(lattice.counts)))
    expected = [[8, 8, 12], [8, 8, 4], [8, 12, 8], [8, 4, 8], [12, 8, 8], [4, 8, 8]]
    assert found.tolist() == expected


def test_corners_stay_inside_for_1000_random_steps_and_illegal_moves_change_nothing():
    lattice = Lattice.of((24, 20, 17), (8, 8, 5), (4, 3, 4))
    counts = torch.tensor(lattice.counts)
    generator = torch.Generator().manual_seed(0)
    node = lattice.start_node().expand(16, 3)
    most = torch.tensor(lattice.shape) - torch.tensor(lattice.window)
    stayed = 0
    for _ in range(1000):
        action = torch.randint(6, (16,), generator=generator)
        legal = lattice.legal(node).gather(1, action.unsqueeze(1)).squeeze(1)
        after = move(node, action, counts)
        assert torch.equal((after == node).all(dim=1), ~legal)
        stayed += int((~legal).sum())
        node = after
        corner = lattice.corner(node)
        assert bool(((corner >= 0) & (corner <= most)).all())
    assert stayed > 0


def test_nodes_and_corners_are_inverse_and_flat_numbers_are_in_order():
    lattice = Lattice.of((23, 20, 17), (8, 8, 5), 4)
    assert torch.equal(lattice.node(lattice.corners()), lattice.nodes())
    assert lattice.flat(lattice.nodes()).tolist() == list(range(lattice.size))
    many = Lattices([Lattice.of((12, 12, 12), (8, 8, 5), 4), lattice])
    case = torch.ones(lattice.size, dtype=torch.int64)
    assert torch.equal(many.flat(case, lattice.nodes()), torch.arange(lattice.size) + many[0].size)
    assert torch.equal(many.node(case, lattice.corners()), lattice.nodes())
    assert torch.equal(many.legal(case, lattice.nodes()), lattice.legal(lattice.nodes()))
    assert many.total == many[0].size + lattice.size


def test_tiles_see_every_voxel_that_windows_can_see():
    from medrl.plugins.spars.painting import visit_count

    for shape, window, stride in (((23, 20, 17), (8, 8, 5), 4), ((16, 9, 12), (3, 9, 4), 2)):
        lattice = Lattice.of(shape, window, stride)
        seen = visit_count(shape, window, lattice.corner(lattice.tiles())) > 0
        assert torch.equal(seen, visit_count(shape, window, lattice.corners()) > 0)


def test_a_window_as_large_as_the_volume_has_one_node_and_no_move():
    lattice = Lattice.of((8, 8, 8), (8, 8, 8), 4, "corner_center")
    assert lattice.counts == (1, 1, 1)
    assert not lattice.legal(lattice.start_node()).any()


@pytest.mark.parametrize(
    ("window", "stride", "what"),
    [((9, 8, 8), 4, "does not fit"), ((4, 4, 4), 0, "stride"), ((4, 4), 4, "window")],
)
def test_impossible_windows_are_refused(window, stride, what):
    with pytest.raises(ConfigError, match=what):
        Lattice.of((8, 8, 8), window, stride)


def test_a_corner_off_the_lattice_is_refused():
    lattice = Lattice.of((16, 16, 16), (8, 8, 8), 4)
    with pytest.raises(ConfigError, match=r"\[1, 0, 0\]"):
        lattice.node(torch.tensor([[0, 0, 0], [1, 0, 0]]))
    assert moves().sum() == 0
