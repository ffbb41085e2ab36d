"""One DICOM series as a volume: slices sorted along their normal, spacing checked, LPS turned to RAS.

Only numbers that describe geometry and intensity are read from the headers; names, dates and
descriptions of a patient never reach a message, a log or an output.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError
from medrl.core.types import Volume

from .header import check_affine

TAGS = [
    "SOPClassUID", "SeriesInstanceUID", "SeriesNumber", "Modality", "InstanceNumber", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "PixelSpacing",
    "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", "SpacingBetweenSlices",
]  # fmt: skip
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
POSITION_TOLERANCE_MM = 0.01


@dataclass(frozen=True, kw_only=True)
class DicomSeries:
    """The files of one series, by its identifier.

    Attributes:
        uid: Series instance UID.
        number: Series number, empty if none is stored.
        modality: Such as ``CT`` or ``MR``.
        files: In order of their names.
    """

    uid: str
    number: str
    modality: str
    files: tuple[Path, ...]

    def __str__(self) -> str:
        return (
            f"{self.modality or 'series'} {self.number or '?'} ({len(self.files)} files, …{self.uid[-12:]})"
        )


def is_dicom_file(path: Path) -> bool:
    """Whether a file carries the DICOM mark at byte 128, or at least the suffix ``.dcm``."""
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() == ".dcm":
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def list_series(folder: Path) -> list[DicomSeries]:
    """Return the series of the DICOM files directly inside a folder, in order of their numbers.

    Raises:
        DataError: A DICOM file of the folder cannot be read.
    """
    found: dict[str, list[Any]] = {}
    for path in sorted(item for item in folder.iterdir() if is_dicom_file(item)):
        header = _read_header(path)
        found.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((path, header))
    series = []
    for uid, items in found.items():
        first = items[0][1]
        series.append(
            DicomSeries(
                uid=uid,
                number=str(first.get("SeriesNumber", "") or ""),
                modality=str(first.get("Modality", "") or ""),
                files=tuple(path for path, _ in items),
            )
        )
    return sorted(
        series,
        key=lambda one: (
            not one.number.isdigit(),
            int(one.number or 0) if one.number.isdigit() else 0,
            one.uid,
        ),
    )


def read_dicom(path: Path, max_bytes: int) -> Volume:
    """Read the one series of a folder, or a single slice; see `medrl.core.volume.read_volume`."""
    if path.is_dir():
        series = list_series(path)
        if not series:
            raise DataError(
                str(path), why="the folder holds no DICOM file", do="name a file, or a folder of one series"
            )
        if len(series) > 1:
            raise DataError(
                str(path),
                why=f"the folder holds {len(series)} series: " + "; ".join(str(one) for one in series),
                do="put each series into a folder of its own",
            )
        files: Sequence[Path] = series[0].files
    else:
        files = (path,)
    headers = [_read_header(file) for file in files]
    for file, header in zip(files, headers, strict=True):
        _check_kind(file, header)
    order, affine, shape = _geometry(path, files, headers)
    if int(np.prod(shape)) * 4 > max_bytes:
        raise DataError(
            str(path), why=f"its {shape} voxels are above the limit of {max_bytes / 2**30:.1f} GiB"
        )
    data = np.empty((1, *shape), dtype=np.float32)
    for z, index in enumerate(order):
        data[0, :, :, z] = _pixels(files[index], shape[:2])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return Volume(
        data=data,
        affine=affine,
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        source=path,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence pydicom's warnings, which repeat header values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pydicom(path: Path) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise DataError(str(path), why="reading DICOM needs pydicom", do="pip install 'medrl[io]'") from error
    return pydicom


def _read_header(path: Path) -> Any:
    dcmread: Callable[..., Any] = _pydicom(path).dcmread
    try:
        with _quiet():
            header = dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
            for tag in TAGS:  # values are decoded on first use: do it here, where errors are caught
                header.get(tag)
    except Exception as error:
        raise DataError(
            str(path), why=f"no readable DICOM file ({type(error).__name__})", do="copy the file again"
        ) from error
    if not header.get("SeriesInstanceUID") and not header.get("Rows"):  # anonymised files may lack the first
        raise DataError(
            str(path),
            why="no readable DICOM file: it ends before its image is described",
            do="copy the file again",
        )
    return header


def _check_kind(path: Path, header: Any) -> None:
    """Refuse what is no grey-valued slice with a place in the patient."""
    frames = _number(header, "NumberOfFrames") or 1
    colour = str(header.get("PhotometricInterpretation", "MONOCHROME2"))
    modality = str(header.get("Modality", "") or "unknown modality")
    if frames > 1:
        raise DataError(
            str(path),
            why=f"a multi-frame {modality} file ({frames:g} frames in one file) is not supported",
            do="convert it to .nii.gz, for instance with dcm2niix",
        )
    if (_number(header, "SamplesPerPixel") or 1) > 1 or colour != "MONOCHROME2":
        raise DataError(
            str(path),
            why=f"{modality} with {colour} pixels; only grey values (MONOCHROME2) are supported",
            do="convert it to a grey-valued .nii.gz with its voxel size",
        )
    if not _number(header, "Rows") or not _number(header, "Columns"):
        raise DataError(str(path), why="a DICOM file without an image")
    for tag, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        values = _vector(header, tag)
        if len(values) != count or not np.isfinite(values).all():
            raise DataError(
                str(path),
                why=f"{modality} without {tag}: the file does not say where its pixels lie in the patient",
                do="convert it to .nii.gz with its voxel size",
            )


def _geometry(
    path: Path, files: Sequence[Path], headers: Sequence[Any]
) -> tuple[list[int], NDArray[np.float64], tuple[int, int, int]]:
    """Return the order of the slices, the RAS affine and the shape ``(X, Y, Z)``."""
    first = headers[0]
    orientation = np.array(_vector(first, "ImageOrientationPatient"))
    pixel = np.array(_vector(first, "PixelSpacing"))
    rows, columns = int(first.Rows), int(first.Columns)
    for file, header in zip(files, headers, strict=True):
        same = (int(header.Rows), int(header.Columns)) == (rows, columns)
        same &= bool(np.allclose(_vector(header, "PixelSpacing"), pixel, rtol=1e-4))
        same &= bool(np.allclose(_vector(header, "ImageOrientationPatient"), orientation, atol=1e-3))
        if not same:
            raise DataError(
                str(path),
                why=f"slices differ in size or orientation: {files[0].name} and {file.name}",
                do="put each series (and each scout image) into a folder of its own",
            )
    row, column = orientation[:3], orientation[3:]
    if (
        abs(np.linalg.norm(row) - 1) > 1e-2
        or abs(np.linalg.norm(column) - 1) > 1e-2
        or abs(row @ column) > 1e-2
    ):
        raise DataError(str(path), why="ImageOrientationPatient is no pair of orthogonal directions")
    normal = np.cross(row, column)
    positions = np.array([_vector(header, "ImagePositionPatient") for header in headers], dtype=np.float64)
    order = [int(index) for index in np.argsort(positions @ normal, kind="stable")]
    step = _slice_step(path, positions[order], normal, first)
    lps = np.eye(4)
    lps[:3, 0] = row * pixel[1]  # PixelSpacing: distance between rows first, between columns second
    lps[:3, 1] = column * pixel[0]
    lps[:3, 2] = step
    lps[:3, 3] = positions[order[0]]
    affine = LPS_TO_RAS @ lps
    problems = check_affine(affine)
    if problems:
        raise DataError(str(path), why="; ".join(problems))
    return order, affine, (columns, rows, len(files))


def _slice_step(
    path: Path, positions: NDArray[np.float64], normal: NDArray[np.float64], header: Any
) -> NDArray[np.float64]:
    """Return the vector from one slice to the next after checking that all steps are equal."""
    if len(positions) == 1:
        distance = _number(header, "SpacingBetweenSlices") or _number(header, "SliceThickness")
        if not distance:
            raise DataError(str(path), why="one slice without a thickness")
        return normal * abs(distance)
    heights = positions @ normal
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    tolerance = POSITION_TOLERANCE_MM + 0.01 * abs(usual)
    if (gaps < POSITION_TOLERANCE_MM).any():
        same = int((gaps < POSITION_TOLERANCE_MM).sum()) + 1
        raise DataError(
            str(path),
            why=f"{same} slices at the same position: several time points or contrasts in one series",
            do="split the series, or convert it with dcm2niix",
        )
    for (low, high), gap in zip(itertools.pairwise(heights), gaps, strict=True):
        if abs(gap - usual) <= tolerance:
            continue
        missing = round(gap / usual) - 1
        if missing >= 1 and abs(gap - (missing + 1) * usual) <= (missing + 1) * tolerance:
            why = f"{missing} slice{'s' * (missing > 1)} missing between {low:.2f} and {high:.2f} mm"
            raise DataError(
                str(path), why=f"{why} (spacing {usual:.2f} mm)", do="export the whole series again"
            )
        raise DataError(
            str(path),
            why=f"slice spacing is not uniform: {usual:.3f} mm, "
            f"but {gap:.3f} mm between {low:.2f} and {high:.2f} mm",
            do="export or resample the series with equal spacing",
        )
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(positions) - 1)
    drift = float(np.linalg.norm(step - normal * (step @ normal)))
    if drift * (len(positions) - 1) > 0.1 and drift > 0.01 * usual:
        raise DataError(
            str(path),
            why=f"the slices are shifted sideways by {drift:.2f} mm each (a tilted gantry)",
            do="resample the series to an upright grid first",
        )
    return step


def _pixels(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return the rescaled pixels of one slice as ``(X, Y)``."""
    pydicom = _pydicom(path)
    syntax = None
    try:
        with _quiet():
            dataset = pydicom.dcmread(path)
            syntax = dataset.file_meta.get("TransferSyntaxUID")
            pixels = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    except Exception as error:
        if (
            syntax is not None
            and syntax.is_compressed
            and isinstance(error, RuntimeError | NotImplementedError)
        ):
            raise DataError(
                str(path),
                why=f"its pixels are compressed as {syntax.name}, which cannot be decoded here",
                do="pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or use gdcmconv --raw",
            ) from error
        raise DataError(
            str(path),
            why=f"its pixels are missing or damaged ({type(error).__name__})",
            do="copy the file again",
        ) from error
    if pixels.shape != (shape[1], shape[0]):
        raise DataError(str(path), why=f"pixels of shape {pixels.shape}, expected {(shape[1], shape[0])}")
    return np.asarray(pixels.T, dtype=np.float32)


def _number(header: Any, tag: str) -> float:
    """Return a numeric element, 0 if it is absent or empty."""
    value = header.get(tag)
    try:
        return float(value) if value not in (None, "") else 0.0
    except (TypeError, ValueError):
        return 0.0


def _vector(header: Any, tag: str) -> list[float]:
    value = header.get(tag)
    try:
        return [float(item) for item in value] if value is not None else []
    except (TypeError, ValueError):
        return []
