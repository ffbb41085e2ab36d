"""Which reader a folder or a file is for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from medrl.core.errors import ConfigError, DataError, did_you_mean
from medrl.core.types import Case
from medrl.core.volume import is_image_file, open_hdf5

from .bart import open_bart, read_bart
from .fastmri import open_fastmri, read_fastmri
from .images import open_acdc_h5, open_acdc_nifti, open_folder, read_image_file
from .mrd import open_ismrmrd, read_ismrmrd
from .png import open_acdc_png
from .scans import RawScan, ScanDataset

_HDF5 = (".h5", ".hdf5", ".mrd")

READERS: Mapping[str, Callable[..., ScanDataset]] = MappingProxyType(
    {
        "core": open_folder,
        "acdc-nifti": open_acdc_nifti,
        "acdc-png": open_acdc_png,
        "acdc-h5": open_acdc_h5,
        "fastmri": open_fastmri,
        "ismrmrd": open_ismrmrd,
        "bart": open_bart,
    }
)
"""Readers by name; each takes a path and ``exclude``."""


def open_scans(
    root: Path | str,
    *,
    reader: str = "auto",
    layout: str = "auto",
    frames: Literal["gt", "all"] = "gt",
    spacing_mm: Sequence[float] = (),
    exclude: Sequence[str] = (),
) -> ScanDataset:
    """Open a dataset with a reader, or with the one that recognises it.

    Args:
        root: Folder or file.
        reader: Name in `READERS`, or `auto`.
        layout: Of `core`.
        frames: Of `acdc-nifti`.
        spacing_mm: Of `acdc-h5`.
        exclude: Cases to leave out.

    Raises:
        ConfigError: The reader is unknown, or a case to leave out does not exist.
        DataError: The dataset is not recognised or cannot be listed.
    """
    name = find_reader(root) if reader == "auto" else reader
    if name not in READERS:
        raise ConfigError("data.reader", why=f"'{name}': {did_you_mean(name, READERS)}")
    if name == "core":
        return open_folder(root, layout=layout, exclude=exclude)
    if name == "acdc-nifti":
        return open_acdc_nifti(root, frames=frames, exclude=exclude)
    if name == "acdc-h5":
        return open_acdc_h5(root, spacing=spacing_mm, exclude=exclude)
    return READERS[name](root, exclude=exclude)


def find_reader(root: Path | str) -> str:
    """Name of the reader that a folder or a file is for.

    Raises:
        DataError: Nothing is recognised.
    """
    root = Path(root)
    if root.is_file():
        return _reader_of_file(root)
    if not root.is_dir():
        raise DataError(str(root), why="no such file or folder")
    if (root / "dataset.json").is_file() or (root / "cases.json").is_file():
        return "core"
    patients = [
        path
        for depth in ("*", "*/*", "*/*/*")
        for path in root.glob(depth)
        if path.is_dir() and re.fullmatch(r"patient\d+", path.name)
    ]
    if patients:
        first = sorted(patients)[0]
        return "acdc-png" if (first / "images").is_dir() else "acdc-nifti"
    if any((path / "images").is_dir() and any((path / "images").glob("*.png")) for path in root.iterdir()):
        return "acdc-png"
    files = sorted(
        path for path in root.rglob("*") if path.is_file() and path.suffix.lower() in (*_HDF5, ".cfl")
    )
    if files:
        return _reader_of_file(files[0])
    return "core"


def read_scan(path: Path | str) -> RawScan:
    """Read one file of any kind that a reader knows, without labels; for prediction.

    Raises:
        DataError: The file is of no kind that is known, or damaged.
    """
    path = Path(path)
    if is_image_file(path):
        return read_image_file(path)
    if path.is_dir():
        raise DataError(str(path), why="a folder, expected one file")
    name = _reader_of_file(path)
    if name == "fastmri":
        return read_fastmri(path)
    if name == "ismrmrd":
        return read_ismrmrd(path)
    if name == "bart":
        return read_bart(path)
    dataset = open_acdc_h5(path)
    case: Case = dataset.scans[0]
    return dataset.read(case, with_label=False)


def _reader_of_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".cfl":
        return "bart"
    if suffix == ".json":
        return "core"
    if suffix not in _HDF5:
        raise DataError(
            str(path),
            why=f"'{suffix or path.name}' is no scan known here",
            do=f"readers: {', '.join(READERS)}",
        )
    with open_hdf5(path) as file:
        if "kspace" in file:
            return "fastmri"
        if "image" in file:
            return "acdc-h5"
        if any(hasattr(file[name], "keys") and {"data", "xml"} <= set(file[name]) for name in file):
            return "ismrmrd"
        names = ", ".join(sorted(file)) or "nothing"
    raise DataError(str(path), why=f"HDF5 with {names}; expected kspace, image, or data and xml in a group")
