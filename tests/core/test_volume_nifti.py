"""Reading and writing NIfTI on exactly the grid of the input."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medrl.core.errors import DataError, RuntimeFault
from medrl.core.volume import check_header, read_volume, voxel_volume_mm3, write_volume

OBLIQUE = np.array(
    [
        [-0.49, -0.02, -0.31, 57.0],
        [0.03, -0.47, -0.95, 82.0],
        [-0.06, -0.16, 2.82, -27.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)


def orthogonal_oblique(spacing: tuple[float, float, float] = (0.5, 0.5, 3.0)) -> np.ndarray:
    """Return an oblique affine without shear, left-posterior like scanners store."""
    basis, _ = np.linalg.qr(OBLIQUE[:3, :3])
    affine = np.eye(4)
    affine[:3, :3] = basis * np.array(spacing)
    affine[:3, 3] = OBLIQUE[:3, 3]
    return affine


def save(
    path: Path, data: np.ndarray, affine: np.ndarray, *, cls=nib.Nifti1Image, codes=(1, 2), units="mm"
) -> Path:
    image = cls(data, affine, dtype=data.dtype)
    image.set_qform(affine, int(codes[0]))
    image.set_sform(affine, int(codes[1]))
    image.header.set_xyzt_units(units, "sec")
    image.header["descrip"] = b"PLANTED^NAME"
    nib.save(image, path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("cls", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"]
)
def test_voxels_and_affine_equal_those_of_nibabel(tmp_path, suffix, cls, dtype):
    data = np.random.default_rng(0).integers(0, 100, (5, 6, 7)).astype(dtype)
    path = save(tmp_path / f"x{suffix}", data, orthogonal_oblique(), cls=cls)
    volume = read_volume(path)
    oracle = nib.load(path)
    assert volume.data.dtype == np.float32
    assert np.array_equal(volume.data[0], oracle.get_fdata(dtype=np.float32))
    assert np.array_equal(volume.affine, oracle.affine)
    assert volume.spacing == pytest.approx((0.5, 0.5, 3.0), rel=1e-6)
    assert voxel_volume_mm3(volume) == pytest.approx(0.75, rel=1e-5)
    assert volume.source == path


def test_big_endian_files_are_read(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4), header)
    nib.save(image, tmp_path / "x.nii")
    assert (tmp_path / "x.nii").read_bytes()[:4] == b"\x00\x00\x01\x5c"
    volume = read_volume(tmp_path / "x.nii")
    assert np.array_equal(volume.data[0].ravel(), np.arange(24))
    write_volume(tmp_path / "y.nii", volume.data.astype(np.uint8), volume, kind="label")
    assert np.array_equal(read_volume(tmp_path / "y.nii", kind="label").data, volume.data)


def test_intensity_scaling_is_applied(tmp_path):
    image = nib.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    nib.save(image, tmp_path / "x.nii")
    raw = bytearray((tmp_path / "x.nii").read_bytes())
    raw[112:120] = np.array([2.0, -1024.0], dtype="<f4").tobytes()
    (tmp_path / "x.nii").write_bytes(raw)
    assert np.array_equal(read_volume(tmp_path / "x.nii").data.ravel(), np.arange(8) * 2.0 - 1024.0)


def test_a_fourth_axis_becomes_channels(tmp_path):
    data = np.random.default_rng(1).normal(size=(4, 5, 6, 3)).astype(np.float32)
    volume = read_volume(save(tmp_path / "x.nii.gz", data, np.diag([1.0, 1.0, 2.0, 1.0])))
    assert volume.data.shape == (3, 4, 5, 6)
    assert np.array_equal(volume.data, np.moveaxis(data, -1, 0))


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 1), (4, 5, 6), (4, 5, 6, 1), (4, 5, 6, 3), (4, 5, 1, 1, 2)])
@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 2), (1, 1), (3, 4)])
def test_outputs_keep_shape_affine_codes_zooms_and_units(tmp_path, shape, codes):
    affine = orthogonal_oblique() if max(codes) else np.diag([0.5, 0.5, 3.0, 1.0])
    data = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    volume = read_volume(save(tmp_path / "x.nii.gz", data, affine, codes=codes))
    write_volume(tmp_path / "y.nii.gz", volume.data, volume, kind="image")
    before, after = nib.load(tmp_path / "x.nii.gz"), nib.load(tmp_path / "y.nii.gz")
    assert after.shape == before.shape
    assert np.array_equal(after.get_fdata(), before.get_fdata())
    assert np.array_equal(after.affine, before.affine)
    assert after.header.get_zooms() == before.header.get_zooms()
    assert after.header.get_xyzt_units() == before.header.get_xyzt_units()
    for field in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x"):
        assert np.array_equal(after.header[field], before.header[field]), field


def test_a_label_map_of_a_channel_image_drops_the_channel_axis_alone(tmp_path):
    data = np.zeros((4, 5, 6, 3), dtype=np.float32)
    volume = read_volume(save(tmp_path / "x.nii.gz", data, orthogonal_oblique()))
    write_volume(tmp_path / "y.nii.gz", np.ones((4, 5, 6), dtype=np.int64), volume, kind="label")
    after = nib.load(tmp_path / "y.nii.gz")
    assert after.shape == (4, 5, 6)
    assert np.array_equal(after.affine, nib.load(tmp_path / "x.nii.gz").affine)


@pytest.mark.parametrize(
    ("highest", "dtype"), [(1, "uint8"), (255, "uint8"), (256, "uint16"), (65535, "uint16")]
)
def test_labels_are_stored_in_the_smallest_integer_type(tmp_path, highest, dtype):
    volume = read_volume(save(tmp_path / "x.nii.gz", np.zeros((3, 3, 3), np.float32), np.eye(4)))
    labels = np.zeros((3, 3, 3), dtype=np.int64)
    labels[1, 1, 1] = highest
    write_volume(tmp_path / "y.nii.gz", labels, volume, kind="label")
    assert nib.load(tmp_path / "y.nii.gz").get_data_dtype() == np.dtype(dtype)
    assert read_volume(tmp_path / "y.nii.gz", kind="label").data.dtype == np.dtype(dtype)


def test_nifti_2_stays_nifti_2(tmp_path):
    volume = read_volume(
        save(tmp_path / "x.nii", np.zeros((3, 3, 3), np.float32), np.eye(4), cls=nib.Nifti2Image)
    )
    write_volume(tmp_path / "y.nii", np.ones((3, 3, 3)), volume, kind="label")
    assert isinstance(nib.load(tmp_path / "y.nii"), nib.Nifti2Image)


def test_writing_twice_gives_the_same_bytes(tmp_path):
    volume = read_volume(save(tmp_path / "x.nii.gz", np.ones((3, 3, 3), np.float32), np.eye(4)))
    for name in ("a", "b"):
        write_volume(tmp_path / f"{name}.nii.gz", volume.data, volume, kind="label")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_result_of_another_shape_is_refused(tmp_path):
    volume = read_volume(save(tmp_path / "x.nii.gz", np.zeros((3, 4, 5), np.float32), np.eye(4)))
    with pytest.raises(DataError, match="shape"):
        write_volume(tmp_path / "y.nii.gz", np.zeros((5, 4, 3)), volume, kind="label")
    assert not (tmp_path / "y.nii.gz").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_result_that_is_not_finite_is_refused(tmp_path, bad):
    volume = read_volume(save(tmp_path / "x.nii.gz", np.zeros((2, 2, 2), np.float32), np.eye(4)))
    with pytest.raises(DataError, match="NaN|finite"):
        write_volume(tmp_path / "y.nii.gz", np.full((2, 2, 2), bad), volume, kind="image")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_rest(tmp_path, monkeypatch):
    volume = read_volume(save(tmp_path / "x.nii.gz", np.zeros((2, 2, 2), np.float32), np.eye(4)))
    target = tmp_path / "out" / "y.nii.gz"
    write_volume(target, np.ones((2, 2, 2)), volume, kind="label")
    before = target.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medrl.core.volume.write.os.fsync", full)
    with pytest.raises(RuntimeFault, match=r"y\.nii\.gz.*No space left on device \(\d+ bytes\)"):
        write_volume(target, np.zeros((2, 2, 2)), volume, kind="label")
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["y.nii.gz"]


def test_a_header_that_belongs_to_another_grid_is_not_used(tmp_path):
    from dataclasses import replace

    volume = read_volume(save(tmp_path / "x.nii.gz", np.zeros((4, 4, 4), np.float32), np.eye(4)))
    moved = replace(volume, affine=np.diag([2.0, 2.0, 2.0, 1.0]), spacing=(2.0, 2.0, 2.0))
    write_volume(tmp_path / "y.nii.gz", np.ones((4, 4, 4)), moved, kind="label")
    assert np.array_equal(read_volume(tmp_path / "y.nii.gz").affine, moved.affine)


def test_a_gzip_of_several_members_is_read_whole(tmp_path):
    path = save(tmp_path / "x.nii", np.arange(64, dtype=np.float32).reshape(4, 4, 4), np.eye(4))
    raw = path.read_bytes()
    (tmp_path / "y.nii.gz").write_bytes(gzip.compress(raw[:400]) + gzip.compress(raw[400:]))
    assert np.array_equal(read_volume(tmp_path / "y.nii.gz").data.ravel(), np.arange(64))


def test_a_good_header_has_no_problem(tmp_path):
    path = save(tmp_path / "x.nii", np.zeros((3, 3, 3), np.float32), orthogonal_oblique())
    assert check_header(nib.load(path).header) == []


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=hnp.arrays(np.float32, st.tuples(*[st.integers(1, 5)] * 3), elements=st.floats(-1e6, 1e6, width=32)),
    spacing=st.tuples(*[st.floats(0.125, 10, width=32)] * 3),
    axes=st.permutations([0, 1, 2]),
    signs=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
)
def test_any_finite_image_on_any_upright_grid_survives_a_round_trip(tmp_path, data, spacing, axes, signs):
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, axes] * np.array(signs) * np.array(spacing)
    path = save(tmp_path / "x.nii.gz", data, affine)
    volume = read_volume(path)
    write_volume(tmp_path / "y.nii.gz", volume.data, volume, kind="image")
    again = read_volume(tmp_path / "y.nii.gz")
    assert np.array_equal(again.data[0], data)
    assert np.array_equal(again.affine, volume.affine)
