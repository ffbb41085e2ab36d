"""Cycles, landmarks and the report of a sequence: numbers of the specification (§12.8 to §12.11)."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from medrl.core.errors import DataError
from medrl.core.metrics import hausdorff
from medrl.core.metrics.cine import describe, find_cycles, landmark_errors
from medrl.core.metrics.landmarks import apex_point, base_points, base_width_mm, length_mm
from medrl.core.validity import check, load_rules

ECHO = load_rules("echo")
RATIO, FRONTIER = "width_ratio_between_lv_and_myo", "frontier_ratio_between_lv_and_bg_no_atr"


def ventricle(smaller: float = 0.0, *, wall: int = 14, cut: int = 170) -> np.ndarray:
    """The phantom of the specification as stored, (x, y): its semi-axes reduced."""
    rows, columns = np.mgrid[:256, :256]
    tall, wide = 70.0 - smaller, 38.0 - smaller

    def inside(thick: float) -> np.ndarray:
        y, x = (rows - 120) / (tall + thick), (columns - 128) / (wide + thick)
        return (y**2 + x**2 <= 1) & (rows <= cut)

    mask = np.zeros((256, 256), dtype=np.uint8)
    mask[inside(wall)] = 2
    mask[inside(0)] = 1
    return mask.T


def beating(frames: int, period: int = 20) -> np.ndarray:
    """Beats of a fixed ventricle's cavity that starts at its largest; (x, y, t)."""
    masks = {}
    for i in range(frames):
        shrunk = round(6 * (1 - math.cos(2 * math.pi * i / period)) / 2, 9)
        masks[i] = shrunk
    made = {value: ventricle(value) for value in set(masks.values())}
    return np.stack([made[masks[i]] for i in range(frames)], axis=-1)


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    return ventricle()


def test_the_phantom_has_the_pixels_and_ratios_of_the_specification(mask):
    report = check(mask, ECHO)
    assert (int((mask == 1).sum()), int((mask == 2).sum())) == (7641, 4124)
    assert report.valid
    assert (round(report.values[RATIO], 3), round(report.values[FRONTIER], 3)) == (2.679, 0.688)


def test_a_hole_a_thin_wall_and_a_closed_base_are_invalid(mask):
    holed = mask.copy()
    holed[127:130, 119:122] = 0
    report = check(holed, ECHO)
    assert not report.valid
    assert report.values["holes_in_lv"] == 9
    thin = check(ventricle(wall=3), ECHO)
    assert (thin.valid, thin.values[RATIO]) == (False, 12.5)
    closed = check(ventricle(cut=255), ECHO)
    assert (closed.valid, closed.values[FRONTIER]) == (False, 0)


def test_base_points_width_and_length_are_those_of_the_specification(mask):
    assert base_points(mask).tolist() == [[102, 170], [154, 170]]
    assert base_width_mm(mask, (0.5, 0.5)) == 26.0
    assert round(length_mm(mask, (0.5, 0.5)), 2) == 60.05


def test_a_shift_of_ten_columns_has_its_distance(mask):
    moved = np.roll(mask, 10, axis=0)
    for label in (mask == 1, mask == 2, mask != 0):
        assert label.any()
    distance = hausdorff(np.roll(mask == 1, 10, axis=0), mask == 1, (0.37, 0.37))
    assert round(distance, 6) == 3.7
    assert round(hausdorff(moved != 0, mask != 0, (0.37, 0.37)), 6) == 3.7


def test_length_and_width_follow_the_spacing_of_their_own_axis(mask):
    assert base_width_mm(mask, (0.2, 0.9)) == pytest.approx(52 * 0.2)
    assert length_mm(mask, (0.2, 0.5)) == pytest.approx(120.1 * 0.5)


def test_landmarks_do_not_depend_on_where_the_heart_lies(mask):
    moved = np.roll(mask, (-40, -15), axis=(0, 1))
    assert (base_points(mask) - base_points(moved)).tolist() == [[40, 15], [40, 15]]
    assert (apex_point(mask) - apex_point(moved)).tolist() == [40, 15]


@pytest.mark.parametrize("fill", [0, 1, 2])
def test_maps_without_landmarks_give_nan(fill):
    mask = np.full((24, 24), fill, dtype=np.uint8)
    assert np.isnan(base_points(mask)).all()
    assert math.isnan(base_width_mm(mask, (1, 1)))
    assert math.isnan(length_mm(mask, (1, 1)))


def test_base_points_in_one_column_are_split_by_rows():
    mask = np.zeros((12, 12), dtype=np.uint8)
    mask[4, 2:10] = 1
    mask[5, 2:10] = 2
    mask[3, 4:8] = 2
    points = base_points(mask)
    assert (points[:, 0] == 4).all()
    assert points[0, 1] > points[1, 1]


@pytest.mark.parametrize(("frames", "count"), [(40, 2), (60, 3), (20, 1)])
def test_cycles_of_a_cosine_are_counted(frames, count):
    area = 5000 + 1500 * np.cos(2 * np.pi * np.arange(frames) / 20)
    cycles = find_cycles(area)
    assert cycles.count == count
    assert cycles.valleys == tuple(range(10, frames, 20))
    assert cycles.peaks[:1] == (0,)


def test_constant_short_and_empty_curves_are_one_cycle():
    for area in (np.full(30, 700.0), np.zeros(12), [3.0], [3.0, 9.0], []):
        assert find_cycles(area).count == 1


def test_the_report_of_a_beat_has_area_volume_and_ejection_fraction():
    sequence = beating(41)
    report = describe(sequence, (0.37, 0.37), 0.05)
    assert report.lv_area_mm2[[0, 10]].round(1).tolist() == [1046.1, 829.2]
    assert (report.ed_frame, report.es_frame, report.cycles.count) == (0, 10, 2)
    length = report.lv_length_mm[0]
    assert report.edv_ml == pytest.approx(8 * report.lv_area_mm2[0] ** 2 / (3 * math.pi * length) / 1000)
    expected = 1 - (report.lv_area_mm2[10] / report.lv_area_mm2[0]) ** 2 * length / report.lv_length_mm[10]
    assert report.ejection_fraction == pytest.approx(expected)
    assert report.heart_rate_bpm == pytest.approx(60.0)
    assert len(report.limits) == 2
    assert json.loads(json.dumps(report.to_dict()))["ed_frame"] == 0


def test_areas_and_volumes_scale_with_the_spacing():
    sequence = beating(12)
    small, large = (describe(sequence, (size, size)) for size in (0.37, 0.74))
    assert np.allclose(large.lv_area_mm2, 4 * small.lv_area_mm2, rtol=1e-12)
    assert np.allclose(large.volume_ml, 8 * small.volume_ml, rtol=1e-12)
    assert large.ejection_fraction == pytest.approx(small.ejection_fraction)


def test_a_sequence_without_a_ventricle_is_described_without_numbers():
    report = describe(np.zeros((24, 24, 5), dtype=np.uint8), (0.37, 0.37), 0.05).to_dict()
    assert (report["ed_frame"], report["es_frame"], report["ejection_fraction"]) == (None, None, None)
    assert report["lv_length_mm"] == [None] * 5
    assert "no left ventricle was found" in report["limits"]


def test_single_frames_and_missing_landmarks_say_what_they_lack(mask):
    single = describe(mask[..., np.newaxis], (0.37, 0.37))
    assert any("no whole beat" in text for text in single.limits)
    assert math.isnan(single.heart_rate_bpm)
    assert math.isnan(single.ejection_fraction)
    sequence = beating(20)[..., :11].copy()
    sequence[..., 4] = np.where(sequence[..., 4] == 2, 0, sequence[..., 4])
    report = describe(sequence, (0.37, 0.37), 0.0)
    assert "base or apex was not found in 1 of 11 frames" in report.limits
    assert np.isnan(report.volume_ml[4])
    assert math.isfinite(report.ejection_fraction)


@pytest.mark.parametrize("spacing", [(0.37, 0.37), np.full(2, 0.37), torch.full((2,), 0.37)])
def test_a_shifted_prediction_has_the_errors_of_the_specification(spacing):
    truth = beating(40)
    report = landmark_errors(np.roll(truth, 14, axis=0), truth, spacing)
    values = report.to_dict()
    assert (values["mae"], values["mae_L"], values["mae_R"], values["mse"]) == (14, 14, 14, 98)
    assert round(report.mean_mm, 2) == 5.18
    for side in ("", "_L", "_R"):
        assert values[f"mistake_per_cycle_5mm{side}"] == 20
        assert values[f"mistake_per_cycle_7.5mm{side}"] == 0
    assert (report.cycles, report.failed, report.unjudged) == (2, 0, 0)


def test_each_axis_counts_with_its_own_spacing():
    truth = beating(12)
    across = landmark_errors(np.roll(truth, 10, axis=0), truth, (0.3, 0.8))
    down = landmark_errors(np.roll(truth, 10, axis=1), truth, (0.3, 0.8))
    assert across.mean_mm == pytest.approx(3.0)
    assert down.mean_mm == pytest.approx(8.0)
    assert across.to_dict()["mae"] == down.to_dict()["mae"] == 10


def test_a_prediction_without_landmarks_is_wrong_by_the_width_of_the_image():
    truth = beating(12)
    pred = truth.copy()
    pred[..., 5] = 0
    report = landmark_errors(pred, truth, (0.5, 0.5))
    assert report.failed == 1
    assert report.errors_px[5].tolist() == [256, 256]
    assert report.errors_mm[5].tolist() == [128, 128]
    assert report.mse_px2 == pytest.approx(256**2 / 12)
    assert report.mistakes_per_cycle[5.0] == 1 / report.cycles


def test_frames_whose_reference_has_no_landmarks_are_left_out():
    truth = beating(12)
    truth[..., 5] = 0
    report = landmark_errors(beating(12), truth, (0.5, 0.5))
    assert report.unjudged == 1
    assert report.mean_mm == 0
    nothing = landmark_errors(truth, np.zeros_like(truth), (0.5, 0.5)).to_dict()
    assert nothing["mae_mm"] is None
    assert nothing["mistake_per_cycle_5mm"] == 0


def test_sequences_that_do_not_fit_are_refused(mask):
    with pytest.raises(DataError, match="expected \\(X, Y, T\\)"):
        describe(mask, (0.37, 0.37))
    with pytest.raises(DataError, match="mitral landmarks"):
        landmark_errors(beating(3), beating(4), (0.37, 0.37))
    with pytest.raises(DataError, match="two positive numbers"):
        describe(beating(2), (0.37, -1.0))
