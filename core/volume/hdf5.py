"""Arrays from HDF5 files, which store no geometry: the caller gives the voxel size.

Links and virtual arrays that lead to another file are never followed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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
    """Read one real array of two or three axes of an HDF5 file; a last, fourth one of length 1 is dropped.

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
    path = Path(path)
    sizes = tuple(float(size) for size in spacing)
    if len(sizes) != 3 or not all(np.isfinite(size) and size > 0 for size in sizes):
        raise DataError(str(path), why=f"voxel size {sizes} mm, expected three positive numbers")
    with open_hdf5(path) as file:
        array = read_hdf5_array(file, key, axes=(2, 3, 4), max_bytes=max_bytes)
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 4:
        raise DataError(str(path), why=f"'{key}' has shape {array.shape}, which is no single image or stack")
    if array.ndim == 2:
        array = array[np.newaxis] if order == "zyx" else array[..., np.newaxis]
    data = (array.transpose(2, 1, 0) if order == "zyx" else array)[np.newaxis]
    return Volume(
        data=as_label(data, path) if kind == "label" else as_image(data, path),
        affine=np.diag([*sizes, 1.0]),
        spacing=(sizes[0], sizes[1], sizes[2]),
        source=path,
    )


@contextlib.contextmanager
def open_hdf5(path: Path | str) -> Iterator[Any]:
    """Open an HDF5 file for reading as an ``h5py.File``; what goes wrong within the block names the file.

    Raises:
        DataError: h5py is missing, or the file is damaged or of another kind.
    """
    try:
        import h5py
    except ImportError as error:
        raise DataError(str(path), why="reading HDF5 needs h5py", do="pip install 'medrl[io]'") from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            str(path), why=f"damaged or no HDF5 file ({reason})", do="copy the file again"
        ) from error


def read_hdf5_array(
    file: Any,
    key: str,
    *,
    kinds: str = "iuf",
    axes: Collection[int] = (2, 3),
    max_bytes: int = 8 * 2**30,
) -> NDArray[Any]:
    """Read one array of an open file whose values lie in this very file.

    Args:
        file: From `open_hdf5`.
        key: Name of the array.
        kinds: Kinds of numpy types that are allowed: ``c`` complex, ``O`` and ``V`` text and records.
        axes: Numbers of axes that are allowed.
        max_bytes: Refuse larger arrays before reading.

    Raises:
        DataError: There is no such array, it lies in another file, is too large or of another kind.
    """
    import h5py

    name = str(file.filename)
    parts = key.strip("/").split("/")
    ways = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    if any(isinstance(file.get(way, getlink=True), h5py.ExternalLink) for way in ways):
        raise DataError(name, why=f"'{key}' points at another file, which is not followed")
    if key not in file:
        raise DataError(name, why=f"no array '{key}'; it holds {', '.join(sorted(file)) or 'nothing'}")
    item = file[key]
    if not isinstance(item, h5py.Dataset) or item.dtype.kind not in kinds or item.ndim not in axes:
        real = "real " if "c" not in kinds else ""
        raise DataError(name, why=f"'{key}' is no {real}array of {_either(axes)} axes")
    if item.external or item.is_virtual:
        raise DataError(name, why=f"the values of '{key}' lie in another file, which is not followed")
    if not item.size or item.size * item.dtype.itemsize > max_bytes:
        raise DataError(name, why=f"'{key}' has shape {item.shape}, which is empty or above the size limit")
    found: NDArray[Any] = item[()]
    return found


def _either(axes: Collection[int]) -> str:
    words = [("no", "one", "two", "three", "four", "five")[count] for count in sorted(axes)]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
