"""Maps of visits."""

from __future__ import annotations

import pytest
import torch

from medrl.core.errors import ConfigError
from medrl.plugins.spars import painting
from medrl.plugins.spars.aggregate import dice, segment
from medrl.plugins.spars.lattice import Lattice
from medrl.plugins.spars.painting import nested, paint, visit_count

VISITS = torch.tensor([[4, 4, 4], [4, 4, 4], [8, 4, 4], [6, 4, 4]])
SCORES = torch.tensor([0.2, 0.7, 0.4, 0.5])


def direct(shape, window, corners, values):
    """Paint voxel by voxel."""
    total, count, most = torch.zeros(shape), torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    for (x, y, z), value in zip(corners.tolist(), values.tolist(), strict=True):
        part = (slice(x, x + window[0]), slice(y, y + window[1]), slice(z, z + window[2]))
        total[part] += value
        count[part] += 1
        most[part] = most[part].clamp(min=value)
    return total, count, most


@pytest.mark.parametrize(
    ("kind", "expected", "voxels", "overlap"),
    [
        ("sum", [0.9, 1.4, 0.9, 0.4], 96, 0.8),
        ("mean", [0.45, 0.4666667, 0.45, 0.4], 128, 2 / 3),
        ("max", [0.7, 0.7, 0.5, 0.4], 128, 2 / 3),
    ],
)
def test_sum_mean_and_maximum_of_four_visits(kind, expected, voxels, overlap):
    found = paint((12, 12, 12), (4, 4, 4), VISITS, SCORES).of(kind)
    line = found[4:12, 4, 4]
    assert torch.allclose(line[::2], torch.tensor(expected), atol=1e-6)
    assert torch.equal(line[::2], line[1::2])
    mask = segment(found, threshold=0.5)
    truth = torch.zeros(12, 12, 12, dtype=torch.bool)
    truth[4:8, 4:8, 4:8] = True
    assert int(mask.sum()) == voxels
    assert dice(mask, truth) == pytest.approx(overlap, abs=1e-9)


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("window", [(5, 4, 3), (1, 1, 1), (20, 3, 16), (7, 18, 9)])
def test_painting_by_differences_equals_direct_painting(window, few, monkeypatch):
    monkeypatch.setattr(painting, "_FEW", few)
    shape = (20, 18, 16)
    generator = torch.Generator().manual_seed(1)
    room = torch.tensor(shape) - torch.tensor(window) + 1
    corners = (torch.rand(500, 3, generator=generator) * room).long()
    values = torch.rand(500, generator=generator)
    found = paint(shape, window, corners, values)
    total, count, most = direct(shape, window, corners, values)
    assert torch.allclose(found.sum, total, atol=1e-4)
    assert torch.equal(found.count, count)
    assert torch.equal(found.maximum, most)
    assert not found.sum[count == 0].any()


def test_no_visit_paints_nothing():
    found = paint((6, 6, 6), (2, 2, 2), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0))
    for kind in ("sum", "mean", "max"):
        assert not found.of(kind).any()


def test_finer_windows_are_painted_where_they_lie_inside_visited_ones():
    shape = (16, 12, 12)
    coarse, fine = Lattice.of(shape, (8, 8, 8), 4), Lattice.of(shape, (4, 4, 4), 2)
    scores = torch.rand(fine.counts, generator=torch.Generator().manual_seed(2))
    visits = torch.tensor([[0, 0, 0], [8, 4, 4], [0, 0, 0]])
    inside = torch.zeros(fine.size, dtype=torch.bool)
    for number, corner in enumerate(fine.corners()):
        inside[number] = any(bool(((corner >= visit) & (corner + 4 <= visit + 8)).all()) for visit in visits)
    corners = fine.corners()[inside]
    total, count, most = direct(shape, (4, 4, 4), corners, scores.flatten()[inside])
    found = nested(coarse, visits, fine, scores, "mean")
    assert torch.allclose(found, total / count.clamp(min=1), atol=1e-5)
    assert torch.equal(nested(coarse, visits, fine, scores, "max"), most)
    assert torch.equal(found > 0, visit_count(shape, (8, 8, 8), visits) > 0)
    with pytest.raises(ConfigError, match="does not fit"):
        nested(fine, visits, coarse, torch.zeros(coarse.counts))


def test_a_window_outside_the_volume_is_refused():
    with pytest.raises(ConfigError, match="not inside"):
        paint((8, 8, 8), (4, 4, 4), torch.tensor([[5, 0, 0]]), torch.ones(1))
    with pytest.raises(ConfigError, match="unknown"):
        paint((8, 8, 8), (4, 4, 4), torch.tensor([[4, 0, 0]]), torch.ones(1)).of("median")
