"""Cases of a synthetic echo dataset, and the dataset as files."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import ConfigError, did_you_mean
from medrl.core.phantoms._files import write_nifti, write_record, write_whole
from medrl.core.validity import Rules, is_valid, load_rules

from .anatomy import ATRIUM, LABELS, Anatomy, draw_heart, rasterise
from .painting import Style, draw_look, paint

CHANNELS = ("echo",)
SMALLEST = 32
LARGEST_SHIFT = 1.25
"""Beyond it every beam would have a shadow."""

_VERSION = 1
DEPTH_MM = 154.0
_TRIES = 100


@dataclass(frozen=True, eq=False, kw_only=True)
class Phantom:
    """One synthetic case.

    Attributes:
        image: ``(X, Y)`` uint8; across, then depth.
        label: ``(X, Y)`` uint8 with the values of `LABELS`, and of `ATRIUM` if asked for.
        affine: ``(4, 4)`` voxel index to millimetres.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]


def make_case(
    seed: int,
    index: int,
    *,
    test: bool = False,
    shape: tuple[int, int] = (64, 64),
    shift: float = 0.0,
    shape_shift: float = 0.0,
    style: Style = "haze",
    atrium: bool = False,
) -> Phantom:
    """Draw case `index` of a set; the same arguments give the same bytes.

    Sets of another shift have other hearts, so that a target domain shares no mask with its source.

    Args:
        seed: Seed of the set.
        index: Number of the case, from 0.
        test: Draw from the test stream, which shares no case with the training stream.
        shape: ``(X, Y)`` pixels, at least 32 each.
        shift: Distance in [0, 1.25] from the look of the source.
        shape_shift: Distance in [0, 1] from its shapes: dilated, with thinner walls.
        style: Kind of shift: `haze` = haze, shadows, attenuation, coarse speckle, low contrast; `outside` =
            reverberation, steps of gain, wall drop-out, another compression, motion ghost.
        atrium: Label the left atrium (3), which is in the image either way.

    Raises:
        ConfigError: An argument is out of its range.
    """
    check_settings(shape, shift, shape_shift, style)
    domain = json.dumps([shift, shape_shift, style if shift else ""])
    entropy = [seed, int(test), index, _VERSION, zlib.crc32(domain.encode())]
    shape_rng, look_rng = (
        np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(entropy).spawn(2)
    )
    anatomy, label = _valid_anatomy(shape_rng, shape, shape_shift, atrium=atrium)
    image = paint(look_rng, anatomy, draw_look(look_rng, anatomy, shift=shift, style=style))
    size = DEPTH_MM / max(shape)
    return Phantom(
        image=np.rint(image * 255.0).astype(np.uint8),
        label=label,
        affine=np.diag((size, size, 1.0, 1.0)),
    )


def write_echo(
    root: Path,
    *,
    cases: int = 40,
    test_cases: int = 10,
    seed: int = 0,
    shape: tuple[int, int] = (64, 64),
    shift: float = 0.0,
    shape_shift: float = 0.0,
    style: Style = "haze",
    atrium: bool = False,
) -> Path:
    """Write a synthetic echo dataset in nnU-Net raw layout and return its folder.

    Training cases are ``echo_000`` and so on, test cases ``echo_test_000`` and so on, two-dimensional. The
    folder appears whole or not at all. The arguments are those of `make_case`.

    Args:
        root: Folder to make; one that already holds this very dataset is left as it is.
        cases: Number of training cases.
        test_cases: Number of test cases, drawn from another stream of random numbers.
        seed: Seed of everything.
        shape: ``(X, Y)`` pixels; the image is 154 mm deep or wide.
        shift: Distance in [0, 1.25] from the look of the source.
        shape_shift: Distance in [0, 1] from its shapes.
        style: `haze` or `outside`.
        atrium: Label the left atrium.

    Raises:
        ConfigError: If the arguments make no dataset.
        DataError: If `root` holds something else, or cannot be written.
    """
    shape = (int(shape[0]), int(shape[1])) if len(shape) == 2 else shape
    check_settings(shape, shift, shape_shift, style)
    if cases < 1 or test_cases < 0 or seed < 0:
        raise ConfigError(
            "echo phantom",
            why=f"cases={cases}, test_cases={test_cases}, seed={seed}",
            do="ask for at least one case; counts and seeds are not negative",
        )
    settings: dict[str, Any] = {
        "seed": seed,
        "shape": list(shape),
        "shift": float(shift),
        "shape_shift": float(shape_shift),
        "style": style,
        "atrium": bool(atrium),
    }
    description = {
        "name": "echo", "version": _VERSION, "cases": cases, "test_cases": test_cases, **settings
    }  # fmt: skip

    def write(draft: Path) -> None:
        for suffix, test, count in (("Tr", False, cases), ("Ts", True, test_cases)):
            images, labels = (draft / f"{kind}{suffix}" for kind in ("images", "labels"))
            for folder in (images, labels) if count else ():
                folder.mkdir(parents=True)
            for index in range(count):
                case = make_case(
                    seed, index, test=test, shape=shape, shift=shift, shape_shift=shape_shift,
                    style=style, atrium=atrium,
                )  # fmt: skip
                name = case_name(index, test=test)
                write_nifti(images / f"{name}_0000.nii.gz", case.image, case.affine)
                write_nifti(labels / f"{name}.nii.gz", case.label, case.affine)
        record = {
            "name": "EchoPhantom",
            "description": "synthetic apical echocardiography of medrl; no patient data",
            "channel_names": {str(number): name for number, name in enumerate(CHANNELS)},
            "labels": {**LABELS, **(ATRIUM if atrium else {})},
            "numTraining": cases,
            "numTest": test_cases,
            "file_ending": ".nii.gz",
            "phantom": description,
        }
        write_record(draft, record)

    return write_whole(root, description, write)


def case_name(index: int, *, test: bool = False) -> str:
    """Identifier of a case: ``echo_007`` or ``echo_test_007``."""
    return f"echo_test_{index:03d}" if test else f"echo_{index:03d}"


def _valid_anatomy(
    rng: np.random.Generator, shape: tuple[int, int], shape_shift: float, *, atrium: bool
) -> tuple[Anatomy, NDArray[np.uint8]]:
    """Draw hearts until the label map of one keeps the anatomical rules; from 64² on the first one does."""
    rules = _rules("echo_atrium" if atrium else "echo")
    for _ in range(_TRIES):
        anatomy = rasterise(draw_heart(rng, shape_shift=shape_shift), shape)
        label = anatomy.label if atrium else np.where(anatomy.label == ATRIUM["LA"], 0, anatomy.label)
        if is_valid(label, rules):
            return anatomy, label.astype(np.uint8)
    raise ConfigError(
        "echo phantom",
        why=f"no heart on a grid of {shape} pixels keeps the anatomical rules",
        do="choose a finer grid",
    )


@cache
def _rules(name: str) -> Rules:
    return load_rules(name)


def check_settings(shape: tuple[int, ...], shift: float, shape_shift: float, style: str) -> None:
    """Refuse settings of a domain that make no image.

    Raises:
        ConfigError: One is out of its range.
    """
    if len(shape) != 2 or min(shape) < SMALLEST:
        raise ConfigError("echo phantom", why=f"shape {shape} is smaller than {(SMALLEST, SMALLEST)} pixels")
    for name, value, limit in (("shift", shift, LARGEST_SHIFT), ("shape_shift", shape_shift, 1.0)):
        if not 0.0 <= value <= limit:
            raise ConfigError("echo phantom", why=f"{name} is {value}", do=f"choose from 0 to {limit:g}")
    if style not in get_args(Style):
        raise ConfigError(f"style '{style}'", why=did_you_mean(style, get_args(Style)))
