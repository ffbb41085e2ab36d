"""Known answers and whole passes over real images; skipped where they are absent."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medrl.core.dataset import check_dataset, convert, load_case, make_splits, open_dataset, stack_channels
from medrl.core.errors import DataError
from medrl.core.preview import preview_case
from medrl.core.types import Case
from medrl.core.volume import read_hdf5, read_volume, to_ras, turn_like, voxel_volume_mm3, write_volume

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the real images are not here: {DATA} does not exist"),
]


def test_liver_volume_and_mean_density_equal_the_published_ones():
    folder = DATA / "ct_totalsegmentator"
    labels = read_volume(folder / "example_seg_fast.nii.gz", kind="label")
    image = read_volume(folder / "example_ct_sm.nii.gz")
    liver = labels.data == 5
    assert np.count_nonzero(liver) * voxel_volume_mm3(labels) == pytest.approx(1_062_450.0, abs=1e-6)
    assert float(image.data[liver].mean(dtype=np.float64)) == pytest.approx(44.858551, abs=1e-6)
    published = json.loads((folder / "example_seg_fast_statistics.json").read_text())["liver"]
    assert published["volume"] == 1_062_450.0


def test_nifti_and_dicom_agree_in_orientation_although_their_axes_run_apart():
    """The segmentation was made on the series, but stored with its y axis the other way round."""
    folder = DATA / "ct_totalsegmentator"
    series = read_volume(folder / "example_ct_dicom")
    stored = read_volume(folder / "example_seg_dicom.nii.gz", kind="label")
    assert np.sign(series.affine[1, 1]) != np.sign(stored.affine[1, 1])
    labels = turn_like(stored, series)
    assert labels is not None
    liver = series.data[labels.data == 5]
    assert 80 < float(np.median(liver)) < 130  # with contrast agent
    assert float(liver.std()) < 40
    # Taken in stored order the label covers other tissue: the check above can fail.
    assert float(series.data[stored.data == 5].std()) > 200
    # The liver lies on the patient's right, the spleen on the left; in RAS the index rises to the right.
    x_liver, x_spleen = (
        float(np.argwhere(to_ras(labels.data[0] == value, series.affine)[0])[:, 0].mean()) for value in (5, 1)
    )
    assert x_liver > x_spleen + 100


def test_the_dicom_series_equals_what_simpleitk_reads():
    sitk = pytest.importorskip("SimpleITK")
    for folder in (DATA / "ct_totalsegmentator" / "example_ct_dicom", DATA / "dicom_ct_torchio"):
        series = read_volume(folder)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        image = reader.Execute()
        assert np.array_equal(series.data[0], sitk.GetArrayFromImage(image).transpose(2, 1, 0))
        corner = [size - 1 for size in series.data.shape[1:]]
        lps = np.array(image.TransformIndexToPhysicalPoint(corner))
        assert np.allclose((series.affine @ [*corner, 1])[:3], lps * [-1, -1, 1], atol=1e-3)


def test_ultrasound_dicom_gives_a_clear_error():
    files = sorted((DATA / "dicom_us").glob("*.dcm"))
    assert files
    for path in files:
        with pytest.raises(DataError, match="US with (RGB|PALETTE COLOR) pixels"):
            read_volume(path)


def test_the_hippocampus_folder_opens_checks_and_splits():
    dataset = open_dataset(DATA / "hippocampus")
    assert (dataset.layout, len(dataset.cases)) == ("folder", 150)
    assert dataset.labels == {"background": 0, "label_1": 1, "label_2": 2}
    report = check_dataset(DATA / "hippocampus")
    assert report.ok, report.problems
    assert [len(split.val) for split in make_splits(dataset, 5, 0)] == [30] * 5


def test_the_hippocampus_folder_converts_with_whole_labels_and_equal_voxels(tmp_path):
    source = open_dataset(DATA / "hippocampus")
    few = [case.id for case in source.cases[:4]]
    part = tmp_path / "part"
    for kind in ("images", "labels"):
        (part / kind).mkdir(parents=True)
        for case in few:
            (part / kind / f"{case}.nii.gz").write_bytes(
                (DATA / "hippocampus" / kind / f"{case}.nii.gz").read_bytes()
            )
    dataset = convert(
        part, tmp_path / "d", "folder", labels={"anterior": 1, "posterior": 2}, channel_names=["MRI"]
    )
    assert dataset.labels == {"background": 0, "anterior": 1, "posterior": 2}
    for case in few:
        before, before_label = load_case(source, source.case(case), with_label=True)
        after, after_label = load_case(dataset, dataset.case(case), with_label=True)
        assert np.array_equal(before.data, after.data)
        assert before_label is not None
        assert after_label is not None
        assert np.array_equal(before_label.data, after_label.data)
        assert after_label.data.dtype == np.uint8
        assert np.array_equal(before.affine, after.affine)


def test_echo_frames_of_one_patient_stay_in_one_part():
    dataset = open_dataset(DATA / "camus_4ch")
    assert (len(dataset.cases), len({case.patient for case in dataset.cases})) == (64, 32)
    for split in make_splits(dataset, 4, 0):
        assert not {case.patient for case in split.train} & {case.patient for case in split.val}


def test_prostate_channels_are_brought_onto_the_t2_grid():
    folder = DATA / "prostate_bpmri"
    names = ("t2w", "adc", "hbv")
    case = Case(id="x", images=tuple(folder / f"11373_1001396_{name}.nii.gz" for name in names))
    image = stack_channels(case, names)
    assert image.data.shape == (3, 384, 384, 19)
    gland = read_volume(folder / "11373_1001396_gland_ai.nii.gz", kind="label").data[0] > 0
    # The whole gland lies inside the field of view of the smaller channels.
    assert (image.data[1][gland] > 0).mean() > 0.99
    assert (image.data[1] == 0).mean() > 0.1


@pytest.mark.parametrize(
    "name",
    [
        "ct_totalsegmentator/example_ct.nii.gz",
        "camus_4ch/images/patient0001_4CH_ED.nii.gz",
        "hippocampus/images/hippocampus_003.nii.gz",
        "prostate_bpmri/11373_1001396_t2w.nii.gz",
    ],
)
def test_results_lie_exactly_on_real_inputs(tmp_path, name):
    volume = read_volume(DATA / name)
    write_volume(tmp_path / "y.nii.gz", volume.data[0] > volume.data.mean(), volume, kind="label")
    before, after = nib.load(DATA / name), nib.load(tmp_path / "y.nii.gz")
    assert after.shape == before.shape
    assert np.array_equal(after.affine, before.affine)
    assert after.header.get_zooms() == before.header.get_zooms()
    assert after.header.get_xyzt_units() == before.header.get_xyzt_units()
    for field in ("qform_code", "sform_code"):
        assert after.header[field] == before.header[field]


def test_cardiac_hdf5_is_read_slice_first():
    path = sorted((DATA / "acdc_h5").glob("*.h5"))[0]
    image = read_hdf5(path, "image", spacing=(1.5, 1.5, 10.0))
    label = read_hdf5(path, "label", spacing=(1.5, 1.5, 10.0), kind="label")
    assert image.data.shape == label.data.shape == (1, 216, 256, 10)
    assert set(np.unique(label.data)) <= {0, 1, 2, 3}


def test_a_real_case_can_be_previewed():
    assert preview_case(DATA / "hippocampus", "hippocampus_003").startswith(b"\x89PNG")
