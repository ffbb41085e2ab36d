"""Learning from labels of images: features, clusters, top-k, pseudo-masks, fractions, windows."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from medrl.core.errors import DataError
from medrl.core.metrics import auroc
from medrl.plugins.spars.data_config import ClusterConfig, HeadConfig, PseudoConfig, TopkConfig
from medrl.plugins.spars.mil import features as of_cells
from medrl.plugins.spars.mil.bank import FeatureBank
from medrl.plugins.spars.mil.clusters import k_means, learn_clusters, selection
from medrl.plugins.spars.mil.features import cell_features, gaussian, largest, to_voxels
from medrl.plugins.spars.mil.fraction import Rows, collect, draw, fraction_loss, one_cycle, optimiser
from medrl.plugins.spars.mil.maps import CellNetwork, assign, map_of
from medrl.plugins.spars.mil.pseudo import pseudo_mask
from medrl.plugins.spars.mil.topk import annealed, bag_logits, learn_topk
from medrl.plugins.spars.mil.windows import annealed_top, bag_logit, cut, dilated, draw_bag, draw_crops
from medrl.plugins.spars.scoring import top_mean


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def volumes(count=16, shape=(24, 24, 16), seed=0):
    """Dark noise with a bright ball everywhere, in every other volume with a dim ball inside a grey box."""
    found, masks = [], []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        axes = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")
        image = 0.2 + 0.03 * rng.standard_normal(shape)
        box = np.zeros(shape, dtype=bool)
        box[2:14, 4:20, 2:14] = True
        image[box] += 0.4
        mask = np.zeros(shape, dtype=bool)
        if number % 2:
            centre = (rng.integers(6, 10), rng.integers(8, 16), rng.integers(6, 10))
            mask = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) <= 9
            image[mask] -= 0.25
        # What looks alike outside the box is in every volume.
        far = sum((a - c) ** 2 for a, c in zip(axes, (19, 12, 8), strict=True)) <= 9
        image[far] = 0.35 + 0.03 * rng.standard_normal(int(far.sum()))
        found.append(torch.from_numpy(image).float())
        masks.append(torch.from_numpy(mask))
    return found, masks


@pytest.fixture(scope="module")
def scene():
    images, masks = volumes()
    return FeatureBank(images), [int(mask.any()) for mask in masks], masks


SETTINGS = ClusterConfig(cells=400, clusters=64, iterations=4, runs=2)


def test_a_cell_has_thirteen_features_and_no_place():
    assert of_cells.COUNT == len(of_cells.NAMES) == 13
    image = torch.rand(24, 24, 16, generator=source())
    moved = torch.roll(image, (4, -2, 2), (0, 1, 2))
    inner = cell_features(image)[:, 5:7, 5:7, 4]
    torch.testing.assert_close(cell_features(moved)[:1, 7:9, 4:6, 5], inner[:1], atol=1e-6, rtol=0)
    assert cell_features(image).shape == (13, 12, 12, 8)


def test_features_of_a_flat_volume_are_flat():
    found = cell_features(torch.full((11, 9, 7), 0.4))
    names = dict(zip(of_cells.NAMES, found, strict=True))
    for name, values in names.items():
        wanted = 0.0 if name.startswith("sd") else 0.4
        torch.testing.assert_close(values, torch.full((6, 5, 4), wanted), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0])
def test_gaussian_is_that_of_scipy(sigma):
    image = torch.rand(20, 18, 16, generator=source())
    wanted = ndimage.gaussian_filter(image.numpy().astype(float), sigma, mode="nearest", truncate=4.0)
    radius = max(1, math.ceil(4 * sigma))
    wanted = ndimage.gaussian_filter(image.numpy().astype(float), sigma, mode="nearest", radius=radius)
    np.testing.assert_allclose(gaussian(image, sigma).numpy(), wanted, atol=1e-5)


def test_largest_is_that_of_scipy():
    image = torch.rand(12, 10, 9, generator=source())
    wanted = ndimage.maximum_filter(image.numpy(), 5, mode="constant", cval=-np.inf)
    assert np.array_equal(largest(image, 5).numpy(), wanted)


def test_maps_of_cells_come_back_to_voxels():
    cells = torch.rand(6, 5, 4, generator=source())
    found = to_voxels(cells, (11, 10, 7), (2, 2, 2))
    assert found.shape == (11, 10, 7)
    assert found.min() >= cells.min()
    assert found.max() <= cells.max()


def test_bank_keeps_features_up_to_its_limit():
    images, _ = volumes(2)
    without, kept = FeatureBank(images, limit=0), FeatureBank(images)
    assert without.features(0) is not without.features(0)
    assert kept.features(0) is kept.features(0)
    assert torch.equal(kept.features(1), without.features(1))
    assert torch.equal(kept.draw(0, 50, 7, "a"), without.draw(0, 50, 7, "a"))
    assert not torch.equal(kept.draw(0, 50, 7, "a"), kept.draw(0, 50, 7, "b"))


def test_clusters_of_positive_volumes_alone_are_selected():
    found = selection(torch.tensor([48.0, 32.0, 0.0]), torch.tensor([0.0, 32.0, 64.0]), 64, 64)
    torch.testing.assert_close(found, torch.tensor([48 / 7, 0.0, -64 / 65**0.5]))
    # Counts are scaled, so that few volumes of a class weigh as much as many.
    few = selection(torch.tensor([12.0]), torch.tensor([0.0]), 16, 64)
    torch.testing.assert_close(few, found[:1])


def test_k_means_gives_a_rare_kind_a_cluster_of_its_own():
    rows = torch.cat([0.1 * torch.randn(500, 3, generator=source()), torch.full((3, 3), 4.0)])
    centres = k_means(rows, 4, iterations=5, generator=source(1))
    alone = assign(rows, centres)
    assert (alone[500:] == alone[500]).all()
    assert (alone[:500] != alone[500]).all()


def test_assignment_is_the_nearest_centre():
    rows, centres = torch.randn(40, 5, generator=source()), torch.randn(7, 5, generator=source(1))
    assert torch.equal(assign(rows, centres), torch.cdist(rows, centres).argmin(dim=1))


def test_labels_of_images_point_at_the_object(scene):
    bank, labels, masks = scene
    found = learn_clusters(bank, labels, SETTINGS, seed=0)
    scores = [top_mean(map_of(found, bank.features(k))) for k in range(len(bank))]
    assert auroc(scores, [bool(label) for label in labels]) >= 0.95
    inside = []
    for k, mask in enumerate(masks):
        if labels[k]:
            chance = to_voxels(map_of(found, bank.features(k)), mask.shape, bank.cell)
            near = ndimage.binary_dilation(mask.numpy(), iterations=3)
            inside.append(bool(near[np.unravel_index(int(chance.argmax()), mask.shape)]))
    assert np.mean(inside) >= 0.75


def test_same_seed_gives_the_same_clusters(scene):
    bank, labels, _ = scene
    first, second = (learn_clusters(bank, labels, SETTINGS, seed=3) for _ in range(2))
    assert torch.equal(first.z, second.z)
    assert torch.equal(first.centres, second.centres)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_of_images_is_refused(scene, label):
    bank, labels, _ = scene
    with pytest.raises(DataError, match="no (positive|negative) training volume"):
        learn_clusters(bank, [label] * len(labels), SETTINGS, seed=0)
    with pytest.raises(DataError, match="alike"):
        learn_topk(bank, [label] * len(labels), TopkConfig(starts=1, steps=2), seed=0)


def test_more_clusters_than_cells_are_refused(scene):
    bank, labels, _ = scene
    with pytest.raises(DataError, match="clusters"):
        learn_clusters(bank, labels, ClusterConfig(cells=1, clusters=300, runs=1), seed=0)


def test_k_falls_from_many_cells_to_few():
    found = [
        annealed(step, 100, first=1200, last=32, cells=24576, whole=24576) for step in (1, 20, 50, 75, 100)
    ]
    assert found[0] == 1200
    assert found[-2:] == [32, 32]
    assert found == sorted(found, reverse=True)
    assert annealed(1, 10, first=1200, last=32, cells=500, whole=1000) == round(1200 * 500 / 24576)


def test_logit_of_a_bag_is_the_mean_of_its_highest():
    network = CellNetwork((4,))
    rows = torch.randn(30, 13, generator=source())
    wanted = network.logits(rows).topk(5).values.mean()
    torch.testing.assert_close(bag_logits(network, [rows, rows[:3]], 5)[0], wanted)
    assert bag_logit(torch.tensor([[1.0, 5.0, 3.0, -2.0]]), 2).item() == 4.0


def test_start_with_the_least_bag_loss_is_kept(scene):
    bank, labels, _ = scene
    network, losses = learn_topk(
        bank, labels, TopkConfig(starts=2, steps=250, first=4000, last=400, lr=1e-2), seed=0, widths=(16,)
    )
    scores = [top_mean(map_of(network, bank.features(k))) for k in range(len(bank))]
    assert len(losses) == 2
    assert min(losses) < 0.4
    assert auroc(scores, [bool(label) for label in labels]) >= 0.95


def test_top_k_leaves_global_streams_alone(scene):
    bank, labels, _ = scene
    before = torch.get_rng_state()
    learn_topk(bank, labels, TopkConfig(starts=1, steps=2), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def blob():
    """A dark ball in bright tissue, and a map that points at its middle."""
    axes = np.meshgrid(*(np.arange(24),) * 3, indexing="ij")
    far = np.sqrt(sum((a - 12.0) ** 2 for a in axes))
    mask = far <= 5
    image = np.full(mask.shape, 0.7)
    image[mask] = 0.55
    image = image + 0.02 * np.random.default_rng(0).standard_normal(image.shape)
    chance = np.exp(-((far / 4.0) ** 2))
    return torch.from_numpy(image), torch.from_numpy(mask), torch.from_numpy(chance)


def dice(a, b):
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_pseudo_mask_is_cut_out_where_the_map_points():
    image, mask, chance = blob()
    assert dice(pseudo_mask(image, chance, PseudoConfig()), mask) >= 0.9
    assert dice(pseudo_mask(image, chance, PseudoConfig(otsu=False)), mask) < 0.75


def test_map_without_a_seed_gives_no_pseudo_mask():
    image, _, chance = blob()
    assert not pseudo_mask(image, 0.4 * chance, PseudoConfig()).any()


def test_small_pseudo_masks_are_dropped():
    image, _, chance = blob()
    assert not pseudo_mask(image, chance, PseudoConfig(smallest=5000)).any()


def test_fractions_of_cells_are_learned(scene):
    bank, _, masks = scene
    rows = collect(bank, [mask if mask.any() else None for mask in masks], seed=0)
    assert rows.features.shape == (16 * 12 * 12 * 8, 13)
    assert rows.fraction.sum() * 8 == sum(int(mask.sum()) for mask in masks)
    torch.manual_seed(0)
    head = CellNetwork((16,))
    head.learn_scale(rows.features)
    config = HeadConfig(steps=300, batch=4096)
    adam = optimiser(head, config)
    for step in range(1, config.steps + 1):
        adam.param_groups[0]["lr"] = one_cycle(step, config.steps, highest=config.lr)
        loss = fraction_loss(head, draw(rows, config.batch, seed=0, step=step), weight=config.weight)
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        found = head(rows.features)
    full, empty = found[rows.fraction > 0.9].mean(), found[rows.fraction == 0].mean()
    assert full > 0.8
    assert empty < 0.1
    assert found[(rows.fraction > 0.3) & (rows.fraction < 0.7)].mean() < full


def test_full_cell_weighs_twenty_one_times_an_empty_one():
    head = CellNetwork((4,))
    rows = torch.zeros(2, 13)
    chance = torch.sigmoid(head.logits(rows))[0].double()
    found = fraction_loss(head, Rows(rows, torch.tensor([0.0, 1.0])), weight=20.0)
    wanted = (-torch.log(1 - chance) - 21 * torch.log(chance)) / 2
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_some_cells_of_a_large_volume_are_learned_from(scene):
    bank, _, masks = scene
    rows = collect(bank, masks[:2], seed=0, cells=100)
    touched = int((of_cells.cell_means(masks[1].float(), bank.cell) > 0).sum())
    assert int((rows.fraction > 0).sum()) == touched
    assert 200 <= len(rows) <= 200 + touched


def test_two_ranks_draw_together_what_one_draws(scene):
    bank, _, masks = scene
    rows = collect(bank, masks[:2], seed=0)
    parts = [draw(rows, 8, seed=1, step=4, rank=rank, world_size=2).features for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), draw(rows, 16, seed=1, step=4).features)


def test_one_cycle_is_that_of_torch():
    adam = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=0.01, total_steps=90, cycle_momentum=False)
    for step in range(1, 91):
        assert one_cycle(step, 90, highest=0.01) == pytest.approx(cycle.get_last_lr()[0], rel=1e-6)
        if step < 90:
            adam.step()
            cycle.step()


def test_crop_with_one_voxel_of_the_object_is_positive():
    mask = torch.zeros(16, 16, 12, dtype=torch.bool)
    mask[5, 6, 7] = True
    found = draw_crops(mask, (4, 4, 4), 10, source())
    assert found.labels[:5].tolist() == [1.0] * 5
    for corner, label in zip(found.corners, found.labels, strict=True):
        assert bool(cut(mask, corner[None], (4, 4, 4)).any()) == bool(label)


def test_crops_stay_inside_and_are_half_positive():
    mask = torch.zeros(16, 16, 12, dtype=torch.bool)
    mask[13:, 13:, 9:] = True
    found = draw_crops(mask, (8, 8, 8), 10, source())
    assert (found.corners <= torch.tensor([8, 8, 4])).all()
    assert found.labels[:5].sum() == 5
    assert draw_crops(torch.zeros_like(mask), (8, 8, 8), 10, source()).labels.sum() == 0
    assert draw_crops(torch.ones_like(mask), (8, 8, 8), 4, source()).labels.sum() == 4


def test_crop_larger_than_its_volume_is_the_volume():
    found = draw_crops(torch.ones(16, 8, 8, dtype=torch.bool), (8, 96, 64), 2, source())
    assert found.size == (8, 8, 8)


def test_mask_is_dilated_by_six_neighbours():
    mask = torch.zeros(5, 5, 5, dtype=torch.bool)
    mask[2, 2, 2] = True
    assert dilated(mask).sum() == 7


def test_bag_lies_on_the_lattice_and_has_the_label_of_its_image():
    found = draw_bag((20, 24, 16), 1, (8, 8, 4), 200, source())
    assert (found.corners % 4 == 0).all()
    assert (found.corners <= torch.tensor([12, 16, 12])).all()
    assert found.corners.amax(dim=0).tolist() == [12, 16, 12]
    assert found.labels.tolist() == [1.0] * 200


def test_windows_of_a_bag_become_fewer():
    found = [annealed_top(step, 100, windows=16, top=2) for step in (1, 25, 51, 100)]
    assert found[0] == 16
    assert found[2:] == [2, 2]
    assert 2 < found[1] < 16


def test_cut_with_a_margin_has_zeros_outside():
    image = torch.rand(6, 6, 6, generator=source()) + 1.0
    found = cut(image, torch.tensor([[0, 2, 4]]), (2, 2, 2), margin=3)
    assert found.shape == (1, 8, 8, 8)
    assert (found[0, :3] == 0).all()
    assert torch.equal(found[0, 3:5, 3:5, 3:5], image[0:2, 2:4, 4:6])
