"""MetaImage (``.mha``) and NRRD (``.nrrd``): the stream is verified here, then read by SimpleITK.

SimpleITK fills what is missing of a truncated file with zeros, so length and checksum come first.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medrl.core.errors import DataError
from medrl.core.types import Volume

from .files import read_limited
from .header import check_affine

HEADER_LIMIT = 2**20
META_BYTES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4,
    "MET_LONG": 4, "MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8,
}  # fmt: skip
NRRD_BYTES = {
    "signed char": 1, "int8": 1, "int8_t": 1, "uchar": 1, "unsigned char": 1, "uint8": 1, "uint8_t": 1,
    "short": 2, "short int": 2, "signed short": 2, "int16": 2, "int16_t": 2,
    "ushort": 2, "unsigned short": 2, "unsigned short int": 2, "uint16": 2, "uint16_t": 2,
    "int": 4, "signed int": 4, "int32": 4, "int32_t": 4, "uint": 4, "unsigned int": 4, "uint32": 4,
    "uint32_t": 4, "longlong": 8, "long long": 8, "int64": 8, "int64_t": 8, "ulonglong": 8,
    "unsigned long long": 8, "uint64": 8, "uint64_t": 8, "float": 4, "double": 8,
}  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    """What a header announces: bytes of voxels, where they start, how they are packed."""

    size: int
    start: int
    packing: str  # "raw", "zlib" or "gzip"


def read_itk(path: Path, max_bytes: int) -> Volume:
    """Read one MetaImage or NRRD file; see `medrl.core.volume.read_volume`."""
    raw = read_limited(path, max_bytes + HEADER_LIMIT)
    if not raw:
        raise DataError(str(path), why="the file is empty", do="copy the file again")
    layout = _nrrd_layout(path, raw) if path.name.lower().endswith(".nrrd") else _meta_layout(path, raw)
    if layout.size > max_bytes or layout.size < 1:
        raise DataError(
            str(path),
            why=f"the header announces {layout.size / 2**30:.1f} GiB of voxels; "
            f"the limit is {max_bytes / 2**30:.1f} GiB",
        )
    _check_stream(path, raw, layout)
    del raw
    return _read(path)


def _read(path: Path) -> Volume:
    import SimpleITK as sitk

    process: Any = sitk.ProcessObject
    process.SetGlobalWarningDisplay(False)
    image: Any = sitk.ReadImage(str(path))
    axes = image.GetDimension()
    if axes not in {2, 3}:
        raise DataError(
            str(path), why=f"{axes} axes are not supported in this format", do="convert it to .nii.gz"
        )
    array: Any = sitk.GetArrayFromImage(image)
    if array.dtype.kind not in "iuf":
        raise DataError(str(path), why=f"{image.GetPixelIDTypeAsString()} voxels are not supported")
    channels = image.GetNumberOfComponentsPerPixel()
    array = array[..., np.newaxis] if channels == 1 else array
    if axes == 2:
        array = array[np.newaxis]
    affine = np.eye(4)
    affine[:axes, :axes] = np.array(image.GetDirection()).reshape(axes, axes) * np.array(image.GetSpacing())
    affine[:axes, 3] = image.GetOrigin()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK counts left and posterior as positive
    problems = check_affine(affine)
    if problems:
        raise DataError(str(path), why="; ".join(problems))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return Volume(
        data=array.transpose(3, 2, 1, 0),
        affine=affine,
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        source=path,
    )


def _meta_layout(path: Path, raw: bytes) -> _Layout:
    fields: dict[str, str] = {}
    start = 0
    while "elementdatafile" not in fields:
        end = raw.find(b"\n", start, HEADER_LIMIT)
        if end < 0:
            raise DataError(str(path), why="this is no MetaImage file, or it ends inside its header")
        name, _, value = raw[start:end].decode("latin-1").partition("=")
        fields[name.strip().lower()] = value.strip()
        start = end + 1
    axes = _whole(fields.get("ndims", ""))
    if axes not in {2, 3} or len(fields.get("dimsize", "").split()) != axes:
        raise DataError(str(path), why="the header names no shape of two or three axes")
    if fields["elementdatafile"].upper() != "LOCAL":
        raise DataError(
            str(path), why="the voxels lie in another file, which is not followed", do="convert it to .mha"
        )
    if fields.get("binarydata", "true").lower() != "true" or fields.get("headersize", "0") != "0":
        raise DataError(str(path), why="only binary voxels directly after the header are supported")
    if "elementspacing" not in fields and "elementsize" not in fields:
        raise DataError(str(path), why="the header stores no voxel size")
    item = META_BYTES.get(fields.get("elementtype", "").upper(), 0)
    count = _whole(fields.get("elementnumberofchannels", "1"))
    size = _product(fields.get("dimsize", "")) * count * item
    compressed = fields.get("compresseddata", "false").lower() == "true"
    return _Layout(size, start, "zlib" if compressed else "raw")


def _nrrd_layout(path: Path, raw: bytes) -> _Layout:
    if not raw.startswith(b"NRRD000"):
        raise DataError(str(path), why="this is no NRRD file")
    end = min(
        (at for mark in (b"\n\n", b"\r\n\r\n") if (at := raw.find(mark, 0, HEADER_LIMIT)) >= 0), default=-1
    )
    if end < 0:
        raise DataError(str(path), why="the file ends inside its header", do="copy the file again")
    start = end + (4 if raw[end : end + 2] == b"\r\n" else 2)
    fields: dict[str, str] = {}
    for line in raw[:end].decode("latin-1").splitlines()[1:]:
        name, mark, value = line.partition(":")
        if mark and not line.startswith("#") and not value.startswith("="):
            fields[name.strip().lower()] = value.strip()
    if "data file" in fields or "datafile" in fields:
        raise DataError(str(path), why="the voxels lie in another file, which is not followed")
    if any(fields.get(name, "0") != "0" for name in ("line skip", "lineskip", "byte skip", "byteskip")):
        raise DataError(str(path), why="skipped lines or bytes before the voxels are not supported")
    if "space directions" not in fields and "spacings" not in fields:
        raise DataError(str(path), why="the header stores no voxel size")
    packing = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}.get(fields.get("encoding", "").lower())
    if packing is None:
        raise DataError(
            str(path), why=f"encoding '{fields.get('encoding', '')}' is not supported", do="use gzip"
        )
    size = _product(fields.get("sizes", "")) * NRRD_BYTES.get(fields.get("type", "").lower(), 0)
    return _Layout(size, start, packing)


def _check_stream(path: Path, raw: bytes, layout: _Layout) -> None:
    """Verify that the voxels are all there, and the checksum if there is one."""
    body = raw[layout.start :]
    got = len(body)
    if layout.packing != "raw":
        stream = zlib.decompressobj(wbits=31 if layout.packing == "gzip" else 15)
        try:
            got = len(stream.decompress(body, layout.size + 1))
        except zlib.error as error:
            raise DataError(
                str(path), why=f"the compressed voxels are damaged ({error})", do="copy the file again"
            ) from error
        if got == layout.size and not stream.eof:
            raise DataError(str(path), why="the compressed voxels end early", do="copy the file again")
    if got < layout.size:
        raise DataError(
            str(path), why=f"ends after {got / layout.size:.0%} of its voxels", do="copy the file again"
        )
    if got > layout.size:
        raise DataError(
            str(path), why="holds more voxels than its header announces", do="write the file again"
        )


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _product(text: str) -> int:
    parts = text.split()
    result = 1 if parts else 0
    for part in parts:
        result *= _whole(part)
    return result
