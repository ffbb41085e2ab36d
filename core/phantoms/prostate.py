"""Synthetic prostate MRI: three correlated channels with zones, lesions, bias and noise, as real files.

An anatomy is drawn for each case (`draw_anatomy`), painted into T2, ADC and DWI (`paint`), and written in
nnU-Net raw layout (`write_prostate`). Case k depends on the seed and k alone: writing more cases never
changes those before. Sizes follow the field of view, so small shapes keep the proportions.

The gland varies in size, place, tilt and outline; its contrast to the tissue around varies and may nearly
vanish on one channel; muscles, rectum, bladder and benign nodules look like it in part. Lesions are dark
on ADC and T2 and bright on DWI; benign nodules are dark on T2 but not bright on DWI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medrl.core.errors import ConfigError
from medrl.core.phantoms._files import write_nifti, write_record, write_whole

CHANNELS = ("T2", "ADC", "DWI")
LABELS = {"background": 0, "prostate": 1, "PCa": 2, "csPCa": 3}

_VERSION = 1
_TRAIN, _TEST = 0, 1
_LESIONS: tuple[tuple[int, ...], ...] = ((3,), (2, 3), (), (2,))
"""Grades of the lesions of four cases in a row: every small set has cases without and with each grade."""

_Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Phantom:
    """One synthetic case.

    Attributes:
        image: ``(3, X, Y, Z)`` int16: T2 and DWI in arbitrary units, ADC in 1e-6 mm²/s.
        label: ``(X, Y, Z)`` uint8 with the values of `LABELS`.
        affine: ``(4, 4)`` voxel index to RAS millimetres; oblique in one case of three.
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    affine: _Array


@dataclass(frozen=True, eq=False, kw_only=True)
class Anatomy:
    """Smooth fields over the grid, in [0, 1] unless said otherwise; lesions as (membership, grade)."""

    gland: NDArray[np.bool_]
    inner: _Array
    capsule: _Array
    muscle: _Array
    rectum: _Array
    bladder: _Array
    nodules: _Array
    lesions: tuple[tuple[_Array, int], ...]


def make_case(
    seed: int,
    index: int,
    *,
    test: bool = False,
    shape: tuple[int, int, int] = (64, 64, 20),
    spacing: tuple[float, float, float] = (0.5, 0.5, 3.0),
) -> Phantom:
    """Draw case `index` of a set; the same arguments give the same bytes.

    Args:
        seed: Seed of the set.
        index: Number of the case, from 0.
        test: Draw from the test stream, which shares no case with the training stream.
        shape: ``(X, Y, Z)`` voxels, at least 16, 16 and 6.
        spacing: Voxel size in mm.

    Raises:
        ConfigError: If the grid is too small or the spacing is not positive.
    """
    _check_grid(shape, spacing)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(test), index, _VERSION])))
    grades = _LESIONS[(index + seed) % len(_LESIONS)]
    anatomy = draw_anatomy(rng, shape, spacing, grades)
    label = anatomy.gland.astype(np.uint8)
    for membership, grade in anatomy.lesions:
        inside = (membership >= 0.5) & anatomy.gland
        label[inside] = np.maximum(label[inside], grade)
    image = paint(rng, anatomy)
    return Phantom(image=image, label=label, affine=_affine(rng, shape, spacing, oblique=index % 3 == 1))


def draw_anatomy(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    grades: Sequence[int],
) -> Anatomy:
    """Draw a gland with zones, its surroundings and lesions of the given grades (2 PCa, 3 csPCa)."""
    half = np.asarray(shape) * np.asarray(spacing) / 2.0
    axes = half * rng.uniform((0.46, 0.38, 0.42), (0.74, 0.64, 0.72))
    centre = half * rng.uniform((-0.12, -0.12, -0.14), (0.12, 0.16, 0.14))
    x, y, z = _coordinates(shape, spacing, centre, tilt=rng.uniform(-0.25, 0.25))

    # The outline: an ellipsoid, flatter at the back, dented by a smooth field.
    back = np.where(y < 0.0, rng.uniform(1.0, 1.3), 1.0)
    rho = np.sqrt((x / axes[0]) ** 2 + (y * back / axes[1]) ** 2 + (z / axes[2]) ** 2)
    rho = rho * (1.0 + 0.07 * _texture(rng, shape, spacing, half[0] * 0.4))
    gland = _largest(rho < 1.0)

    # The inner (transition) zone lies towards the front and grows with age.
    size = rng.uniform(0.55, 0.78)
    front = y - 0.22 * axes[1]
    inner_rho = np.sqrt((x / axes[0]) ** 2 + (front / axes[1]) ** 2 + (z / axes[2]) ** 2) / size
    inner = _step(1.0 - inner_rho, 0.08)

    width = 0.75 * axes[0]
    muscle = _step(np.abs(x) / (1.12 * axes[0]) - 1.0 - 0.05 * z / half[2], 0.06)
    rectum_y = -axes[1] * rng.uniform(1.15, 1.35) - 0.1 * half[1]
    rectum_rho = np.sqrt((x / (width * rng.uniform(0.6, 1.1))) ** 2 + ((y - rectum_y) / (0.3 * half[1])) ** 2)
    bladder = _step(z / (axes[2] * rng.uniform(0.95, 1.1)) - 1.0 + 0.25 * y / half[1], 0.12)
    nodules = np.zeros(shape)
    for _ in range(int(rng.integers(1, 4))):
        nodules = np.maximum(nodules, _blob(rng, (x, y, z), axes, inner > 0.5, spacing, (0.14, 0.26)))
    lesions: list[tuple[_Array, int]] = []
    free = gland & (rho < 0.82)
    for grade in grades:
        lesion = _blob(rng, (x, y, z), axes, free, spacing, (0.26, 0.42))
        lesions.append((lesion, grade))
        free = free & (ndimage.gaussian_filter(lesion, 2.0) < 0.05)
    return Anatomy(
        gland=gland,
        inner=inner,
        capsule=np.exp(-(((rho - 1.0) / 0.05) ** 2)),
        muscle=muscle,
        rectum=_step(1.0 - rectum_rho, 0.12),
        bladder=bladder,
        nodules=nodules,
        lesions=tuple(lesions),
    )


def paint(rng: np.random.Generator, anatomy: Anatomy) -> NDArray[np.int16]:
    """Paint the three channels ``(3, X, Y, Z)``: tissue, shared texture, lesions, blur, bias, noise, gain."""
    shape = anatomy.gland.shape
    gland = ndimage.gaussian_filter(anatomy.gland.astype(np.float64), 0.6)
    outer = gland * (1.0 - anatomy.inner)
    inner = gland * anatomy.inner
    outside = 1.0 - gland
    unit = (1.0, 1.0, 2.0)
    coarse, fine = _texture(rng, shape, unit, 5.0), _texture(rng, shape, unit, 1.6)
    far = _texture(rng, shape, unit, 4.0)

    # Tissue values relative to the surroundings (1.0) for T2, ADC and DWI.
    peripheral = rng.uniform((1.20, 1.20, 0.95), (1.60, 1.55, 1.25))
    transition = rng.uniform((0.80, 1.02, 1.05), (1.12, 1.28, 1.35))
    muscle = rng.uniform((0.50, 0.80, 0.60), (0.80, 1.00, 0.90))
    rectum = rng.uniform((0.35, 0.60, 0.50), (1.30, 1.30, 1.20))
    bladder = rng.uniform((1.30, 1.40, 0.50), (1.90, 1.90, 0.90))
    nodule = np.array((-0.25, -0.15, 0.0)) * rng.uniform(0.6, 1.2)
    scale = np.array((300.0, 1100.0, 120.0))
    noise = np.array((0.06, 0.07, 0.09)) * rng.uniform(0.7, 1.3, size=3)
    mixing = np.array(((0.14, 0.07), (0.10, 0.05), (-0.08, 0.06)))

    image = np.empty((3, *shape), dtype=np.int16)
    for channel in range(3):
        around = np.ones(shape) + (0.16 if channel == 0 else 0.11) * far
        around += anatomy.muscle * (muscle[channel] - 1.0)
        around += anatomy.rectum * (rectum[channel] - around)
        around += anatomy.bladder * (bladder[channel] - around)
        value = outside * around + outer * peripheral[channel] + inner * transition[channel]
        value *= 1.0 + mixing[channel, 0] * coarse + mixing[channel, 1] * fine
        value *= 1.0 + nodule[channel] * anatomy.nodules * gland
        if channel == 0:
            value *= 1.0 - 0.22 * anatomy.capsule
        for membership, grade in anatomy.lesions:
            value *= 1.0 + _lesion_contrast(grade)[channel] * membership * gland
        value = ndimage.gaussian_filter(value, (0.0, 0.0, 0.0) if channel == 0 else (0.8, 0.8, 0.0))
        value *= _bias(rng, shape, 0.10 if channel == 1 else 0.28)
        real, imaginary = rng.normal(scale=noise[channel], size=(2, *shape))
        value = np.hypot(np.maximum(value, 0.0) + real, imaginary)
        gain = rng.uniform(0.92, 1.08) if channel == 1 else rng.uniform(0.6, 1.6)
        image[channel] = np.clip(np.rint(value * scale[channel] * gain), 0, 32767).astype(np.int16)
    return image


def write_prostate(
    root: Path,
    *,
    cases: int = 20,
    test_cases: int = 5,
    seed: int = 0,
    shape: tuple[int, int, int] = (64, 64, 20),
    spacing: tuple[float, float, float] = (0.5, 0.5, 3.0),
) -> Path:
    """Write a synthetic prostate dataset in nnU-Net raw layout and return its folder.

    Training cases are ``prostate_000`` and so on, test cases ``prostate_test_000`` and so on, with
    ``imagesTr/<case>_0000|_0001|_0002.nii.gz`` (T2, ADC, DWI), ``labelsTr/<case>.nii.gz``,
    ``masksTr/<case>.nii.gz`` (prostate) and the same with ``Ts``. The folder appears whole or not at all.

    Args:
        root: Folder to make; one that already holds this very dataset is left as it is.
        cases: Number of training cases.
        test_cases: Number of test cases, drawn from another stream of random numbers.
        seed: Seed of everything.
        shape: ``(X, Y, Z)`` voxels.
        spacing: Voxel size in mm.

    Raises:
        ConfigError: If the numbers make no dataset.
        DataError: If `root` holds something else, or cannot be written.
    """
    _check_grid(shape, spacing)
    if cases < 1 or test_cases < 0 or seed < 0:
        raise ConfigError(
            "prostate phantom",
            why=f"cases={cases}, test_cases={test_cases}, seed={seed}",
            do="ask for at least one case; counts and seeds are not negative",
        )
    description = {
        "name": "prostate",
        "version": _VERSION,
        "cases": cases,
        "test_cases": test_cases,
        "seed": seed,
        "shape": list(shape),
        "spacing": [float(item) for item in spacing],
    }
    return write_whole(root, description, lambda draft: _write_all(draft, description))


def _write_all(root: Path, description: dict[str, Any]) -> None:
    shape, spacing = tuple(description["shape"]), tuple(description["spacing"])
    for suffix, test, count in (("Tr", False, description["cases"]), ("Ts", True, description["test_cases"])):
        folders = [root / f"{kind}{suffix}" for kind in ("images", "labels", "masks")]
        if count:
            for folder in folders:
                folder.mkdir(parents=True)
        images, labels, masks = folders
        for index in range(count):
            name = case_name(index, test=test)
            phantom = make_case(description["seed"], index, test=test, shape=shape, spacing=spacing)
            for channel in range(3):
                write_nifti(images / f"{name}_{channel:04d}.nii.gz", phantom.image[channel], phantom.affine)
            write_nifti(labels / f"{name}.nii.gz", phantom.label, phantom.affine)
            write_nifti(masks / f"{name}.nii.gz", (phantom.label > 0).astype(np.uint8), phantom.affine)
    record = {
        "name": "ProstatePhantom",
        "description": "synthetic prostate MRI of medrl; no patient data",
        "channel_names": {str(index): name for index, name in enumerate(CHANNELS)},
        "labels": LABELS,
        "numTraining": description["cases"],
        "numTest": description["test_cases"],
        "file_ending": ".nii.gz",
        "phantom": description,
    }
    write_record(root, record)


def case_name(index: int, *, test: bool = False) -> str:
    """Identifier of a case: ``prostate_007`` or ``prostate_test_007``."""
    return f"prostate_test_{index:03d}" if test else f"prostate_{index:03d}"


def _check_grid(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    if len(shape) != 3 or any(size < least for size, least in zip(shape, (16, 16, 6), strict=True)):
        raise ConfigError("prostate phantom", why=f"shape {shape} is smaller than (16, 16, 6) voxels")
    if len(spacing) != 3 or not all(np.isfinite(size) and size > 0 for size in spacing):
        raise ConfigError("prostate phantom", why=f"spacing {spacing} is not three positive sizes in mm")


def _lesion_contrast(grade: int) -> tuple[float, float, float]:
    """Relative change of T2, ADC and DWI in the core of a lesion."""
    return (-0.30, -0.50, 0.95) if grade == 3 else (-0.20, -0.34, 0.50)


def _coordinates(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], centre: _Array, *, tilt: float
) -> tuple[_Array, _Array, _Array]:
    """Millimetres from `centre`, turned by `tilt` radians in the plane; each ``(X, Y, Z)``."""
    axes = [(np.arange(n) - (n - 1) / 2.0) * s - c for n, s, c in zip(shape, spacing, centre, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt), z


def _step(distance: _Array, width: float) -> _Array:
    """Smooth step from 0 to 1 around distance 0."""
    value: _Array = 1.0 / (1.0 + np.exp(np.clip(-4.0 * distance / width, -60.0, 60.0)))
    return value


def _texture(
    rng: np.random.Generator, shape: tuple[int, ...], spacing: Sequence[float], sigma: float
) -> _Array:
    """Smooth Gaussian noise of mean 0 and deviation 1; `sigma` in the units of `spacing`."""
    field = ndimage.gaussian_filter(rng.normal(size=shape), [sigma / size for size in spacing])
    value: _Array = (field - field.mean()) / (field.std() + 1e-12)
    return value


def _bias(rng: np.random.Generator, shape: tuple[int, ...], strength: float) -> _Array:
    """A receive-coil field: the exponential of a second-order polynomial with zero mean."""
    x, y, z = np.meshgrid(*(np.linspace(-1.0, 1.0, n) for n in shape), indexing="ij")
    terms = (x, y, z, x * y, x * x, y * y)
    field = sum(weight * term for weight, term in zip(rng.normal(size=len(terms)), terms, strict=True))
    value: _Array = np.exp(strength * (field - np.mean(field)) / (np.std(field) + 1e-12))
    return value


def _blob(
    rng: np.random.Generator,
    position: tuple[_Array, _Array, _Array],
    axes: _Array,
    allowed: NDArray[np.bool_],
    spacing: tuple[float, float, float],
    size: tuple[float, float],
) -> _Array:
    """A soft ellipsoid around a random allowed voxel; at least one and a half voxels in each radius."""
    voxels = np.flatnonzero(allowed)
    if voxels.size == 0:
        return np.zeros(allowed.shape)
    middle = int(voxels[rng.integers(voxels.size)])
    radii = np.maximum(axes * rng.uniform(*size, size=3), 1.5 * np.asarray(spacing))
    squares = sum(
        ((axis - axis.flat[middle]) / radius) ** 2 for axis, radius in zip(position, radii, strict=True)
    )
    return _step(1.0 - np.sqrt(squares), 0.35)


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected part."""
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    value: NDArray[np.bool_] = parts == int(sizes.argmax())
    return value


def _affine(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    *,
    oblique: bool,
) -> _Array:
    """Voxel index to RAS millimetres, centred near the origin; tilted by up to 15 degrees if oblique."""
    about_x, about_z = rng.uniform(0.06, 0.26, size=2) * np.where(rng.random(2) < 0.5, -1.0, 1.0)
    shift = rng.uniform(-20.0, 20.0, size=3)
    affine = np.eye(4)
    if oblique:
        cx, sx, cz, sz = np.cos(about_x), np.sin(about_x), np.cos(about_z), np.sin(about_z)
        tilt_x = np.array(((1.0, 0.0, 0.0), (0.0, cx, -sx), (0.0, sx, cx)))
        tilt_z = np.array(((cz, -sz, 0.0), (sz, cz, 0.0), (0.0, 0.0, 1.0)))
        affine[:3, :3] = tilt_z @ tilt_x
    affine[:3, :3] = affine[:3, :3] * np.asarray(spacing)
    affine[:3, 3] = shift - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2.0)
    return affine
