import hashlib
import json

import numpy as np
import pytest
from click.testing import CliRunner

from medrl.cli.data import synth
from medrl.core.dataset import check_dataset, load_case, open_dataset
from medrl.core.errors import ConfigError, DataError
from medrl.core.phantoms.cardiac import (
    LABELS,
    Anatomy,
    at_level,
    draw,
    draw_anatomy,
    make_patient,
    write_cardiac,
)

SMALL = {"shape": (32, 32), "slices": 2}


def digests(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_canonical_phantom_has_the_numbers_of_the_specification():
    image, label = draw(Anatomy())
    assert np.bincount(label.ravel()).tolist() == [3697, 151, 145, 103]
    assert float(image.sum(dtype=np.float64)) == pytest.approx(697.50, abs=1e-4)
    assert float((image.astype(np.float64) ** 2).sum()) == pytest.approx(376.555, abs=1e-4)


@pytest.mark.parametrize(("columns", "share"), [(4, 0.8106), (8, 0.8778), (16, 0.9495)])
def test_canonical_phantom_has_the_energy_of_the_specification_in_its_centre_columns(columns, share):
    image, _ = draw(Anatomy())
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image), norm="ortho"))
    energy = (np.abs(kspace) ** 2).sum(axis=0)
    first = (64 - columns + 1) // 2
    assert energy[first : first + columns].sum() / energy.sum() == pytest.approx(share, abs=5e-5)


def test_a_single_slice_at_rest_is_the_canonical_heart():
    assert at_level(Anatomy(), 0.0) == Anatomy()


def test_the_heart_closes_towards_the_apex_and_contracts():
    levels = [at_level(Anatomy(), level) for level in (0.0, 0.5, 0.95)]
    assert [level.rv > 0 for level in levels] == [True, True, False]
    assert levels[0].inner > levels[1].inner > levels[2].inner > 0
    rest, systole = (draw(at_level(Anatomy(), 0.0, c), (128, 128))[1] for c in (0.0, 1.0))
    for name in ("LV", "RV"):
        assert (systole == LABELS[name]).sum() < 0.75 * (rest == LABELS[name]).sum()
    # The muscle is not lost: it becomes thicker, within a fifth of its area.
    assert (systole == LABELS["MYO"]).sum() == pytest.approx((rest == LABELS["MYO"]).sum(), rel=0.25)


def test_drawn_patients_keep_to_their_ranges_and_hold_every_label():
    drawn = [draw_anatomy(np.random.default_rng(k)) for k in range(300)]
    shifts = np.array([one.shift for one in drawn])
    assert 0.09 < np.abs(shifts).max() <= 0.10
    assert 0.8 <= min(one.scale for one in drawn) < 0.81
    assert 29 < np.rad2deg(max(one.turn for one in drawn)) <= 30
    assert all(0.8 * 0.35 <= one.body <= 1.2 * 0.35 for one in drawn)
    assert all(set(np.unique(draw(one)[1])) == {0, 1, 2, 3} for one in drawn[:50])


def test_one_heart_is_the_same_on_a_coarse_and_a_fine_grid():
    for seed in range(4):
        anatomy = draw_anatomy(np.random.default_rng(seed))
        fine, coarse = draw(anatomy, (256, 256))[1], draw(anatomy, (64, 64))[1]
        for value in (1, 2, 3):
            assert (coarse == value).mean() == pytest.approx((fine == value).mean(), rel=0.12)


def test_end_systole_has_a_smaller_cavity_of_the_same_patient():
    for index in range(5):
        patient = make_patient(0, index, shape=(64, 64), slices=4)
        volume = {frame: int((label == LABELS["LV"]).sum()) for frame, label in patient.labels.items()}
        assert 0.2 < 1.0 - volume["ES"] / volume["ED"] < 0.75
        assert patient.images["ED"].shape == patient.labels["ES"].shape == (64, 64, 4)


def test_two_writes_with_one_seed_are_equal_byte_for_byte(tmp_path):
    first = write_cardiac(tmp_path / "a", cases=2, test_cases=1, seed=4, shift_k=3.0, **SMALL)
    second = write_cardiac(tmp_path / "other" / "b", cases=2, test_cases=1, seed=4, shift_k=3.0, **SMALL)
    assert digests(first) == digests(second)
    assert len(digests(first)) == 2 + 2 * 2 * (2 + 1)
    assert write_cardiac(first, cases=2, test_cases=1, seed=4, shift_k=3.0, **SMALL) == first
    with pytest.raises(DataError, match="something other"):
        write_cardiac(first, cases=3, test_cases=1, seed=4, shift_k=3.0, **SMALL)


def test_a_patient_does_not_depend_on_how_many_are_written(tmp_path):
    few = digests(write_cardiac(tmp_path / "few", cases=1, test_cases=0, **SMALL))
    many = digests(write_cardiac(tmp_path / "many", cases=3, test_cases=1, **SMALL))
    images = [name for name in few if name.endswith(".nii.gz")]
    assert len(images) == 4
    assert all(few[name] == many[name] for name in images)


def test_the_dataset_passes_every_check_and_groups_frames_by_patient(tmp_path):
    root = write_cardiac(tmp_path / "data", cases=3, test_cases=1, shape=(32, 24), slices=3)
    report = check_dataset(root)
    assert report.ok, report.problems
    dataset = open_dataset(root)
    assert [case.patient for case in dataset.cases][:3] == ["cardiac_000", "cardiac_000", "cardiac_001"]
    assert dataset.labels == LABELS
    image, label = load_case(dataset, dataset.cases[0], with_label=True)
    assert image.data.shape == (1, 32, 24, 3)
    assert image.spacing == pytest.approx((10.0, 320 / 24, 10.0))
    patient = make_patient(0, 0, shape=(32, 24), slices=3)
    assert np.array_equal(image.data[0], patient.images["ED"])
    assert np.array_equal(label.data[0], patient.labels["ED"])


def test_displacements_of_the_kspace_centre_lie_beside_the_images(tmp_path):
    root = write_cardiac(tmp_path / "data", cases=40, test_cases=1, shift_k=4.0, frames=1, **SMALL)
    beside = json.loads((root / "kspace.json").read_text())
    values = np.array([item["shift_k"] for item in beside.values()])
    assert len(values) == 41
    assert np.abs(values).max() <= 4.0
    assert values.min() < -3.0 < 3.0 < values.max()
    assert (
        beside["cardiac_003_ED"]["shift_k"]
        == make_patient(0, 3, shift_k=4.0, frames=1, **SMALL).shift_k["ED"]
    )
    # The images are those of the set without displacement.
    plain = write_cardiac(tmp_path / "plain", cases=1, test_cases=0, frames=1, **SMALL)
    assert not (plain / "kspace.json").exists()
    name = "imagesTr/cardiac_000_ED_0000.nii.gz"
    assert digests(plain)[name] == digests(root)[name]


def test_the_command_line_writes_them(tmp_path):
    arguments = ["cardiac", str(tmp_path / "d"), "--cases", "1"]
    for item in ("shape=[16,16]", "slices=1", "frames=1", "test_cases=0", "shift_k=2"):
        arguments += ["--set", item]
    done = CliRunner().invoke(synth, arguments, catch_exceptions=False, standalone_mode=False)
    assert done.exception is None
    assert [case.id for case in open_dataset(tmp_path / "d").cases] == ["cardiac_000_ED"]


@pytest.mark.parametrize(
    "wrong", [{"shape": (8, 32)}, {"slices": 0}, {"frames": 3}, {"shift_k": 20.0}, {"cases": 0}]
)
def test_arguments_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match="cardiac phantom"):
        write_cardiac(tmp_path / "d", **{"shape": (32, 32), **wrong})
