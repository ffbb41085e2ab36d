"""Arrays from HDF5 files, which store no geometry: the caller gives the voxel size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medrl.core.errors import DataError
from medrl.core.types import Volume

from .arrays import as_image, as_label


def read_hdf5(
    path: Path | str,
    key: str,
    *,
    spacing: Sequence[float],
    kind: Literal["image", "label"] = "image",
    order: Literal["xyz", "zyx"] = "zyx",
    max_bytes: int = 8 * 2**30,
) -> Volume:
    """Read one real array of two or three axes of an HDF5 file; a fourth one of length 1 is dropped.

    Args:
        path: The file; links that lead out of it are refused.
        key: Name of the array, such as ``image``.
        spacing: Voxel size in mm along X, Y, Z, which the format does not store.
        kind: As for `medrl.core.volume.read_volume`.
        order: Order of the stored axes; slice first (``zyx``) is what most HDF5 datasets use.
        max_bytes: Refuse larger arrays before reading.

    Raises:
        DataError: The file is damaged, the array is missing, too large or of another kind.
    """
    try:
        import h5py
    except ImportError as error:
        raise DataError(str(path), why="reading HDF5 needs h5py", do="pip install 'medrl[io]'") from error
    path = Path(path)
    sizes = tuple(float(size) for size in spacing)
    if len(sizes) != 3 or not all(np.isfinite(size) and size > 0 for size in sizes):
        raise DataError(str(path), why=f"voxel size {sizes} mm, expected three positive numbers")
    try:
        with h5py.File(path, "r") as file:
            array = _read(file, key, h5py, max_bytes)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            str(path), why=f"damaged or no HDF5 file ({reason})", do="copy the file again"
        ) from error
    if array.ndim == 2:
        array = array[np.newaxis] if order == "zyx" else array[..., np.newaxis]
    data = (array.transpose(2, 1, 0) if order == "zyx" else array)[np.newaxis]
    return Volume(
        data=as_label(data, path) if kind == "label" else as_image(data, path),
        affine=np.diag([*sizes, 1.0]),
        spacing=(sizes[0], sizes[1], sizes[2]),
        source=path,
    )


def _read(file: Any, key: str, h5py: Any, max_bytes: int) -> Any:
    name = str(file.filename)
    if key not in file:
        raise DataError(name, why=f"no array '{key}'; it holds {', '.join(sorted(file)) or 'nothing'}")
    if isinstance(file.get(key, getlink=True), h5py.ExternalLink):
        raise DataError(name, why=f"'{key}' points at another file, which is not followed")
    item = file[key]
    axes = item.ndim if isinstance(item, h5py.Dataset) else 0
    single = axes == 4 and item.shape[-1] == 1
    if axes not in ({4} if single else {2, 3}) or item.dtype.kind not in "iuf":
        raise DataError(name, why=f"'{key}' is no real array of two or three axes")
    if item.external or item.is_virtual:
        raise DataError(name, why=f"the values of '{key}' lie in another file, which is not followed")
    if not item.size or item.size * item.dtype.itemsize > max_bytes:
        raise DataError(name, why=f"'{key}' has shape {item.shape}, which is empty or above the size limit")
    return item[..., 0] if single else item[()]
