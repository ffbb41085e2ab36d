"""Correctors: denoiser, variational autoencoder, morphology, atlas, none."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.learned_reward import Corrector, build_corrector, corrupt_masks
from medrl.core.learned_reward.correctors import (
    CORRECTORS,
    AtlasCorrector,
    CorrectorModule,
    Denoiser,
    MaskVAE,
    MorphologyCorrector,
    attribute_loss,
    dice_per_image,
    gaussian_kl,
    mask_attributes,
    soft_dice,
)


def m0(shape=(64, 64)):
    mask = torch.zeros(1, *shape, dtype=torch.int64)
    mask[0, 10:50, 20:44] = 2
    mask[0, 16:50, 26:38] = 1
    return mask


def small(n=6, classes=3, shape=(32, 32)):
    mask = torch.zeros(n, *shape, dtype=torch.int64)
    for i in range(n):
        mask[i, 4 + i : 26, 6:26] = classes - 1
        mask[i, 8 + i : 26, 11:21] = 1
    return mask


def network(classes, dims=2):
    kind, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    torch.manual_seed(0)
    return nn.Sequential(
        kind(classes, 8, 3, padding=1),
        norm(8),
        nn.ReLU(),
        kind(8, 8, 5, padding=2),
        nn.ReLU(),
        kind(8, classes, 1),
    )


def build(kind, classes=3, shape=(32, 32)):
    params = {"blocks": 2, "channels": 4, "latent": 4} if kind == "vae" else {}
    return build_corrector(
        kind,
        classes=classes,
        network=network(classes),
        masks=small(classes=classes, shape=shape),
        shape=shape,
        **params,
    )


# -- all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CORRECTORS)
@pytest.mark.parametrize("shape", [(32, 32), (36, 27), (32, 32, 4)])
def test_every_corrector_maps_label_maps_to_label_maps_and_probabilities(kind, shape):
    masks = small(2, 4) if len(shape) == 2 else small(2, 4).unsqueeze(-1).expand(2, 32, 32, 4)
    masks = masks[:, : shape[0], : shape[1]]
    if shape[0] > 32:
        masks = torch.zeros(2, *shape, dtype=torch.int64)
        masks[:, 5:20, 5:20] = 3
    corrector = build(kind, classes=4)
    assert isinstance(corrector, Corrector)
    before = {name: value.clone() for name, value in corrector.state_dict().items()}
    corrector.train()
    corrected, probabilities = corrector.correct(masks), corrector.probabilities(masks)
    assert corrected.shape == masks.shape
    assert corrected.dtype == torch.int64
    assert probabilities.shape == (2, 4, *masks.shape[1:])
    assert torch.allclose(probabilities.sum(1), torch.ones(masks.shape), atol=1e-5)
    assert torch.equal(probabilities.argmax(1), corrected)
    assert corrector.training
    assert all(torch.equal(value, before[name]) for name, value in corrector.state_dict().items())
    assert torch.equal(corrector.correct(masks.to(torch.uint8), probabilities), corrected)


@pytest.mark.parametrize("kind", ["denoiser", "vae"])
@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 2)])
def test_a_learned_corrector_has_a_loss_that_seed_and_keys_decide(kind, shape):
    masks = small(4) if len(shape) == 2 else small(4).unsqueeze(-1).expand(4, *shape)
    corrector = build(kind)
    state = torch.get_rng_state()
    first = corrector.loss(masks, seed=1, keys=range(4))
    assert torch.equal(state, torch.get_rng_state())
    again = corrector.loss(masks, seed=1, keys=range(4))
    other = corrector.loss(masks, seed=1, keys=range(4, 8))
    assert float(first["loss"].detach()) == float(again["loss"].detach())
    assert float(first["loss"].detach()) != float(other["loss"].detach())
    first["loss"].backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in corrector.parameters())
    assert all(value.dim() == 0 for value in first.values())


@pytest.mark.parametrize("kind", CORRECTORS)
def test_a_state_dict_rebuilds_a_corrector(kind):
    masks = corrupt_masks(small(3), 3, seed=0, keys=range(3))
    trained = build(kind)
    fresh = build_corrector(
        kind,
        classes=3,
        network=network(3),
        **({"size": (32, 32), "blocks": 2, "channels": 4, "latent": 4} if kind == "vae" else {}),
    )
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.correct(masks), trained.correct(masks))


def test_a_misspelt_kind_or_setting_or_a_missing_part_is_one_line():
    with pytest.raises(ConfigError, match="did you mean 'denoiser'"):
        build_corrector("denoise", classes=3)
    with pytest.raises(ConfigError, match="did you mean 'latent'"):
        build_corrector("vae", classes=3, shape=(32, 32), latents=3)
    with pytest.raises(ConfigError, match="no network"):
        build_corrector("denoiser", classes=3)
    with pytest.raises(ConfigError, match="size of the label maps"):
        build_corrector("vae", classes=3)
    with pytest.raises(ConfigError, match="no source masks"):
        build_corrector("atlas", classes=3).correct(small(1))
    with pytest.raises(ConfigError, match="1 classes"):
        build_corrector("none", classes=1)


def test_settings_may_be_plain_values():
    made = build_corrector(
        "denoiser", classes=3, network=network(3), corruption={"salt": 0.0}, jitter={"rotation": [-5, 5]}
    )
    assert made.corruption.salt == 0.0
    assert made.jitter.rotation == (-5, 5)
    assert build_corrector("denoiser", classes=3, network=network(3), jitter=None).jitter is None


# -- morphology -------------------------------------------------------------------------------------


def test_morphology_leaves_a_good_mask_alone_and_repairs_each_defect():
    good = m0()
    fix = MorphologyCorrector(3)
    assert torch.equal(fix.correct(good), good)
    hole = good.clone()
    hole[0, 30, 32] = 0
    speck = good.clone()
    speck[0, 5, 5] = 1
    wrong = good.clone()
    wrong[0, 30, 32] = 2
    gap = good.clone()
    gap[0, 20:25, 26] = 0
    for broken in (hole, speck, wrong):
        assert torch.equal(fix.correct(broken), good)
    filled = good.clone()
    filled[0, 20:25, 26] = 2  # what lies between both is given the higher label
    assert torch.equal(fix.correct(gap), filled)


def test_morphology_keeps_the_largest_4_connected_blob_and_a_later_label_wins():
    mask = torch.tensor([[[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [2, 0, 0, 0]]])
    assert MorphologyCorrector(3).correct(mask)[0].tolist() == [
        [1, 1, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [2, 0, 0, 0],
    ]
    enclosed = torch.zeros(1, 7, 7, dtype=torch.int64)
    enclosed[0, 1:6, 1:6] = 2
    enclosed[0, 3, 3] = 1
    assert torch.equal(MorphologyCorrector(3).correct(enclosed), enclosed)


def test_morphology_treats_every_frame_by_itself_and_empty_masks_stay_empty():
    window = torch.stack((m0(), torch.zeros_like(m0())), dim=-1)
    window[0, 5, 5, 0] = 1
    fixed = MorphologyCorrector(3).correct(window)
    assert torch.equal(fixed[..., 0], m0())
    assert not fixed[..., 1].any()
    assert MorphologyCorrector(2).correct(torch.zeros(0, 4, 4)).shape == (0, 4, 4)


@given(classes=st.integers(2, 5), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_morphology_twice_is_morphology_once_for_two_classes_and_labels_stay_known(classes, seed):
    masks = torch.randint(0, classes, (2, 9, 11), generator=torch.Generator().manual_seed(seed))
    once = MorphologyCorrector(classes).correct(masks)
    assert set(once.unique().tolist()) <= set(range(classes))
    if classes == 2:
        assert torch.equal(MorphologyCorrector(classes).correct(once), once)


# -- atlas and Dice ---------------------------------------------------------------------------------


def test_the_atlas_gives_the_source_mask_with_the_best_dice():
    atlas = AtlasCorrector(3, small(6))
    broken = small(6)[3:4].clone()
    broken[0, 10:14, 10:14] = 0
    assert torch.equal(atlas.correct(broken), small(6)[3:4])
    large = small(6)[2:3].repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(atlas.correct(large), large)


def test_the_atlas_looks_windows_up_as_a_whole_if_it_holds_windows():
    frames = small(3)
    windows = torch.stack((frames, frames.flip(0)), dim=-1)
    atlas = AtlasCorrector(3, windows)
    assert torch.equal(atlas.correct(windows[1:2]), windows[1:2])
    assert torch.equal(AtlasCorrector(3, frames).correct(windows), windows)
    assert torch.equal(atlas.correct(frames[2:]), frames[2:])


def test_the_atlas_equals_a_search_by_dice():
    known = corrupt_masks(small(5), 3, seed=1, keys=range(5))
    asked = corrupt_masks(small(5), 3, seed=2, keys=range(5))
    found = AtlasCorrector(3, known).correct(asked)
    for i in range(5):
        scores = dice_per_image(asked[i : i + 1].expand(5, -1, -1), known, 3)
        assert torch.equal(found[i], known[int(scores.argmax())])


def test_dice_is_the_mean_over_classes_and_optionally_of_the_highest_present():
    a = torch.tensor([[[1, 1, 2, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]]])
    b = torch.tensor([[[1, 0, 2, 0]], [[0, 0, 0, 0]], [[2, 0, 0, 0]], [[1, 2, 0, 0]]])
    assert dice_per_image(a, b, 3).tolist() == pytest.approx([(2 / 3 + 1) / 2, 1.0, 0.0, 0.5])
    assert dice_per_image(a, b, 3, only_highest=True).tolist() == pytest.approx([1.0, 1.0, 0.0, 1.0])


# -- denoiser ---------------------------------------------------------------------------------------


def test_a_denoiser_learns_to_repair_corrupted_masks():
    clean = small(8)
    denoiser = Denoiser(network(3), 3, jitter=None)
    broken = corrupt_masks(clean, 3, seed=9, keys=range(8))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    for step in range(60):
        loss = denoiser.loss(clean, seed=0, keys=[(step, i) for i in range(8)])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before = dice_per_image(broken, clean, 3).mean()
    assert float(dice_per_image(denoiser.correct(broken), clean, 3).mean()) > float(before) + 0.01


def test_the_denoisers_batch_is_a_corrupted_mask_beside_the_moved_one():
    denoiser = Denoiser(network(3), 3)
    corrupted, moved = denoiser.batch(small(4), seed=0, keys=range(4))
    assert not torch.equal(moved, small(4))
    assert not torch.equal(corrupted, moved)
    assert torch.equal(corrupted, corrupt_masks(moved, 3, seed=0, keys=range(4)))
    assert torch.equal(
        Denoiser(network(3), 3, jitter=None).batch(small(4), seed=0, keys=range(4))[1], small(4)
    )


def test_a_volumetric_network_sees_windows_and_a_planar_one_frames():
    window = small(2).unsqueeze(-1).expand(2, 32, 32, 4)
    assert Denoiser(network(3, 3), 3)(window).shape == (2, 3, 32, 32, 4)
    planar = Denoiser(network(3), 3).eval()
    assert torch.allclose(planar(window)[..., 2], planar(small(2)), atol=1e-5)
    with pytest.raises(ConfigError, match=r"expected logits \(1, 3, 32, 32\)"):
        Denoiser(nn.Conv2d(3, 2, 1), 3)(small(1))


# -- variational autoencoder ------------------------------------------------------------------------


def test_the_defaults_of_the_autoencoder_are_the_originals():
    vae = MaskVAE(3, (256, 256))
    assert vae.bottom == (48, 8, 8)
    assert vae.mean.out_features == 16
    assert vae.weights == (0.1, 1.0, 1e-4, 0.0)
    convolutions = [m for m in vae.encoder.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [48, 48, 96, 96, 192, 192, 384, 384, 48]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in vae.modules()) == 18


def test_the_loss_of_the_autoencoder_is_the_weighted_sum_of_its_terms():
    vae = MaskVAE(3, (16, 16), blocks=1, channels=4, latent=6, attribute_weight=10.0)
    terms = vae.loss(small(4, shape=(32, 32)), seed=0, keys=range(4))
    expected = 0.1 * terms["ce"] + 1 - terms["dice"] + 1e-4 * terms["kl"] + 10 * terms["attribute"]
    assert float(terms["loss"].detach()) == pytest.approx(float(expected), rel=1e-6)
    assert not terms["ce"].requires_grad


def test_an_autoencoder_learns_to_reconstruct():
    torch.manual_seed(0)
    vae = MaskVAE(3, (16, 16), blocks=2, channels=8, latent=4, jitter=None)
    masks = small(6)
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-3)
    first = dice_per_image(vae.correct(masks), masks, 3).mean()
    for step in range(80):
        loss = vae.loss(masks, seed=0, keys=[(step, i) for i in range(6)])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = dice_per_image(vae.correct(masks), masks, 3).mean()
    assert float(first) < 0.5
    assert float(last) > 0.75


@pytest.mark.parametrize("size", [(20, 14), (16, 12, 4), (16, 16, 3)])
def test_an_autoencoder_of_any_size_gives_back_its_size(size):
    vae = MaskVAE(2, size, blocks=2, channels=3, latent=2)
    masks = torch.zeros(2, *size, dtype=torch.int64)
    assert vae(masks).shape == (2, 2, *size)
    if len(size) == 3:
        with pytest.raises(RuntimeFault, match="for a size"):
            vae.correct(masks[..., 0])


def test_the_training_size_is_a_multiple_of_the_strides_near_the_data():
    made = build_corrector("vae", classes=3, shape=(100, 70), blocks=3, channels=2)
    assert made.size == (96, 64)
    assert made.bottom == (2, 6, 4)
    assert made.correct(torch.zeros(1, 100, 70, dtype=torch.int64)).shape == (1, 100, 70)
    assert build_corrector("vae", classes=3, shape=(30, 30, 4), blocks=2, channels=2).size == (32, 32, 4)


def test_settings_of_the_autoencoder_without_sense_are_listed():
    with pytest.raises(ConfigError) as caught:
        MaskVAE(3, (16,), blocks=-1, channels=0)
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="latent is 3, expected at least 4"):
        MaskVAE(3, (16, 16), latent=3, attribute_weight=1.0)


def test_the_terms_of_the_autoencoder_by_hand():
    assert float(
        gaussian_kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, math.log(2.0)]]))
    ) == pytest.approx(0.5 + 0.5 * (2 - 1 - math.log(2)))
    labels = torch.tensor([[[0, 1], [1, 0]]])
    even = torch.full((1, 3, 2, 2), 1 / 3)
    assert float(soft_dice(even, labels)) == pytest.approx(2 * (2 / 3) / (4 / 3 + 2))
    assert float(soft_dice(even, torch.zeros_like(labels))) == 0.0
    codes = torch.tensor([[0.0, 5.0], [100.0, 5.0]])
    assert float(attribute_loss(codes, torch.tensor([[1.0], [2.0]]))) == pytest.approx(0.0)
    assert float(attribute_loss(codes, torch.tensor([[2.0], [1.0]]))) == pytest.approx(1.0)


def test_attributes_are_areas_and_the_centre_of_the_foreground():
    mask = torch.zeros(2, 5, 5, dtype=torch.int64)
    mask[0, 4, 0] = 2
    found = mask_attributes(mask, 3)
    assert found[0].tolist() == pytest.approx([0.0, 0.04, 1.0, -1.0])
    assert found[1].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert mask_attributes(torch.zeros(1, 4, 4, 2), 2).shape == (1, 4)


def test_the_base_takes_label_maps_of_two_or_three_axes():
    with pytest.raises(RuntimeFault, match=r"expected \(N, \*S\)"):
        MorphologyCorrector(3).correct(torch.zeros(4, 4))
    assert not CorrectorModule.learned
