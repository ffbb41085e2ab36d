"""Synthetic short-axis cardiac MR: body, lungs, right ventricle, myocardium, left ventricle, as real files.

A heart is drawn as numbers (`draw_anatomy`) and painted on a grid of any size (`draw`); `write_cardiac`
writes patients with slices from base to apex at end-diastole and end-systole, in nnU-Net raw layout. Patient
k depends on the seed and k alone. `Anatomy()` is the canonical phantom, whose numbers are known.

Painted arrays are ``(H, W)``: rows y, columns x. Files hold ``(X, Y, Z)``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import ConfigError
from medrl.core.phantoms._files import write_nifti, write_record, write_whole

__all__ = [
    "CHANNELS",
    "LABELS",
    "SIDECAR",
    "Anatomy",
    "Patient",
    "case_name",
    "draw",
    "draw_anatomy",
    "make_patient",
    "write_cardiac",
]

LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
CHANNELS = ("MR",)
FRAMES = ("ED", "ES")
SIDECAR = "kspace.json"
"""What magnitude images cannot hold: ``{"shift_k": columns}``, where the k-space centre of a case lies."""

_VERSION = 1
_FIELD_MM = 320.0
_THICKNESS_MM = 10.0
_LAST_SLICE = 0.95
"""Place of the last slice between base (0) and apex (1)."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """One slice of a chest, in units of half the field of view; the defaults are the canonical phantom.

    Attributes:
        shift: Displacement of everything along x and y.
        scale: Size of the heart.
        turn: Rotation of the heart about its centre, in radians.
        rv: Size of the right ventricle; 0 leaves it out.
        outer: Radius of the myocardium.
        inner: Radius of the left ventricle's cavity; 0 leaves it out.
        body, lungs, right, wall, left: Intensities.
    """

    shift: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    turn: float = 0.0
    rv: float = 1.0
    outer: float = 0.28
    inner: float = 0.18
    body: float = 0.35
    lungs: float = 0.05
    right: float = 0.90
    wall: float = 0.25
    left: float = 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Patient:
    """One synthetic patient.

    Attributes:
        images: By frame, ``(X, Y, Z)`` float32.
        labels: By frame, ``(X, Y, Z)`` uint8 with the values of `LABELS`.
        affine: ``(4, 4)`` voxel index to millimetres.
        shift_k: By frame, columns by which the k-space centre is displaced.
    """

    images: dict[str, NDArray[np.float32]]
    labels: dict[str, NDArray[np.uint8]]
    affine: NDArray[np.float64]
    shift_k: dict[str, float]


def draw(
    anatomy: Anatomy, shape: tuple[int, int] = (64, 64)
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Paint a slice: image ``(H, W)`` and its label map.

    Pixel j of n lies at ``(j - n/2) / (n/2)``. Later ellipses cover earlier ones.
    """
    height, width = shape
    y, x = np.meshgrid(_places(height), _places(width), indexing="ij")
    x, y = x - anatomy.shift[0], y - anatomy.shift[1]
    image = np.zeros(shape, dtype=np.float32)
    label = np.zeros(shape, dtype=np.uint8)
    image[_ellipse(x, y, 0.85, 0.70)] = anatomy.body
    image[_ellipse(x + 0.50, y + 0.20, 0.22, 0.30)] = anatomy.lungs
    image[_ellipse(x - 0.58, y + 0.20, 0.20, 0.30)] = anatomy.lungs
    # The heart has axes of its own, about its centre.
    cosine, sine = np.cos(anatomy.turn), np.sin(anatomy.turn)
    across, along = x - 0.10, y
    u = (across * cosine + along * sine) / anatomy.scale
    v = (along * cosine - across * sine) / anatomy.scale
    if anatomy.rv > 0:
        right = _ellipse(u + 0.30, v - 0.02, 0.23 * anatomy.rv, 0.30 * anatomy.rv)
        image[right], label[right] = anatomy.right, LABELS["RV"]
    for radius, value, name in ((anatomy.outer, anatomy.wall, "MYO"), (anatomy.inner, anatomy.left, "LV")):
        if radius > 0:
            inside = np.hypot(u, v) <= radius
            image[inside], label[inside] = value, LABELS[name]
    return image, label


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a patient: shift ±.10, heart ±20 %, rotation ±30°, every intensity ±20 %."""
    plain = Anatomy()
    shift = rng.uniform(-0.10, 0.10, 2)
    names = ("body", "lungs", "right", "wall", "left")
    factors = rng.uniform(0.8, 1.2, len(names))
    return Anatomy(
        shift=(float(shift[0]), float(shift[1])),
        scale=float(rng.uniform(0.8, 1.2)),
        turn=float(np.deg2rad(rng.uniform(-30.0, 30.0))),
        **{name: float(getattr(plain, name) * factor) for name, factor in zip(names, factors, strict=True)},
    )


def at_level(anatomy: Anatomy, level: float, contraction: float = 0.0) -> Anatomy:
    """The slice at a place from base (0) to apex (1), contracted from 0 (end-diastole) to 1.

    Towards the apex the wall keeps its thickness while the cavity closes, and the right ventricle ends. A
    full contraction takes 28 % of the cavity's radius, 6 % of the outer one and 18 % of the right ventricle.
    """
    outer = anatomy.outer * float(np.sqrt(1.0 - (0.8 * level) ** 2))
    inner = max(anatomy.inner - (anatomy.outer - outer), 0.0)
    rv = anatomy.rv * float(np.sqrt(max(0.0, 1.0 - (1.15 * level) ** 2)))
    return replace(
        anatomy,
        outer=outer * (1.0 - 0.06 * contraction),
        inner=inner * (1.0 - 0.28 * contraction),
        rv=rv * (1.0 - 0.18 * contraction),
    )


def make_patient(
    seed: int,
    index: int,
    *,
    test: bool = False,
    shape: tuple[int, int] = (64, 64),
    slices: int = 4,
    frames: int = 2,
    shift_k: float = 0.0,
) -> Patient:
    """Draw patient `index` of a set; the same arguments give the same values.

    Args:
        seed: Seed of the set.
        index: Number of the patient, from 0.
        test: Draw from the test stream, which shares no patient with the training stream.
        shape: Pixels along x and y, at least 16 each.
        slices: From base to apex; a single one lies at the base, where the canonical phantom does.
        frames: 1 for end-diastole alone, 2 for end-systole too.
        shift_k: Columns up to which the k-space centre of a frame is displaced to either side.

    Raises:
        ConfigError: An argument is out of its range.
    """
    _check(shape, slices, frames, shift_k)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(test), index, _VERSION])))
    anatomy = draw_anatomy(rng)
    contraction = float(rng.uniform(0.4, 1.2))
    displaced = rng.uniform(-1.0, 1.0, len(FRAMES)) * shift_k
    levels = np.linspace(0.0, _LAST_SLICE, slices) if slices > 1 else np.zeros(1)
    images, labels = {}, {}
    for frame in FRAMES[:frames]:
        painted = [
            draw(at_level(anatomy, float(level), contraction if frame == "ES" else 0.0), (shape[1], shape[0]))
            for level in levels
        ]
        images[frame] = np.stack([image.T for image, _ in painted], axis=-1)
        labels[frame] = np.stack([label.T for _, label in painted], axis=-1)
    return Patient(
        images=images,
        labels=labels,
        affine=np.diag([_FIELD_MM / shape[0], _FIELD_MM / shape[1], _THICKNESS_MM, 1.0]),
        shift_k={frame: float(value) for frame, value in zip(FRAMES[:frames], displaced, strict=False)},
    )


def write_cardiac(
    root: Path,
    *,
    cases: int = 20,
    test_cases: int = 5,
    seed: int = 0,
    shape: tuple[int, int] = (64, 64),
    slices: int = 4,
    frames: int = 2,
    shift_k: float = 0.0,
) -> Path:
    """Write a synthetic cardiac dataset in nnU-Net raw layout and return its folder.

    Training patients are ``cardiac_000_ED``, ``cardiac_000_ES`` and so on, test patients
    ``cardiac_test_000_ED``. The folder appears whole or not at all. With `shift_k` the displacement of each
    case lies beside the images in ``kspace.json``, because magnitude images cannot hold it.

    Args:
        root: Folder to make; one that already holds this very dataset is left as it is.
        cases: Number of training patients.
        test_cases: Number of test patients, drawn from another stream of random numbers.
        seed: Seed of everything.
        shape: Pixels along x and y; the field of view is 320 mm.
        slices: From base to apex, 10 mm thick.
        frames: 1 for end-diastole alone, 2 for end-systole too.
        shift_k: Columns up to which the k-space centre is displaced to either side.

    Raises:
        ConfigError: If the arguments make no dataset.
        DataError: If `root` holds something else, or cannot be written.
    """
    shape = (int(shape[0]), int(shape[1])) if len(shape) == 2 else shape
    _check(shape, slices, frames, shift_k)
    if cases < 1 or test_cases < 0 or seed < 0:
        raise ConfigError(
            "cardiac phantom",
            why=f"cases={cases}, test_cases={test_cases}, seed={seed}",
            do="ask for at least one case; counts and seeds are not negative",
        )
    settings: dict[str, Any] = {
        "seed": seed,
        "shape": list(shape),
        "slices": slices,
        "frames": frames,
        "shift_k": float(shift_k),
    }
    description = {
        "name": "cardiac", "version": _VERSION, "cases": cases, "test_cases": test_cases, **settings
    }  # fmt: skip

    def write(draft: Path) -> None:
        beside: dict[str, dict[str, float]] = {}
        for suffix, test, count in (("Tr", False, cases), ("Ts", True, test_cases)):
            images, labels = (draft / f"{kind}{suffix}" for kind in ("images", "labels"))
            for folder in (images, labels) if count else ():
                folder.mkdir(parents=True)
            for index in range(count):
                patient = make_patient(
                    seed, index, test=test, shape=shape, slices=slices, frames=frames, shift_k=shift_k
                )
                for frame in patient.images:
                    name = case_name(index, frame, test=test)
                    write_nifti(images / f"{name}_0000.nii.gz", patient.images[frame], patient.affine)
                    write_nifti(labels / f"{name}.nii.gz", patient.labels[frame], patient.affine)
                    beside[name] = {"shift_k": patient.shift_k[frame]}
        if shift_k:
            (draft / SIDECAR).write_text(json.dumps(beside, indent=1) + "\n", encoding="utf-8")
        record = {
            "name": "CardiacPhantom",
            "description": "synthetic short-axis cardiac MR of medrl; no patient data",
            "channel_names": {str(number): name for number, name in enumerate(CHANNELS)},
            "labels": LABELS,
            "numTraining": cases * frames,
            "numTest": test_cases * frames,
            "file_ending": ".nii.gz",
            "phantom": description,
        }
        write_record(draft, record)

    return write_whole(root, description, write)


def case_name(index: int, frame: str = "ED", *, test: bool = False) -> str:
    """Identifier of a case: ``cardiac_007_ED`` or ``cardiac_test_007_ED``."""
    return f"cardiac_test_{index:03d}_{frame}" if test else f"cardiac_{index:03d}_{frame}"


def _places(size: int) -> NDArray[np.float64]:
    places: NDArray[np.float64] = (np.arange(size, dtype=np.float64) - size / 2) / (size / 2)
    return places


def _ellipse(x: NDArray[np.float64], y: NDArray[np.float64], a: float, b: float) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (x / a) ** 2 + (y / b) ** 2 <= 1.0
    return inside


def _check(shape: Sequence[int], slices: int, frames: int, shift_k: float) -> None:
    if len(shape) != 2 or min(shape) < 16:
        raise ConfigError("cardiac phantom", why=f"shape {tuple(shape)} is smaller than (16, 16) pixels")
    if slices < 1 or frames not in (1, 2):
        raise ConfigError(
            "cardiac phantom", why=f"slices={slices}, frames={frames}", do="at least 1 slice; 1 or 2 frames"
        )
    if not 0.0 <= shift_k <= shape[0] / 4:
        raise ConfigError("cardiac phantom", why=f"shift_k is {shift_k}", do=f"choose 0 to {shape[0] / 4:g}")
