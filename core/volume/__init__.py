"""The only reader and writer of images: NIfTI, DICOM series, MetaImage and NRRD, HDF5 arrays.

Image libraries open damaged files without complaint (half a ``.nii.gz`` becomes zeros, a flipped bit
another voxel value). Here every compressed stream is read to its end, so that its checksum is verified,
every header passes a battery of checks, and every failure is a `DataError` that names the file.

Arrays are ``(C, X, Y, Z)`` with an RAS affine in millimetres, voxel order as stored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from medrl.core.errors import DataError
from medrl.core.types import Volume

from .arrays import as_image, as_label, present_labels, smallest_integer
from .dicom import DicomSeries, is_dicom_file, list_series
from .grid import (
    grid_difference,
    overlap_fraction,
    resample_like,
    same_grid,
    to_ras,
    turn_like,
    voxel_volume_mm3,
)
from .hdf5 import open_hdf5, read_hdf5, read_hdf5_array
from .header import check_header
from .paths import IMAGE_SUFFIXES, image_stem, image_suffix, is_image_file
from .write import write_volume

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_BYTES",
    "DicomSeries",
    "Kind",
    "as_image",
    "as_label",
    "check_header",
    "grid_difference",
    "image_stem",
    "image_suffix",
    "is_dicom_file",
    "is_image_file",
    "list_series",
    "open_hdf5",
    "overlap_fraction",
    "present_labels",
    "read_hdf5",
    "read_hdf5_array",
    "read_volume",
    "resample_like",
    "same_grid",
    "smallest_integer",
    "to_ras",
    "turn_like",
    "voxel_volume_mm3",
    "write_volume",
]

Kind = Literal["image", "label"]

MAX_BYTES = 8 * 2**30
"""Largest voxel array that is read unless the caller says otherwise: 8 GiB."""


def read_volume(path: Path | str, *, kind: Kind = "image", max_bytes: int = MAX_BYTES) -> Volume:
    """Read one image file, or a folder that holds one DICOM series, and check it completely.

    Args:
        path: ``.nii``, ``.nii.gz``, ``.mha``, ``.nrrd``, ``.dcm``, or a folder of DICOM slices.
        kind: ``image`` gives float32 voxels, all finite; ``label`` gives the smallest unsigned integer
            type that holds the values and refuses fractions.
        max_bytes: Refuse files whose header announces more than this many bytes of voxels.

    Returns:
        A `Volume` with data ``(C, X, Y, Z)``; a two-dimensional image has Z = 1 (or the unit axis that
        it was stored with).

    Raises:
        DataError: The file is missing, damaged, misnamed, too large, of an unsupported kind, or holds
            values that `kind` does not allow.
    """
    path = Path(path)
    read = _reader(path)
    try:
        volume = read(path, max_bytes)
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            str(path),
            why="this machine has not enough memory for its voxels",
            do="crop or resample the image",
        ) from error
    except OSError as error:
        raise DataError(str(path), why=f"cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise DataError(
            str(path), why=f"damaged or not supported: {_one_line(error)}", do="copy the file again"
        ) from error
    data = as_label(volume.data, path) if kind == "label" else as_image(volume.data, path)
    return Volume(data=data, affine=volume.affine, spacing=volume.spacing, header=volume.header, source=path)


def _reader(path: Path) -> Callable[[Path, int], Volume]:
    """Choose the reader by what the path is, before anything is opened."""
    if not path.exists():
        raise DataError(str(path), why="no such file or folder")
    if path.is_dir():
        from .dicom import read_dicom

        return read_dicom
    suffix = image_suffix(path)
    if suffix in {".nii", ".nii.gz"}:
        from .nifti import read_nifti

        return read_nifti
    if suffix in {".mha", ".nrrd"}:
        from .itk import read_itk

        return read_itk
    if suffix == ".dcm" or (not suffix and is_dicom_file(path)):
        from .dicom import read_dicom

        return read_dicom
    raise DataError(str(path), why=_why_unreadable(path), do="convert the image to .nii.gz")


def _why_unreadable(path: Path) -> str:
    name = path.name.lower()
    if name.endswith((".hdr", ".img", ".img.gz")):
        return "header and voxels in two files are not supported"
    if name.endswith((".mhd", ".nhdr")):
        return "a header that points at another file is not supported; use .mha or .nrrd"
    if name.endswith((".h5", ".hdf5")):
        return "an HDF5 file stores no voxel size; its dataset's own reader opens it (see `read_hdf5`)"
    return f"'{path.suffix or path.name}' is no image format known here ({', '.join(IMAGE_SUFFIXES)})"


def _one_line(error: BaseException) -> str:
    text: Any = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
