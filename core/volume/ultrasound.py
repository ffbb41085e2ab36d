"""One ultrasound DICOM file as grey frames with their physical size.

`read_dicom` wants slices with a place in the patient; ultrasound has frames, colours and regions instead.
As there, only numbers that describe geometry and intensity are read from the header.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError

CENTIMETRES = 3
"""Code of cm among the physical units of an ultrasound region (DICOM PS3.3 C.8.5.5.1.2)."""

TAGS = [
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelSpacing",
    "ImagerPixelSpacing", "SequenceOfUltrasoundRegions", "FrameTime", "CineRate",
    "RecommendedDisplayFrameRate",
]  # fmt: skip
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")


@dataclass(frozen=True, eq=False, kw_only=True)
class Cine:
    """Frames of one ultrasound file.

    Attributes:
        frames: `(X, Y, T)` float32 grey values, x to the right, y down the picture.
        spacing_mm: Pixel size along X and Y; None where the file does not say.
        frame_time_s: Time from frame to frame; None where the file does not say.
    """

    frames: NDArray[np.float32]
    spacing_mm: tuple[float, float] | None
    frame_time_s: float | None


def read_cine(path: Path, *, max_bytes: int = 8 * 2**30) -> Cine:
    """Read a DICOM file of one or many frames as grey values.

    Colours of any kind become grey as the mean of red, green and blue; MONOCHROME1 is inverted. The pixel
    size is PixelSpacing, else ImagerPixelSpacing, else that of the largest region of tissue whose unit is
    cm.

    Raises:
        DataError: Missing, damaged, too large, of a colour space or compression that cannot be decoded.
    """
    try:
        import pydicom
    except ImportError as error:
        raise DataError(str(path), why="reading DICOM needs pydicom", do="pip install 'medrl[io]'") from error
    try:
        with warnings.catch_warnings():  # pydicom's warnings repeat header values
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
            kind = str(header.get("PhotometricInterpretation", "") or "MONOCHROME2")
            size = [int(header.get(tag) or 0) for tag in ("Rows", "Columns")]
            count = int(header.get("NumberOfFrames") or 1)
            spacing, frame_time = _spacing(header), _frame_time(header)
    except Exception as error:
        raise DataError(
            str(path), why=f"no readable DICOM file ({type(error).__name__})", do="copy the file again"
        ) from error
    if min(size) < 1 or count < 1:
        raise DataError(str(path), why="a DICOM file without an image")
    if kind not in (*GREY, *COLOURS):
        raise DataError(str(path), why=f"pixels of kind {kind[:30]}", do="convert it to a grey .nii.gz")
    if size[0] * size[1] * count * 4 > max_bytes:
        raise DataError(
            str(path),
            why=f"{count} frames of {size[1]} × {size[0]} pixels are above {max_bytes / 2**30:.1f} GiB",
        )
    frames = _grey(path, kind)
    if frames.shape != (count, *size):
        raise DataError(str(path), why=f"pixels of shape {frames.shape}, expected {(count, *size)}")
    return Cine(
        frames=np.ascontiguousarray(np.transpose(frames, (2, 1, 0))),
        spacing_mm=spacing,
        frame_time_s=frame_time,
    )


def _grey(path: Path, kind: str) -> NDArray[np.float32]:
    """Return grey frames `(T, rows, columns)`."""
    import pydicom

    syntax: Any = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path)
            meta = getattr(dataset, "file_meta", None)
            syntax = meta.get("TransferSyntaxUID") if meta is not None else None
            pixels = pydicom.pixels.pixel_array(dataset)
            if kind == "PALETTE COLOR":
                pixels = pydicom.pixels.apply_color_lut(pixels, dataset)
            bits = int(dataset.get("BitsStored") or 8)
    except Exception as error:
        if syntax is not None and syntax.is_compressed and isinstance(error, RuntimeError):
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
    colour = kind not in GREY
    if pixels.ndim not in (2 + colour, 3 + colour):
        raise DataError(str(path), why=f"pixels of shape {pixels.shape} of kind {kind}")
    whole = pixels if pixels.ndim == 3 + colour else pixels[np.newaxis]
    frames = np.empty(whole.shape[:3], dtype=np.float32)
    for index, frame in enumerate(whole):  # frame by frame: colours as floats take twelve times the file
        frames[index] = frame.mean(axis=-1) if colour else frame
    if kind == "MONOCHROME1":
        frames = float(2**bits - 1) - frames
    return frames


def _spacing(header: Any) -> tuple[float, float] | None:
    """Return the pixel size along X and Y in mm."""
    for tag in ("PixelSpacing", "ImagerPixelSpacing"):
        values = header.get(tag)
        if values is not None and len(values) == 2:
            rows, columns = (float(value) for value in values)  # distance of rows first: along Y
            if _usable(columns) and _usable(rows):
                return columns, rows
    best, area = None, -1
    for region in header.get("SequenceOfUltrasoundRegions") or ():
        units = [region.get(f"PhysicalUnits{axis}Direction") for axis in "XY"]
        deltas = [abs(float(region.get(f"PhysicalDelta{axis}") or 0.0)) * 10.0 for axis in "XY"]
        if any(unit != CENTIMETRES for unit in units) or not all(_usable(delta) for delta in deltas):
            continue
        corners = [
            int(region.get(f"RegionLocation{name}") or 0) for name in ("MinX0", "MaxX1", "MinY0", "MaxY1")
        ]
        size = max(corners[1] - corners[0], 0) * max(corners[3] - corners[2], 0)
        if size > area:
            best, area = (deltas[0], deltas[1]), size
    return best


def _frame_time(header: Any) -> float | None:
    """Return the time from frame to frame in seconds."""
    stored = float(header.get("FrameTime") or 0.0) / 1000.0
    if math.isfinite(stored) and stored > 0.0:
        return stored
    for tag in ("CineRate", "RecommendedDisplayFrameRate"):
        rate = float(header.get(tag) or 0.0)
        if math.isfinite(rate) and rate > 0.0:
            return 1.0 / rate
    return None


def _usable(millimetres: float) -> bool:
    return math.isfinite(millimetres) and 1e-4 <= millimetres <= 1e3
