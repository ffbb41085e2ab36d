"""Pieces of one real CT: with implanted lesions or without, with the liver or without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core import rng
from medrl.core.types import Volume
from medrl.core.volume import read_volume, write_volume
from medrl.plugins.spars.data import implant_lesions

LIVER = 5
"""Value of the liver in masks of TotalSegmentator."""

Draw = Callable[[np.random.Generator, bool], tuple[NDArray[np.float32], NDArray[np.uint8]]]


def tumour_data(folder: Path, ct: Path, *, seed: int, learn: int, test: int, shape: Sequence[int]) -> Path:
    """Pieces that hold liver; synthetic lesions are implanted into half of them, of the test into more.

    Args:
        folder: Dataset to write, in nnU-Net layout with ``presence.csv``.
        ct: Folder of the CT.
        seed: Of places, noise and lesions.
        learn: Pieces to learn on.
        test: Pieces to test on.
        shape: Voxels of a piece.
    """
    image, liver = opened(ct)

    def draw(source: np.random.Generator, positive: bool) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        at = place(source, image.shape, shape, liver, least=0.4)
        piece, organ = image[at], liver[at]
        mask = np.zeros(piece.shape, dtype=bool)
        if positive:
            piece, mask = implant_lesions(piece, organ, source, count=(1, 2), radius=(4.0, 8.0))
        return piece, np.where(mask, 2, organ.astype(np.uint8)).astype(np.uint8)

    return write(folder, draw, {"background": 0, "liver": 1, "tumour": 2}, seed, learn, test, free=4)


def organ_data(folder: Path, ct: Path, *, seed: int, learn: int, test: int, shape: Sequence[int]) -> Path:
    """Pieces with a good part of the liver, and pieces without any of it. Arguments as in `tumour_data`."""
    image, liver = opened(ct)
    size = [max(16, extent * 5 // 8) for extent in shape[:2]] + [min(shape[2], 24)]
    size = [min(a, b) for a, b in zip(size, image.shape, strict=True)]

    def draw(source: np.random.Generator, positive: bool) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        at = place(source, image.shape, size, liver, least=0.1 if positive else -1.0)
        return image[at], liver[at].astype(np.uint8)

    return write(folder, draw, {"background": 0, "liver": 1}, seed, learn, test, free=2)


def opened(ct: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The CT in HU ``(X, Y, Z)``, and the mask of its liver."""
    image = read_volume(ct / "example_ct_sm.nii.gz").data[0].astype(np.float32)
    organs = read_volume(ct / "example_seg.nii.gz", kind="label").data[0]
    return image, organs == LIVER


def place(
    source: np.random.Generator,
    whole: Sequence[int],
    size: Sequence[int],
    organ: NDArray[np.bool_],
    *,
    least: float,
) -> tuple[slice, ...]:
    """A random piece that holds at least such a share of the organ; with -1, none of it.

    Raises:
        SystemExit: There is none.
    """
    total = int(organ.sum())
    for _ in range(5000):
        first = [
            int(source.integers(0, max(1, have - want + 1))) for have, want in zip(whole, size, strict=True)
        ]
        at = tuple(
            slice(low, low + min(want, have)) for low, want, have in zip(first, size, whole, strict=True)
        )
        inside = int(organ[at].sum())
        if (inside == 0) if least < 0 else (inside >= least * total or inside >= 0.2 * organ[at].size):
            return at
    raise SystemExit(f"no piece of {list(size)} voxels with {least} of the organ")


def write(
    folder: Path, draw: Draw, labels: dict[str, int], seed: int, learn: int, test: int, *, free: int
) -> Path:
    """Write a dataset; every second piece to learn on is negative, and every `free`-th of the test."""
    if (folder / "dataset.json").is_file():
        return folder
    rows = ["case_id,label"]
    for suffix, count in (("Tr", learn), ("Ts", test)):
        for number in range(count):
            source = rng.numpy_generator(seed, "evidence", suffix, number)
            positive = number % (2 if suffix == "Tr" else free) != 1
            piece, label = draw(source, positive)
            # Scans of one body differ in noise at least.
            piece = piece + 8.0 * source.standard_normal(piece.shape).astype(np.float32)
            grid = Volume(data=piece[None], affine=np.diag([3.0, 3.0, 3.0, 1.0]), spacing=(3.0, 3.0, 3.0))
            name = f"piece{suffix}_{number:03d}"
            write_volume(folder / f"images{suffix}" / f"{name}_0000.nii.gz", piece, grid, kind="image")
            write_volume(folder / f"labels{suffix}" / f"{name}.nii.gz", label, grid, kind="label")
            if suffix == "Tr":
                rows.append(f"{name},{int(positive)}")
    (folder / "presence.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    record: dict[str, Any] = {
        "channel_names": {"0": "CT"},
        "labels": labels,
        "numTraining": learn,
        "numTest": test,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(record), encoding="utf-8")
    return folder
