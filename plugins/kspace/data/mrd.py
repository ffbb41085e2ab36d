"""ISMRMRD: the XML header, and raw acquisitions of Cartesian scans sorted into k-space.

Read with h5py by the names of the fields, so that files of every version of the format can be read.
"""

from __future__ import annotations

import logging
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.dataset import patient_of, safe_case_id
from medrl.core.errors import DataError
from medrl.core.types import Case
from medrl.core.volume import open_hdf5, read_hdf5_array

from .scans import RawScan, ScanDataset, files_below

_log = logging.getLogger("medrl.kspace")

NOISE, CALIBRATION, REVERSE = 19, 20, 22
_NO_IMAGE = (23, 24, 26, 27, 28, 29, 30)
"""Flags of readouts that are no part of the image: navigation, phase correction, feedback, dummies,
surface-coil correction, phase stabilisation."""
_XML_LIMIT = 8 * 2**20
_IGNORED = ("average", "segment", "user")
"""Counters that do not tell images apart; readouts of one place are averaged."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is needed of an ISMRMRD header.

    Attributes:
        encoded: Matrix (readout, phase encoding, slices or partitions) as measured.
        recon: Matrix of the image; None if not given.
        field_mm: Encoded field of view; NaN where not given.
        lowest, highest, centre: Limits of the phase-encoding counter; None if not given.
        trajectory: Such as ``cartesian``.
    """

    encoded: tuple[int, int, int]
    recon: tuple[int, int, int] | None
    field_mm: tuple[float, float, float]
    lowest: int | None
    highest: int | None
    centre: int | None
    trajectory: str

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Between rows (readout), columns and slices."""
        x, y, z = (
            size / count if size > 0 and count else math.nan
            for size, count in zip(self.field_mm, self.encoded, strict=True)
        )
        return x, y, z

    def padding(self, width: int) -> tuple[int, int]:
        """First column that was measured, and the column after the last.

        Source: fastMRI mri_data.py, ``padding_left`` and ``padding_right``.

        Raises:
            DataError: They lie outside of the columns.
        """
        if self.centre is None or self.highest is None:
            return 0, width
        left = self.encoded[1] // 2 - self.centre
        right = left + self.highest + 1
        if not 0 <= left < right <= width:
            raise DataError("header", why=f"columns {left} to {right} were measured, of {width}")
        return left, right


def parse_header(text: bytes, source: str) -> Header:
    """Read the XML of an ISMRMRD header; entities are refused.

    Raises:
        DataError: It is damaged, too large, or lacks the encoded matrix.
    """
    if len(text) > _XML_LIMIT or b"<!" in text.replace(b"<!--", b""):
        raise DataError(source, why="the header declares entities, or is larger than 8 MiB")
    try:
        root = ET.fromstring(text)  # noqa: S314 - without declarations there is nothing to expand
    except ET.ParseError as error:
        raise DataError(source, why=f"the header is no XML ({error})") from error
    encoding = root.find("{*}encoding")
    if encoding is None:
        raise DataError(source, why="the header has no encoding")
    encoded = _matrix(encoding, "encodedSpace", source)
    if encoded is None:
        raise DataError(source, why="the header has no encoded matrix")
    limits = "{*}encodingLimits/{*}kspace_encoding_step_1/{*}"
    return Header(
        encoded=encoded,
        recon=_matrix(encoding, "reconSpace", source),
        field_mm=_field(encoding),
        lowest=_whole(encoding, f"{limits}minimum"),
        highest=_whole(encoding, f"{limits}maximum"),
        centre=_whole(encoding, f"{limits}center"),
        trajectory=(encoding.findtext("{*}trajectory") or "cartesian").strip().lower(),
    )


def open_ismrmrd(root: Path | str, *, exclude: Sequence[str] = ()) -> ScanDataset:
    """Open ISMRMRD files ``*.h5``, one case each, with a group that holds ``data`` and ``xml``.

    Raises:
        ConfigError: A case to leave out does not exist.
        DataError: There is no file.
    """
    root = Path(root)
    paths = files_below(root, (".h5", ".hdf5", ".mrd"))
    cases = [
        Case(id=safe_case_id(path.stem), images=(path,), patient=patient_of(path.stem)) for path in paths
    ]
    return ScanDataset(root=root, layout="ismrmrd", scans=cases, read=_read, exclude=exclude)


def read_ismrmrd(path: Path) -> RawScan:
    """Sort the readouts of a Cartesian file into k-space ``(N, C, H, W)``; one coil gives ``(N, H, W)``.

    Noise readouts whiten the coils and are left out, oversampling of the readout is taken away, and readouts
    are placed by ``kspace_encode_step_1``; of several at one place the mean is taken. Partitions (encode step
    2) are transformed to slices. Columns that are missing in any slice are marked.

    Raises:
        DataError: The file is damaged, not Cartesian, or holds no image readout.
    """
    with open_hdf5(path) as file:
        group = next((name for name in file if {"data", "xml"} <= set(_keys(file[name]))), None)
        if group is None:
            raise DataError(str(path), why="no group with data and xml; it is no ISMRMRD file")
        xml = read_hdf5_array(file, f"{group}/xml", kinds="OS", axes=(0, 1))
        records = read_hdf5_array(file, f"{group}/data", kinds="V", axes=(1,))
    first = np.asarray(xml).reshape(-1)[0]
    header = parse_header(first if isinstance(first, bytes) else str(first).encode(), str(path))
    if header.trajectory != "cartesian":
        raise DataError(str(path), why=f"a {header.trajectory} trajectory, only Cartesian ones are read")
    readouts = [_Readout(record, path) for record in records]
    whiten = _whitening([one.samples for one in readouts if one.has(NOISE)], path)
    wanted = [one for one in readouts if not any(one.has(flag) for flag in (NOISE, CALIBRATION, *_NO_IMAGE))]
    if not wanted:
        raise DataError(str(path), why="it holds no readout of an image")
    return _sorted(wanted, header, whiten, path)


class _Readout:
    """One acquisition: counters, flags and samples ``(C, points)``."""

    def __init__(self, record: Any, path: Path) -> None:
        head = record["head"]
        self.flags = int(head["flags"])
        channels, points = int(head["active_channels"]), int(head["number_of_samples"])
        values = np.asarray(record["data"], dtype=np.float32)
        if values.size != 2 * channels * points or not channels:
            raise DataError(
                str(path), why=f"a readout of {values.size} values, expected {channels} coils × {points}"
            )
        samples = values.view(np.complex64).reshape(channels, points)
        before, after = int(head["discard_pre"]), int(head["discard_post"])
        samples = samples[:, before : points - after]
        self.centre = int(head["center_sample"]) - before
        if self.has(REVERSE):
            self.centre = samples.shape[1] - 1 - self.centre
            samples = samples[:, ::-1]
        self.samples: NDArray[np.complex64] = samples
        index = head["idx"]
        self.step = int(index["kspace_encode_step_1"])
        self.partition = int(index["kspace_encode_step_2"])
        self.slice = int(index["slice"])
        self.frame = tuple(int(index[name]) for name in ("phase", "contrast", "repetition", "set"))

    def has(self, flag: int) -> bool:
        """Whether a flag, counted from 1, is set."""
        return bool(self.flags >> (flag - 1) & 1)


def _sorted(
    readouts: Sequence[_Readout], header: Header, whiten: NDArray[np.complex64] | None, path: Path
) -> RawScan:
    """Place the readouts."""
    length, width, depth = header.encoded
    coils = {one.samples.shape[0] for one in readouts}
    if len(coils) > 1:
        raise DataError(str(path), why=f"readouts of {sorted(coils)} coils")
    frames = sorted({one.frame for one in readouts})
    slices = sorted({one.slice for one in readouts})
    shape = (len(frames), len(slices), depth, coils.pop(), width, length)
    if math.prod(shape) > 2**31:
        raise DataError(str(path), why=f"the header announces k-space of shape {shape}, above the limit")
    kspace = np.zeros(shape, dtype=np.complex64)
    count = np.zeros((len(frames), len(slices), depth, width), dtype=np.int64)
    offset = 0 if header.centre is None else width // 2 - header.centre
    for one in readouts:
        column = one.step + offset
        start = length // 2 - one.centre
        stop = start + one.samples.shape[1]
        if not (0 <= column < width and 0 <= one.partition < depth and 0 <= start < stop <= length):
            raise DataError(
                str(path),
                why=f"a readout of {one.samples.shape[1]} points at line {one.step}, partition "
                f"{one.partition} does not fit the encoded matrix {header.encoded}",
            )
        place = (frames.index(one.frame), slices.index(one.slice), one.partition)
        samples = one.samples if whiten is None else whiten @ one.samples
        kspace[(*place, slice(None), column, slice(start, stop))] += samples
        count[(*place, column)] += 1
    kspace /= np.maximum(count, 1)[:, :, :, None, :, None]
    if header.recon is not None and header.recon[0] < length:
        kspace = _without_oversampling(kspace, header.recon[0])
    if depth > 1:
        kspace = _centred(np.fft.ifft, kspace, 2)
    stacked = kspace.reshape(-1, *kspace.shape[3:]).transpose(0, 1, 3, 2)
    missing = (count == 0).any(axis=(0, 1, 2))
    if missing.all():
        raise DataError(str(path), why="no column was measured in every slice")
    numbers = [
        (frame, level * depth + part)
        for frame in range(len(frames))
        for level in range(len(slices))
        for part in range(depth)
    ]
    several = len(frames) > 1
    return RawScan(
        names=tuple(
            f"t{frame:02d}_z{number:03d}" if several else f"z{number:03d}" for frame, number in numbers
        ),
        frames=tuple(f"t{frame:02d}" if several else "" for frame, _ in numbers),
        slices=tuple(number for _, number in numbers),
        spacing_mm=header.spacing_mm,
        kspace=np.ascontiguousarray(stacked[:, 0] if stacked.shape[1] == 1 else stacked),
        missing=missing,
    )


def _whitening(noise: Sequence[NDArray[np.complex64]], path: Path) -> NDArray[np.complex64] | None:
    """The matrix ``(C, C)`` that makes the noise of the coils equal and independent; None without noise.

    Source: Pruessmann et al. 2001, appendix A; ismrmrd-python-tools ``calculate_prewhitening``.
    """
    if not noise:
        return None
    samples = np.concatenate(noise, axis=1).astype(np.complex128)
    coils, points = samples.shape
    if points <= coils:
        _log.warning("%s: %d noise samples of %d coils; they are not whitened", path.name, points, coils)
        return None
    covariance = samples @ samples.conj().T / (points - 1)
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        _log.warning("%s: the noise of the coils is degenerate; they are not whitened", path.name)
        return None
    found: NDArray[np.complex64] = np.linalg.inv(factor).astype(np.complex64)
    return found


def _without_oversampling(kspace: NDArray[np.complex64], length: int) -> NDArray[np.complex64]:
    """Keep the middle of the field of view along the readout, the last axis."""
    images = _centred(np.fft.ifft, kspace, -1)
    start = kspace.shape[-1] // 2 - length // 2
    return _centred(np.fft.fft, images[..., start : start + length], -1)


def _centred(transform: Any, values: NDArray[np.complex64], axis: int) -> NDArray[np.complex64]:
    moved = transform(np.fft.ifftshift(values, axes=axis), axis=axis, norm="ortho")
    found: NDArray[np.complex64] = np.fft.fftshift(moved, axes=axis).astype(np.complex64)
    return found


def _read(case: Case, with_label: bool) -> RawScan:
    return read_ismrmrd(case.images[0])


def _keys(item: Any) -> Sequence[str]:
    return list(item) if hasattr(item, "keys") else ()


def _matrix(encoding: Any, space: str, source: str) -> tuple[int, int, int] | None:
    found = [_whole(encoding, f"{{*}}{space}/{{*}}matrixSize/{{*}}{axis}") for axis in "xyz"]
    if any(size is None for size in found):
        return None
    x, y, z = (int(size or 0) for size in found)
    if min(x, y, z) < 1 or max(x, y, z) > 2**16:
        raise DataError(source, why=f"matrix {x} × {y} × {z} in the header")
    return x, y, z


def _field(encoding: Any) -> tuple[float, float, float]:
    sizes = []
    for axis in "xyz":
        text = encoding.findtext(f"{{*}}encodedSpace/{{*}}fieldOfView_mm/{{*}}{axis}")
        try:
            size = float(text)
        except (TypeError, ValueError):
            size = math.nan
        sizes.append(size if math.isfinite(size) and size > 0 else math.nan)
    return sizes[0], sizes[1], sizes[2]


def _whole(item: Any, way: str) -> int | None:
    text = item.findtext(way)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None
