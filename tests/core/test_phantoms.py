import hashlib
import json

import nibabel as nib
import numpy as np
import pytest

from medrl.core.errors import ConfigError, DataError
from medrl.core.phantoms.prostate import make_case, write_prostate

SMALL = {"shape": (32, 32, 10), "spacing": (1.0, 1.0, 6.0)}


def digests(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def cases():
    return [make_case(0, index) for index in range(12)]


def test_two_writes_with_one_seed_are_equal_byte_for_byte(tmp_path):
    first = write_prostate(tmp_path / "a", cases=3, test_cases=2, seed=4, **SMALL)
    second = write_prostate(tmp_path / "other" / "b", cases=3, test_cases=2, seed=4, **SMALL)
    assert digests(first) == digests(second)
    assert len(digests(first)) == 1 + 5 * (3 + 2)


def test_another_seed_gives_other_images():
    assert not np.array_equal(make_case(0, 0, **SMALL).image, make_case(1, 0, **SMALL).image)


def test_a_case_does_not_depend_on_how_many_are_written(tmp_path):
    few = digests(write_prostate(tmp_path / "few", cases=2, test_cases=0, **SMALL))
    many = digests(write_prostate(tmp_path / "many", cases=4, test_cases=1, **SMALL))
    images = [name for name in few if name.endswith(".nii.gz")]
    assert images
    assert all(few[name] == many[name] for name in images)


def test_training_and_test_cases_share_no_image():
    train = {make_case(0, index, **SMALL).image.tobytes() for index in range(4)}
    test = {make_case(0, index, test=True, **SMALL).image.tobytes() for index in range(4)}
    assert len(train | test) == 8


def test_the_layout_is_nnunet_raw(tmp_path):
    root = write_prostate(tmp_path / "set", cases=2, test_cases=1, **SMALL)
    record = json.loads((root / "dataset.json").read_text())
    assert record["channel_names"] == {"0": "T2", "1": "ADC", "2": "DWI"}
    assert record["labels"] == {"background": 0, "prostate": 1, "PCa": 2, "csPCa": 3}
    assert record["numTraining"] == 2
    assert record["file_ending"] == ".nii.gz"
    assert sorted(path.name for path in (root / "imagesTr").iterdir()) == [
        f"prostate_00{case}_000{channel}.nii.gz" for case in range(2) for channel in range(3)
    ]
    assert [path.name for path in (root / "labelsTs").iterdir()] == ["prostate_test_000.nii.gz"]
    assert sorted(path.name for path in root.iterdir()) == sorted(
        ["dataset.json", "imagesTr", "labelsTr", "masksTr", "imagesTs", "labelsTs", "masksTs"]
    )


def test_files_hold_the_case_with_its_geometry_and_codes(tmp_path):
    root = write_prostate(tmp_path / "set", cases=2, test_cases=0, seed=3, **SMALL)
    case = make_case(3, 1, **SMALL)
    image = nib.load(root / "imagesTr" / "prostate_001_0001.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), case.image[1])
    np.testing.assert_allclose(image.affine, case.affine, atol=1e-5)
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
    assert image.header.get_zooms() == (1.0, 1.0, 6.0)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)
    label = nib.load(root / "labelsTr" / "prostate_001.nii.gz")
    mask = nib.load(root / "masksTr" / "prostate_001.nii.gz")
    assert label.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asanyarray(mask.dataobj), np.asanyarray(label.dataobj) > 0)
    np.testing.assert_allclose(label.affine, image.affine)


def test_some_affines_are_oblique_and_some_are_not(cases):
    oblique = [np.abs(case.affine[:3, :3] - np.diag((0.5, 0.5, 3.0))).max() > 1e-3 for case in cases]
    assert 0 < sum(oblique) < len(cases)
    for case in cases:
        np.testing.assert_allclose(np.linalg.norm(case.affine[:3, :3], axis=0), (0.5, 0.5, 3.0))
        assert np.linalg.det(case.affine[:3, :3]) > 0


def test_four_cases_in_a_row_have_no_lesion_one_and_two(cases):
    grades = [frozenset(np.unique(case.label)) - {0, 1} for case in cases[:4]]
    assert set(grades) == {frozenset(), frozenset({2}), frozenset({3}), frozenset({2, 3})}


def test_every_gland_lies_inside_the_grid_and_glands_differ(cases):
    volumes = []
    for case in cases:
        gland = case.label > 0
        assert not gland[[0, -1]].any()
        assert not gland[:, [0, -1]].any()
        assert not gland[..., [0, -1]].any()
        volumes.append(gland.sum())
    assert max(volumes) > 1.5 * min(volumes)


def test_lesions_are_dark_on_t2_and_adc_and_bright_on_dwi_and_grade_three_is_stronger(cases):
    contrast = {2: [], 3: []}
    for case in cases:
        image = case.image.astype(float)
        benign = np.median(image[:, case.label == 1], axis=1)
        for grade, found in contrast.items():
            if (case.label == grade).any():
                found.append(np.median(image[:, case.label == grade], axis=1) / benign)
    mild, strong = (np.mean(contrast[grade], axis=0) for grade in (2, 3))
    assert mild[1] < 0.85
    assert mild[2] > 1.1
    assert strong[0] < 0.95
    assert strong[1] < mild[1]
    assert strong[2] > mild[2]


def test_channels_are_correlated_and_not_copies(cases):
    inside = [np.corrcoef(case.image[:, case.label == 1]) for case in cases]
    t2_adc = np.mean([matrix[0, 1] for matrix in inside])
    assert 0.2 < t2_adc < 0.95


def test_no_threshold_on_one_channel_finds_the_gland(cases):
    for channel in range(3):
        best = []
        for case in cases:
            values, gland = case.image[channel].astype(float), case.label > 0
            cuts = np.percentile(values, range(5, 100, 5))
            best.append(
                max(2 * ((values > cut) & gland).sum() / ((values > cut).sum() + gland.sum()) for cut in cuts)
            )
        assert np.mean(best) < 0.6


def test_writing_again_leaves_the_same_dataset_as_it_is(tmp_path):
    root = write_prostate(tmp_path / "set", cases=1, test_cases=0, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_prostate(root, cases=1, test_cases=0, **SMALL) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path):
    root = write_prostate(tmp_path / "set", cases=1, test_cases=0, **SMALL)
    with pytest.raises(DataError, match="other than the phantom"):
        write_prostate(root, cases=2, test_cases=0, **SMALL)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    with pytest.raises(DataError, match="other than the phantom"):
        write_prostate(mine, cases=1, test_cases=0, **SMALL)
    assert (mine / "notes.txt").read_text() == "keep"


def test_an_empty_folder_is_filled_and_nothing_is_left_beside_it(tmp_path):
    (tmp_path / "set").mkdir()
    write_prostate(tmp_path / "set", cases=1, test_cases=0, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    "bad",
    [{"shape": (8, 64, 20)}, {"spacing": (0.5, 0.0, 3.0)}, {"cases": 0}, {"test_cases": -1}, {"seed": -1}],
)
def test_arguments_that_make_no_dataset_are_refused(tmp_path, bad):
    with pytest.raises(ConfigError):
        write_prostate(tmp_path / "set", **{"cases": 1, "test_cases": 0, **SMALL, **bad})
    assert not (tmp_path / "set").exists()
