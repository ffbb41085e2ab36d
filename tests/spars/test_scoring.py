"""Scorers: dense and window by window agree, digests follow weights, states come back."""

import pytest
import torch

from medrl.core.errors import CheckpointError, ConfigError
from medrl.plugins.spars.mil.gate import gate_level, gated
from medrl.plugins.spars.mil.maps import CellNetwork, ClusterMap
from medrl.plugins.spars.models import CompactNet, FaithfulNet
from medrl.plugins.spars.scoring import (
    CompactScorer,
    FaithfulScorer,
    FractionScorer,
    PresenceScorer,
    Scorer,
    build_scorer,
    window_maxima,
)


def volume(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def clusters():
    made = ClusterMap(2, 5)
    source = torch.Generator().manual_seed(1)
    made.centres.copy_(torch.randn(made.centres.shape, generator=source))
    made.z.copy_(3.0 * torch.randn(made.z.shape, generator=source))
    return made


def compact():
    torch.manual_seed(0)
    network = CompactNet()
    for norm in network.norms:
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 2.0)
    return CompactScorer(network).eval()


def scorers():
    torch.manual_seed(0)
    return [
        FractionScorer(CellNetwork(), clusters()),
        FractionScorer(CellNetwork((8,)), None, cell=(3, 2, 2), label_source="crop"),
        FractionScorer(CellNetwork(), CellNetwork((4,))),
        PresenceScorer(clusters()),
        compact(),
    ]


def corners_of(lattice, stride, offset=(0, 0, 0)):
    axes = [
        torch.arange(count) * step + first
        for count, step, first in zip(lattice.shape, stride, offset, strict=True)
    ]
    return torch.cartesian_prod(*axes)


@pytest.mark.parametrize("number", range(5))
def test_scorer_comes_back_from_settings_and_state(number):
    scorer = scorers()[number]
    assert isinstance(scorer, Scorer)
    again = build_scorer(scorer.settings(), scorer.state_dict())
    assert again.digest == scorer.digest
    assert again.settings() == scorer.settings()
    image, corners = volume(16, 16, 12), torch.tensor([[0, 0, 0], [4, 8, 4]])
    first, second = (item.eval().windows(image, corners, (8, 8, 8)) for item in (scorer, again))
    assert torch.equal(first, second)
    assert first.dtype == torch.float32
    assert ((first >= 0) & (first <= 1)).all()


def test_changed_weight_changes_the_digest():
    scorer = scorers()[0]
    before = scorer.digest
    with torch.no_grad():
        scorer.head.layers[0].weight[0, 0] += 1e-4
    assert scorer.digest != before


def test_changed_label_source_changes_the_digest():
    torch.manual_seed(0)
    head = CellNetwork()
    assert FractionScorer(head, None).digest != FractionScorer(head, None, label_source="crop").digest


@pytest.mark.parametrize("shape", [(16, 16, 12), (17, 15, 9)])
def test_dense_map_has_the_shape_of_the_volume(shape):
    for scorer in scorers()[:4]:
        found = scorer.dense(volume(*shape))
        assert found.shape == shape
        assert found.min() >= 0
        assert found.max() <= 1


def test_fraction_of_a_window_is_the_mean_of_its_voxels():
    scorer = scorers()[0]
    image = volume(16, 16, 12)
    p = scorer.dense(image)
    found = scorer.windows(image, torch.tensor([[3, 4, 5]]), (8, 8, 4))
    torch.testing.assert_close(found[0], p[3:11, 4:12, 5:9].mean(), atol=1e-6, rtol=0)


def test_presence_of_a_window_is_the_maximum_of_its_voxels():
    scorer = scorers()[3]
    image = volume(16, 16, 12)
    p = scorer.dense(image)
    assert scorer.windows(image, torch.tensor([[3, 4, 5]]), (8, 8, 4))[0] == p[3:11, 4:12, 5:9].max()


def test_maximum_of_every_window_is_that_of_its_box():
    image = volume(9, 8, 7)
    corners = torch.cartesian_prod(torch.arange(6), torch.arange(7), torch.arange(3))
    found = window_maxima(image, corners, (4, 2, 5))
    direct = [image[x : x + 4, y : y + 2, z : z + 5].max() for x, y, z in corners.tolist()]
    assert torch.equal(found, torch.stack(direct))


@pytest.mark.parametrize("stride", [(4, 4, 4), (8, 4, 4), (3, 5, 4)])
def test_compact_net_scores_all_windows_at_once_as_one_by_one(stride):
    scorer = compact()
    image = volume(30, 26, 21)
    found = scorer.lattice(image, (12, 12, 8), stride)
    alone = scorer.windows(image, corners_of(found, stride), (12, 12, 8))
    torch.testing.assert_close(alone, found.flatten(), atol=1e-6, rtol=0)
    assert alone.std() > 1e-4


def test_compact_net_scores_a_batch_as_single_windows():
    scorer = compact()
    image, corners = volume(32, 32, 24), torch.tensor([[8, 8, 8], [12, 8, 8], [0, 4, 16], [20, 20, 4]])
    together = scorer.windows(image, corners, (8, 8, 8))
    alone = torch.cat([scorer.windows(image, corner[None], (8, 8, 8)) for corner in corners])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_window_that_is_not_whole_cells_is_refused():
    with pytest.raises(ConfigError, match="not whole cells") as refused:
        compact().windows(volume(16, 16, 16), torch.zeros(1, 3, dtype=torch.int64), (6, 8, 8))
    assert "multiples of 4" in refused.value.do


def test_temperature_flattens_scores_of_networks():
    scorer = compact()
    image, corners = volume(24, 24, 16), torch.tensor([[0, 0, 0], [8, 8, 4]])
    sharp = scorer.windows(image, corners, (8, 8, 8))
    scorer.temperature.fill_(4.0)
    flat = scorer.windows(image, corners, (8, 8, 8))
    torch.testing.assert_close(torch.logit(flat) * 4.0, torch.logit(sharp), atol=1e-4, rtol=0)


def test_dense_map_of_a_network_of_windows_is_refused_with_advice():
    with pytest.raises(ConfigError, match="no map of voxels") as refused:
        compact().dense(volume(16, 16, 16))
    assert "map.paint=coarse" in refused.value.do


def test_faithful_scorer_enlarges_trilinearly():
    scorer = FaithfulScorer(FaithfulNet())
    crop = volume(1, 6, 5, 4)
    found = scorer.enlarged(crop)
    assert found.shape == (1, 1, 256, 256, 180)
    wanted = torch.nn.functional.interpolate(
        crop[None], size=(256, 256, 180), mode="trilinear", align_corners=False
    )
    assert torch.equal(found, wanted)


def test_state_of_another_scorer_is_refused():
    first, second = scorers()[0], scorers()[1]
    with pytest.raises(CheckpointError):
        build_scorer(first.settings(), second.state_dict())


def test_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="unknown"):
        build_scorer({"kind": "magic"})


def test_gate_keeps_what_is_present_and_empties_the_rest():
    fraction, presence = torch.zeros(16, 8, 8), torch.zeros(16, 8, 8)
    fraction[2:5, 2:5, 2:5] = 0.9
    fraction[11:14, 2:5, 2:5] = 0.8
    fraction[8, 7, 7] = 0.1
    presence[3, 3, 3], presence[12, 3, 3] = 0.7, 0.2
    found = gated(fraction, presence, 0.5)
    assert torch.equal(found[:7], fraction[:7])
    assert found[7:].max() == 0
    assert gated(fraction, presence, 0.8).max() == 0


@pytest.mark.parametrize(("peaks", "level"), [([], 0.15), ([0.05, 0.01], 0.15), ([0.3], 0.32), ([0.9], 0.6)])
def test_gate_lies_above_free_volumes_within_limits(peaks, level):
    assert gate_level(peaks) == pytest.approx(level)


def test_calibrated_probability_of_an_image_rises_with_its_score():
    scorer = scorers()[0]
    scorer.image_midpoint.fill_(0.2)
    scorer.image_temperature.fill_(0.1)
    images = [volume(12, 12, 8, seed=seed) for seed in range(4)]
    ordered = sorted(images, key=scorer.image_score)
    chances = [scorer.image_probability(image) for image in ordered]
    assert chances == sorted(chances)
    assert chances[0] < chances[-1]
