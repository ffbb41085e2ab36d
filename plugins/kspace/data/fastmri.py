"""fastMRI HDF5: ``kspace`` ``(slice, H, W)`` or, of several coils, ``(slice, coil, H, W)``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medrl.core.dataset import safe_case_id
from medrl.core.errors import DataError
from medrl.core.types import Case
from medrl.core.volume import open_hdf5, read_hdf5_array

from .mrd import Header, parse_header
from .scans import UNKNOWN, Listing, RawScan, ScanDataset, files_below

_REFERENCES = ("reconstruction_rss", "reconstruction_esc")
_PARTS = ("train", "val", "test")
_SUFFIXES = (".h5", ".hdf5")


def open_fastmri(root: Path | str, *, exclude: Sequence[str] = ()) -> ScanDataset:
    """Open fastMRI files, one case each; the patient is the attribute ``patient_id``, else the file.

    Folders ``…_train``, ``…_val`` and ``…_test`` below `root` deal the cases, as fastMRI is published.

    Raises:
        ConfigError: A case to leave out does not exist.
        DataError: There is no file, or one is damaged.
    """
    root = Path(root)
    found = Listing()
    parts: dict[str, list[str]] = {}
    folders = {"": root}
    if root.is_dir():
        dealt = [path for path in sorted(root.iterdir()) if path.is_dir() and _part(path)]
        folders |= {_part(path): path for path in dealt}
    for part, folder in folders.items():
        for path in files_below(folder, _SUFFIXES):
            case = safe_case_id(path.stem)
            found.scans.append(Case(id=case, images=(path,), patient=_patient(path) or case))
            parts.setdefault(part, []).append(case)
    apart = parts.pop("test", [])
    parts.pop("", None)
    return ScanDataset(
        root=root,
        layout="fastmri",
        scans=found.scans,
        read=_read,
        apart=apart,
        parts=parts if set(parts) == {"train", "val"} else None,
        exclude=exclude,
    )


def read_fastmri(path: Path) -> RawScan:
    """Read the k-space of a file; the rows are the readout, the columns the phase encoding.

    Columns outside of the encoding limits are marked as missing. ``reconstruction_rss`` or
    ``reconstruction_esc`` is kept as the reference.

    Raises:
        DataError: The file is damaged, or undersampled.
    """
    with open_hdf5(path) as file:
        if "mask" in file and not bool(np.all(read_hdf5_array(file, "mask", kinds="biuf", axes=(1,)))):
            raise DataError(
                str(path), why="it is undersampled, as the test set of the challenge", do="leave it out"
            )
        kspace = read_hdf5_array(file, "kspace", kinds="c", axes=(3, 4)).astype(np.complex64)
        name = next((item for item in _REFERENCES if item in file), None)
        reference = None if name is None else read_hdf5_array(file, name, axes=(3,)).astype(np.float32)
        header = _header(file, path)
        sensitivities = None
        if "sensitivities" in file and kspace.ndim == 4:
            sensitivities = read_hdf5_array(file, "sensitivities", kinds="c", axes=(4,)).astype(np.complex64)
            if sensitivities.shape != kspace.shape:
                raise DataError(str(path), why=f"sensitivities of shape {sensitivities.shape}")
    if not np.isfinite(kspace).all():
        raise DataError(str(path), why="k-space holds values that are NaN or infinite")
    width = kspace.shape[-1]
    left, right = (0, width) if header is None else header.padding(width)
    missing = np.ones(width, dtype=np.bool_)
    missing[left:right] = False
    count = len(kspace)
    return RawScan(
        names=tuple(f"z{number:03d}" for number in range(count)),
        frames=("",) * count,
        slices=tuple(range(count)),
        spacing_mm=UNKNOWN if header is None else header.spacing_mm,
        kspace=kspace,
        sensitivities=sensitivities,
        missing=missing,
        reference=reference,
    )


def _read(case: Case, with_label: bool) -> RawScan:
    return read_fastmri(case.images[0])


def _header(file: Any, path: Path) -> Header | None:
    if "ismrmrd_header" not in file:
        return None
    text = read_hdf5_array(file, "ismrmrd_header", kinds="OS", axes=(0,))
    value = np.asarray(text).reshape(-1)[0]
    return parse_header(value if isinstance(value, bytes) else str(value).encode(), str(path))


def _patient(path: Path) -> str:
    with open_hdf5(path) as file:
        value = file.attrs.get("patient_id", "")
    return value.decode() if isinstance(value, bytes) else str(value)


def _part(path: Path) -> str:
    return next((part for part in _PARTS if path.name == part or path.name.endswith(f"_{part}")), "")
