"""ACDC as PNG slices, as the original lays them out, with a sidecar that keeps what PNG cannot.

``patientNNN/images/<i>.png`` and ``patientNNN/labels/<i>.png``, i from 0; ``patientNNN/meta.json`` holds, for
each i, frame, slice, spacing (rows, columns, slices in mm), affine, and the intensities of black and white.
Without the sidecar frames and slices are unknown, and so is every volume.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medrl.core.dataset import safe_case_id
from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Case
from medrl.core.volume.write import write_bytes

from .scans import UNKNOWN, Listing, RawScan, ScanDataset
from .splits import PUBLIC, acdc_group, acdc_number

META = "meta.json"
ALPHABETS = ((0, 1, 2, 3), (0, 85, 170, 255))
"""Encodings of the four labels that are accepted: as they are, and spread over 8 bits."""

_META_LIMIT = 64 * 2**20
_MAX_PIXELS = 2**26
_NAME = re.compile(r"\d+")

_log = logging.getLogger("medrl.kspace")


def open_acdc_png(root: Path | str, *, exclude: Sequence[str] = ()) -> ScanDataset:
    """Open ``<root>/patientNNN/{images,labels}/<i>.png``; a case is a patient, slices in numeric order.

    Patients from 101 on are set aside for testing.

    Raises:
        ConfigError: A patient to leave out does not exist.
        DataError: There is no such folder, or a label is missing.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(str(root), why="no such folder")
    found = Listing()
    for folder in sorted(path for path in root.iterdir() if (path / "images").is_dir()):
        patient = safe_case_id(folder.name)
        images = _numbered(folder / "images")
        if not images:
            continue
        labels = _numbered(folder / "labels") if (folder / "labels").is_dir() else {}
        if labels and set(labels) != set(images):
            wrong = sorted(set(labels) ^ set(images))
            raise DataError(str(folder), why=f"slice {wrong[0]} has an image or a label, but not both")
        found.scans.append(
            Case(
                id=patient,
                images=tuple(images[number] for number in sorted(images)),
                label=folder / "labels" if labels else None,
                patient=patient,
            )
        )
        found.groups[patient] = acdc_group(patient)
        if (acdc_number(patient) or 0) > PUBLIC:
            found.apart.append(patient)
        if (folder / META).is_file():
            found.beside[patient] = (folder / META,)
    return ScanDataset(
        root=root,
        layout="acdc-png",
        scans=found.scans,
        read=_read,
        apart=found.apart,
        groups=found.groups,
        beside=found.beside,
        exclude=exclude,
    )


def export_png(dataset: ScanDataset, root: Path | str, *, bits: Literal[8, 16] = 16) -> Path:
    """Write scans as PNG slices with their sidecars, one folder a patient; return the folder.

    Intensities are stretched from the minimum to the maximum of each slice, which the sidecar keeps; 16 bits
    lose a 131,070th of the range, 8 bits a 510th.

    Args:
        dataset: Scans of magnitude images, with or without labels.
        root: Folder to write to; it must be new or empty.
        bits: Of the images; labels are written as they are.

    Raises:
        ConfigError: `root` holds something.
        DataError: The dataset holds k-space, or a patient has scans with and without labels.
    """
    root = Path(root)
    if bits not in (8, 16):
        raise ConfigError("bits", why=f"{bits}", do="8 or 16")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(str(root), why="there is something already", do="choose a new folder")
    patients: dict[str, list[Case]] = {}
    for case in dataset.scans:
        patients.setdefault(safe_case_id(case.patient or case.id), []).append(case)
    for patient, cases in patients.items():
        if len({case.label is None for case in cases}) > 1:
            raise DataError(patient, why="some of its scans have labels and some have none")
        meta: dict[str, dict[str, Any]] = {}
        for case in cases:
            raw = dataset.read(case, with_label=True)
            if raw.images is None:
                raise DataError(f"case {case.id}", why="it holds k-space, not images", case=case.id)
            affine = None if raw.volume is None else raw.volume.affine.tolist()
            for number, image in enumerate(raw.images):
                name = str(len(meta))
                low, high = float(image.min()), float(image.max())
                _write(root / patient / "images" / f"{name}.png", _stretched(image, low, high, bits))
                if raw.labels is not None:
                    _write(root / patient / "labels" / f"{name}.png", raw.labels[number])
                meta[name] = {
                    "frame": raw.frames[number],
                    "slice": raw.slices[number],
                    "spacing": [None if math.isnan(size) else size for size in raw.spacing_mm],
                    "affine": affine,
                    "min": low,
                    "max": high,
                }
        text = json.dumps(meta, indent=1, allow_nan=False) + "\n"
        write_bytes(root / patient / META, text.encode())
    return root


def _numbered(folder: Path) -> dict[int, Path]:
    """Files ``<i>.png`` by their number.

    Raises:
        DataError: A PNG file has another name, or two have one number.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() != ".png" or path.name.startswith("."):
            continue
        if not _NAME.fullmatch(path.stem):
            raise DataError(str(path), why="slices are named by their number, such as 12.png")
        if int(path.stem) in found:
            raise DataError(str(path), why=f"number {int(path.stem)} is there twice")
        found[int(path.stem)] = path
    return found


def _read(case: Case, with_label: bool) -> RawScan:
    numbers = [int(path.stem) for path in case.images]
    images = [read_png(path) for path in case.images]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise DataError(case.id, why=f"slices of different size: {sorted(shapes)}")
    labels = None
    if with_label and case.label is not None:
        labels = decode_labels(
            np.stack([read_png(case.label / path.name) for path in case.images]), str(case.label)
        )
        if labels.shape[1:] != images[0].shape:
            raise DataError(case.id, why=f"labels of {labels.shape[1:]} on images of {images[0].shape}")
    meta = _meta(case.images[0].parent.parent / META, numbers)
    if meta is None:
        _log.warning(
            "%s: no %s; frames, slices and volumes are unknown, and no volume is measured", case.id, META
        )
        return RawScan(
            names=tuple(f"i{number:04d}" for number in numbers),
            frames=("",) * len(numbers),
            slices=(-1,) * len(numbers),
            images=np.stack([image.astype(np.float32) for image in images]),
            labels=labels,
        )
    spacings = {meta[number].spacing for number in numbers}
    if len(spacings) > 1:
        raise DataError(case.id, why="slices of different spacing")
    return RawScan(
        names=tuple(f"i{number:04d}" for number in numbers),
        frames=tuple(meta[number].frame for number in numbers),
        slices=tuple(meta[number].number for number in numbers),
        spacing_mm=meta[numbers[0]].spacing,
        images=np.stack(
            [meta[number].restored(image) for number, image in zip(numbers, images, strict=True)]
        ),
        labels=labels,
    )


class _Entry:
    """What the sidecar says of one slice."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.frame = str(content["frame"])
        self.number = int(content["slice"])
        sizes = [float("nan") if size is None else float(size) for size in content["spacing"]]
        if len(sizes) != 3 or any(size <= 0 for size in sizes):
            raise ValueError(f"spacing {content['spacing']}")
        self.spacing = UNKNOWN if any(map(math.isnan, sizes)) else (sizes[0], sizes[1], sizes[2])
        self.low, self.high = float(content["min"]), float(content["max"])
        if not (math.isfinite(self.low) and self.low <= self.high < math.inf):
            raise ValueError(f"intensities {self.low} to {self.high}")

    def restored(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Intensities before they were stretched."""
        share = image.astype(np.float64) / (65535 if image.dtype == np.uint16 else 255)
        return (self.low + share * (self.high - self.low)).astype(np.float32)


def _meta(path: Path, numbers: Sequence[int]) -> dict[int, _Entry] | None:
    """The sidecar, which must know every slice; None where there is none."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _META_LIMIT:
            raise DataError(str(path), why="larger than 64 MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {number: _Entry(content[str(number)]) for number in numbers}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            str(path), why=f"no sidecar of these slices ({type(error).__name__}: {error})",
            do="write it again with `medrl kspace export-png`, or remove it",
        ) from error  # fmt: skip
    return found


def decode_labels(values: NDArray[Any], source: str) -> NDArray[np.uint8]:
    """Label values of a patient from one of the two encodings.

    Raises:
        DataError: The values are of neither.

    >>> decode_labels(np.array([0, 170, 85, 255]), "labels").tolist()
    [0, 2, 1, 3]
    """
    present = set(np.unique(values).tolist())
    for alphabet in ALPHABETS:
        if present <= set(alphabet):
            return (values // alphabet[1]).astype(np.uint8)
    raise DataError(
        source,
        why=f"label values {sorted(present)[:8]}; expected 0, 1, 2, 3 or 0, 85, 170, 255",
        do="write labels without interpolation or compression",
    )


def read_png(path: Path) -> NDArray[Any]:
    """Read a grey PNG of 8 or 16 bits: ``(H, W)`` uint8 or uint16.

    Raises:
        DataError: The file is missing, damaged, in colour, or too large.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(str(path), why=f"{image.width} × {image.height} pixels are above the limit")
            if image.mode not in {"L", "I;16", "I"}:
                raise DataError(str(path), why=f"a PNG of mode {image.mode}, expected grey of 8 or 16 bits")
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(str(path), why=f"damaged or no PNG ({error})", do="copy the file again") from error
    grey: NDArray[Any] = values if values.dtype == np.uint8 else values.astype(np.uint16)
    return grey


def _stretched(image: NDArray[np.float32], low: float, high: float, bits: int) -> NDArray[Any]:
    top = 2**bits - 1
    share = (image.astype(np.float64) - low) / (high - low) if high > low else np.zeros(image.shape)
    grey: NDArray[Any] = np.rint(share * top).astype(np.uint8 if bits == 8 else np.uint16)
    return grey


def _write(path: Path, values: NDArray[Any]) -> None:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(content, format="PNG")
    write_bytes(path, content.getvalue())
