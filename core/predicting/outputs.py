"""What is written for a case beside its segmentation: probabilities, uncertainty, picture, volumes.

Side outputs lie in folders of their own, so that the output folder holds segmentations only and can be
given to `medrl evaluate` as it is::

    out/<case>.nii.gz  labels.json  report.json
    out/probabilities/<case>.npz  uncertainty/<case>.nii.gz  previews/<case>.png  statistics.csv
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import RuntimeFault
from medrl.core.types import Prediction, Volume
from medrl.core.volume import voxel_volume_mm3, write_volume
from medrl.core.volume.write import write_bytes

LABELS_NAME = "labels.json"
STATISTICS_NAME = "statistics.csv"


def entropy(probabilities: NDArray[Any]) -> NDArray[np.float32]:
    """Return how undecided each voxel is, from 0 (sure) to 1 (all classes alike).

    Args:
        probabilities: `(K, X, Y, Z)`. If they sum to 1 over K, the entropy over classes divided by log K.
            Otherwise each channel is a region of its own, and the largest of their binary entropies is
            taken, divided by log 2.

    Returns:
        `(X, Y, Z)` in [0, 1].
    """
    p = np.clip(probabilities, 0.0, 1.0).astype(np.float32, copy=False)
    k = p.shape[0]
    if k > 1 and bool(np.allclose(p.sum(axis=0), 1.0, atol=1e-3)):
        found = np.zeros(p.shape[1:], dtype=np.float32)
        for channel in p:
            found -= _x_log_x(channel)
        return np.clip(found / np.float32(np.log(k)), 0.0, 1.0)
    found = np.zeros(p.shape[1:], dtype=np.float32)
    for channel in p:
        np.maximum(found, -(_x_log_x(channel) + _x_log_x(1.0 - channel)), out=found)
    return np.clip(found / np.float32(np.log(2.0)), 0.0, 1.0)


def label_volumes_ml(labels: NDArray[Any], names: Mapping[str, int], like: Volume) -> dict[str, float]:
    """Return the volume of each label in ml, background left out."""
    counts = np.bincount(labels.ravel().astype(np.int64), minlength=max(names.values(), default=0) + 1)
    voxel_ml = voxel_volume_mm3(like) / 1000.0
    return {name: float(counts[value]) * voxel_ml for name, value in names.items() if value != 0}


def write_case(
    prediction: Prediction,
    target: Path,
    folder: Path,
    like: Volume,
    names: Mapping[str, int],
    *,
    preview: bool,
) -> list[Path]:
    """Write the segmentation of a case and what else the prediction holds; return the files.

    Every file is written beside its place, read back and renamed; the segmentation comes last, so that
    it is there only if everything else is.

    Raises:
        RuntimeFault: A file could not be written or does not read back equal.
        DataError: The prediction does not lie on the grid of its input.
    """
    written: list[Path] = []
    if prediction.probabilities is not None:
        path = folder / "probabilities" / f"{prediction.case_id}.npz"
        _write_npz(path, prediction.probabilities, like)
        written.append(path)
    if prediction.uncertainty is not None:
        path = folder / "uncertainty" / f"{prediction.case_id}.nii.gz"
        write_volume(path, prediction.uncertainty, like, kind="image")
        written.append(path)
    if preview:
        from medrl.core.preview import render

        path = folder / "previews" / f"{prediction.case_id}.png"
        picture = render(
            like.data[0], like.affine, labels=prediction.labels, names=names, title=prediction.case_id
        )
        write_bytes(path, picture, suffix=".png")
        written.append(path)
    write_volume(target, prediction.labels, like, kind="label")
    return [*written, target]


def write_statistics(path: Path, volumes: Mapping[str, Mapping[str, float]]) -> None:
    """Write the volume in ml of each label (columns) of each case (rows) as CSV."""
    labels = list(dict.fromkeys(label for row in volumes.values() for label in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", *(f"{label}_ml" for label in labels)])
    for case in sorted(volumes):
        writer.writerow([case, *(f"{volumes[case].get(label, 0.0):.4f}" for label in labels)])
    write_bytes(path, text.getvalue().encode())


def _write_npz(path: Path, probabilities: NDArray[Any], like: Volume) -> None:
    array = probabilities.astype(np.float32, copy=False)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, probabilities=array, affine=like.affine)

    def verify(written: Path) -> None:
        with np.load(written, allow_pickle=False) as found:
            same = np.array_equal(found["probabilities"], array)
        if not same:
            raise RuntimeFault(f"{path} does not read back as it was written", do="check the disk")

    write_bytes(path, buffer.getvalue(), suffix=".npz", verify=verify)


def _x_log_x(p: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``p log p`` with 0 log 0 = 0."""
    safe = np.where(p > 0, p, np.float32(1.0))
    return np.asarray(p * np.log(safe), dtype=np.float32)
