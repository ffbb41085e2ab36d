"""What visited windows paint on a volume."""

from __future__ import annotations

import pytest
import torch

from medrl.core.errors import ConfigError
from medrl.plugins.spars.boxsum import integral, lattice_means
from medrl.plugins.spars.lattice import Lattice
from medrl.plugins.spars.maps import as_original, score_map, segment_with
from medrl.plugins.spars.painting import paint, visit_count
from medrl.plugins.spars.play_config import MapConfig
from medrl.plugins.spars.policies import Episodes, RandomTiles, RandomWalk, Scan, run


@pytest.fixture
def walked(make_table):
    """A table and the visits of a random walk in its second volume."""
    table = make_table()
    visits = run(RandomWalk(), table, 1, Episodes(episodes=2, steps=3), torch.Generator().manual_seed(0))
    return table, visits


def test_windows_paint_their_own_scores_or_the_dense_map_inside_them(walked):
    table, visits = walked
    seen = visit_count((24, 24, 16), (8, 8, 8), visits.corners) > 0
    dense = score_map(table, 1, visits, MapConfig(paint="dense"))
    assert torch.equal(dense, torch.where(seen, table.scorer.dense(table.volumes[1]), 0.0))
    for kind in ("sum", "mean", "max"):
        coarse = score_map(table, 1, visits, MapConfig(paint="coarse", aggregate=kind))
        assert torch.equal(coarse, paint((24, 24, 16), (8, 8, 8), visits.corners, visits.scores).of(kind))


def test_nested_maps_paint_finer_windows_inside_visited_ones(walked):
    table, visits = walked
    cfg = MapConfig(paint="nested", fine=(4, 4, 4), fine_stride=(2, 2, 2), aggregate="mean")
    found = score_map(table, 1, visits, cfg)
    seen = visit_count((24, 24, 16), (8, 8, 8), visits.corners) > 0
    assert torch.equal(found > 0, seen)
    fine = Lattice.of((24, 24, 16), (4, 4, 4), 2)
    scores = lattice_means(integral(table.scorer.dense(table.volumes[1])), fine).flatten()
    whole = score_map(table, 1, run(Scan(), table, 1, Episodes(), torch.Generator()), cfg)
    assert torch.allclose(whole, paint(fine.shape, fine.window, fine.corners(), scores).of("mean"), atol=1e-5)


def test_a_dense_map_needs_a_dense_scorer(make_table, fakes):
    table = make_table(scorer=fakes.LazyScorer())
    visits = run(RandomTiles(), table, 0, Episodes(budget=3), torch.Generator().manual_seed(0))
    for paint_as in ("dense", "nested"):
        with pytest.raises(ConfigError, match="no dense form"):
            score_map(table, 0, visits, MapConfig(paint=paint_as))
    assert float(score_map(table, 0, visits, MapConfig(paint="coarse")).max()) == float(visits.scores.max())
    assert table.scored == 3


def test_masks_follow_the_config(walked):
    table, _ = walked
    found = score_map(table, 1, run(Scan(), table, 1, Episodes(), torch.Generator()), MapConfig())
    ball = table.volumes[1] > 0.5
    assert torch.equal(segment_with(found, 0.5, MapConfig(smallest=20)), ball)
    assert not segment_with(found, 0.5, MapConfig(smallest=100_000)).any()
    assert not segment_with(found, 0.5, MapConfig(floor=1.5)).any()
    assert not segment_with(found, 0.5, MapConfig(), organ=torch.zeros_like(ball)).any()


def test_the_painting_of_the_original_takes_the_other_score_and_loses_what_ended(make_table):
    table = make_table()
    visits = run(RandomWalk(), table, 0, Episodes(episodes=6, steps=3), torch.Generator().manual_seed(3))
    bug = as_original(visits, None)
    assert len(bug) == 18
    first, second = visits.agent == 0, visits.agent == 1
    assert torch.equal(bug.corners, visits.corners[first])
    assert torch.equal(bug.scores, visits.scores[second])
    tau = float(visits.scores.sort().values[-3])
    ended = set(visits.episode[visits.scores > tau].tolist())
    assert 0 < len(ended) < 6
    assert set(as_original(visits, tau).episode.tolist()) == set(range(6)) - ended
    with pytest.raises(ConfigError, match="two windows"):
        as_original(run(Scan(), table, 0, Episodes(), torch.Generator()), None)
