"""BART ``.cfl``/``.hdr``: k-space with dimensions readout, phase 1, phase 2, coil, …, slice (13th from 0)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medrl.core.dataset import patient_of, safe_case_id
from medrl.core.errors import DataError
from medrl.core.types import Case

from .scans import RawScan, ScanDataset, files_below

_SENSITIVITIES = "_sens"
_COIL, _SLICE = 3, 13
_LIMIT = 16 * 2**30


def open_bart(root: Path | str, *, exclude: Sequence[str] = ()) -> ScanDataset:
    """Open k-space of BART, one case a ``.cfl``; ``NAME_sens.cfl`` holds the sensitivities of ``NAME.cfl``.

    Raises:
        ConfigError: A case to leave out does not exist.
        DataError: There is no file.
    """
    root = Path(root)
    cases, beside = [], {}
    for path in files_below(root, (".cfl",)):
        if (
            path.stem.endswith(_SENSITIVITIES)
            and path.with_name(f"{path.stem.removesuffix(_SENSITIVITIES)}.cfl").is_file()
        ):
            continue
        case = safe_case_id(path.stem)
        cases.append(Case(id=case, images=(path,), patient=patient_of(case)))
        maps = _maps(path)
        headers = [path.with_suffix(".hdr")]
        if maps is not None:
            headers += [maps, maps.with_suffix(".hdr")]
        beside[case] = tuple(headers)
    return ScanDataset(root=root, layout="bart", scans=cases, read=_read, beside=beside, exclude=exclude)


def read_bart(path: Path) -> RawScan:
    """Read k-space of two-dimensional slices or of a volume.

    With two encoded dimensions, whichever they are, the first is the rows and the second the columns. With
    three, rows are the readout, columns phase 1, and phase 2 is transformed to slices. Columns of zeros are
    marked as missing.

    Raises:
        DataError: The files are damaged, or have dimensions that are not known here.
    """
    kspace = _slices(read_cfl(path), path, transform=True)
    maps = _maps(path)
    sensitivities = None
    if maps is not None:
        sensitivities = _slices(read_cfl(maps), maps, transform=False)
        if sensitivities.shape != kspace.shape:
            raise DataError(str(maps), why=f"shape {sensitivities.shape} on k-space {kspace.shape}")
    count = len(kspace)
    missing = (kspace == 0).all(axis=tuple(range(kspace.ndim - 1)))
    if missing.all():
        raise DataError(str(path), why="k-space is zero everywhere")
    several = kspace.shape[1] > 1
    return RawScan(
        names=tuple(f"z{number:03d}" for number in range(count)),
        frames=("",) * count,
        slices=tuple(range(count)),
        kspace=np.ascontiguousarray(kspace if several else kspace[:, 0]),
        sensitivities=sensitivities if several else None,
        missing=missing,
    )


def read_cfl(path: Path) -> NDArray[np.complex64]:
    """Read a ``.cfl`` with its ``.hdr``, first dimension fastest, all dimensions kept.

    Raises:
        DataError: A file is missing, or does not have the size that the header announces.
    """
    header = path.with_suffix(".hdr")
    try:
        lines = header.read_text(encoding="utf-8", errors="replace").splitlines()
        at = lines.index("# Dimensions")
        shape = tuple(int(word) for word in lines[at + 1].split())
    except (OSError, ValueError, IndexError) as error:
        raise DataError(str(header), why=f"no header of a .cfl file ({error})") from error
    size = 8
    for extent in shape:
        size *= extent
    if not shape or min(shape) < 1 or size > _LIMIT:
        raise DataError(str(header), why=f"dimensions {shape}")
    if not path.is_file() or path.stat().st_size != size:
        found = path.stat().st_size if path.is_file() else 0
        raise DataError(str(path), why=f"{found} bytes, its header announces {size}", do="copy it again")
    values = np.fromfile(path, dtype="<c8").reshape(shape, order="F")
    if not np.isfinite(values).all():
        raise DataError(str(path), why="it holds values that are NaN or infinite")
    return values


def _slices(values: NDArray[np.complex64], path: Path, *, transform: bool) -> NDArray[np.complex64]:
    """Bring the dimensions of BART to ``(N, C, H, W)``."""
    shape = values.shape + (1,) * (16 - values.ndim)
    extra = [axis for axis in range(4, len(shape)) if shape[axis] > 1 and axis != _SLICE]
    if extra:
        raise DataError(str(path), why=f"dimension {extra[0]} has {shape[extra[0]]} entries, expected 1")
    # (readout, phase 1, phase 2, coil, slice)
    short = values.reshape(*shape[:4], shape[_SLICE], order="F")
    encoded = [axis for axis in range(3) if short.shape[axis] > 1]
    if len(encoded) == 2:
        flat = short.reshape(*(short.shape[axis] for axis in encoded), *short.shape[3:], order="F")
        return np.ascontiguousarray(flat.transpose(3, 2, 0, 1))
    if len(encoded) == 3 and short.shape[4] == 1:
        volume = short[..., 0]
        if transform:
            shifted = np.fft.ifft(np.fft.ifftshift(volume, axes=2), axis=2, norm="ortho")
            volume = np.fft.fftshift(shifted, axes=2).astype(np.complex64)
        return np.ascontiguousarray(volume.transpose(2, 3, 0, 1))
    raise DataError(str(path), why=f"dimensions {shape[:4]}, expected two or three that are encoded")


def _maps(path: Path) -> Path | None:
    found = path.with_name(f"{path.stem}{_SENSITIVITIES}.cfl")
    return found if found.is_file() else None


def _read(case: Case, with_label: bool) -> RawScan:
    return read_bart(case.images[0])
