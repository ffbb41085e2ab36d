"""Synthetic abdominal CT: liver, spleen, spine, tumours in the liver and look-alikes outside, as real files.

Half of the volumes have no tumour, every volume has distractors with the intensity of tumours, noise and a
smooth bias. `write_abdomen` writes volumes in nnU-Net raw layout, and beside them ``presence.csv``, which
tells of the training cases whether there is a tumour. Case k depends on the seed and k alone.

Arrays are ``(X, Y, Z)`` in RAS order: the liver lies at high x. Intensities are Hounsfield units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import ConfigError
from medrl.core.phantoms._files import write_nifti, write_record, write_whole

__all__ = ["CHANNELS", "LABELS", "PRESENCE", "Scene", "case_name", "draw", "is_free", "write_abdomen"]

LABELS = {"background": 0, "liver": 1, "tumour": 2}
CHANNELS = ("CT",)
PRESENCE = "presence.csv"

_VERSION = 1
_SMALLEST = (16, 16, 8)
_AIR, _BODY, _SPLEEN, _SPINE = -1000.0, 20.0, 105.0, 220.0
_LIVER = (100.0, 120.0)
_INSIDE = 0.5
"""Least distance of a centre from the surface of what it lies in, in radii."""
_SMOOTH = 0.15
"""Scale of the bias field, as a part of each axis."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What the volumes of a set have in common.

    Attributes:
        shape: Voxels along x, y, z.
        radius: Lowest and highest radius of tumours and distractors, in voxels.
        tumours: Lowest and highest number where there are any.
        tumour_hu: Their intensity, and that of distractors.
        distractors: Lowest and highest number of look-alikes outside the liver.
        noise: Standard deviation of the noise, in HU.
        bias: Standard deviation of the smooth bias, in HU.
    """

    shape: tuple[int, int, int] = (64, 64, 48)
    radius: tuple[float, float] = (3.0, 8.0)
    tumours: tuple[int, int] = (1, 2)
    tumour_hu: tuple[float, float] = (45.0, 65.0)
    distractors: tuple[int, int] = (1, 3)
    noise: float = 15.0
    bias: float = 6.0


def draw(
    rng: np.random.Generator, scene: Scene | None = None, *, free: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Draw a volume ``(X, Y, Z)`` in HU, and its labels.

    Args:
        rng: Source of everything random.
        scene: What is drawn; by default the hard phantom.
        free: Without tumours.
    """
    from scipy import ndimage

    scene = scene or Scene()
    axes = [(np.arange(size) + 0.5) / size * 2.0 - 1.0 for size in scene.shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)

    def organ(centre: Sequence[float], radii: Sequence[float], jitter: float = 0.04) -> NDArray[np.bool_]:
        middle = np.asarray(centre) + rng.uniform(-jitter, jitter, 3)
        extent = np.asarray(radii) * rng.uniform(0.92, 1.08, 3)
        offset = (grid - middle[:, None, None, None]) / extent[:, None, None, None]
        inside: NDArray[np.bool_] = (offset**2).sum(axis=0) <= 1.0
        return inside

    body = (grid[0] / 0.93) ** 2 + (grid[1] / 0.88) ** 2 <= 1.0
    spine = organ((0.0, -0.60, 0.0), (0.16, 0.18, 9.0), 0.03)
    liver = organ((0.36, 0.06, 0.05), (0.44, 0.50, 0.62))
    liver |= organ((0.0, 0.28, 0.20), (0.42, 0.26, 0.36))
    liver &= body & ~spine
    spleen = organ((-0.55, -0.20, 0.10), (0.20, 0.28, 0.40)) & body & ~spine & ~liver
    image = np.where(body, _BODY, _AIR)
    image[spleen] = _SPLEEN
    image[liver] = rng.uniform(*_LIVER)
    image[spine] = _SPINE

    deep = ndimage.distance_transform_edt(liver)
    count = 0 if free else int(rng.integers(scene.tumours[0], scene.tumours[1] + 1))
    tumour = np.zeros(scene.shape, dtype=np.bool_)
    for _ in range(count):
        radius = float(rng.uniform(*scene.radius))
        # Many reach the surface of the liver and end there, where dark tissue is as near as bright liver.
        ball = _ball(rng, scene.shape, _place(rng, deep, _INSIDE * radius), radius)
        ball &= liver & ~tumour
        image[ball] = rng.uniform(*scene.tumour_hu)
        tumour |= ball

    # Distractors end one voxel before liver, spleen, spine and skin; only what is around them tells.
    space = ndimage.distance_transform_edt(body & ~liver & ~spleen & ~spine)
    for _ in range(int(rng.integers(scene.distractors[0], scene.distractors[1] + 1))):
        radius = float(rng.uniform(*scene.radius))
        ball = _ball(rng, scene.shape, _place(rng, space, _INSIDE * radius), radius)
        ball &= space > 1.0
        image[ball] = rng.uniform(*scene.tumour_hu)

    if scene.bias:
        sigma = [max(1.0, _SMOOTH * size) for size in scene.shape]
        field = ndimage.gaussian_filter(rng.standard_normal(scene.shape), sigma)
        image += scene.bias * field / max(float(field.std()), 1e-9)
    image += scene.noise * rng.standard_normal(scene.shape)
    label = liver.astype(np.uint8)
    label[tumour] = LABELS["tumour"]
    return image.astype(np.float32), label


def is_free(index: int, share: float) -> bool:
    """Whether case `index` has no tumour; of n cases the share is as exact as it can be.

    >>> [is_free(index, 0.5) for index in range(4)]
    [False, True, False, True]
    """
    return int((index + 1) * share + 1e-9) > int(index * share + 1e-9)


def write_abdomen(
    root: Path,
    *,
    cases: int = 64,
    test_cases: int = 16,
    seed: int = 0,
    shape: tuple[int, int, int] = (64, 64, 48),
    spacing: tuple[float, float, float] = (5.0, 5.0, 5.0),
    free: float = 0.5,
    test_free: float = 0.25,
    radius: tuple[float, float] = (3.0, 8.0),
    tumours: tuple[int, int] = (1, 2),
    tumour_hu: tuple[float, float] = (45.0, 65.0),
    distractors: tuple[int, int] = (1, 3),
    noise: float = 15.0,
    bias: float = 6.0,
) -> Path:
    """Write a synthetic abdominal dataset in nnU-Net raw layout and return its folder.

    Training cases are ``abdomen_000`` and so on, test cases ``abdomen_test_000``. ``presence.csv`` tells of
    the training cases alone whether they hold a tumour. The folder appears whole or not at all.

    Args:
        root: Folder to make; one that already holds this very dataset is left as it is.
        cases: Number of training cases.
        test_cases: Number of test cases, drawn from another stream of random numbers.
        seed: Seed of everything.
        shape: Voxels along x, y, z.
        spacing: Voxel size in mm.
        free: Share of training cases without tumour.
        test_free: Share of test cases without tumour.
        radius: Of tumours and distractors, in voxels.
        tumours: Lowest and highest number where there are any.
        tumour_hu: Intensity of tumours and distractors.
        distractors: Lowest and highest number.
        noise: Standard deviation in HU.
        bias: Standard deviation in HU.

    Raises:
        ConfigError: If the arguments make no dataset.
        DataError: If `root` holds something else, or cannot be written.
    """
    scene = Scene(
        shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        radius=(float(radius[0]), float(radius[1])),
        tumours=(int(tumours[0]), int(tumours[1])),
        tumour_hu=(float(tumour_hu[0]), float(tumour_hu[1])),
        distractors=(int(distractors[0]), int(distractors[1])),
        noise=float(noise),
        bias=float(bias),
    )
    _check(scene, spacing, free, test_free, cases, test_cases, seed)
    description: dict[str, Any] = {
        "name": "abdomen",
        "version": _VERSION,
        "cases": cases,
        "test_cases": test_cases,
        "seed": seed,
        "spacing": [float(size) for size in spacing],
        "free": float(free),
        "test_free": float(test_free),
        **{
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(scene).items()
        },
    }  # fmt: skip
    affine = np.diag([*(float(size) for size in spacing), 1.0])

    def write(draft: Path) -> None:
        rows = ["case_id,label"]
        for suffix, test, count, share in (("Tr", False, cases, free), ("Ts", True, test_cases, test_free)):
            images, labels = (draft / f"{kind}{suffix}" for kind in ("images", "labels"))
            for folder in (images, labels) if count else ():
                folder.mkdir(parents=True)
            for index in range(count):
                source = np.random.SeedSequence([seed, int(test), index, _VERSION])
                without = is_free(index, share)
                image, label = draw(np.random.Generator(np.random.PCG64(source)), scene, free=without)
                name = case_name(index, test=test)
                write_nifti(images / f"{name}_0000.nii.gz", np.rint(image).astype(np.int16), affine)
                write_nifti(labels / f"{name}.nii.gz", label, affine)
                if not test:
                    rows.append(f"{name},{int(not without)}")
        (draft / PRESENCE).write_text("\n".join(rows) + "\n", encoding="utf-8")
        record = {
            "name": "AbdomenPhantom",
            "description": "synthetic abdominal CT of medrl; no patient data",
            "channel_names": {str(number): name for number, name in enumerate(CHANNELS)},
            "labels": LABELS,
            "numTraining": cases,
            "numTest": test_cases,
            "file_ending": ".nii.gz",
            "phantom": description,
        }
        write_record(draft, record)

    return write_whole(root, description, write)


def case_name(index: int, *, test: bool = False) -> str:
    """Identifier of a case: ``abdomen_007`` or ``abdomen_test_007``."""
    return f"abdomen_test_{index:03d}" if test else f"abdomen_{index:03d}"


def _place(rng: np.random.Generator, depth: NDArray[np.float64], wanted: float) -> NDArray[np.float64]:
    """A random voxel at least so deep."""
    flat = np.flatnonzero(depth >= max(wanted, 1e-6))
    if not len(flat):
        flat = np.flatnonzero(depth == depth.max())
    chosen = np.unravel_index(int(flat[rng.integers(len(flat))]), depth.shape)
    return np.asarray(chosen, dtype=np.float64)


def _ball(
    rng: np.random.Generator, shape: Sequence[int], centre: NDArray[np.float64], radius: float
) -> NDArray[np.bool_]:
    """A ball that is a little longer along one axis than along another."""
    radii = radius * rng.uniform(0.85, 1.1, 3)
    axes = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij", sparse=True)
    distance = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True))
    inside: NDArray[np.bool_] = np.asarray(distance <= 1.0)
    return inside


def _check(
    scene: Scene,
    spacing: Sequence[float],
    free: float,
    test_free: float,
    cases: int,
    test_cases: int,
    seed: int,
) -> None:
    if any(size < least for size, least in zip(scene.shape, _SMALLEST, strict=True)):
        raise ConfigError("abdomen phantom", why=f"shape {scene.shape} is smaller than {_SMALLEST} voxels")
    if not 0 < scene.radius[0] <= scene.radius[1] <= min(scene.shape) / 3:
        raise ConfigError(
            "abdomen phantom",
            why=f"radius {scene.radius}",
            do=f"a rising pair between 0 and {min(scene.shape) / 3:g} voxels",
        )
    for name, (low, high), least in (
        ("tumours", scene.tumours, 1),
        ("distractors", scene.distractors, 0),
    ):
        if not least <= low <= high:
            raise ConfigError("abdomen phantom", why=f"{name} {low} to {high}", do=f"a pair from {least} on")
    if scene.tumour_hu[0] > scene.tumour_hu[1] or scene.noise < 0 or scene.bias < 0 or min(spacing) <= 0:
        raise ConfigError(
            "abdomen phantom",
            why=f"tumour_hu={scene.tumour_hu}, noise={scene.noise}, bias={scene.bias}, spacing={spacing}",
            do="tumour_hu rises, noise and bias are not negative, spacing is positive",
        )
    if not (0.0 <= free <= 1.0 and 0.0 <= test_free <= 1.0):
        raise ConfigError("abdomen phantom", why=f"free={free}, test_free={test_free}", do="from 0 to 1")
    if cases < 1 or test_cases < 0 or seed < 0:
        raise ConfigError(
            "abdomen phantom",
            why=f"cases={cases}, test_cases={test_cases}, seed={seed}",
            do="ask for at least one case; counts and seeds are not negative",
        )
