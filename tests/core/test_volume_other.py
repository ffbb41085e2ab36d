"""MetaImage, NRRD, HDF5, grids and label values."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medrl.core.errors import DataError
from medrl.core.types import Volume
from medrl.core.volume import (
    as_label,
    open_hdf5,
    overlap_fraction,
    present_labels,
    read_hdf5,
    read_hdf5_array,
    read_volume,
    resample_like,
    same_grid,
    smallest_integer,
    to_ras,
    turn_like,
    write_volume,
)

sitk = pytest.importorskip("SimpleITK")


def itk_image(path: Path, *, compress: bool = True, dtype=np.int16) -> np.ndarray:
    """Write an oblique image; return its array (X, Y, Z)."""
    data = np.random.default_rng(3).integers(0, 90, (6, 5, 4)).astype(dtype)
    basis, _ = np.linalg.qr(np.array([[1.0, 0.2, 0.1], [-0.1, 1.0, 0.3], [0.2, -0.3, 1.0]]))
    image = sitk.GetImageFromArray(data.transpose(2, 1, 0))
    image.SetSpacing((0.5, 0.75, 3.0))
    image.SetOrigin((-10.0, 20.0, 30.0))
    image.SetDirection(basis.ravel())
    sitk.WriteImage(image, str(path), compress)
    return data


def grid(shape, affine) -> Volume:
    data = np.random.default_rng(5).normal(size=(1, *shape)).astype(np.float32)
    spacing = tuple(float(v) for v in np.linalg.norm(affine[:3, :3], axis=0))
    return Volume(data=data, affine=np.asarray(affine, dtype=float), spacing=spacing)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("compress", [False, True])
def test_metaimage_and_nrrd_have_the_geometry_of_the_same_image_as_nifti(tmp_path, suffix, compress):
    data = itk_image(tmp_path / f"x{suffix}", compress=compress)
    itk_image(tmp_path / "x.nii.gz")
    volume, oracle = read_volume(tmp_path / f"x{suffix}"), read_volume(tmp_path / "x.nii.gz")
    assert np.array_equal(volume.data[0], data)
    assert np.allclose(volume.affine, oracle.affine, atol=1e-4)
    assert volume.spacing == pytest.approx((0.5, 0.75, 3.0))
    write_volume(tmp_path / "y.nii.gz", data > 40, volume, kind="label")
    assert np.allclose(read_volume(tmp_path / "y.nii.gz").affine, oracle.affine, atol=1e-4)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_metaimage_or_nrrd_is_refused(tmp_path, suffix, compress, keep):
    path = tmp_path / f"x{suffix}"
    itk_image(path, compress=compress)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(DataError, match=f"x{suffix}"):
        read_volume(path)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_flipped_bits_in_compressed_voxels_are_found_or_change_nothing(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    data = itk_image(path)
    raw = path.read_bytes()
    start = raw.find(b"LOCAL\n") + 6 if suffix == ".mha" else raw.find(b"\n\n") + 2
    rng = np.random.default_rng(0)
    for _ in range(50):
        damaged = bytearray(raw)
        damaged[int(rng.integers(start, len(raw)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            volume = read_volume(path)
        except DataError:
            continue
        assert np.array_equal(volume.data[0], data)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_random_header_bytes_never_escape_as_another_error(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    itk_image(path)
    raw = path.read_bytes()
    rng = np.random.default_rng(4)
    refused = 0
    for _ in range(150):
        damaged = bytearray(raw)
        for position in rng.integers(0, 300, 4):
            damaged[position] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            volume = read_volume(path)
        except DataError:
            refused += 1
            continue
        assert np.isfinite(volume.affine).all()
    assert refused > 75


def test_a_header_that_points_at_another_file_is_not_followed(tmp_path):
    itk_image(tmp_path / "x.mha", compress=False)
    raw = (tmp_path / "x.mha").read_bytes()
    (tmp_path / "y.mha").write_bytes(raw.replace(b"LOCAL", b"/etc/passwd"))
    with pytest.raises(DataError, match="another file"):
        read_volume(tmp_path / "y.mha")
    itk_image(tmp_path / "x.nrrd")
    raw = (tmp_path / "x.nrrd").read_bytes()
    (tmp_path / "y.nrrd").write_bytes(raw.replace(b"encoding:", b"data file: /etc/passwd\nencoding:"))
    with pytest.raises(DataError, match="another file"):
        read_volume(tmp_path / "y.nrrd")


def test_a_small_metaimage_that_claims_a_huge_array_is_refused(tmp_path):
    itk_image(tmp_path / "x.mha", compress=False)
    raw = (tmp_path / "x.mha").read_bytes()
    (tmp_path / "y.mha").write_bytes(raw.replace(b"DimSize = 6 5 4", b"DimSize = 32767 32767 32767"))
    with pytest.raises(DataError, match="limit"):
        read_volume(tmp_path / "y.mha")


@pytest.mark.parametrize("name", ["x.img", "x.hdr", "x.mhd", "x.png", "x.h5", "x"])
def test_other_files_are_refused_with_a_reason(tmp_path, name):
    (tmp_path / name).write_bytes(b"content")
    with pytest.raises(DataError, match=name) as caught:
        read_volume(tmp_path / name)
    assert caught.value.why


def test_hdf5_arrays_are_read_slice_first_with_the_given_voxel_size(tmp_path):
    h5py = pytest.importorskip("h5py")
    data = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["image"] = data
        file["label"] = (data > 10).astype(np.uint8)
        file["outside"] = h5py.ExternalLink("/etc/passwd", "/x")
    volume = read_hdf5(tmp_path / "x.h5", "image", spacing=(1.5, 1.25, 8.0))
    assert volume.data.shape == (1, 4, 3, 2)
    assert np.array_equal(volume.data[0], data.transpose(2, 1, 0))
    assert volume.spacing == (1.5, 1.25, 8.0)
    assert read_hdf5(tmp_path / "x.h5", "label", spacing=(1, 1, 1), kind="label").data.dtype == np.uint8
    with pytest.raises(DataError, match="no array 'images'"):
        read_hdf5(tmp_path / "x.h5", "images", spacing=(1, 1, 1))
    with pytest.raises(DataError, match="another file|no array"):
        read_hdf5(tmp_path / "x.h5", "outside", spacing=(1, 1, 1))
    with pytest.raises(DataError, match="limit"):
        read_hdf5(tmp_path / "x.h5", "image", spacing=(1, 1, 1), max_bytes=10)
    (tmp_path / "y.h5").write_bytes((tmp_path / "x.h5").read_bytes()[:700])
    with pytest.raises(DataError, match=r"y\.h5"):
        read_hdf5(tmp_path / "y.h5", "image", spacing=(1, 1, 1))


def test_hdf5_arrays_of_any_kind_are_read_only_from_the_file_itself(tmp_path):
    h5py = pytest.importorskip("h5py")
    values = (np.arange(24) * (1 - 2j)).astype(np.complex64).reshape(2, 2, 3, 2)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["group/values"] = values
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["scan/values"] = values
        file["scan/text"] = "some words"
        file["away"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/group")
        layout = h5py.VirtualLayout(shape=values.shape, dtype=values.dtype)
        layout[...] = h5py.VirtualSource(str(tmp_path / "other.h5"), "group/values", shape=values.shape)
        file.create_virtual_dataset("virtual", layout)
    with open_hdf5(tmp_path / "x.h5") as file:
        assert np.array_equal(read_hdf5_array(file, "scan/values", kinds="c", axes=(3, 4)), values)
        assert read_hdf5_array(file, "scan/text", kinds="O", axes=(0,)) == b"some words"
        with pytest.raises(DataError, match="no real array of two or three axes"):
            read_hdf5_array(file, "scan/values")
        with pytest.raises(DataError, match="no array of three axes"):
            read_hdf5_array(file, "scan/values", kinds="c", axes=(3,))
        for name in ("away/values", "virtual"):
            with pytest.raises(DataError, match="another file"):
                read_hdf5_array(file, name, kinds="c", axes=(4,))


def test_grids_are_the_same_within_a_fraction_of_a_voxel_only():
    a = grid((10, 10, 10), np.diag([1.0, 1.0, 3.0, 1.0]))
    nudged, moved = a.affine.copy(), a.affine.copy()
    nudged[0, 3], moved[0, 3] = 0.1, 0.5
    assert same_grid(a, grid((10, 10, 10), nudged))
    assert not same_grid(a, grid((10, 10, 10), moved))
    assert not same_grid(a, grid((10, 10, 9), a.affine))


def test_turning_axes_gives_the_same_voxels_at_the_same_places():
    reference = grid((4, 5, 6), np.diag([1.0, 2.0, 3.0, 1.0]))
    turned = nib.Nifti1Image(reference.data[0], reference.affine).as_reoriented(
        np.array([[2, -1], [0, 1], [1, -1]])
    )
    volume = Volume(
        data=turned.get_fdata(dtype=np.float32)[None], affine=turned.affine, spacing=turned.header.get_zooms()
    )
    back = turn_like(volume, reference)
    assert back is not None
    assert np.array_equal(back.data, reference.data)
    assert turn_like(grid((4, 5, 6), np.diag([1.5, 2.0, 3.0, 1.0])), reference) is None


def test_resampling_a_linear_ramp_is_exact_inside_and_zero_outside():
    coarse = grid((8, 8, 8), np.diag([2.0, 2.0, 2.0, 1.0]))
    x, y, z = np.meshgrid(*[np.arange(8) * 2.0] * 3, indexing="ij")
    ramp = Volume(
        data=(x + 2 * y - z + 50)[None].astype(np.float32), affine=coarse.affine, spacing=coarse.spacing
    )
    fine = grid((20, 15, 15), np.eye(4))
    moved = resample_like(ramp, fine)
    i, j, k = np.meshgrid(np.arange(20.0), np.arange(15.0), np.arange(15.0), indexing="ij")
    inside = (i <= 14) & (j <= 14) & (k <= 14)
    assert np.allclose(moved.data[0][inside], (i + 2 * j - k + 50)[inside], atol=1e-4)
    assert np.all(moved.data[0][i > 15] == 0)
    assert overlap_fraction(ramp, fine) == pytest.approx(16 / 20)


def test_ras_view_turns_axes_and_their_sizes():
    affine = np.array([[0, 0, -3.0, 0], [-1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])
    data = np.arange(24).reshape(2, 3, 4)
    turned, spacing = to_ras(data, affine)
    assert spacing == (3.0, 1.0, 2.0)
    assert turned.shape == (4, 2, 3)
    assert turned[0, 0, 0] == data[1, 0, 3]


def test_label_values_must_be_whole_and_not_negative():
    good = as_label(np.array([0.0, 1.0, 7.0]).reshape(1, 3, 1, 1), "x")
    assert good.dtype == np.uint8
    assert present_labels(good) == {0: 1, 1: 1, 7: 1}
    for bad in (0.5, -1.0, np.nan, np.inf, 1e9):
        with pytest.raises(DataError, match="label values"):
            as_label(np.array([0.0, bad]).reshape(1, 2, 1, 1), "x")
    with pytest.raises(DataError, match="one channel"):
        as_label(np.zeros((2, 3, 3, 3)), "x")


def test_the_smallest_integer_type_is_chosen():
    cases = {
        (0, 255): "uint8",
        (0, 256): "uint16",
        (-1, 127): "int8",
        (-1024, 3000): "int16",
        (0, 70000): "uint32",
    }
    assert {span: smallest_integer(*span).name for span in cases} == cases
