"""Metrics against published values, hand-computed values and MONAI."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.core.errors import ConfigError, DataError
from medrl.core.metrics import (
    OVERALL,
    LesionMatch,
    assd,
    auroc,
    average_precision,
    brier_score,
    case_metrics,
    confusion,
    dice,
    expected_calibration_error,
    hausdorff,
    hd95,
    iou,
    match_lesions,
    nsd,
    pool,
    reliability,
    summarise,
    surface_distances,
    values_of,
)


def ball(radius: float, centre: tuple[int, int, int], size: int = 99) -> np.ndarray:
    grid = np.ogrid[:size, :size, :size]
    return sum((axis - at) ** 2 for axis, at in zip(grid, centre, strict=True)) <= radius**2


def random_masks(seed: int, shape: tuple[int, ...] = (9, 8, 7)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(shape) < 0.3, rng.random(shape) < 0.3


# -- overlap ----------------------------------------------------------------------------------------------


def test_dice_and_iou_of_a_hand_counted_pair():
    pred = np.array([1, 1, 1, 0, 0, 0])
    ref = np.array([0, 1, 1, 1, 1, 0])
    counts = confusion(pred, ref)
    assert (counts.tp, counts.fp, counts.fn, counts.tn) == (2, 1, 2, 1)
    assert dice(pred, ref) == 4 / 7
    assert iou(pred, ref) == 2 / 5
    assert counts.sensitivity == 2 / 4
    assert counts.precision == 2 / 3
    assert counts.volume_difference == -1 / 4


def test_counts_of_cases_add_up_to_pooled_dice():
    first = confusion(np.array([1, 1, 0]), np.array([1, 0, 0]))
    second = confusion(np.array([0, 0, 0]), np.array([1, 1, 1]))
    assert (first + second).dice == 2 / (2 + 1 + 3)


def test_masks_of_different_shape_are_refused():
    with pytest.raises(DataError, match=r"\(2,\) and \(3,\)"):
        dice(np.ones(2), np.ones(3))


# -- surfaces: published values ---------------------------------------------------------------------------


@pytest.mark.parametrize("elements", ["voxels", "surfels"])
def test_two_voxels_2_mm_apart_have_hausdorff_distance_2(elements):
    pred, ref = np.zeros((128, 128, 128), bool), np.zeros((128, 128, 128), bool)
    ref[50, 60, 70] = True
    pred[50, 60, 72] = True
    assert hausdorff(pred, ref, (3.0, 2.0, 1.0), elements=elements) == 2.0


def test_two_cubes_reach_the_published_values_of_surface_distance():
    ref, pred = np.zeros((100, 100, 100), bool), np.zeros((100, 100, 100), bool)
    ref[0:50] = True
    pred[0:51] = True
    found = surface_distances(pred, ref, (2.0, 1.0, 1.0), elements="surfels")
    pred_to_ref, ref_to_pred = found.mean()
    assert ref_to_pred == pytest.approx(0.322, abs=5e-4)
    assert pred_to_ref == pytest.approx(0.339, abs=5e-4)
    assert found.nsd(1.0) == pytest.approx(0.836145008498, abs=1e-6)
    assert nsd(pred, ref, (2.0, 1.0, 1.0), tolerance_mm=1.0) == found.nsd(1.0)
    assert dice(pred, ref) == pytest.approx(0.990099009901, abs=1e-12)


def test_two_balls_reach_the_published_values_of_monai():
    one, other = ball(20, (20, 20, 20)), ball(20, (19, 19, 19))
    assert hausdorff(one, other, (1, 1, 1)) == pytest.approx(1.7320508075688772, abs=1e-12)
    # MONAI's published mean surface distance of these balls is the one in taxicab distance.
    taxicab = surface_distances(one, other, (1, 1, 1), norm="taxicab")
    assert taxicab.mean() == pytest.approx((1.0380029806259848, 1.0380029806259848), abs=1e-12)
    assert taxicab.hausdorff() == 3.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.7, 3.0)])
def test_distances_equal_those_of_monai(seed, spacing):
    from monai.metrics import (
        compute_average_surface_distance,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    pred, ref = random_masks(seed)
    a, b = (torch.from_numpy(mask)[None, None].float() for mask in (pred, ref))
    kwargs = {"include_background": True, "spacing": spacing}
    assert hd95(pred, ref, spacing) == pytest.approx(
        compute_hausdorff_distance(a, b, percentile=95, **kwargs).item(), rel=1e-5
    )
    assert surface_distances(pred, ref, spacing).mean()[0] == pytest.approx(
        compute_average_surface_distance(a, b, **kwargs).item(), rel=1e-5
    )
    for elements, subvoxels in (("voxels", False), ("surfels", True)):
        assert nsd(pred, ref, spacing, tolerance_mm=0.9, elements=elements) == pytest.approx(
            compute_surface_dice(a, b, [0.9], use_subvoxels=subvoxels, **kwargs).item(), rel=1e-5
        )


def test_a_single_slice_is_measured_in_two_dimensions():
    pred, ref = np.zeros((20, 20, 1), bool), np.zeros((20, 20, 1), bool)
    pred[5:15, 5:15] = True
    ref[5:15, 5:17] = True
    flat = surface_distances(pred[..., 0], ref[..., 0], (1.0, 2.0))
    assert len(flat.pred_weights) == 36
    assert hausdorff(pred, ref, (1.0, 2.0, 8.0)) == hausdorff(pred[..., 0], ref[..., 0], (1.0, 2.0)) == 4.0
    assert nsd(pred, ref, (1.0, 2.0, 8.0), tolerance_mm=1.0) == pytest.approx(
        nsd(pred[..., 0], ref[..., 0], (1.0, 2.0), tolerance_mm=1.0)
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.tuples(*[st.integers(0, 5)] * 3), swap=st.booleans())
def test_distances_do_not_depend_on_position_or_order(seed, shift, swap):
    pred, ref = random_masks(seed, (5, 6, 4))
    spacing = (1.0, 0.5, 2.0)
    moved = [np.pad(mask, [(s, 3) for s in shift]) for mask in ((ref, pred) if swap else (pred, ref))]
    for measure in (hd95, assd, nsd):
        assert measure(*moved, spacing) == pytest.approx(measure(pred, ref, spacing), rel=1e-12)


def test_a_spacing_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match="spacing"):
        hd95(np.ones((2, 2, 2)), np.ones((2, 2, 2)), (1.0, 0.0, 1.0))


# -- the rule for empty masks -----------------------------------------------------------------------------


def test_neither_mask_has_the_label_is_not_a_number_for_every_metric():
    empty = np.zeros((4, 4, 4), np.uint8)
    (row,) = case_metrics(empty, empty, {"a": 1}, (1, 1, 1), ("dice", "iou", "hd95", "hd", "nsd", "assd"))
    assert all(math.isnan(row[name]) for name in ("dice", "iou", "hd95", "hd", "nsd", "assd"))


@pytest.mark.parametrize("predicted", [True, False])
def test_only_one_mask_has_the_label_scores_zero_and_infinitely_far(predicted):
    empty, full = np.zeros((4, 4, 4), np.uint8), np.ones((4, 4, 4), np.uint8)
    pair = (full, empty) if predicted else (empty, full)
    (row,) = case_metrics(*pair, {"a": 1}, (1, 1, 1), ("dice", "iou", "nsd", "hd95", "assd"))
    assert (row["dice"], row["iou"], row["nsd"]) == (0.0, 0.0, 0.0)
    assert (row["hd95"], row["assd"]) == (math.inf, math.inf)


def test_summary_excludes_and_counts_empty_and_infinite_values():
    rows = [
        {"case": "a", "label": "x", "dice": 0.5, "hd95": 2.0},
        {"case": "b", "label": "x", "dice": 0.0, "hd95": math.inf},
        {"case": "c", "label": "x", "dice": math.nan, "hd95": math.nan},
        {"case": "d", "label": "x", "dice": 1.0, "hd95": 4.0},
    ]
    found = summarise(rows)["x"]
    assert found["dice"].mean == 0.5
    assert (found["dice"].n, found["dice"].excluded, found["dice"].infinite) == (3, 1, 0)
    assert found["hd95"].mean == 3.0
    assert (found["hd95"].n, found["hd95"].excluded, found["hd95"].infinite) == (3, 1, 1)
    assert (found["hd95"].median, found["hd95"].maximum) == (4.0, math.inf)


# -- cases ------------------------------------------------------------------------------------------------


def test_each_label_is_measured_as_if_it_were_alone():
    rng = np.random.default_rng(0)
    pred, ref = rng.integers(0, 4, (2, 10, 9, 8)).astype(np.uint8)
    spacing = (1.0, 2.0, 0.5)
    rows = case_metrics(
        pred, ref, {"background": 0, "a": 1, "c": 3}, spacing, ("dice", "hd95", "nsd", "assd")
    )
    assert [row["label"] for row in rows] == ["a", "c"]
    for row, value in zip(rows, (1, 3), strict=True):
        assert row["dice"] == dice(pred == value, ref == value)
        assert row["hd95"] == hd95(pred == value, ref == value, spacing)
        assert row["assd"] == assd(pred == value, ref == value, spacing)
        assert row["nsd"] == nsd(pred == value, ref == value, spacing)
        assert row["ref_ml"] == pytest.approx((ref == value).sum() / 1000)


def test_a_region_is_the_union_of_its_labels():
    rng = np.random.default_rng(1)
    pred, ref = rng.integers(0, 4, (2, 6, 6, 6)).astype(np.uint8)
    (row,) = case_metrics(pred, ref, {"whole": [2, 3]}, (1, 1, 1), ("dice",))
    assert row["dice"] == dice(pred >= 2, ref >= 2)


def test_overall_counts_each_case_with_the_mean_of_its_labels():
    rows = [
        {"case": "a", "label": "x", "dice": 0.2},
        {"case": "a", "label": "y", "dice": 0.6},
        {"case": "b", "label": "x", "dice": 1.0},
        {"case": "b", "label": "y", "dice": math.nan},
    ]
    assert values_of(rows, OVERALL, "dice") == {"a": 0.4, "b": 1.0}
    assert summarise(rows)[OVERALL]["dice"].mean == pytest.approx(0.7)


def test_an_unknown_metric_is_named_with_its_nearest_match():
    with pytest.raises(ConfigError, match="did you mean 'dice'"):
        case_metrics(np.zeros((2, 2, 2), int), np.zeros((2, 2, 2), int), {"a": 1}, (1, 1, 1), ("dise",))


def test_probabilities_are_refused_as_label_map():
    with pytest.raises(DataError, match="float"):
        case_metrics(np.zeros((2, 2, 2)), np.zeros((2, 2, 2), int), {"a": 1}, (1, 1, 1))


# -- lesions ----------------------------------------------------------------------------------------------


def test_five_hits_four_false_alarms_five_misses_give_lesion_ap_5_of_18():
    probability, ref = np.zeros((60, 10, 3)), np.zeros((60, 10, 3), np.uint8)
    for k in range(10):
        ref[6 * k : 6 * k + 2, 0:2] = 1
    for k in range(5):
        probability[6 * k : 6 * k + 2, 0:2] = 0.9
    for k in range(4):
        probability[6 * k : 6 * k + 2, 7:9] = 0.9
    match = match_lesions(probability, ref)
    assert (len(match.hits), len(match.false_alarms), match.misses) == (5, 4, 5)
    assert match.average_precision == pytest.approx(5 / 18, abs=1e-12)


def test_average_precision_falls_in_steps_at_each_threshold():
    # Thresholds 0.9: P 1, R 1/3; 0.8: P 1/2; 0.7: P 2/3, R 2/3; the third positive is never found.
    assert average_precision([0.9, 0.8, 0.7], [True, False, True], missed=1) == pytest.approx(1 / 3 + 2 / 9)
    assert average_precision([], [], missed=2) == 0.0
    assert math.isnan(average_precision([0.3], [False]))


def test_matching_prefers_more_pairs_over_more_overlap():
    # One long candidate covers both lesions, a short one covers the first only.
    ref = np.zeros((1, 1, 40), np.uint8)
    ref[..., 2:10] = 1
    ref[..., 12:20] = 1
    candidates = np.zeros((1, 3, 40))
    candidates[0, 0, 2:20] = 0.6
    shifted = np.zeros((3, 3, 40), np.uint8)
    shifted[1, 1] = ref[0, 0]
    field = np.zeros((3, 3, 40))
    field[1, 1, 2:20] = 0.6
    match = match_lesions(field, shifted)
    assert (len(match.hits), match.misses, len(match.false_alarms)) == (1, 1, 0)


def test_a_second_candidate_on_a_found_lesion_is_no_false_alarm():
    ref = np.zeros((30, 5, 5), np.uint8)
    ref[5:25] = 1
    field = np.zeros((30, 5, 5))
    field[5:14] = 0.9
    field[16:25] = 0.8
    match = match_lesions(field, ref)
    assert match == LesionMatch(hits=(0.9,), false_alarms=(), misses=0, overlaps=match.overlaps)
    assert match.overlaps == (9 / 20,)


def test_candidates_below_the_overlap_are_a_miss_and_a_false_alarm():
    ref = np.zeros((40, 5, 5), np.uint8)
    ref[0:20] = 1
    field = np.zeros((40, 5, 5))
    field[19:40] = 0.7
    match = match_lesions(field, ref)
    assert (match.hits, match.false_alarms, match.misses) == ((), (0.7,), 1)


def test_pooling_joins_cases_before_the_curve_is_made():
    joined = pool([LesionMatch(hits=(0.9,)), LesionMatch(false_alarms=(0.95,), misses=1)])
    assert joined.average_precision == pytest.approx(1 / 2 * 1 / 2)


def test_auroc_counts_ties_half():
    assert auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert auroc([0.5, 0.5], [True, False]) == 0.5
    assert math.isnan(auroc([0.5, 0.6], [True, True]))


# -- calibration ------------------------------------------------------------------------------------------


def test_calibration_error_of_a_hand_computed_diagram():
    # Four voxels at 0.8 of which three are right, two at 0.6 of which none is.
    foreground = np.array([0.8, 0.8, 0.8, 0.8, 0.6, 0.6])
    labels = np.array([1, 1, 1, 0, 0, 0])
    expected = (4 * abs(0.75 - 0.8) + 2 * 0.6) / 6
    assert expected_calibration_error(foreground, labels, bins=10) == pytest.approx(expected)
    assert reliability(foreground, labels, bins=10).mce == pytest.approx(0.6)
    assert brier_score(foreground, labels) == pytest.approx((3 * 0.04 + 0.64 + 2 * 0.36) / 6)


def test_sure_and_right_is_perfectly_calibrated_in_any_number_of_classes():
    labels = np.arange(24).reshape(2, 3, 4) % 3
    sure = np.stack([(labels == k).astype(np.float32) for k in range(3)])
    assert expected_calibration_error(sure, labels) == 0.0
    assert brier_score(sure, labels) == 0.0
    assert expected_calibration_error(sure[[1, 2, 0]], labels) == 1.0
    assert brier_score(sure[[1, 2, 0]], labels) == 2.0


def test_calibration_looks_only_inside_the_mask():
    foreground, labels = np.array([0.9, 0.1]), np.array([1, 1])
    mask = np.array([1, 0])
    assert expected_calibration_error(foreground, labels, mask=mask) == pytest.approx(0.1)
