"""Scores that are looked up."""

from __future__ import annotations

import pytest
import torch

from medrl.core.cache import Cache
from medrl.core.errors import ConfigError, RuntimeFault


def asked(table, count, seed=0):
    """Random volumes and nodes."""
    generator = torch.Generator().manual_seed(seed)
    case = torch.randint(len(table), (count,), generator=generator)
    node = (torch.rand(count, 3, generator=generator) * table.lattices.counts[case]).long()
    return case, node


def test_scores_are_those_of_the_scorer_in_any_order_and_batch(make_table, fakes):
    volumes = fakes.blobs(3, sizes=[(24, 24, 16), (16, 20, 12), (13, 12, 17)])
    table = make_table(scorer=fakes.LazyScorer(), volumes=volumes, batch=7)
    case, node = asked(table, 60)
    corners = table.lattices.corner(case, node)
    found = table.scores(case, corners)
    single = torch.stack(
        [
            table.scorer.windows(volumes[c], corner[None], (8, 8, 8))[0]
            for c, corner in zip(case, corners, strict=True)
        ]
    )
    assert torch.allclose(found, single, atol=1e-5)
    assert torch.equal(table.scores(case, corners), found)


def test_windows_asked_for_several_times_are_scored_once_and_together(make_table, fakes):
    scorer = fakes.LazyScorer()
    table = make_table(scorer=scorer, batch=64)
    case, node = asked(table, 8)
    different = len({(int(c), *n) for c, n in zip(case, node.tolist(), strict=True)})
    table.at(case.repeat(5), node.repeat(5, 1))
    assert scorer.sizes == [different]
    assert table.scored == different
    table.at(case, node)
    assert scorer.sizes == [different]


def test_a_scorer_that_sees_more_than_windows_is_given_whole_volumes(make_table, fakes):
    class Wide(fakes.LazyScorer):
        local = False

        def windows(self, volume, corners, window):
            assert volume.shape == (24, 24, 16)
            return super().windows(volume, corners, window)

    table, other = make_table(scorer=Wide(), batch=7), make_table(scorer=fakes.LazyScorer())
    case, node = asked(table, 60)
    assert torch.allclose(table.at(case, node), other.at(case, node), atol=1e-6)
    assert max(table.scorer.sizes) == 7
    assert table.scored == other.scored


def test_a_network_with_a_dense_pass_fills_a_volume_at_once(make_table, fakes):
    class Passing(fakes.LazyScorer):
        def lattice(self, volume, window, stride, offset):
            assert (window, stride, offset) == ((8, 8, 8), (4, 4, 4), (0, 0, 0))
            corners = fakes.Lattice.of(volume.shape, window, stride).corners()
            return self.windows(volume, corners, window).view(5, 5, 3)

    table = make_table(scorer=Passing())
    assert table.fills
    table.at(torch.tensor([1]), torch.tensor([[1, 2, 1]]))
    assert (table.scored, table.scorer.calls) == (75, 1)
    assert torch.equal(table.full(1), make_table(scorer=fakes.LazyScorer(), batch=100).full(1))
    assert not make_table(scorer=fakes.LazyScorer()).fills


def test_a_dense_scorer_fills_a_volume_at_once(make_table):
    table = make_table()
    case, node = torch.tensor([1, 1, 1]), torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0]])
    found = table.at(case, node)
    assert table.scorer.calls == 1
    assert table.scored == table.lattices[1].size
    full = table.full(1)
    assert table.scorer.calls == 1
    assert torch.equal(full[0, 0, 0], found[0])
    volume = table.volumes[1]
    assert float(full[1, 2, 1]) == pytest.approx(float(volume[4:12, 8:16, 4:12].mean()), abs=1e-6)


def test_cached_scores_are_the_same_bit_for_bit_and_are_not_scored_again(make_table, fakes, tmp_path):
    plain = make_table(scorer=fakes.LazyScorer())
    case, node = asked(plain, 40)
    expected = plain.at(case, node)
    first = make_table(scorer=fakes.LazyScorer(), cache=Cache(tmp_path))
    assert torch.equal(first.at(case, node), expected)
    first.flush()
    again = make_table(scorer=fakes.LazyScorer(), cache=Cache(tmp_path))
    assert torch.equal(again.at(case, node), expected)
    assert (again.scored, again.scorer.calls) == (0, 0)
    # What another process scored meanwhile is kept.
    other_case, other_node = asked(plain, 40, seed=1)
    first.at(other_case, other_node)
    again.full(0)
    again.flush()
    first.flush()
    third = make_table(scorer=fakes.LazyScorer(), cache=Cache(tmp_path))
    third.at(other_case, other_node)
    third.full(0)
    assert third.scorer.calls == 0


def test_dense_tables_are_kept_without_being_asked(make_table, tmp_path):
    expected = make_table(cache=Cache(tmp_path)).full(2)
    table = make_table(cache=Cache(tmp_path))
    assert torch.equal(table.full(2), expected)
    assert table.scorer.calls == 0


def test_other_weights_volumes_windows_strides_and_interpolations_are_other_tables(make_table, fakes):
    settings = [
        {},
        {"scorer": fakes.DenseScorer(0.5)},
        {"volumes": [volume + 0.01 for volume in fakes.blobs(3)]},
        {"window": (8, 8, 4)},
        {"stride": 2},
        {"interpolation": "trilinear"},
        {"scales": (1.0, 2.0)},
        {"start": "corner_center", "stride": 5},
    ]
    keys = [make_table(**item).key(0) for item in settings]
    assert len(set(keys)) == len(keys)
    assert make_table().key(0) == keys[0]
    assert make_table().digest == make_table().digest != make_table(stride=2).digest


def test_changed_weights_do_not_read_the_old_table(make_table, fakes, tmp_path):
    old = make_table(cache=Cache(tmp_path)).full(0)
    new = make_table(cache=Cache(tmp_path), scorer=fakes.DenseScorer(0.5)).full(0)
    assert torch.allclose(new, old / 2, atol=0.03)
    assert not torch.equal(new, old)


def test_several_scales_average_windows_about_the_same_centre(make_table, fakes):
    table = make_table(scales=(0.5, 1.0))
    one, half = table.scaled(0, (1.0,)), table.scaled(0, (0.5,))
    assert torch.allclose(table.full(0), (one + half) / 2, atol=1e-6)
    volume = table.volumes[0].clamp(0, 1)
    assert float(half[1, 1, 1]) == pytest.approx(float(volume[6:10, 6:10, 6:10].mean()), abs=1e-6)
    with pytest.raises(ConfigError, match="no dense form"):
        make_table(scorer=fakes.LazyScorer(), scales=(1.0, 2.0))
    with pytest.raises(ConfigError, match="no dense form"):
        make_table(scorer=fakes.LazyScorer()).scaled(0, (2.0,))
    assert make_table(scorer=fakes.LazyScorer()).dense(0) is None


def test_scores_that_are_not_finite_are_refused_with_the_name_of_the_volume(make_table, fakes):
    table = make_table(scorer=fakes.LazyScorer(float("nan")), ids=["a", "b", "c"])
    with pytest.raises(RuntimeFault, match="scores of b"):
        table.full(1)
    with pytest.raises(ConfigError, match="2 names"):
        make_table(ids=["a", "b"])
