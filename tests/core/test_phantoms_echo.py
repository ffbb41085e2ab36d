import hashlib
import json
import time
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from medrl.core.dataset import check_dataset, load_case, open_dataset
from medrl.core.errors import ConfigError, DataError
from medrl.core.phantoms.echo import draw_heart, draw_look, make_case, paint, rasterise, write_echo
from medrl.core.validity import check_batch, load_rules

SMALL = {"shape": (32, 32)}


def digests(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def masks_of(count, **settings):
    return np.stack([make_case(3, index, **settings).label for index in range(count)])


@pytest.fixture(scope="module")
def cases():
    return [make_case(0, index) for index in range(24)]


@pytest.mark.parametrize("shape_shift", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (100, 70), (70, 100)])
def test_every_mask_keeps_the_anatomical_rules(shape, shape_shift):
    masks = masks_of(40, shape=shape, shape_shift=shape_shift)
    assert [report.failed for report in check_batch(masks, load_rules("echo")) if not report.valid] == []
    assert set(np.unique(masks)) == {0, 1, 2}


@pytest.mark.parametrize("shape", [(48, 48), (64, 64), (128, 96)])
def test_masks_with_atrium_keep_the_rules_of_the_atrium(shape):
    masks = masks_of(30, shape=shape, atrium=True)
    assert [report.failed for report in check_batch(masks, load_rules("echo_atrium")) if report.failed] == []
    assert all(set(np.unique(mask)) == {0, 1, 2, 3} for mask in masks)


def test_masks_of_full_size_are_valid():
    masks = np.concatenate([masks_of(6, shape=(256, 256), shape_shift=s) for s in (0.0, 1.0)])
    assert all(report.valid for report in check_batch(masks, load_rules("echo")))


def test_hearts_are_rarely_redrawn():
    masks = [rasterise(draw_heart(np.random.default_rng(k)), (64, 64)).label for k in range(200)]
    plain = np.where(np.stack(masks) == 3, 0, masks)
    assert sum(not report.valid for report in check_batch(plain, load_rules("echo"))) <= 2


def test_one_heart_is_the_same_on_a_coarse_and_a_fine_grid():
    for seed in range(5):
        heart = draw_heart(np.random.default_rng(seed))
        fine, coarse = rasterise(heart, (256, 256)).label, rasterise(heart, (64, 64)).label
        for value in (1, 2, 3):
            assert (coarse == value).mean() == pytest.approx((fine == value).mean(), rel=0.12, abs=2e-3)


def test_two_writes_with_one_seed_are_equal_byte_for_byte(tmp_path):
    first = write_echo(tmp_path / "a", cases=3, test_cases=2, seed=4, shift=0.5, **SMALL)
    second = write_echo(tmp_path / "other" / "b", cases=3, test_cases=2, seed=4, shift=0.5, **SMALL)
    assert digests(first) == digests(second)
    assert len(digests(first)) == 1 + 2 * (3 + 2)


def test_a_case_does_not_depend_on_how_many_are_written(tmp_path):
    few = digests(write_echo(tmp_path / "few", cases=2, test_cases=0, **SMALL))
    many = digests(write_echo(tmp_path / "many", cases=4, test_cases=1, **SMALL))
    images = [name for name in few if name.endswith(".nii.gz")]
    assert len(images) == 4
    assert all(few[name] == many[name] for name in images)


def test_seed_test_stream_and_domain_share_no_mask():
    settings = [
        {},
        {"test": True},
        {"shift": 0.85},
        {"shift": 0.85, "style": "outside"},
        {"shape_shift": 1.0},
    ]
    masks = [make_case(seed, k, **s).label.tobytes() for seed in (0, 1) for s in settings for k in range(3)]
    assert len(set(masks)) == len(masks)


def test_a_label_does_not_depend_on_whether_the_atrium_is_asked_for():
    plain, full = make_case(0, 1), make_case(0, 1, atrium=True)
    np.testing.assert_array_equal(plain.image, full.image)
    np.testing.assert_array_equal(plain.label, np.where(full.label == 3, 0, full.label))


def test_the_layout_is_nnunet_raw_in_two_dimensions(tmp_path):
    root = write_echo(tmp_path / "set", cases=2, test_cases=1, shape=(40, 32))
    record = json.loads((root / "dataset.json").read_text())
    assert record["labels"] == {"background": 0, "LV": 1, "MYO": 2}
    assert record["channel_names"] == {"0": "echo"}
    image = nib.load(root / "imagesTr" / "echo_001_0000.nii.gz")
    assert image.shape == (40, 32)
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), make_case(0, 1, shape=(40, 32)).image)
    assert image.header.get_zooms() == pytest.approx((3.85, 3.85))
    assert (root / "labelsTs" / "echo_test_000.nii.gz").is_file()
    assert check_dataset(root).ok
    dataset = open_dataset(root)
    volume, label = load_case(dataset, dataset.cases[0], with_label=True)
    assert volume.data.shape == label.data.shape == (1, 40, 32, 1)


def test_the_atrium_is_named_if_it_is_asked_for(tmp_path):
    root = write_echo(tmp_path / "set", cases=1, test_cases=0, shape=(48, 48), atrium=True)
    assert open_dataset(root).labels == {"background": 0, "LV": 1, "MYO": 2, "LA": 3}


def test_the_cavity_is_dark_in_a_brighter_wall_and_the_outside_of_the_sector_is_black(cases):
    cavity, wall = (np.mean([c.image[c.label == value].mean() for c in cases]) for value in (1, 2))
    assert wall > 1.5 * cavity
    assert all((case.image[[0, -1], :8] == 0).all() for case in cases)
    assert all(20 < case.image[case.label == 1].mean() < 140 for case in cases)


def test_no_threshold_finds_the_cavity(cases):
    best = []
    for case in cases:
        inside, truth = case.image > 0, case.label == 1
        best.append(
            max(
                2 * (found & truth).sum() / (found.sum() + truth.sum())
                for cut in range(20, 200, 8)
                for found in [inside & (case.image < cut)]
            )
        )
    assert np.mean(best) < 0.75


def test_speckle_follows_rayleigh_statistics():
    """The magnitude of complex Gaussian noise has a coefficient of variation of 0.5227."""
    heart = draw_heart(np.random.default_rng(0))
    anatomy = rasterise(heart, (192, 192))
    flat = replace(anatomy, **{name: np.full((192, 192), -1.0) for name in ("cavity", "wall", "atrium")})
    flat = replace(flat, **{name: np.full((192, 192), -1.0) for name in ("right", "valve", "papillary")})
    flat = replace(flat, shell=np.full((192, 192), 9.0))
    look = replace(
        draw_look(np.random.default_rng(1), anatomy),
        contrast=0.0,
        haze=(-120.0, 0.0),
        noise=-120.0,
        attenuation=0.0,
        shadows=(),
        gain=-6.0,
        span=60.0,
        gamma=1.0,
        half_angle=0.7,
        turn=0.0,
        spread=(0.012, 0.02),
    )
    image = paint(np.random.default_rng(2), flat, look)
    # One sample a resolution cell, in the focus, where interpolation between rows is exact enough.
    level = image[70:122:2, 40:64:2] * 60.0 - 60.0 + 6.0
    magnitude = 10.0 ** (level / 20.0)
    assert magnitude.std() / magnitude.mean() == pytest.approx(0.5227, abs=0.06)


@pytest.mark.parametrize("style", ["haze", "outside"])
def test_a_shift_changes_the_look_and_grows(style):
    def histogram(shift):
        images = np.stack([make_case(0, k, shift=shift, style=style).image for k in range(24)])
        return np.histogram(images[images > 0], bins=16, range=(0, 256))[0] / (images > 0).sum()

    near, far = (np.abs(histogram(shift) - histogram(0.0)).sum() for shift in (0.3, 0.9))
    assert far > near > 0.02
    assert far > 0.15


def test_haze_lowers_the_contrast_of_the_cavity(cases):
    def contrast(found):
        return np.mean([np.median(c.image[c.label == 2]) - np.median(c.image[c.label == 1]) for c in found])

    assert contrast([make_case(0, k, shift=0.85) for k in range(24)]) < 0.6 * contrast(cases)


def test_a_shift_of_shape_widens_the_cavity_and_thins_the_wall(cases):
    dilated = [make_case(0, index, shape_shift=1.0) for index in range(24)]

    def ratio(found):
        return np.mean([(case.label == 1).sum() / (case.label == 2).sum() for case in found])

    assert ratio(dilated) > 1.4 * ratio(cases)


def test_phantoms_of_64_pixels_are_made_at_a_hundred_a_second():
    """Half of what is asked for, so that a busy machine does not fail."""
    start = time.process_time()
    for index in range(50):
        make_case(9, index, shift=0.5)
    assert 50 / (time.process_time() - start) > 100


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path):
    root = write_echo(tmp_path / "set", cases=1, test_cases=0, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_echo(root, cases=1, test_cases=0, **SMALL) == root
    with pytest.raises(DataError, match="other than the phantom"):
        write_echo(root, cases=1, test_cases=0, shift=0.5, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize(
    "bad",
    [
        {"shape": (16, 64)},
        {"shape": (64, 64, 3)},
        {"shift": 1.5},
        {"shape_shift": -0.1},
        {"style": "hazy"},
        {"cases": 0},
        {"test_cases": -1},
        {"seed": -1},
    ],
)
def test_arguments_that_make_no_dataset_are_refused(tmp_path, bad):
    with pytest.raises(ConfigError):
        write_echo(tmp_path / "set", **{"cases": 1, "test_cases": 0, **SMALL, **bad})
    assert not (tmp_path / "set").exists()
