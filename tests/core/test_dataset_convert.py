"""Converting other layouts to nnU-Net raw, and the picture of a case."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medrl.core.dataset import convert, load_case, open_dataset
from medrl.core.errors import ConfigError, DataError
from medrl.core.preview import preview_case, render


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([0.5, 0.5, 2.0, 1.0]) if affine is None else affine), path)
    return path


def folder(root: Path, *, values=(0, 1, 2), dtype=np.float32) -> Path:
    rng = np.random.default_rng(0)
    for case in ("a_ED", "a_ES", "b_ED"):
        save(root / "images" / f"{case}.nii.gz", rng.integers(-1000, 1000, (6, 7, 8)).astype(np.float32))
        label = np.zeros((6, 7, 8), dtype=dtype)
        label[1], label[2] = values[1], values[2]
        save(root / "labels" / f"{case}.nii.gz", label)
    save(root / "images" / "unlabelled.nii.gz", rng.normal(size=(6, 7, 8)).astype(np.float32))
    return root


def test_a_plain_folder_becomes_nnunet_raw_with_whole_labels(tmp_path):
    src, dst = folder(tmp_path / "src"), tmp_path / "Dataset009_X"
    dataset = convert(src, dst, "folder", labels={"inner": 1, "outer": 2}, channel_names=["MR"])
    assert (dataset.layout, dataset.channel_names) == ("nnunet", ("MR",))
    assert dataset.labels == {"background": 0, "inner": 1, "outer": 2}
    assert [case.id for case in dataset.cases] == ["a_ED", "a_ES", "b_ED"]
    assert [case.id for case in dataset.test_cases] == ["unlabelled"]
    assert dataset.case("a_ES").patient == "a"
    stored = nib.load(dst / "labelsTr" / "a_ED.nii.gz")
    assert stored.get_data_dtype() == np.uint8
    assert nib.load(dst / "imagesTr" / "a_ED_0000.nii.gz").get_data_dtype() == np.int16
    assert nib.load(dst / "imagesTs" / "unlabelled_0000.nii.gz").get_data_dtype() == np.float32
    before, after = open_dataset(src), dataset
    for case in before.cases:
        old_image, old_label = load_case(before, case, with_label=True)
        new_image, new_label = load_case(after, after.case(case.id), with_label=True)
        assert np.array_equal(old_image.data, new_image.data)
        assert np.array_equal(old_image.affine, new_image.affine)
        assert old_label is not None
        assert new_label is not None
        assert np.array_equal(old_label.data, new_label.data)


def test_fractional_labels_are_refused_and_nothing_is_left(tmp_path):
    src = folder(tmp_path / "src")
    label = np.zeros((6, 7, 8), dtype=np.float32)
    label[3, 3, 3] = 0.5
    save(src / "labels" / "b_ED.nii.gz", label)
    with pytest.raises(DataError, match=r"case b_ED.*whole numbers, found 0\.5"):
        convert(src, tmp_path / "dst", "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_label_values_with_gaps_get_new_numbers_which_are_recorded(tmp_path):
    dataset = convert(folder(tmp_path / "src", values=(0, 5, 7)), tmp_path / "dst", "folder")
    assert dataset.labels == {"background": 0, "label_5": 1, "label_7": 2}
    meta = json.loads((tmp_path / "dst" / "dataset.json").read_text())
    assert meta["source_labels"] == {"background": 0, "label_5": 5, "label_7": 7}
    _, label = load_case(dataset, dataset.cases[0], with_label=True)
    assert label is not None
    assert [int(label.data[0, x, 0, 0]) for x in range(3)] == [0, 1, 2]


def test_msd_channels_on_the_fourth_axis_become_files(tmp_path):
    src = tmp_path / "Task01"
    data = np.random.default_rng(0).normal(size=(6, 7, 8, 2)).astype(np.float32)
    save(src / "imagesTr" / "a.nii.gz", data)
    save(src / "labelsTr" / "a.nii.gz", np.ones((6, 7, 8), dtype=np.float32))
    meta = {
        "modality": {"0": "FLAIR", "1": "T1"},
        "labels": {"0": "background", "1": "tumour"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    }
    (src / "dataset.json").write_text(json.dumps(meta))
    dataset = convert(src, tmp_path / "dst", "msd")
    assert dataset.channel_names == ("FLAIR", "T1")
    for channel, path in enumerate(dataset.cases[0].images):
        assert np.array_equal(nib.load(path).get_fdata(dtype=np.float32), data[..., channel])


def test_an_occupied_target_and_an_unknown_source_are_refused(tmp_path):
    src = folder(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        convert(src, tmp_path / "dst", "folder")
    with pytest.raises(ConfigError, match="unknown source"):
        convert(src, tmp_path / "new", "nifti")
    with pytest.raises(ConfigError, match="inside the source"):
        convert(src, src / "new", "folder")
    assert (tmp_path / "dst" / "mine.txt").read_text() == "keep"


def dicom_series(folder: Path, seed: int) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True)
    series = generate_uid()
    for z in range(3):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        ds = FileDataset(str(folder), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.PatientName, ds.SeriesInstanceUID, ds.Modality = "PLANTED^NAME", series, "CT"
        ds.Rows, ds.Columns, ds.PixelSpacing = 4, 5, [1.0, 1.0]
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0.0, 0.0, 2.0 * z]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.PixelData = np.full((4, 5), seed + z, dtype=np.uint16).tobytes()
        ds.save_as(folder / f"{z}.dcm", enforce_file_format=True)
    assert pydicom


def test_folders_of_dicom_series_become_cases_without_patient_names(tmp_path):
    dicom_series(tmp_path / "src" / "case1", 0)
    dicom_series(tmp_path / "src" / "case2", 10)
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    save(tmp_path / "src" / "case2" / "label.nii.gz", np.ones((5, 4, 3), dtype=np.uint8), affine)
    dataset = convert(tmp_path / "src", tmp_path / "dst", "dicom", channel_names=["CT"], labels={"body": 1})
    assert [case.id for case in dataset.cases] == ["case2"]
    assert [case.id for case in dataset.test_cases] == ["case1"]
    image, label = load_case(dataset, dataset.case("case2"), with_label=True)
    assert label is not None
    assert image.data[0, 0, 0].tolist() == [10, 11, 12]
    assert np.allclose(image.affine, affine)
    assert all(
        b"PLANTED" not in path.read_bytes() for path in (tmp_path / "dst").rglob("*") if path.is_file()
    )


def test_folders_of_several_series_become_channels(tmp_path):
    for case in ("case1", "case2"):
        dicom_series(tmp_path / "src" / case / "adc", 0)
        dicom_series(tmp_path / "src" / case / "t2", 100)
    dataset = convert(tmp_path / "src", tmp_path / "dst", "dicom")
    assert dataset.channel_names == ("adc", "t2")
    image, _ = load_case(dataset, dataset.test_cases[0], with_label=False)
    assert image.data[:, 0, 0, 0].tolist() == [0, 100]


def test_one_series_alone_is_one_case(tmp_path):
    dicom_series(tmp_path / "scan7", 0)
    dataset = convert(tmp_path / "scan7", tmp_path / "dst", "dicom")
    assert [case.id for case in dataset.test_cases] == ["scan7"]


# --- preview -------------------------------------------------------------------------------------------


def decode(png: bytes) -> np.ndarray:
    import io

    from matplotlib.image import imread

    assert png.startswith(b"\x89PNG")
    return imread(io.BytesIO(png))[..., :3]


def test_a_preview_shows_three_planes_and_the_contours_of_the_label(tmp_path):
    src = folder(tmp_path / "src")
    with_label, without = decode(preview_case(src, "a_ED")), decode(preview_case(src, "unlabelled"))
    assert with_label.shape[1] > 2.2 * with_label.shape[0]
    orange = np.array([0xE6, 0x9F, 0x00]) / 255
    assert (np.abs(with_label - orange).max(axis=-1) < 0.1).sum() > 100
    assert (np.abs(without - orange).max(axis=-1) < 0.1).sum() == 0


def test_a_preview_keeps_proportions_and_turns_the_patient_upright():
    image = np.zeros((20, 20, 5), dtype=np.float32)
    image[12:, 5:, :] = 1.0
    affine = np.diag([-1.0, -1.0, 4.0, 1.0])  # indices rise to the left and to the back of the patient
    picture = decode(render(image, affine)).mean(axis=-1)
    axial = picture[:, : picture.shape[1] // 3]
    rows, columns = np.nonzero(axial > 0.99)
    # The left side of the patient is shown on the right, the back below.
    assert columns.mean() > axial.shape[1] / 2
    assert rows.mean() > axial.shape[0] / 2
    # Bright are 8 × 15 mm of the axial panel and 8 × 20 mm (five voxels of 4 mm) of the coronal one.
    coronal = picture[:, picture.shape[1] // 3 : 2 * picture.shape[1] // 3]
    assert (coronal > 0.99).sum() / len(rows) == pytest.approx(20 / 15, rel=0.05)


def test_a_two_dimensional_image_gives_one_panel(tmp_path):
    save(tmp_path / "x.nii.gz", np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32))
    picture = decode(preview_case(tmp_path / "x.nii.gz"))
    assert picture.shape[1] < picture.shape[0]


def test_a_preview_is_the_same_every_time(tmp_path):
    src = folder(tmp_path / "src")
    assert preview_case(src, "a_ED") == preview_case(open_dataset(src), "a_ED")


def test_a_preview_of_a_prediction_draws_that_instead(tmp_path):
    src = folder(tmp_path / "src")
    label = np.zeros((6, 7, 8), dtype=np.uint8)
    label[2:5, 2:5, 2:5] = 2
    path = save(tmp_path / "prediction.nii.gz", label)
    assert preview_case(src, "a_ED", label=path) != preview_case(src, "a_ED")
    other = save(tmp_path / "other.nii.gz", label[:4])
    with pytest.raises(DataError, match="does not lie on its image"):
        preview_case(src, "a_ED", label=other)


def test_a_preview_of_an_unknown_case_or_channel_is_an_error(tmp_path):
    src = folder(tmp_path / "src")
    with pytest.raises(DataError, match="no case"):
        preview_case(src, "zz")
    with pytest.raises(DataError, match="no channel 3"):
        preview_case(src, "a_ED", channel=3)
