"""What the writers of phantoms share: a folder that appears whole or not at all, and NIfTI without a time."""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError


def write_whole(root: Path, description: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Make the folder of a phantom with ``write(draft)``; one that holds this very phantom stays as it is.

    Args:
        root: Folder to make.
        description: What the phantom is made of, as ``dataset.json`` keeps it under ``phantom``.
        write: Fills an empty folder, ``dataset.json`` included.

    Raises:
        DataError: `root` holds something else, or cannot be written.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if _description(root) == description:
            return root
        raise DataError(
            str(root),
            why="the folder holds something other than the phantom asked for",
            do="choose a new folder",
        )
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as scratch:
            draft = Path(scratch) / "draft"
            write(draft)
            if root.exists():
                root.rmdir()
            shutil.move(draft, root)
    except OSError as error:
        raise DataError(str(root), why=f"cannot be written ({error.strerror or error})") from error
    return root


def write_record(root: Path, record: dict[str, Any]) -> None:
    """Write ``dataset.json``."""
    (root / "dataset.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_nifti(path: Path, data: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """Write one image; no time and no file name go into the gzip header."""
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


def _description(root: Path) -> Any:
    try:
        return json.loads((root / "dataset.json").read_text(encoding="utf-8")).get("phantom")
    except (OSError, ValueError, AttributeError):
        return None
