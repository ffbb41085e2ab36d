"""Temporal validity: acceptance numbers of the specification (§12.7, §12.9), edge cases, rule files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medrl.core.errors import ConfigError, DataError
from medrl.core.validity.temporal import (
    Attribute,
    builtin_temporal_rules,
    check_sequence,
    jump_errors,
    jumps_of,
    load_temporal_rules,
)

SPACING = (0.37, 0.37)
ALL = (
    "lv_area", "lv_base_width", "lv_length", "myo_area",
    "epi_center_x", "epi_center_y", "hd_frames_myo", "hd_frames_epi",
)  # fmt: skip


def ventricle(smaller: float = 0.0) -> np.ndarray:
    """The phantom of the specification in rows and columns, its semi-axes reduced."""
    rows, columns = np.mgrid[:256, :256]
    tall, wide = 70.0 - smaller, 38.0 - smaller

    def inside(wall: float) -> np.ndarray:
        y, x = (rows - 120) / (tall + wall), (columns - 128) / (wide + wall)
        return (y**2 + x**2 <= 1) & (rows <= 170)

    mask = np.zeros((256, 256), dtype=np.uint8)
    mask[inside(14)] = 2
    mask[inside(0)] = 1
    return mask


@pytest.fixture(scope="module")
def beating() -> np.ndarray:
    """21 frames of one beat, as stored: (x, y, t)."""
    shrunk = [6 * (1 - math.cos(2 * math.pi * i / 20)) / 2 for i in range(21)]
    return np.stack([ventricle(each).T for each in shrunk], axis=-1)


def shifted(sequence: np.ndarray, frame: int, columns: int) -> np.ndarray:
    changed = sequence.copy()
    changed[..., frame] = np.roll(changed[..., frame], columns, axis=0)
    return changed


def rounded(series, digits: int = 3) -> list[float]:
    return (np.round(jumps_of(series), digits) + 0.0).tolist()


def test_an_even_ramp_has_no_jump():
    assert np.abs(jumps_of([100, 110, 120, 130, 140])).max() < 1e-12


@pytest.mark.parametrize(
    ("series", "expected", "errors"),
    [
        ([100, 100, 150, 100, 100], [0, -0.476, 0.952, -0.476, 0], 3),
        ([1000, 1000, 1010, 1000, 1000], [0, -0.166, 0.332, -0.166, 0], 1),
        ([100, 100, 100, 200, 200, 200], [0, 0, -0.485, 0.485, 0, 0], 2),
        ([50, 50, 50, 50], [0, 0, 0, 0], 0),
    ],
)
def test_jumps_are_those_of_the_specification(series, expected, errors):
    assert rounded(series) == expected
    assert int(jump_errors(series, 0.2).sum()) == errors


@pytest.mark.parametrize(
    ("period", "beats", "largest", "valid"),
    # Within one beat the ends, which are the peaks, have no jump; a peak between two beats has the largest.
    [(8, 1, 0.14, True), (8, 5, 0.14, True), (5, 1, 0.29, False), (5, 5, 0.36, False)],
)
def test_a_slow_cosine_is_smooth_and_a_fast_one_is_not(period, beats, largest, valid):
    series = 1000 + 200 * np.cos(2 * np.pi * np.arange(beats * period + 1) / period)
    assert round(float(np.abs(jumps_of(series)).max()), 2) == largest
    assert (not jump_errors(series, 0.2).any()) == valid


def test_a_structure_that_is_never_there_is_an_error_in_every_frame():
    assert np.isnan(jumps_of([0, 0, 0])).all()
    assert jump_errors([0, 0, 0], 0.2).tolist() == [True, True, True]


def test_a_frame_without_a_value_is_an_error_and_leaves_its_neighbours_alone():
    series = [10.0, 10.0, math.nan, 10.0, 10.0]
    assert jump_errors(series, 0.2).tolist() == [False, False, True, False, False]


def test_sequences_of_one_or_two_frames_have_no_jump(beating):
    for count in (1, 2):
        report = check_sequence(beating[..., :count], SPACING)
        assert report.valid
        assert report.frames_with_error == 0


def test_the_beating_ventricle_is_valid(beating):
    report = check_sequence(beating, SPACING)
    assert report.valid
    assert tuple(report.errors) == ALL
    areas = report.values["lv_area"]
    assert (round(float(areas[0]), 1), round(float(areas[10]), 1)) == (1046.1, 829.2)


def test_a_shifted_frame_is_flagged_with_its_neighbours(beating):
    report = check_sequence(shifted(beating, 10, 25), SPACING)
    assert not report.valid
    assert report.wrong_frames == (9, 10, 11)
    assert report.frames_with_error == 3
    assert round(float(report.values["hd_frames_myo"][10]), 2) == 9.51
    assert np.flatnonzero(report.errors["hd_frames_myo"]).tolist() == [10]
    assert not report.errors["lv_area"].any()


def test_columns_and_rows_are_told_apart_and_legacy_axes_swap_them(beating):
    moved = shifted(beating, 10, 25)
    ours, legacy = (check_sequence(moved, SPACING, legacy_axes=flag) for flag in (False, True))
    assert ours.errors["epi_center_x"][10]
    assert not ours.errors["epi_center_y"].any()
    assert np.array_equal(ours.values["epi_center_x"], legacy.values["epi_center_y"])
    assert np.array_equal(ours.values["epi_center_y"], legacy.values["epi_center_x"])


def test_frames_stored_the_other_way_round_give_the_same_report(beating):
    moved = shifted(beating, 10, 25)[..., 7:14]
    own = check_sequence(moved, (0.3, 0.5))
    turned = check_sequence(
        moved.transpose(1, 0, 2), (0.5, 0.3), load_temporal_rules("echo_temporal", rows="x")
    )
    assert own.to_dict() == turned.to_dict()


def test_an_empty_frame_is_an_error_of_every_attribute_but_its_jump_only_of_areas(beating):
    short = beating[..., 6:13].copy()
    short[..., 3] = 0
    report = check_sequence(short, SPACING)
    assert all(report.errors[name][3] for name in ALL)
    assert np.isinf(report.values["hd_frames_epi"][3])
    assert np.flatnonzero(report.errors["epi_center_x"]).tolist() == [3]
    assert np.flatnonzero(report.errors["lv_area"]).tolist() == [2, 3, 4]


def test_an_empty_sequence_is_invalid_in_every_frame():
    report = check_sequence(np.zeros((32, 32, 5), dtype=np.uint8), SPACING)
    assert not report.valid
    assert report.frames_with_error == 5
    assert report.to_dict()["values"]["epi_center_x"] == [None] * 5


def test_relaxed_accepts_one_error_and_no_more():
    frames = np.zeros((40, 40, 7), dtype=np.uint8)
    frames[10:30, 5:25] = 2
    frames[14:26, 9:25] = 1
    frames[14:26, 25, 3] = 1  # one more row of the cavity: jumps of -0.36, 0.72, -0.36
    rules = load_temporal_rules("echo_temporal")
    for limit, errors, relaxed in ((0.2, 3, False), (0.6, 1, True), (0.8, 0, True)):
        own = replace(rules, attributes=(Attribute("lv_area", "area", (1,), (), limit),))
        assert check_sequence(frames, SPACING, own).error_count == errors
        assert check_sequence(frames, SPACING, own).valid == (errors == 0)
        assert check_sequence(frames, SPACING, own, relaxed=True).valid == relaxed


def test_tensors_lists_and_arrays_give_the_same_report(beating):
    short = beating[..., :4]
    plain = check_sequence(short, SPACING).to_dict()
    assert check_sequence(torch.from_numpy(short), np.asarray(SPACING)).to_dict() == plain
    assert check_sequence(short.astype(np.float32), list(SPACING)).to_dict() == plain


def test_only_measures_what_is_asked_for(beating):
    report = check_sequence(beating[..., :4], SPACING, only=("lv_area", "myo_area"))
    assert tuple(report.values) == ("lv_area", "myo_area")
    full = check_sequence(beating[..., :4], SPACING)
    assert np.array_equal(report.values["lv_area"], full.values["lv_area"])


@pytest.mark.parametrize("labels", [np.zeros((4, 4)), np.zeros((4, 4, 0))])
def test_arrays_that_are_no_sequence_are_refused(labels):
    with pytest.raises(DataError, match="expected \\(X, Y, T\\)"):
        check_sequence(labels, SPACING)


@pytest.mark.parametrize("spacing", [(0.3,), (0.3, 0.0), (0.3, math.nan), (1.0, 1.0, 1.0)])
def test_a_spacing_that_does_not_fit_is_refused(spacing):
    with pytest.raises(DataError, match="two positive numbers"):
        check_sequence(np.ones((4, 4, 3)), spacing)


def test_the_built_in_rules_have_the_limits_of_the_original():
    rules = load_temporal_rules("echo_temporal")
    limits = {item.name: item.limit for item in rules.attributes}
    assert limits == dict(zip(ALL, (0.2, 0.45, 0.25, 0.4, 0.3, 0.2, 7.0, 7.5), strict=True))
    assert builtin_temporal_rules() == ("echo_temporal",)
    assert rules.to_dict()["attributes"]["hd_frames_epi"]["max_mm"] == 7.5


def test_labels_can_be_renumbered(beating):
    short = beating[..., :4]
    other = np.where(short == 1, 7, short)
    rules = load_temporal_rules("echo_temporal", labels={"lv": 7})
    assert check_sequence(other, SPACING, rules).to_dict() == check_sequence(short, SPACING).to_dict()
    with pytest.raises(ConfigError, match="label lw"):
        load_temporal_rules("echo_temporal", labels={"lw": 7})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a: {measure: area, region: lv, max_mm: 2}", "limited by 'max_jump' alone"),
        ("a: {measure: neighbour_hausdorff, region: lv, max_jump: 2}", "limited by 'max_mm' alone"),
        ("a: {measure: length, region: lv, max_jump: 2}", "length needs 'other'"),
        ("a: {measure: area, region: lw, max_jump: 2}", "'lw' is no label"),
        ("a: {measure: area, region: lv, max_jmup: 2}", "max_jmup: unknown key"),
    ],
)
def test_wrong_rule_files_name_the_key(tmp_path: Path, line, message):
    path = tmp_path / "rules.yaml"
    path.write_text(f"medrl_temporal_rules: 1\nrows: y\nlabels: {{lv: 1, myo: 2}}\nattributes:\n  {line}\n")
    with pytest.raises(ConfigError) as caught:
        load_temporal_rules(path)
    assert message in str(caught.value)


def test_unknown_rules_name_what_is_built_in():
    with pytest.raises(ConfigError, match="echo_temporal"):
        load_temporal_rules("echo_temporl")
