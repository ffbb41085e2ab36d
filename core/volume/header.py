"""The battery of checks that a NIfTI header passes before its voxels are trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SUPPORTED = {
    2: np.uint8,
    4: np.int16,
    8: np.int32,
    16: np.float32,
    64: np.float64,
    256: np.int8,
    512: np.uint16,
    768: np.uint32,
    1024: np.int64,
    1280: np.uint64,
}
"""NIfTI datatype codes that are read; complex, colour, binary and 128-bit voxels are not."""

UNSUPPORTED = {
    1: "binary",
    32: "complex",
    128: "RGB",
    1536: "float128",
    1792: "complex",
    2048: "complex",
    2304: "RGBA",
}
UNITS = {0: "unknown", 1: "metres", 2: "mm", 3: "micrometres"}
FORM_CODES = range(6)
MIN_SPACING_MM, MAX_SPACING_MM = 1e-4, 1e3
MAX_OFFSET_MM = 1e5


def check_header(header: Any) -> list[str]:
    """Return every problem of a nibabel NIfTI-1 or NIfTI-2 header, or an empty list.

    Checked are the dimensions, data type, voxel sizes, units, intensity scaling, both orientation
    forms and the affine that follows from them. Values are taken
    as stored: nothing is repaired on the way.
    """
    problems: list[str] = []
    for check in _CHECKS:
        problems.extend(check(header))
    if not problems:
        problems.extend(_check_affine(header))
    return problems


def shape_of(header: Any) -> tuple[int, ...]:
    """Return the array shape as stored, between one and seven numbers."""
    dim = [int(value) for value in header["dim"]]
    return tuple(dim[1 : dim[0] + 1])


def affine_of(header: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the voxel-to-RAS affine in mm: sform, else qform, else voxel sizes alone."""
    return np.asarray(header.get_best_affine(), dtype=np.float64)


def check_affine(affine: Any, axes: int = 3) -> list[str]:
    """Return the problems of a voxel-to-RAS affine: finite, near the origin, sizes in range, invertible."""
    affine = np.asarray(affine, dtype=np.float64)
    if not np.isfinite(affine).all():
        return ["the affine holds numbers that are not finite"]
    if (np.abs(affine[:3, 3]) > MAX_OFFSET_MM).any():
        return [f"the image lies at {_numbers(affine[:3, 3])} mm, too far from the origin"]
    columns = np.linalg.norm(affine[:3, :axes], axis=0)
    if (columns < MIN_SPACING_MM).any() or (columns > MAX_SPACING_MM).any():
        return [f"the affine gives voxels of {_numbers(columns)} mm"]
    if _spanned(affine[:3, :axes] / columns) < 1e-3:
        return ["the affine cannot be inverted"]
    return []


def _check_dimensions(header: Any) -> list[str]:
    dim = [int(value) for value in header["dim"]]
    if not 1 <= dim[0] <= 7:
        return [f"dim[0] is {dim[0]}, expected the number of axes"]
    shape = dim[1 : dim[0] + 1]
    if any(size < 1 for size in shape):
        return [f"an axis is shorter than one voxel: shape {tuple(shape)}"]
    if len(shape) < 2:
        return [f"an image has two or three axes in space, this file has shape {tuple(shape)}"]
    if len(shape) > 5 and any(size != 1 for size in shape[5:]):
        return [f"more than five axes are not supported: shape {tuple(shape)}"]
    if len(shape) >= 5 and shape[3] != 1 and shape[4] != 1:
        return [f"both a time axis and a channel axis: shape {tuple(shape)}"]
    return []


def _check_data_type(header: Any) -> list[str]:
    code = int(header["datatype"])
    if code not in SUPPORTED:
        return [f"{UNSUPPORTED.get(code, 'unknown')} voxels (datatype {code}) are not supported"]
    expected = np.dtype(SUPPORTED[code]).itemsize * 8
    found = int(header["bitpix"])
    return [] if found == expected else [f"bitpix is {found}, expected {expected} for datatype {code}"]


def _check_voxel_size(header: Any) -> list[str]:
    axes = min(max(int(header["dim"][0]), 1), 3)
    sizes = np.asarray(header["pixdim"][1 : axes + 1], dtype=np.float64)
    if not np.isfinite(sizes).all() or (sizes < MIN_SPACING_MM).any() or (sizes > MAX_SPACING_MM).any():
        return [f"voxel size {_numbers(sizes)} mm, expected finite positive numbers up to {MAX_SPACING_MM:g}"]
    others = np.asarray(header["pixdim"][axes + 1 : int(header["dim"][0]) + 1], dtype=np.float64)
    if not np.isfinite(others).all() or (others < 0).any():
        return [f"step along the further axes is {_numbers(others)}, expected finite numbers"]
    return []


def _check_units(header: Any) -> list[str]:
    code = int(header["xyzt_units"]) & 0x07
    if code in {0, 2}:
        return []
    return [f"spatial unit {UNITS.get(code, 'unknown')} (code {code}) instead of mm"]


def _check_scaling(header: Any) -> list[str]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isnan(slope) or slope == 0:
        return []
    if not np.isfinite(slope) or not np.isfinite(intercept):
        return [f"intensity scaling is not finite: slope {slope:g}, intercept {intercept:g}"]
    return []


def check_offset(header: Any) -> list[str]:
    """Check where the voxels begin; nibabel sets this field to 0 in the headers that it has loaded."""
    offset = float(header["vox_offset"])
    first = int(header["sizeof_hdr"]) + 4
    if not np.isfinite(offset) or offset != int(offset) or offset < first:
        return [f"vox_offset is {offset:g}, expected a whole number from {first} on"]
    return []


def _check_forms(header: Any) -> list[str]:
    problems = []
    q_code, s_code = int(header["qform_code"]), int(header["sform_code"])
    if q_code not in FORM_CODES or s_code not in FORM_CODES:
        problems.append(f"orientation codes are qform {q_code}, sform {s_code}, expected 0 to 5")
    if q_code > 0:
        quaternion = np.array([header[f"quatern_{axis}"] for axis in "bcd"], dtype=np.float64)
        offsets = np.array([header[f"qoffset_{axis}"] for axis in "xyz"], dtype=np.float64)
        if not np.isfinite(quaternion).all() or float(quaternion @ quaternion) > 1 + 1e-3:
            problems.append(f"qform is no rotation: quaternion {_numbers(quaternion)}")
        if not np.isfinite(offsets).all():
            problems.append(f"qform offset {_numbers(offsets)} is not finite")
        if float(header["pixdim"][0]) not in (-1.0, 0.0, 1.0):
            problems.append(f"pixdim[0] is {float(header['pixdim'][0]):g}, expected -1 or 1")
    if s_code > 0 and not all(np.isfinite(np.asarray(header[f"srow_{axis}"])).all() for axis in "xyz"):
        problems.append("sform holds numbers that are not finite")
    return problems


def _check_affine(header: Any) -> list[str]:
    """Check that the affine is invertible and agrees with the stored voxel sizes."""
    axes = min(int(header["dim"][0]), 3)
    affine = affine_of(header)
    problems = check_affine(affine, axes)
    if problems:
        return problems
    columns = np.linalg.norm(affine[:3, :axes], axis=0)
    sizes = np.asarray(header["pixdim"][1 : axes + 1], dtype=np.float64)
    if (np.abs(columns - sizes) > 0.01 * sizes).any():
        return [
            f"two voxel sizes: pixdim says {_numbers(sizes)} mm, the affine {_numbers(columns)} mm; "
            "volumes and distances would depend on the reader"
        ]
    return []


def _spanned(columns: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Volume (or area) spanned by unit columns: 1 if they are orthogonal, 0 if they are dependent."""
    return float(np.sqrt(max(np.linalg.det(columns.T @ columns), 0.0)))


def _numbers(values: Any) -> str:
    return "(" + ", ".join(f"{float(value):.6g}" for value in np.ravel(values)) + ")"


_CHECKS: tuple[Callable[[Any], list[str]], ...] = (
    _check_dimensions,
    _check_data_type,
    _check_voxel_size,
    _check_units,
    _check_scaling,
    _check_forms,
)
