"""Sequences made of two frames: real end-diastole and end-systole, morphed into each other and back.

There are no labelled echo sequences that may be used here. A morph has real tissue and real labels in two of
its frames; what lies between is interpolated, smoother than any heart, and its speckle moves with the tissue.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.registration import optical_flow_tvl1
from skimage.transform import resize

from medrl.core.dataset import load_case, open_dataset
from medrl.core.phantoms.echo.beating import contraction
from medrl.core.types import Case, Volume
from medrl.core.volume import write_volume
from medrl.plugins.rl4seg.device_shift import DeviceShift, split_by_patient

Array = NDArray[np.float64]

FINE = 128
"""Pixels of a side on which frames are morphed; they are made smaller afterwards."""
CLIPPED = 24.0
"""Distances beyond so many pixels of the fine grid do not decide where tissue goes."""
SMOOTH = 4.0
"""Width of the Gaussian that smooths the motion, in pixels of the fine grid."""
LABELS = {"background": 0, "LV": 1, "MYO": 2}


def write_morphed(
    camus: Path,
    source: Path,
    target: Path,
    *,
    seed: int,
    shares: Sequence[float],
    strength: float,
    size: int,
    frames: int,
) -> None:
    """Part the patients, and write sequences of the source and, through another device, of the target.

    Args:
        camus: Folder of frames and labels at end-diastole and end-systole.
        source: Folder to make, with labelled training sequences.
        target: Folder to make, with training and test sequences of other patients.
        seed: Deals the patients and is the number of the device.
        shares: Parts of the patients: source, target, test.
        strength: Of the device.
        size: Pixels of a side.
        frames: Of a sequence, which is one beat.
    """
    dataset = open_dataset(camus)
    own, other, test = split_by_patient(dataset.cases, seed=seed, shares=shares)
    shift = DeviceShift(strength=strength, seed=seed)
    for folder, parts, device in (
        (source, {"Tr": own}, None),
        (target, {"Tr": other, "Ts": test}, shift),
    ):
        if (folder / "dataset.json").exists():
            continue
        patients: dict[str, str] = {}
        for suffix, cases in parts.items():
            for patient, pair in _pairs(cases).items():
                image, label, spacing = morphed(dataset, pair, device, patient, size=size, frames=frames)
                affine = np.diag((*spacing, 1.0, 1.0))
                for kind, data, name in (("image", image, f"{patient}_0000"), ("label", label, patient)):
                    place = folder / f"{kind}s{suffix}" / f"{name}.nii.gz"
                    like = Volume(data=data[None], affine=affine, spacing=(*spacing, 1.0))
                    write_volume(place, data, like, kind=kind)  # type: ignore[arg-type]
                patients[patient] = patient
        record = {
            "name": "EchoMorphs",
            "channel_names": {"0": "echo"},
            "labels": LABELS,
            "numTraining": len(_pairs(parts["Tr"])),
            "file_ending": ".nii.gz",
            "patients": patients,
        }
        (folder / "dataset.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def morphed(
    dataset: Any, pair: Sequence[Case], device: DeviceShift | None, key: str, *, size: int, frames: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], tuple[float, float]]:
    """Return frames and labels `(size, size, frames)` of one beat, and the size of a pixel in mm.

    Both real frames go through the device first, with the same speckle, which then moves with the tissue.
    """
    images, labels = [], []
    spacing = (1.0, 1.0)
    for case in pair:
        image, label = load_case(dataset, case, with_label=True)
        frame = np.asarray(image.data[0, ..., 0], dtype=np.float64)
        frame = frame if device is None else np.asarray(device(frame, key), dtype=np.float64)
        frame = frame / max(float(frame.max()), 1.0)
        steps = np.linalg.norm(image.affine[:3, :2], axis=0)
        spacing = tuple(float(steps[k] * frame.shape[k] / size) for k in (0, 1))  # type: ignore[assignment]
        images.append(resize(frame, (FINE, FINE), order=1, anti_aliasing=True))
        values = np.asarray(label.data[0, ..., 0]) if label is not None else np.zeros(frame.shape)
        values = np.where(values == 3, 0, values)
        labels.append(resize(values, (FINE, FINE), order=0, anti_aliasing=False, preserve_range=True))
    shapes = [np.stack([_signed(label == 1), _signed(label > 0)]) for label in labels]
    motion = _motion(shapes[0].sum(axis=0), shapes[1].sum(axis=0))
    painted, marked = [], []
    for time in range(frames):
        part = contraction(time / frames)
        image = _between(images[0], images[1], motion, part)
        cavity, heart = (_between(shapes[0][k], shapes[1][k], motion, part) for k in (0, 1))
        label = np.where(cavity < 0, 1, np.where(heart < 0, 2, 0))
        painted.append(resize(image, (size, size), order=1, anti_aliasing=True))
        marked.append(_smaller(label, size))
    whole = np.clip(np.rint(255.0 * np.stack(painted, axis=-1)), 0, 255).astype(np.uint8)
    return whole, np.stack(marked, axis=-1), spacing


def _pairs(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """End-diastole and end-systole of each patient, in this order."""
    found: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.id):
        found.setdefault(case.patient or case.id.partition("_")[0], []).append(case)
    return {name: pair for name, pair in found.items() if len(pair) == 2}


def _signed(inside: NDArray[np.bool_]) -> Array:
    """Distance to the border of a region, negative inside."""
    away = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    return np.asarray(np.clip(away, -CLIPPED, CLIPPED), dtype=np.float64)


def _motion(first: Array, second: Array) -> Array:
    """Where each pixel of the first frame is in the second `(2, X, Y)`, minus its place."""
    scale = 2.0 * CLIPPED
    found = optical_flow_tvl1(first / scale, second / scale, attachment=30.0)
    return np.stack([ndimage.gaussian_filter(part, SMOOTH) for part in found]).astype(np.float64)


def _between(first: Array, second: Array, motion: Array, part: float) -> Array:
    """Bring both frames to the same moment and mix them."""
    grid = np.indices(first.shape, dtype=np.float64)
    one = ndimage.map_coordinates(first, grid - part * motion, order=1, mode="nearest")
    two = ndimage.map_coordinates(second, grid + (1.0 - part) * motion, order=1, mode="nearest")
    return np.asarray((1.0 - part) * one + part * two, dtype=np.float64)


def _smaller(label: NDArray[Any], size: int) -> NDArray[np.uint8]:
    """The most frequent label in the area of each pixel."""
    shares = [
        resize((label == value).astype(np.float64), (size, size), order=1, anti_aliasing=True)
        for value in LABELS.values()
    ]
    return np.argmax(np.stack(shares), axis=0).astype(np.uint8)
