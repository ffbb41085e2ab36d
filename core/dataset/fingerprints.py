"""What a dataset is made of: shapes, spacings, intensities, label volumes, and a hash of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medrl.core.types import Case
from medrl.core.volume import present_labels, voxel_volume_mm3

from .loading import load_case
from .model import Dataset

PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)
SAMPLES = 20_000
"""Voxels of each case and channel that enter the percentiles, evenly spaced."""


def fingerprint(
    dataset: Dataset, *, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Read every training case and describe the dataset in plain values.

    Returns:
        ``name, layout, channel_names, labels, cases`` (shape, spacing in mm, label volumes in ml of each
        case), ``spacing_median_mm``, ``shape_median``, ``intensities`` (percentiles, mean and standard
        deviation by channel, over voxels of the foreground where there is one), ``empty`` (cases without
        foreground) and ``content_hash``.

    Raises:
        DataError: A case is damaged; ``medrl data check`` lists all of them.
    """
    names = {value: name for name, value in dataset.labels.items()}
    samples: list[list[Any]] = [[] for _ in dataset.channel_names]
    cases: dict[str, Any] = {}
    empty = []
    for done, case in enumerate(dataset.cases):
        if progress is not None:
            progress(done, len(dataset.cases), case.id)
        image, label = load_case(dataset, case, with_label=True)
        mask = label.data[0] > 0 if label is not None else np.zeros(image.data.shape[1:], dtype=bool)
        if not mask.any():
            empty.append(case.id)
            mask = np.ones_like(mask)
        for channel, kept in zip(image.data, samples, strict=True):
            values = channel[mask]
            kept.append(values[:: max(len(values) // SAMPLES, 1)])
        ml = voxel_volume_mm3(image) / 1000
        counts = present_labels(label.data) if label is not None else {}
        cases[case.id] = {
            "shape": list(image.data.shape[1:]),
            "spacing_mm": [round(size, 6) for size in image.spacing],
            "patient": case.patient,
            "label_ml": {names[value]: round(n * ml, 6) for value, n in counts.items() if value != 0},
        }
    spacing = np.array([case["spacing_mm"] for case in cases.values()] or [[0.0, 0.0, 0.0]])
    shapes = np.array([case["shape"] for case in cases.values()] or [[0, 0, 0]])
    return {
        "name": dataset.name,
        "layout": dataset.layout,
        "channel_names": list(dataset.channel_names),
        "labels": dict(dataset.labels),
        "patients": len({case.patient for case in dataset.cases}),
        "spacing_median_mm": [float(value) for value in np.median(spacing, axis=0)],
        "shape_median": [float(value) for value in np.median(shapes, axis=0)],
        "intensities": {
            name: _describe(kept) for name, kept in zip(dataset.channel_names, samples, strict=True)
        },
        "empty": empty,
        "cases": cases,
        "content_hash": content_hash(dataset),
    }


def content_hash(dataset: Dataset) -> str:
    """Return a SHA-256 of identifiers, labels and the bytes of every file of the training cases."""
    digest = hashlib.sha256(repr(sorted((dataset.declared_labels or {}).items())).encode())
    for case in dataset.cases:
        digest.update(f"\n{case.id}".encode())
        for path in _files(case):
            digest.update(_file_hash(path))
    return digest.hexdigest()


def _files(case: Case) -> list[Path]:
    found: list[Path] = []
    for path in (*case.images, *([case.label] if case.label else [])):
        found.extend(sorted(item for item in path.iterdir() if item.is_file()) if path.is_dir() else [path])
    return found


def _file_hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _describe(kept: list[Any]) -> dict[str, float]:
    if not kept:
        return {}
    values = np.concatenate(kept).astype(np.float64)
    described = {f"p{percentile:g}": float(np.percentile(values, percentile)) for percentile in PERCENTILES}
    return {**described, "mean": float(values.mean()), "std": float(values.std())}
