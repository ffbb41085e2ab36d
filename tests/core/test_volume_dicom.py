"""DICOM series: geometry, rescaling, order of slices, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medrl.core.errors import DataError
from medrl.core.volume import is_dicom_file, list_series, read_volume, write_volume

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import FileDataset, FileMetaDataset  # noqa: E402
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless, generate_uid  # noqa: E402

SHAPE = (4, 6)  # rows, columns


def pixels(z: int) -> np.ndarray:
    return (np.arange(24, dtype=np.uint16).reshape(SHAPE) + 100 * z).astype(np.uint16)


def write_slice(
    path: Path, z: int, *, series: str, row=(1, 0, 0), column=(0, 1, 0), step=2.5, **changes
) -> Path:
    """Write one slice; `changes` set or (with None) delete elements."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    ds.PatientName, ds.PatientID = "PLANTED^NAME", "PLANTED-ID"
    ds.SeriesDescription = "PLANTED-DESCRIPTION"
    ds.SeriesInstanceUID, ds.SeriesNumber, ds.Modality, ds.InstanceNumber = series, 3, "CT", z + 1
    ds.Rows, ds.Columns = SHAPE
    ds.PixelSpacing = [0.75, 0.5]  # between rows, between columns
    ds.ImageOrientationPatient = [*row, *column]
    normal = np.cross(row, column)
    ds.ImagePositionPatient = [float(v) for v in np.array([-10.0, -20.0, 30.0]) + normal * step * z]
    ds.SliceThickness = step
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.RescaleSlope, ds.RescaleIntercept = 2, -1024
    ds.PixelData = pixels(z).tobytes()
    for name, value in changes.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, slices=range(5), *, series: str = "", **changes) -> Path:
    folder.mkdir(exist_ok=True)
    uid = series or generate_uid()
    for z in slices:
        # Names run against the order in space: only positions may count.
        write_slice(folder / f"IM{99 - z:03d}", z, series=uid, **changes)
    return folder


def test_a_series_has_ras_geometry_rescaled_values_and_slices_in_order_of_position(tmp_path):
    volume = read_volume(write_series(tmp_path / "ct"))
    assert volume.data.shape == (1, 6, 4, 5)
    for z in range(5):
        assert np.array_equal(volume.data[0, :, :, z], pixels(z).T * 2.0 - 1024.0)
    assert volume.spacing == pytest.approx((0.5, 0.75, 2.5))
    expected = np.array([[-0.5, 0, 0, 10.0], [0, -0.75, 0, 20.0], [0, 0, 2.5, 30.0], [0, 0, 0, 1.0]])
    assert np.allclose(volume.affine, expected)


def test_the_affine_equals_that_of_simpleitk_on_an_oblique_series(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    basis, _ = np.linalg.qr(np.array([[1.0, 0.2, 0.1], [-0.1, 1.0, 0.3], [0.2, -0.3, 1.0]]))
    folder = write_series(tmp_path / "mr", row=tuple(basis[:, 0]), column=tuple(basis[:, 1]))
    volume = read_volume(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    corner = [image.GetWidth() - 1, image.GetHeight() - 1, image.GetDepth() - 1]
    for index in ([0, 0, 0], corner):
        lps = np.array(image.TransformIndexToPhysicalPoint(index))
        assert np.allclose((volume.affine @ [*index, 1])[:3], lps * [-1, -1, 1], atol=1e-3)
    assert np.array_equal(volume.data[0], sitk.GetArrayFromImage(image).transpose(2, 1, 0))


def test_a_result_for_a_series_is_nifti_with_its_affine_and_no_patient_data(tmp_path):
    volume = read_volume(write_series(tmp_path / "ct"))
    write_volume(tmp_path / "y.nii", np.ones((6, 4, 5)), volume, kind="label")
    again = read_volume(tmp_path / "y.nii", kind="label")
    assert np.allclose(again.affine, volume.affine)
    assert again.data.sum() == 120
    assert (int(again.header["qform_code"]), int(again.header["sform_code"])) == (1, 1)
    assert again.header.get_xyzt_units()[0] == "mm"
    assert b"PLANTED" not in (tmp_path / "y.nii").read_bytes()


def test_one_slice_alone_takes_its_thickness(tmp_path):
    volume = read_volume(write_slice(tmp_path / "x.dcm", 0, series=generate_uid()))
    assert volume.data.shape == (1, 6, 4, 1)
    assert volume.spacing == pytest.approx((0.5, 0.75, 2.5))


def test_several_series_in_one_folder_are_named_and_refused(tmp_path):
    folder = write_series(tmp_path / "ct")
    write_slice(folder / "other", 0, series=generate_uid(), SeriesNumber=7)
    assert [one.number for one in list_series(folder)] == ["3", "7"]
    with pytest.raises(DataError, match=r"2 series: CT 3 \(5 files.*; CT 7 \(1 files"):
        read_volume(folder)


@pytest.mark.parametrize(
    ("slices", "why"),
    [((0, 1, 3, 4), "1 slice missing"), ((0, 1, 2, 5), "2 slices missing"), ((0, 1, 2, 3.4), "not uniform")],
)
def test_missing_slices_and_uneven_spacing_are_found(tmp_path, slices, why):
    folder = tmp_path / "ct"
    folder.mkdir()
    uid = generate_uid()
    for number, z in enumerate(slices):
        write_slice(
            folder / f"{number}", number, series=uid, ImagePositionPatient=[-10.0, -20.0, 30.0 + 2.5 * z]
        )
    with pytest.raises(DataError, match=why):
        read_volume(folder)


def test_two_slices_at_one_position_are_a_time_series_and_refused(tmp_path):
    folder = write_series(tmp_path / "ct")
    uid = list_series(folder)[0].uid
    write_slice(folder / "again", 2, series=uid)
    with pytest.raises(DataError, match="2 slices at the same position"):
        read_volume(folder)


def test_a_tilted_gantry_is_refused(tmp_path):
    folder = tmp_path / "ct"
    folder.mkdir()
    uid = generate_uid()
    for z in range(5):
        position = [-10.0, -20.0 + 0.7 * z, 30.0 + 2.5 * z]
        write_slice(folder / f"{z}", z, series=uid, ImagePositionPatient=position)
    with pytest.raises(DataError, match="tilted gantry"):
        read_volume(folder)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"PixelSpacing": [0.75, 0.6]}, "differ in size or orientation"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}, "differ in size or orientation"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient"),
        ({"PixelSpacing": None}, "PixelSpacing"),
        ({"NumberOfFrames": 40, "Modality": "US"}, "multi-frame US"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "RGB"),
        ({"PixelData": b"\0" * 10}, "missing or damaged"),
    ],
)
def test_a_slice_that_does_not_belong_is_named(tmp_path, changes, why):
    folder = write_series(tmp_path / "ct", range(4))
    write_slice(folder / "odd", 4, series=list_series(folder)[0].uid, **changes)
    with pytest.raises(DataError, match=why) as caught:
        read_volume(folder)
    assert "odd" in str(caught.value)
    assert "PLANTED" not in str(caught.value)


def test_pixels_in_a_codec_that_is_not_installed_give_a_hint(tmp_path, monkeypatch):
    path = write_slice(tmp_path / "x.dcm", 0, series=generate_uid())
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path, enforce_file_format=True)
    with pytest.raises(DataError, match="JPEG-LS Lossless") as caught:
        read_volume(path)
    assert "pip install" in caught.value.do


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_truncated_slice_is_named(tmp_path, keep):
    folder = write_series(tmp_path / "ct")
    victim = folder / "IM097"
    raw = victim.read_bytes()
    victim.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(DataError, match="IM097"):
        read_volume(folder)


def test_an_empty_folder_and_other_files_are_no_series(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    assert not is_dicom_file(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="no DICOM file"):
        read_volume(tmp_path)


def test_a_dcm_file_that_is_none_is_named(tmp_path):
    (tmp_path / "x.dcm").write_bytes(b"not dicom at all")
    with pytest.raises(DataError, match=r"x\.dcm"):
        read_volume(tmp_path / "x.dcm")


def test_a_series_above_the_limit_is_refused_before_its_pixels_are_read(tmp_path):
    folder = write_series(tmp_path / "ct")
    with pytest.raises(DataError, match="limit"):
        read_volume(folder, max_bytes=100)
