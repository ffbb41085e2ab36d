"""Anatomical validity: acceptance table, edge cases, rule files, equality with a plain implementation."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from medrl.core.errors import ConfigError, DataError, RuntimeFault
from medrl.core.validity import (
    builtin_rules,
    check,
    check_batch,
    check_stack,
    is_valid,
    load_rules,
    validity_rate,
    worker_pool,
)

ROOT = Path(__file__).parents[2]
ECHO_FILE = ROOT / "core" / "validity" / "echo.yaml"
ECHO = load_rules("echo")
HOLES_LV, HOLES_EPI = "holes_in_lv", "holes_in_epi"
DISC_LV, DISC_MYO = "disconnectivity_in_lv", "disconnectivity_in_myo"
GAP = "holes_between_lv_and_myo"
EROSION = "erosion_ratio_before_myo_split"
WIDTH = "width_ratio_between_lv_and_myo"
FRONTIER = "frontier_ratio_between_lv_and_bg_no_atr"
NAN = math.nan


def m0() -> np.ndarray:
    """The mask M0 of the specification, in rows and columns."""
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[10:50, 20:44] = 2
    mask[16:50, 26:38] = 1
    return mask


def larger(mask: np.ndarray) -> np.ndarray:
    return np.kron(mask, np.ones((4, 4), dtype=mask.dtype))


def changed(where, label: int, mask: np.ndarray | None = None) -> np.ndarray:
    mask = m0() if mask is None else mask
    mask[where] = label
    return mask


def shell_with(lv_rows: slice) -> np.ndarray:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[10:50, 20:44] = 2
    mask[lv_rows, 26:38] = 1
    return mask


def stored(mask: np.ndarray) -> np.ndarray:
    """Turn rows and columns to the order of the files, (x, y)."""
    return mask.T


EROSION_M0, EROSION_X4, EROSION_THIN = 3 / 4, 12 / math.sqrt(200), 1 / math.sqrt(2)
USUAL = {EROSION: EROSION_M0, WIDTH: 1, FRONTIER: 1}
ROWS = {
    # name: mask, values that are not 0, rules that fail
    "M0": (m0(), USUAL, set()),
    "M0 upside down": (m0()[::-1], USUAL, set()),
    "M0 each pixel x4": (larger(m0()), {**USUAL, EROSION: EROSION_X4}, set()),
    "M0 transposed": (m0().T, {**USUAL, WIDTH: 34 / 6, FRONTIER: 12 / 34}, {WIDTH}),
    "hole in the LV": (
        changed((30, 32), 0),
        {**USUAL, HOLES_LV: 1, HOLES_EPI: 1, FRONTIER: 20 / 12},
        {HOLES_LV, HOLES_EPI, FRONTIER},
    ),
    "myocardium in the LV": (
        changed((30, 32), 2),
        {**USUAL, HOLES_LV: 1, DISC_MYO: 1, EROSION: 0},
        {HOLES_LV, DISC_MYO, EROSION},
    ),
    "a stray pixel of the LV": (changed((5, 5), 1), {**USUAL, DISC_LV: 1, FRONTIER: 13 / 33}, {DISC_LV}),
    "a gap of 5 pixels": (
        changed((slice(20, 25), 26), 0),
        {**USUAL, HOLES_EPI: 5, GAP: 5, FRONTIER: 21 / 12},
        {HOLES_EPI, GAP, FRONTIER},
    ),
    "walls of one pixel": (
        changed((slice(11, 50), slice(21, 43)), 1),
        {**USUAL, WIDTH: 11, EROSION: 1},
        {WIDTH},
    ),
    "walls of two pixels": (
        changed((slice(12, 50), slice(22, 42)), 1),
        {**USUAL, WIDTH: 5, EROSION: EROSION_THIN},
        {WIDTH},
    ),
    "LV closed at the base": (shell_with(slice(16, 44)), {EROSION: EROSION_M0, WIDTH: 1}, {FRONTIER}),
    "one wall missing": (
        changed((slice(25, 50), slice(20, 26)), 0),
        {EROSION: EROSION_M0, WIDTH: 2, FRONTIER: 37 / 12},
        {FRONTIER},
    ),
    "a wall almost cut": (changed((slice(30, 34), slice(20, 25)), 0), {**USUAL, EROSION: 1 / 4}, set()),
    "M0 rolled to pixel (0, 0)": (
        np.roll(m0(), (-10, -20), (0, 1)),
        {**USUAL, EROSION: EROSION_THIN},
        set(),
    ),
    "x4, a gap of 4 pixels": (
        changed((slice(100, 104), 104), 0, larger(m0())),
        {**USUAL, EROSION: EROSION_X4, HOLES_EPI: 4, FRONTIER: 56 / 48},
        {HOLES_EPI},
    ),
    "x4, a gap of 5 pixels": (
        changed((slice(100, 105), 104), 0, larger(m0())),
        {**USUAL, EROSION: EROSION_X4, HOLES_EPI: 5, GAP: 5, FRONTIER: 57 / 48},
        {HOLES_EPI, GAP},
    ),
}
EMPTY_ROWS = {
    "all 0": (m0() * 0, {"lv_pixels": 1, EROSION: NAN, WIDTH: NAN, FRONTIER: NAN}),
    "only the LV": (np.where(m0() == 1, 1, 0), {EROSION: NAN, WIDTH: NAN, FRONTIER: 88 / 12}),
    "only the myocardium": (
        np.where(m0() == 2, 2, 0),
        {"lv_pixels": 1, EROSION: EROSION_M0, WIDTH: NAN, FRONTIER: NAN},
    ),
    "LV everywhere": (np.ones((64, 64), dtype=int), {EROSION: NAN, WIDTH: NAN}),
    "myocardium everywhere": (
        np.full((64, 64), 2),
        {"lv_pixels": 1, EROSION: NAN, WIDTH: NAN, FRONTIER: NAN},
    ),
}


def expected(values: dict[str, float]) -> dict[str, float]:
    return {rule.name: float(values.get(rule.name, 0.0)) for rule in ECHO.rules}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_acceptance_table_has_its_values_and_verdict(name):
    mask, values, failed = ROWS[name]
    report = check(stored(mask), ECHO)
    assert report.values == pytest.approx(expected(values), rel=1e-12, abs=0)
    assert set(report.failed) == failed
    assert report.valid == (not failed)
    assert is_valid(stored(mask), ECHO) == report.valid


def test_the_numbers_of_the_table_are_those_that_the_specification_prints():
    printed = {EROSION_X4: 0.8485, EROSION_THIN: 0.7071}
    assert all(round(value, 4) == text for value, text in printed.items())
    ratios = {(34, 6): 5.667, (12, 34): 0.353, (20, 12): 1.667, (13, 33): 0.394, (37, 12): 3.083}
    assert all(round(float(Fraction(*pair)), 3) == text for pair, text in ratios.items())


@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_a_mask_without_a_structure_gets_a_verdict_and_no_exception(name):
    mask, values = EMPTY_ROWS[name]
    report = check(stored(mask), ECHO)
    assert report.values == pytest.approx(expected(values), rel=1e-12, abs=0, nan_ok=True)
    assert not report.valid
    assert not is_valid(stored(mask), ECHO)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2), (0, 5), (3, 3)])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_the_smallest_masks_get_verdicts(shape, label):
    report = check(np.full(shape, label), ECHO)
    assert not report.valid
    assert set(report.values) == {rule.name for rule in ECHO.rules}


def test_what_reaches_the_edge_of_the_image_is_neither_hole_nor_gap():
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[10:16, :] = 2  # the myocardium parts the background in two
    mask[16:, 8:24] = 1
    values = check(stored(mask), ECHO).values
    assert values[HOLES_EPI] == values[GAP] == 0


def test_nan_fails_a_rule_with_limits_and_one_without():
    rules = {rule.name: rule for rule in ECHO.rules}
    assert not rules[EROSION].passes(NAN)
    assert not rules[HOLES_LV].passes(NAN)
    assert rules[EROSION].passes(0.12)
    assert not rules[EROSION].passes(np.nextafter(0.12, 0))
    assert rules[WIDTH].passes(4.15)
    assert not rules[WIDTH].passes(4.1501)


def test_eroded_pieces_below_the_limit_are_removed_and_larger_ones_count():
    rules = load_rules("echo", rows="x")
    mask = np.zeros((256, 256), dtype=np.uint8)
    mask[100:140, 100:140] = 2
    mask[119:121, 140:144] = 2  # a bridge of two rows, gone after one erosion
    small, large = mask.copy(), mask.copy()
    small[118:121, 144:147] = 2  # erodes to one pixel, below 4
    large[118:122, 144:148] = 2  # erodes to four
    assert check(small, rules).values[EROSION] == pytest.approx(20 / 20)
    assert check(large, rules).values[EROSION] == pytest.approx(1 / 20)


def echo_phantom(wall: int = 14, base: int = 170) -> np.ndarray:
    rows, columns = np.mgrid[:256, :256]
    lv = ((rows - 120) / 70) ** 2 + ((columns - 128) / 38) ** 2 <= 1
    epi = ((rows - 120) / (70 + wall)) ** 2 + ((columns - 128) / (38 + wall)) ** 2 <= 1
    return np.where(lv, 1, np.where(epi, 2, 0)) * (rows <= base)


def test_the_phantom_of_rl4seg3d_has_its_numbers():
    mask = echo_phantom()
    assert [int((mask == label).sum()) for label in (1, 2)] == [7641, 4124]
    report = check(stored(mask), ECHO)
    assert report.valid
    assert round(report.values[WIDTH], 3) == 2.679
    assert round(report.values[FRONTIER], 3) == 0.688
    holed = mask.copy()
    holed[100:103, 120:123] = 0
    assert check(stored(holed), ECHO).values[HOLES_LV] == 9
    thin = check(stored(echo_phantom(wall=3)), ECHO)
    assert (thin.values[WIDTH], thin.failed) == (12.5, (WIDTH,))
    uncut = check(stored(echo_phantom(base=255)), ECHO)
    assert (uncut.values[FRONTIER], uncut.failed) == (0, (FRONTIER,))


# Equality with a plain implementation


@pytest.fixture(scope="module")
def plain():
    """The plain scikit-image implementation and the masks of the benchmark."""
    spec = importlib.util.spec_from_file_location(
        "benchmark_of_validity", ROOT / "benchmarks" / "validity.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_values_and_verdicts_equal_those_of_a_plain_implementation(plain):
    verdicts = set()
    for kind, mask in plain.various(45):
        for cut in (mask, mask[: mask.shape[0] * 2 // 3], mask[:, mask.shape[1] // 3 :]):
            values = plain.plain_values(cut)
            report = check(cut, ECHO)
            assert report.values == pytest.approx(values, rel=1e-12, abs=0, nan_ok=True), kind
            assert report.valid == plain.plain_verdict(values) == is_valid(cut, ECHO), kind
            verdicts.add(report.valid)
    assert verdicts == {True, False}


def maze() -> np.ndarray:
    """Corridors one pixel wide that all lead outside: nothing is enclosed, much is far from the edge."""
    mask = np.ones((65, 65), dtype=np.uint8)
    mask[1:-1:2, 1:-1] = 0
    for k, row in enumerate(range(2, 63, 2)):
        mask[row, 1 if k % 2 else 63] = 0
    mask[0, 1] = 0
    return mask


@pytest.mark.parametrize("name", ["checkerboard", "stripes", "maze", "closed maze", "maze of both", "random"])
def test_masks_made_to_be_awkward_equal_the_plain_implementation(plain, name):
    masks = {
        "checkerboard": np.indices((40, 40)).sum(0) % 2 + 1,
        "stripes": np.indices((40, 40))[0] % 3,
        "maze": maze(),
        "closed maze": np.pad(changed((0, 1), 1, maze()), 3),
        "maze of both": np.where(maze() == 1, 1 + np.indices((65, 65)).sum(0) // 9 % 2, 0),
        "random": np.random.default_rng(0).integers(0, 3, (48, 40)),
    }
    mask = masks[name].astype(np.uint8)
    assert check(mask, ECHO).values == pytest.approx(plain.plain_values(mask), rel=1e-12, nan_ok=True)


# Kinds of input


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int64, np.float32, np.float64])
def test_every_type_that_holds_whole_numbers_gives_the_same_report(dtype):
    mask = stored(changed((30, 32), 0))
    assert check(mask.astype(dtype), ECHO) == check(mask, ECHO)


def test_tensors_fortran_order_and_unit_axes_give_the_same_report_and_nothing_is_changed():
    mask = np.ascontiguousarray(stored(changed((5, 5), 1)))
    before, report = mask.copy(), check(mask, ECHO)
    assert check(torch.from_numpy(mask), ECHO) == report
    assert check(np.asfortranarray(mask), ECHO) == report
    assert check(mask[..., None], ECHO) == check(mask[None], ECHO) == report
    assert np.array_equal(mask, before)
    mask.flags.writeable = False
    assert check(mask, ECHO) == report


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (np.full((4, 4), 0.5), "not whole numbers"),
        (np.full((4, 4), np.nan), "not whole numbers"),
        (np.zeros((4, 4), dtype=complex), "complex128"),
        (np.zeros((4, 4, 4), dtype=int), "expected two dimensions"),
        (np.zeros(4, dtype=int), "expected two dimensions"),
    ],
)
def test_what_is_no_label_map_is_an_error_that_says_why(mask, text):
    with pytest.raises(DataError, match=text):
        check(mask, ECHO)


def test_values_that_no_label_names_are_background_or_refused(tmp_path):
    mask = stored(changed((slice(50, 60), slice(20, 44)), 3))
    assert check(mask, ECHO).valid
    text = (
        (ROOT / "core" / "validity" / "echo.yaml")
        .read_text()
        .replace("unlisted: background", "unlisted: refuse")
    )
    path = tmp_path / "strict.yaml"
    path.write_text(text)
    strict = load_rules(path)
    with pytest.raises(DataError, match=r"do not name: 3"):
        check(mask, strict)
    assert check(stored(m0()), strict).valid


def test_a_stack_has_one_report_for_each_frame():
    frames = [stored(m0()), stored(m0() * 0), stored(changed((30, 32), 0))]
    expected_verdicts = [True, False, False]
    stack = np.stack(frames, axis=-1)
    assert [report.valid for report in check_stack(stack, ECHO)] == expected_verdicts
    assert check_stack(stack[:, :, None], ECHO) == check_stack(stack, ECHO)
    assert check_stack(np.stack(frames), ECHO, axis=0) == check_stack(torch.from_numpy(stack), ECHO)
    with pytest.raises(DataError, match="expected frames"):
        check_stack(frames[0], ECHO)


def test_a_batch_may_hold_masks_of_several_sizes_and_its_rate_is_the_part_that_is_valid():
    masks = [stored(m0()), stored(larger(m0())), stored(m0() * 0), stored(m0().T)]
    assert check_batch(masks, ECHO) == [check(mask, ECHO) for mask in masks]
    assert validity_rate(masks, ECHO) == 0.5
    assert validity_rate(torch.zeros(3, 8, 8), ECHO) == 0
    assert math.isnan(validity_rate([], ECHO))
    assert check_batch([], ECHO) == []


def test_worker_processes_give_the_same_reports_in_the_same_order():
    rng = np.random.default_rng(3)
    masks = [stored(np.roll(m0(), rng.integers(-20, 20, 2), (0, 1))) for _ in range(11)]
    with worker_pool(1) as pool:
        assert check_batch(masks, ECHO, workers=pool) == check_batch(masks, ECHO)
        assert validity_rate(np.stack(masks), ECHO, workers=pool) == validity_rate(masks, ECHO)
    assert check_batch(masks, ECHO, workers=1) == check_batch(masks, ECHO)


def test_a_worker_that_dies_is_an_error_that_says_so():
    with pytest.raises(RuntimeFault, match="died"), worker_pool(1) as pool:
        list(pool.map(os._exit, [1]))


# Rules


def test_echo_has_the_nine_rules_and_their_limits():
    free = {"lv_pixels", HOLES_LV, HOLES_EPI, DISC_LV, DISC_MYO, GAP}
    limits = {rule.name: (rule.low, rule.high) for rule in ECHO.rules}
    assert limits == {
        **dict.fromkeys(free, (0, 0)),
        EROSION: (0.12, math.inf),
        WIDTH: (0, 4.15),
        FRONTIER: (0.05, 1.5),
    }
    assert builtin_rules() == ("echo", "echo_atrium")


def with_atrium() -> np.ndarray:
    return changed((slice(50, 60), slice(24, 40)), 3)


def test_the_atrium_has_rules_of_its_own():
    rules = load_rules("echo_atrium")
    assert len(rules.rules) == 13
    good = check(stored(with_atrium()), rules)
    assert good.failed == ("frontier_ratio_between_myo_and_atrium",)
    assert good.values["frontier_ratio_between_myo_and_atrium"] == (3 + 3) / 24
    assert good.values["frontier_ratio_between_lv_and_bg"] == 0
    narrow = changed((slice(50, 60), slice(26, 38)), 3)
    report = check(stored(narrow), rules)
    assert report.values["frontier_ratio_between_myo_and_atrium"] == 2 / 24
    assert report.valid
    assert check(stored(m0()), rules).failed == ("frontier_ratio_between_lv_and_bg",)
    holed = changed((55, 30), 0, narrow.copy())
    assert check(stored(holed), rules).failed == ("holes_in_atrium",)
    stray = changed((5, 5), 3, narrow.copy())
    assert check(stored(stray), rules).failed == ("disconnectivity_in_atrium",)


def test_the_gap_between_ventricle_and_atrium_is_measured_between_these_two():
    rules = load_rules("echo_atrium")
    mask = changed((slice(50, 60), slice(26, 38)), 3)
    mask[49:51, 30:33] = 0
    values = check(stored(mask), rules).values
    assert values["holes_between_lv_and_atrium"] == 6
    assert values[GAP] == 0


def test_labels_and_orientation_can_be_replaced():
    swapped = np.array([0, 2, 300], dtype=np.uint16)[m0()]
    rules = load_rules("echo", labels={"lv": 2, "myo": 300})
    assert check(stored(swapped), rules) == check(stored(m0()), ECHO)
    assert check(m0(), load_rules("echo", rows="x")) == check(stored(m0()), ECHO)
    assert not check(m0(), ECHO).valid
    with pytest.raises(ConfigError, match="did you mean 'myo'"):
        load_rules("echo", labels={"myoc": 2})


CUSTOM = """
medrl_rules: 1
rows: x
labels: {kidney: 4, tumour: 9}
regions: {organ: [kidney, tumour]}
rules:
  kidney_there: {measure: exists, region: kidney}
  organ_in_one: {measure: components, region: organ}
  organ_mm2: {measure: area, region: organ, unit: mm2, min: 10, max: 30}
  tumour_part: {measure: area, region: tumour, unit: fraction, max: 0.1}
  tumour_px: {measure: area, region: tumour, min: 1}
  tumour_to_kidney: {measure: frontier_ratio, region: tumour, other: kidney, min: 1, max: 20}
"""


def test_rules_for_other_organs_are_a_file(tmp_path):
    path = tmp_path / "kidney.yaml"
    path.write_text(CUSTOM)
    rules = load_rules(path)
    mask = np.zeros((20, 10), dtype=np.int16)
    mask[2:8, 2:8] = 4
    mask[4:6, 4:6] = 9
    report = check(mask, rules, spacing=(0.5, 1.5))
    assert report.values == {
        "kidney_there": 0,
        "organ_in_one": 0,
        "organ_mm2": 27.0,
        "tumour_part": 0.02,
        "tumour_px": 4,
        "tumour_to_kidney": 2,
    }
    assert report.valid
    assert report.to_dict() == {"valid": True, "failed": [], "values": report.values}
    with pytest.raises(ConfigError, match="needs the spacing"):
        check(mask, rules)
    assert check(mask * 0, rules, spacing=(1, 1)).failed == (
        "kidney_there",
        "organ_mm2",
        "tumour_px",
        "tumour_to_kidney",
    )
    assert rules.to_dict()["rules"]["tumour_px"] == {
        "measure": "area",
        "region": "tumour",
        "other": "",
        "min": 1.0,
        "max": None,
        "ignore_one_in": 0,
        "unit": "px",
    }


HOLES = "measure: holes, region: lv"
WRONG = {
    "rules.holes_in_lv.regoin: unknown key; did you mean 'region'": (HOLES, f"{HOLES}, regoin: lv"),
    "lables: unknown key; did you mean 'labels'": ("rows: y", "rows: y\nlables: {lv: 1}"),
    "rules.holes_in_lv.measure: Input should be 'exists'": (HOLES, "measure: hole, region: lv"),
    "rules.holes_in_lv.region: 'lvv' is no label and no region; did you mean 'lv'": (HOLES, f"{HOLES}v"),
    "regions.epi: 'la' is no label": ("epi: [lv, myo]", "epi: [lv, la]"),
    "regions.lv: is already a label": ("epi: [lv, myo]", "epi: [lv, myo]\n  lv: [myo]"),
    "regions.epi: has no label": ("epi: [lv, myo]", "epi: []"),
    "labels.myo: the value 1 already belongs to 'lv'": ("myo: 2", "myo: 1"),
    "labels.lv: Input should be a valid integer": ("lv: 1", "lv: one"),
    "rows: Input should be 'x' or 'y', got 'z'": ("rows: y", "rows: z"),
    "medrl_rules: Input should be 1": ("medrl_rules: 1", "medrl_rules: 2"),
    "rules.holes_between_lv_and_myo: gap needs 'other'": ("lv, other: myo, ignore", "lv, ignore"),
    "rules.holes_in_lv: holes takes no 'other'": (HOLES, f"{HOLES}, other: myo"),
    "rules.holes_in_lv: holes takes no 'ignore_one_in'": (HOLES, f"{HOLES}, ignore_one_in: 4"),
    "rules.holes_in_lv: holes takes no 'unit'": (HOLES, f"{HOLES}, unit: px"),
    "rules.holes_in_lv: area needs 'min', 'max' or both": (HOLES, "measure: area, region: lv"),
    "min 0.05 is larger than max 0.01": ("min: 0.05, max: 1.5", "min: 0.05, max: 0.01"),
    "rules.holes_in_lv.region: the background can only be": (HOLES, "measure: holes, region: background"),
    "duplicate key 'holes_in_lv'": ("rules:\n", "rules:\n  holes_in_lv: {measure: exists, region: lv}\n"),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_rule_file_is_an_error_that_names_the_key(message, tmp_path):
    old, new = WRONG[message]
    text = ECHO_FILE.read_text()
    assert old in text
    path = tmp_path / "rules.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_rules(path)
    assert message in str(caught.value)


def test_every_problem_of_a_rule_file_is_told_at_once(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(
        CUSTOM.replace("region: kidney}", "region: kidny}").replace("[kidney, tumour]", "[kidney, cyst]")
    )
    with pytest.raises(ConfigError) as caught:
        load_rules(path)
    assert len(caught.value.problems) == 2


def test_an_unknown_name_of_rules_gives_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'echo'"):
        load_rules("eco")
