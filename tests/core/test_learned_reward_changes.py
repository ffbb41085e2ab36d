"""Style of images, corruption of label maps, sampling: what is drawn, and what it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.learned_reward import (
    AffineRanges,
    CorruptionRanges,
    StyleRanges,
    StyleShift,
    corrupt_mask,
    corrupt_masks,
    from_params,
    jitter_images,
    jitter_masks,
    match_histogram,
    sample_actions,
    swap_amplitude,
)
from medrl.core.learned_reward.corruption import FAMILIES
from medrl.core.learned_reward.fields import correlated, smooth, smooth_field
from medrl.core.learned_reward.pairs import SyntheticRecipe


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def heart(shape=(32, 28), classes=3, n=4):
    """A block of the highest label with a block of label 1 in it."""
    mask = torch.zeros(n, *shape, dtype=torch.uint8)
    mask[:, 6:-6, 6:-6] = classes - 1
    mask[:, 10:-8, 10:-10] = 1
    return mask


def global_state():
    return torch.get_rng_state().clone(), np.random.get_state(legacy=True)[1].copy()


def same_state(a, b):
    return torch.equal(a[0], b[0]) and np.array_equal(a[1], b[1])


# -- style ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 32, 20), (2, 16, 16), (1, 12, 10, 5)])
def test_styles_keep_shape_range_and_input(shape):
    images, targets = random(6, *shape), random(3, *shape, seed=1)
    before = images.clone()
    styled = StyleShift(seed=1)(images, list("abcdef"), targets)
    assert styled.shape == images.shape
    assert styled.dtype == torch.float32
    assert float(styled.min()) >= 0.0
    assert float(styled.max()) <= 1.0
    assert torch.equal(images, before)
    assert float((styled - images).abs().mean()) > 0.02


def test_the_same_seed_and_key_give_the_same_style_whatever_the_batch_and_the_global_streams():
    images, targets = random(5, 1, 20, 16), random(3, 1, 20, 16, seed=1)
    state = global_state()
    together = StyleShift(seed=4)(images, range(5), targets)
    assert same_state(state, global_state())
    torch.manual_seed(99)
    assert torch.equal(StyleShift(seed=4)(images, range(5), targets), together)
    alone = StyleShift(seed=4)(images[3:4], [3], targets)
    assert torch.allclose(alone, together[3:4], atol=1e-5)
    assert not torch.allclose(StyleShift(seed=5)(images, range(5), targets), together, atol=1e-2)


def test_all_frames_get_the_same_style_and_only_noise_differs():
    frame = random(2, 1, 16, 16, 1)
    window = frame.expand(2, 1, 16, 16, 4)
    quiet = StyleShift(StyleRanges(noise=None), seed=0)(window, "ab", random(3, 1, 16, 16, 4, seed=2))
    assert torch.allclose(quiet, quiet[..., :1].expand_as(quiet), atol=1e-6)
    noisy = StyleShift(StyleRanges(noise=(0.1, 0.1), borrow=0.0), seed=0)(window, "ab")
    assert float((noisy[..., 0] - noisy[..., 1]).abs().max()) > 0.05


@pytest.mark.parametrize("family", ["gamma", "contrast", "bias", "shadow", "blur", "noise"])
def test_each_family_can_be_used_alone_and_the_others_do_nothing(family):
    images = random(8, 1, 24, 24)
    none = StyleRanges().only()
    assert torch.equal(StyleShift(none)(images, range(8), random(2, 1, 24, 24)), images)
    alone = StyleShift(StyleRanges().only(family))(images, range(8))
    assert float((alone - images).abs().amax((1, 2, 3)).max()) > 0.02


def test_strength_zero_leaves_images_alone_and_strength_one_is_the_same_ranges():
    images = random(4, 1, 16, 16)
    still = StyleShift(StyleRanges().scaled(0.0))(images, range(4))
    assert torch.allclose(still, images, atol=1e-6)
    ranges = StyleRanges().scaled(1.0)
    assert ranges.gamma == pytest.approx(StyleRanges().gamma)
    assert ranges.contrast == pytest.approx(StyleRanges().contrast)
    assert ranges == StyleRanges(gamma=ranges.gamma, contrast=ranges.contrast)


def test_half_of_the_samples_borrow_from_a_target_and_none_without_targets():
    drawn = StyleShift(seed=0).draw(range(400), 7)
    assert (drawn.target >= 0).mean() == pytest.approx(0.5, abs=0.07)
    assert set(drawn.target) == {-1, *range(7)}
    assert drawn.by_histogram.mean() == pytest.approx(0.5, abs=0.07)
    assert set(StyleShift(seed=0).draw(range(50), 0).target) == {-1}


def test_leaving_a_family_out_does_not_change_what_the_others_draw():
    full, less = StyleShift(StyleRanges(), seed=2), StyleShift(StyleRanges(shadow=None, blur=None), seed=2)
    a, b = full.draw("abc", 5), less.draw("abc", 5)
    assert np.array_equal(a.gamma, b.gamma)
    assert np.array_equal(a.target, b.target)
    assert torch.equal(a.knots, b.knots)
    assert np.array_equal(b.blur, np.zeros(3))


def test_ranges_without_sense_are_listed():
    with pytest.raises(ConfigError) as caught:
        StyleRanges(gamma=(0.0, 2.0), noise=(0.3, 0.1), borrow=1.5)
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="unknown families: sharpen"):
        StyleRanges().only("sharpen")


def test_wrong_numbers_of_keys_and_channels_are_refused():
    with pytest.raises(RuntimeFault, match="2 keys"):
        StyleShift()(random(3, 1, 8, 8), "ab")
    with pytest.raises(RuntimeFault, match="2 channels"):
        StyleShift(StyleRanges(borrow=1.0))(random(1, 1, 8, 8), "a", random(1, 2, 8, 8))


@given(n=st.integers(1, 3), c=st.integers(1, 2), w=st.integers(2, 9), h=st.integers(2, 9))
@settings(max_examples=25, deadline=None)
def test_a_matched_image_has_exactly_the_histogram_of_its_reference(n, c, w, h):
    generator = torch.Generator().manual_seed(w * 10 + h)
    images, references = (
        torch.stack([torch.randperm(w * h, generator=generator) for _ in range(n * c)]).float() / (w * h)
        for _ in range(2)
    )
    images, references = images.view(n, c, w, h), references.view(n, c, w, h) ** 2
    matched = match_histogram(images, references)
    assert torch.allclose(matched.flatten(2).sort(2).values, references.flatten(2).sort(2).values, atol=1e-6)
    assert torch.equal(matched.flatten(2).argsort(2), images.flatten(2).argsort(2))


def test_equal_intensities_stay_equal_and_take_the_mean_of_their_share():
    image = torch.tensor([0.0, 0.0, 0.0, 0.7]).view(1, 1, 2, 2)
    reference = torch.tensor([0.1, 0.2, 0.3, 0.9]).view(1, 1, 2, 2)
    assert match_histogram(image, reference).flatten().tolist() == pytest.approx([0.2, 0.2, 0.2, 0.9])
    constant = match_histogram(torch.full((1, 1, 3, 3), 0.4), random(1, 1, 3, 3))
    assert constant.unique().numel() == 1
    assert float(constant[0, 0, 0, 0]) == pytest.approx(float(random(1, 1, 3, 3).mean()))


def test_a_reference_of_another_size_gives_its_quantiles():
    image = torch.linspace(0, 1, 100).view(1, 1, 10, 10)
    matched = match_histogram(image, torch.linspace(0.2, 0.6, 400).view(1, 1, 20, 20))
    assert torch.allclose(matched.flatten(), torch.linspace(0.2, 0.6, 100), atol=0.005)


def test_swapped_amplitudes_are_the_references_at_low_and_the_images_at_high_frequencies():
    image, reference = random(2, 1, 16, 12), random(2, 1, 16, 12, seed=1)
    swapped = swap_amplitude(image, reference, torch.tensor([0.1, 0.0]))
    have, own, other = (torch.fft.rfft2(x).abs() for x in (swapped, image, reference))
    assert torch.allclose(have[0, 0, :2, :2], other[0, 0, :2, :2], rtol=1e-3)
    assert torch.allclose(have[0, 0, 3:13, 3:], own[0, 0, 3:13, 3:], rtol=1e-3)
    assert float(swapped[1].mean()) == pytest.approx(float(reference[1].mean()), rel=1e-4)
    assert torch.allclose(have[1, 0].flatten()[1:], own[1, 0].flatten()[1:], rtol=1e-3, atol=1e-4)
    phases = torch.fft.rfft2(swapped).angle() - torch.fft.rfft2(image).angle()
    assert float(torch.sin(phases[0, 0, 1:2, 1:2]).abs().max()) < 1e-3


def test_the_frames_of_a_window_change_alike_when_amplitudes_are_swapped():
    window = random(1, 1, 12, 12, 1).expand(1, 1, 12, 12, 3)
    swapped = swap_amplitude(window, random(1, 1, 20, 20, 2, seed=1), 0.1)
    assert torch.allclose(swapped, swapped[..., :1].expand_as(swapped), atol=1e-5)
    single = swap_amplitude(window[..., 0], random(1, 1, 12, 12, seed=3), 0.1)
    assert single.shape == (1, 1, 12, 12)


def test_gaussian_smoothing_keeps_a_constant_and_has_its_width_for_each_sample():
    images = torch.zeros(3, 1, 31, 31)
    images[:, :, 15, 15] = 1.0
    smoothed = smooth(images, torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(smoothed[0], images[0])
    places = torch.arange(31.0) - 15
    for row, sigma in ((1, 1.0), (2, 2.0)):
        profile = smoothed[row, 0].sum(1)
        assert float((profile * places**2).sum()) == pytest.approx(sigma**2, rel=0.02)
    flat = smooth(torch.ones(1, 2, 9, 7, 3), torch.tensor([1.5]))
    assert torch.allclose(flat, torch.ones_like(flat), atol=1e-5)


def test_correlated_noise_keeps_its_variance_up_to_the_border():
    noise = torch.randn(400, 1, 12, 10, generator=torch.Generator().manual_seed(0))
    wide = correlated(noise, torch.full((400,), 2.0))
    spread = wide.std(dim=(0, 1))
    assert float(spread.min()) > 0.85
    assert float(spread.max()) < 1.15
    near = (wide[..., 1:] * wide[..., :-1]).mean()
    assert float(near) > 0.8


def test_a_smooth_field_passes_through_its_knots_and_changes_little_between_frames():
    knots = torch.randn(2, 1, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    field = smooth_field(knots, (13, 10, 5))
    assert field.shape == (2, 1, 13, 10, 5)
    assert torch.allclose(field[:, :, 0, 0, 0], knots[:, :, 0, 0, 0], atol=1e-5)
    assert torch.allclose(field[:, :, -1, -1, 2], knots[:, :, -1, -1, 1], atol=1e-5)
    flat = smooth_field(knots[..., 0], (13, 10, 5))
    assert torch.equal(flat[..., 0], flat[..., 4])


# -- corruption -------------------------------------------------------------------------------------


@given(classes=st.integers(2, 5), seed=st.integers(0, 10_000), three=st.booleans())
@settings(max_examples=40, deadline=None)
def test_corrupted_label_maps_keep_shape_type_and_classes(classes, seed, three):
    shape = (17, 14, 4) if three else (25, 18)
    masks = torch.randint(0, classes, (3, *shape), generator=torch.Generator().manual_seed(seed))
    masks = masks.to(torch.uint8)
    before = masks.clone()
    corrupted = corrupt_masks(masks, classes, seed=seed, keys="abc")
    assert corrupted.shape == masks.shape
    assert corrupted.dtype == torch.uint8
    assert int(corrupted.max()) < classes
    assert torch.equal(masks, before)


def test_corruption_depends_on_seed_and_key_alone():
    masks = heart(n=5)
    state = global_state()
    together = corrupt_masks(masks, 3, seed=1, keys=range(5))
    assert same_state(state, global_state())
    assert torch.equal(corrupt_masks(masks, 3, seed=1, keys=range(5)), together)
    assert torch.equal(corrupt_masks(masks[2:3], 3, seed=1, keys=[2]), together[2:3])
    assert not torch.equal(corrupt_masks(masks, 3, seed=2, keys=range(5)), together)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(32, 28), (32, 28, 4)])
def test_each_family_alone_changes_some_but_not_most_pixels(family, shape):
    masks = heart((32, 28), n=40)
    if len(shape) == 3:
        masks = masks.unsqueeze(-1).expand(40, *shape).contiguous()
    corrupted = corrupt_masks(masks, 3, seed=0, keys=range(40), ranges=CorruptionRanges().only(family))
    changed = (corrupted != masks).float().flatten(1).mean(1)
    assert float((changed > 0).float().mean()) > 0.6
    assert float(changed.max()) < 0.4
    if family == "band":
        assert bool((corrupted[corrupted != masks] == 0).all())


def test_growing_background_erodes_and_growing_structures_dilate():
    masks = heart((40, 40), n=200)
    grown = corrupt_masks(masks, 3, seed=0, keys=range(200), ranges=CorruptionRanges().only("grow"))
    area, before = (grown != 0).flatten(1).sum(1), (masks != 0).flatten(1).sum(1)
    assert int((area < before).sum()) > 40
    assert int((area > before).sum()) > 40


def test_salt_has_the_share_that_was_asked_for():
    masks = torch.zeros(20, 50, 50, dtype=torch.int64)
    ranges = CorruptionRanges(salt_share=(0.1, 0.1)).only("salt")
    salted = corrupt_masks(masks, 5, seed=0, keys=range(20), ranges=ranges)
    assert float((salted != 0).float().mean()) == pytest.approx(0.1 * 4 / 5, abs=0.01)
    counts = torch.bincount(salted.flatten(), minlength=5)[1:].float()
    assert float(counts.min() / counts.max()) > 0.85


@pytest.mark.parametrize("family", ["warp", "blob", "band", "grow"])
def test_neighbouring_frames_are_corrupted_alike(family):
    window = heart((40, 36), n=30).unsqueeze(-1).expand(30, 40, 36, 5).contiguous()
    corrupted = corrupt_masks(window, 3, seed=3, keys=range(30), ranges=CorruptionRanges().only(family))
    step = (corrupted[..., 1:] != corrupted[..., :-1]).float().mean()
    whole = (corrupted != window).float().mean()
    assert float(step) < 0.5 * float(whole)
    assert (float(step) > 0.0) == (family != "grow")


def test_a_sample_that_chance_spared_is_corrupted_by_a_family_in_use():
    masks = heart(n=60)
    ranges = CorruptionRanges(warp=1e-9, blob=0.0, grow=0.0, band=0.0, salt=0.0)
    corrupted = corrupt_masks(masks, 3, seed=0, keys=range(60), ranges=ranges)
    warped = corrupt_masks(masks, 3, seed=0, keys=range(60), ranges=CorruptionRanges().only("warp"))
    assert torch.equal(corrupted, warped)


def test_one_label_map_with_a_generator_of_its_own():
    mask = heart(n=1)[0]
    first, second = (corrupt_mask(mask, 3, np.random.default_rng(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, mask)


def test_a_label_outside_the_classes_and_impossible_ranges_are_refused():
    with pytest.raises(RuntimeFault, match="labels from 0 to 2 for 2 classes"):
        corrupt_masks(heart(n=1), 2, seed=0, keys="a")
    with pytest.raises(RuntimeFault, match="2 keys"):
        corrupt_masks(heart(n=1), 3, seed=0, keys="ab")
    with pytest.raises(ConfigError, match="every family is left out"):
        CorruptionRanges(warp=0.0, blob=0.0, grow=0.0, band=0.0, salt=0.0)
    with pytest.raises(ConfigError, match="unknown families: none"):
        CorruptionRanges().only()
    with pytest.raises(ConfigError, match="two ordered numbers"):
        AffineRanges(scale=(0.0, 1.0))


def test_an_empty_label_map_and_an_empty_batch_are_fine():
    empty = torch.zeros(20, 16, 16, dtype=torch.int64)
    assert corrupt_masks(empty, 3, seed=0, keys=range(20)).max() <= 2
    assert corrupt_masks(empty[:0], 3, seed=0, keys=[]).shape == (0, 16, 16)
    assert jitter_masks(empty[:0], seed=0, keys=[]).shape == (0, 16, 16)


def test_jitter_moves_turns_and_scales_by_what_was_asked_for():
    mask = torch.zeros(1, 41, 31, dtype=torch.int64)
    mask[0, 18:23, 13:18] = 1
    still = AffineRanges(rotation=(0, 0), scale=(1, 1), shift=(0, 0))
    assert torch.equal(jitter_masks(mask, seed=0, keys="a", ranges=still), mask)
    shifted = jitter_masks(
        mask, seed=0, keys="a", ranges=AffineRanges(rotation=(0, 0), scale=(1, 1), shift=(0.1, 0.1))
    )
    assert torch.equal(shifted, torch.roll(mask, (4, 3), (1, 2)))
    bigger = jitter_masks(
        mask, seed=0, keys="a", ranges=AffineRanges(rotation=(0, 0), scale=(3, 3), shift=(0, 0))
    )
    assert int(bigger.sum()) == pytest.approx(9 * 25, rel=0.15)
    bar = torch.zeros(1, 41, 31, dtype=torch.int64)
    bar[0, 10:31, 15] = 1
    turned = jitter_masks(
        bar, seed=0, keys="a", ranges=AffineRanges(rotation=(90, 90), scale=(1, 1), shift=(0, 0))
    )
    assert turned[0, 20, 5:26].sum() == 21
    assert turned.sum() == 21


def test_jitter_is_the_same_in_all_frames():
    window = heart(n=3).unsqueeze(-1).expand(3, 32, 28, 4).contiguous()
    moved = jitter_masks(window, seed=0, keys="abc")
    assert torch.equal(moved, moved[..., :1].expand_as(moved))
    assert torch.equal(moved[..., 0], jitter_masks(heart(n=3), seed=0, keys="abc"))


@pytest.mark.parametrize("frames", [None, 3])
def test_images_move_with_their_label_maps(frames):
    mask = heart(n=3)
    image = torch.stack([mask == 1, mask == 2], dim=1).float()
    if frames:
        mask = mask.unsqueeze(-1).expand(*mask.shape, frames).contiguous()
        image = image.unsqueeze(-1).expand(*image.shape, frames).contiguous()
    moved, labels = jitter_images(image, mask, seed=0, keys="abc")
    assert moved.shape == image.shape
    assert torch.equal(labels, jitter_masks(mask, seed=0, keys="abc"))
    assert not torch.equal(labels, mask)
    for label in (1, 2):
        inside = (moved[:, label - 1] > 0.5) == (labels == label)
        assert inside.float().mean() > 0.99
    if frames:
        assert torch.equal(moved, moved[..., :1].expand_as(moved))


def test_images_that_do_not_move_stay_as_they_are():
    image, mask = random(2, 1, 12, 10), heart((12, 10), n=2)[:, :12, :10]
    moved, labels = jitter_images(image, mask, seed=0, keys="ab", ranges=AffineRanges().scaled(0.0))
    torch.testing.assert_close(moved, image, rtol=0, atol=1e-6)
    assert torch.equal(labels, mask)


def test_half_the_strength_goes_half_as_far():
    half = AffineRanges(rotation=(-20, 10), scale=(0.25, 4.0), shift=(-0.2, 0.1)).scaled(0.5)
    assert half.rotation == (-10, 5)
    assert half.scale == pytest.approx((0.5, 2.0))
    assert half.shift == pytest.approx((-0.1, 0.05))


# -- sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_drawn_labels_have_exactly_the_probabilities_also_when_neighbours_are_alike(sigma):
    wanted = torch.tensor([0.5, 0.3, 0.2])
    logits = wanted.log().view(1, 3, 1, 1).expand(600, 3, 8, 6)
    drawn = sample_actions(logits, seed=0, keys=range(600), sigma_px=sigma)
    shares = torch.stack([(drawn == label).float().mean(0) for label in range(3)])
    assert float((shares - wanted.view(3, 1, 1)).abs().max()) < 0.08
    assert torch.allclose(shares.mean((1, 2)), wanted, atol=0.03 if sigma else 0.01)
    same = float((drawn[:, 1:] == drawn[:, :-1]).float().mean())
    assert same > 0.65 if sigma else same < 0.42


def test_a_draw_depends_on_seed_and_key_and_a_cold_one_is_greedy():
    logits = torch.randn(4, 3, 10, 9, generator=torch.Generator().manual_seed(0))
    state = global_state()
    drawn = sample_actions(logits, seed=1, keys="abcd")
    assert same_state(state, global_state())
    assert torch.equal(sample_actions(logits[1:2], seed=1, keys="b"), drawn[1:2])
    cold = sample_actions(logits, seed=1, keys="abcd", temperature=1e-4)
    assert torch.equal(cold, logits.argmax(1))
    heat = np.array([1e-4, 1.0, 1.0, 1e-4], np.float32)
    mixed = sample_actions(logits, seed=1, keys="abcd", temperature=heat)
    assert torch.equal(mixed[[0, 3]], cold[[0, 3]])
    assert torch.equal(mixed[[1, 2]], drawn[[1, 2]])
    assert sample_actions(logits[:0], seed=0, keys=[]).shape == (0, 10, 9)
    assert sample_actions(logits[..., None].expand(4, 3, 10, 9, 2), seed=0, keys="abcd").shape == (
        4,
        10,
        9,
        2,
    )


# -- settings from plain values ---------------------------------------------------------------------


def test_recipes_are_built_from_plain_values_and_misspelt_keys_are_named():
    recipe = from_params(
        SyntheticRecipe, {"true": 0.2, "temperature": [1, 2], "style": {"shadow": None}}, "pairs.params"
    )
    assert recipe.true == 0.2
    assert recipe.temperature == (1, 2)
    assert recipe.style == StyleRanges(shadow=None)
    with pytest.raises(ConfigError) as caught:
        from_params(SyntheticRecipe, {"style": {"shadows": None}}, "pairs.params")
    assert caught.value.problems == ("shadows: did you mean 'shadow' or 'shadow_width'?",)
