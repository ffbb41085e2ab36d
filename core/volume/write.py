"""Writing NIfTI on exactly the grid of the input, whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import os
import secrets
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError, RuntimeFault
from medrl.core.types import Volume

from .arrays import as_label, smallest_integer
from .header import affine_of, shape_of
from .paths import image_suffix

COMPRESSION = 4
"""gzip level: label maps shrink nearly as well as with 9, images in a third of the time."""


def write_volume(
    path: Path | str, data: NDArray[Any], like: Volume, *, kind: Literal["image", "label"]
) -> None:
    """Write voxels as NIfTI with the geometry of `like`.

    Shape, affine, qform and sform codes, voxel sizes and units equal those of the input; free text and
    extensions, where patient data hides, are left out. An input that was no NIfTI (DICOM, MetaImage,
    NRRD) gives NIfTI-1 in mm with both forms set to its affine. The file is written beside its
    place, read back, compared voxel by voxel, and only then renamed.

    Args:
        path: Ends in ``.nii`` or ``.nii.gz``.
        data: ``(X, Y, Z)`` or ``(C, X, Y, Z)`` on the grid of `like`.
        like: The volume whose grid the result lies on.
        kind: ``label`` uses the smallest unsigned integer type that fits; ``image`` keeps integers and
            stores other numbers as float32.

    Raises:
        DataError: The array does not fit the grid or holds values that cannot be stored.
        RuntimeFault: The file could not be written or does not read back equal.
    """
    path = Path(path)
    suffix = image_suffix(path)
    if suffix not in {".nii", ".nii.gz"}:
        raise DataError(str(path), why="results are written as .nii or .nii.gz", do="change the file name")
    array = _prepare(path, data, like, kind)
    content = _nifti_bytes(array, like)
    if suffix == ".nii.gz":
        content = gzip.compress(content, COMPRESSION, mtime=0)
    write_bytes(path, content, suffix=suffix, verify=lambda written: _verify(written, array, like, kind))


def write_bytes(path: Path, content: bytes, *, suffix: str = "", verify: Any = None) -> None:
    """Replace a file at once: temporary file beside it, flushed to disk, checked, renamed.

    Raises:
        RuntimeFault: The disk is full or the folder cannot be written; the old file is untouched.
    """
    temporary = (
        path.parent / f".{path.name[: len(path.name) - len(suffix)]}.{secrets.token_hex(4)}.tmp{suffix}"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if verify is not None:
            verify(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RuntimeFault(
            f"cannot write {path}",
            why=f"{error.strerror or error} ({len(content)} bytes)",
            do="free disk space or choose another folder",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable where the system can (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prepare(path: Path, data: NDArray[Any], like: Volume, kind: str) -> NDArray[Any]:
    """Return ``(C, X, Y, Z)`` in the type that is stored."""
    array = data if data.ndim == 4 else data[np.newaxis]
    if array.shape[1:] != like.data.shape[1:]:
        raise DataError(
            str(path), why=f"the result has shape {array.shape[1:]}, its input {like.data.shape[1:]}"
        )
    if kind == "label":
        return as_label(array, path)
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind in "iu":
        dtype = array.dtype
        if dtype.itemsize > 4:
            dtype = np.dtype(smallest_integer(int(array.min()), int(array.max())))
        return array.astype(dtype.newbyteorder("="), copy=False)
    image = array.astype(np.float32, copy=False)
    if not np.isfinite(image).all():
        raise DataError(str(path), why="the result holds NaN or infinite values")
    return image


def _nifti_bytes(array: NDArray[Any], like: Volume) -> bytes:
    header = _header_like(like)
    if header is None:
        header = _fresh_header(like.affine)
        stored: tuple[int, ...] = like.data.shape[1:]
    else:
        stored = shape_of(header)
    image_class = nib.Nifti2Image if int(header["sizeof_hdr"]) == 540 else nib.Nifti1Image
    channels = array.shape[0]
    if channels == like.data.shape[0] and len(stored) > 3:
        shape = stored
        voxels = np.moveaxis(array, 0, -1)
    elif channels == 1:
        shape = stored[:3]
        voxels = array[0]
    else:
        shape = (*array.shape[1:], channels)
        voxels = np.moveaxis(array, 0, -1)
    steps = header["pixdim"].copy()
    header.set_data_shape(shape)
    header["pixdim"][: max(len(shape), 3) + 1] = steps[
        : max(len(shape), 3) + 1
    ]  # nibabel resets some of them
    header.set_data_dtype(array.dtype)
    header["scl_slope"], header["scl_inter"] = np.nan, np.nan
    header["cal_max"], header["cal_min"], header["intent_code"] = 0, 0, 0
    # Without an affine argument nibabel leaves both forms and their codes as they are.
    content: bytes = image_class(voxels.reshape(shape, order="F"), None, header).to_bytes()
    return content


def _header_like(like: Volume) -> Any:
    """Return a copy of the NIfTI header of the input, or None if it does not describe its grid."""
    header = like.header
    if not isinstance(header, nib.Nifti1Header):  # NIfTI-2 headers are a subclass
        return None
    shape = (*shape_of(header), 1, 1)[:3]
    axes = min(len(shape_of(header)), 3)
    affine = affine_of(header)
    same = np.allclose(affine[:, [*range(axes), 3]], like.affine[:, [*range(axes), 3]], rtol=1e-5, atol=1e-4)
    if shape != tuple(like.data.shape[1:]) or not same:
        return None
    from .nifti import strip_header

    return strip_header(header.as_byteswapped("<"))


def _fresh_header(affine: NDArray[np.float64]) -> Any:
    header = nib.Nifti1Header()
    header.set_xyzt_units("mm")
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    if not np.allclose(header.get_qform(), affine, rtol=1e-4, atol=1e-3):
        header["qform_code"] = 0  # a sheared grid has no quaternion; the sform alone is right
        header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    return header


def _verify(path: Path, array: NDArray[Any], like: Volume, kind: Literal["image", "label"]) -> None:
    from medrl.core.volume import read_volume

    back = read_volume(path, kind=kind)
    expected = array if kind == "label" else array.astype(np.float32)
    if not np.array_equal(back.data, expected):
        raise RuntimeFault(
            f"cannot write {path.parent}", why="a file did not read back equal to what was written"
        )
    if not np.allclose(back.affine, like.affine, rtol=1e-5, atol=1e-3):
        raise RuntimeFault(
            f"cannot write {path.parent}", why="a file did not read back with the affine of its input"
        )
