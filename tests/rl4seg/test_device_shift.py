from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medrl.core.dataset import check_dataset, open_dataset
from medrl.core.errors import ConfigError, DataError
from medrl.core.phantoms.echo import draw_heart, draw_look, make_case, paint, rasterise, write_echo
from medrl.core.types import Case
from medrl.core.volume import read_volume
from medrl.plugins.rl4seg.device_shift import DeviceShift, shift_device, split_by_patient, write_shifted

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "camus_4ch"


@pytest.fixture(scope="module")
def echo():
    """One image of 128 × 128 pixels in [0, 255], fan of known opening, and its cavity and wall."""
    rng = np.random.default_rng(3)
    anatomy = rasterise(draw_heart(rng), (128, 128))
    look = replace(draw_look(rng, anatomy), half_angle=0.6, turn=0.0, radius=0.9, shadows=())
    return paint(rng, anatomy, look) * 255.0, anatomy.label


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_the_same_machine_and_image_give_the_same_bytes_in_any_order(echo):
    image, _ = echo
    keys = ["a", "b", "c"]
    first = {key: digest(shift_device(image, seed=4, key=key)) for key in keys}
    second = {key: digest(shift_device(image, seed=4, key=key)) for key in reversed(keys)}
    assert first == second
    assert len(set(first.values())) == 3
    assert digest(shift_device(image, seed=5, key="a")) not in first.values()


def test_global_random_numbers_and_the_image_stay_as_they_are(echo):
    image, _ = echo
    before = digest(image), np.random.get_state()[1].copy()
    shift_device(image, seed=1)
    assert digest(image) == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_strength_zero_changes_nothing_and_more_strength_more(echo):
    image, _ = echo
    np.testing.assert_array_equal(shift_device(image, strength=0.0), image.astype(np.float32))
    changes = [np.abs(shift_device(image, strength=s, seed=2) - image).mean() for s in (0.2, 0.5, 1.0)]
    assert 1.0 < changes[0] < changes[1] < changes[2]


def test_the_range_stays_and_outside_the_sector_it_stays_black(echo):
    image, _ = echo
    for seed in range(4):
        shifted = shift_device(image, seed=seed, strength=1.0)
        assert shifted.dtype == np.float32
        assert 0.0 <= shifted.min() < shifted.max() <= 255.0
        assert (shifted[:12, :20] == 0).all()
        assert (shifted[:, 121:] == 0).all()
    unit = shift_device(image / 255.0, seed=0, strength=1.0)
    np.testing.assert_allclose(unit * 255.0, shift_device(image, seed=0, strength=1.0), atol=1e-3)


def test_the_heart_stays_where_it_is_and_loses_contrast(echo):
    image, label = echo

    def contrast(found):
        return found[label == 2].mean() - found[label == 1].mean()

    shifted = np.mean([shift_device(image, seed=seed, strength=0.8) for seed in range(6)], axis=0)
    assert 0.0 < contrast(shifted) < 0.8 * contrast(image)


@pytest.mark.parametrize(
    ("axis", "probe", "turn", "back"),
    [
        (1, "last", lambda image: image[:, ::-1], lambda image: image[:, ::-1]),
        (0, "first", lambda image: image.T, lambda image: image.T),
        (0, "last", lambda image: image.T[::-1, ::-1], lambda image: image[::-1, ::-1].T),
    ],
)
def test_depth_is_where_it_is_declared(echo, axis, probe, turn, back):
    """An image turned in the declared way gives the turned result."""
    image, _ = echo
    shift = DeviceShift(0.8, seed=1, depth_axis=axis, probe=probe)
    expected = DeviceShift(0.8, seed=1)(image, "a")
    np.testing.assert_array_equal(back(shift(np.ascontiguousarray(turn(image)), "a")), expected)
    assert np.abs(back(DeviceShift(0.8, seed=1)(turn(image), "a")) - expected).max() > 5


def test_attenuation_darkens_with_depth_and_not_across(echo):
    image, _ = echo
    flat = np.where(image > 0, 140.0, 0.0)
    shifted = np.mean([shift_device(flat, seed=seed, strength=1.0) for seed in range(8)], axis=0)
    near, far = shifted[54:74, 40:50].mean(), shifted[54:74, 95:105].mean()
    assert near > far + 10
    left, right = shifted[40:60, 80:90].mean(), shifted[68:88, 80:90].mean()
    assert left == pytest.approx(right, abs=8)


def test_the_sector_becomes_smaller_and_never_larger(echo):
    image, _ = echo
    for seed in range(4):
        shifted = shift_device(image, seed=seed, strength=1.0)
        grown = np.count_nonzero((shifted > 0) & (image == 0))
        assert grown <= 0.01 * np.count_nonzero(image)
        assert 0.8 * np.count_nonzero(image) < np.count_nonzero(shifted) < np.count_nonzero(image)


def test_images_without_a_fan_are_shifted_too():
    rng = np.random.default_rng(0)
    rectangle = rng.uniform(20, 200, (40, 60))
    shifted = shift_device(rectangle, seed=0)
    assert np.isfinite(shifted).all()
    assert np.abs(shifted - rectangle).mean() > 2
    np.testing.assert_array_equal(shift_device(np.zeros((16, 16))), np.zeros((16, 16)))
    assert np.isfinite(shift_device(make_case(0, 0, shape=(32, 32)).image)).all()


@pytest.mark.parametrize("bad", [{"strength": 1.5}, {"depth_axis": 2}, {"probe": "top"}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError):
        DeviceShift(**bad)


@pytest.mark.parametrize("bad", [np.zeros((4, 16)), np.full((16, 16), 400.0), np.zeros((16, 16, 3))])
def test_an_array_that_is_no_grey_image_is_refused(bad):
    with pytest.raises(DataError, match="expected"):
        shift_device(bad)


# --- datasets --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_echo(tmp_path_factory.mktemp("echo") / "set", cases=5, test_cases=2, shape=(40, 48))


def load(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def test_a_shifted_copy_has_the_same_labels_and_grids_and_other_images(dataset, tmp_path):
    shift = DeviceShift(0.8, seed=7)
    copy = write_shifted(
        dataset, tmp_path / "copy", shift, train=["echo_000", "echo_003"], test=["echo_004", "echo_test_001"]
    )
    opened = open_dataset(copy)
    assert [case.id for case in opened.cases] == ["echo_000", "echo_003"]
    assert [case.id for case in opened.test_cases] == ["echo_004", "echo_test_001"]
    assert opened.labels == {"background": 0, "LV": 1, "MYO": 2}
    assert check_dataset(copy).ok
    for name, part, home in (
        ("echo_003", "Tr", "Tr"),
        ("echo_test_001", "Ts", "Ts"),
        ("echo_004", "Ts", "Tr"),
    ):
        before = dataset / f"images{home}" / f"{name}_0000.nii.gz"
        after = copy / f"images{part}" / f"{name}_0000.nii.gz"
        np.testing.assert_array_equal(
            load(copy / f"labels{part}" / f"{name}.nii.gz"),
            load(dataset / f"labels{home}" / f"{name}.nii.gz"),
        )
        assert np.abs(load(after) - load(before).astype(np.float32)).mean() > 5
        np.testing.assert_allclose(nib.load(after).affine, nib.load(before).affine)
    expected = shift(load(dataset / "imagesTr" / "echo_003_0000.nii.gz"), "echo_003/0/0")
    np.testing.assert_allclose(load(copy / "imagesTr" / "echo_003_0000.nii.gz"), expected, atol=1e-4)


def test_without_a_shift_the_copy_is_the_same(dataset, tmp_path):
    copy = write_shifted(dataset, tmp_path / "copy", None, test=["echo_001"])
    assert len(open_dataset(copy).cases) == 6
    name = "echo_000_0000.nii.gz"
    np.testing.assert_array_equal(load(copy / "imagesTr" / name), load(dataset / "imagesTr" / name))


def test_a_copy_of_what_is_not_there_or_onto_something_is_refused(dataset, tmp_path):
    with pytest.raises(ConfigError, match="case echo_009 does not exist"):
        write_shifted(dataset, tmp_path / "a", None, train=["echo_009"])
    with pytest.raises(ConfigError, match="named twice"):
        write_shifted(dataset, tmp_path / "a", None, train=["echo_000"], test=["echo_000"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        write_shifted(dataset, tmp_path / "b", None)
    assert not (tmp_path / "a").exists()


def cases_of(patients: int) -> list[Case]:
    return [Case(id=f"p{k:02d}_{t}", images=(), patient=f"p{k:02d}") for k in range(patients) for t in "ab"]


def test_halves_share_no_patient_and_keep_frames_together():
    cases = cases_of(11)
    first, second = split_by_patient(cases, seed=3)
    assert len(first) + len(second) == 22
    assert not {case.patient for case in first} & {case.patient for case in second}
    assert abs(len(first) - len(second)) == 2
    assert split_by_patient(list(reversed(cases)), seed=3) == (first, second)
    assert split_by_patient(cases, seed=4) != (first, second)


def test_parts_take_their_shares_of_the_patients():
    parts = split_by_patient(cases_of(20), shares=(0.5, 0.3, 0.1))
    assert [len(part) for part in parts] == [20, 12, 4]


@pytest.mark.parametrize("shares", [(0.7, 0.7), (0.0, 0.5), (0.5, 0.01), ()])
def test_shares_that_cannot_be_dealt_are_refused(shares):
    with pytest.raises(ConfigError):
        split_by_patient(cases_of(6), shares=shares)


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real images are not here: {REAL} does not exist")
def test_a_real_echo_keeps_its_fan_and_loses_contrast():
    image = read_volume(REAL / "images" / "patient0002_4CH_ED.nii.gz").data[0, :, :, 0]
    label = read_volume(REAL / "labels" / "patient0002_4CH_ED_gt.nii.gz", kind="label").data[0, :, :, 0]
    shifted = shift_device(image, seed=0, key="patient0002_4CH_ED")
    fan, after = image > 5, shifted > 5
    assert 0.85 < np.count_nonzero(after & fan) / np.count_nonzero(fan) <= 1.0
    assert np.count_nonzero(after & ~fan) < 0.03 * np.count_nonzero(fan)
    seen = (label == 1) | (label == 2)
    assert np.count_nonzero(after & seen & fan) > 0.97 * np.count_nonzero(seen & fan)
    assert (
        0
        < shifted[label == 2].mean() - shifted[label == 1].mean()
        < image[label == 2].mean() - image[label == 1].mean()
    )
