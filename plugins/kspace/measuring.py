"""What acquisitions are worth: image quality and Dice of slices; Dice, HD95, volumes of hearts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medrl.core.metrics import dice as dice_of
from medrl.core.metrics import hd95 as hd95_of

from .domain import Data, SliceInfo
from .observer import CaseObserver
from .quality import nmse, psnr, ssim

Row = dict[str, Any]


@dataclass
class Measured:
    """Rows of one policy and budget.

    Attributes:
        slices: One for each slice: ``id``, ``patient``, ``frame``, ``slice``, ``lines``, ``acceleration``,
            ``ssim``, ``psnr``, ``nmse``, and with labels ``dice`` and ``dice_<label>``, NaN where absent.
        volumes: One for each frame of a patient: Dice and HD95 of each label over all of its slices.
        hearts: One for each patient with end-diastole and end-systole: errors of volumes and of the ejection
            fraction.
    """

    slices: list[Row] = field(default_factory=list)
    volumes: list[Row] = field(default_factory=list)
    hearts: list[Row] = field(default_factory=list)


@torch.no_grad()
def measure(
    observer: CaseObserver,
    data: Data,
    info: Sequence[Sequence[SliceInfo]],
    masks: Tensor,
    *,
    batch: int = 32,
) -> Measured:
    """Reconstruct, segment and judge acquisitions.

    Args:
        observer: Of the cases.
        data: Names of the labels.
        info: For each case, what its slices are.
        masks: ``(N, A)`` acquired lines of all cases.
        batch: Cases at once.
    """
    found = Measured()
    cases = observer.cases
    predicted: dict[tuple[str, str], list[tuple[SliceInfo, NDArray[Any], NDArray[Any]]]] = {}
    columns = (cases.possible | cases.initial).sum(dim=1)
    for start in range(0, len(cases), batch):
        index = torch.arange(start, min(start + batch, len(cases)), device=cases.device)
        mask = masks[index.cpu()].to(cases.device)
        view = observer.view(index, mask, segment=True, gradient=False)
        magnitude, target = _slices(view.magnitude), _slices(cases.rows("target", index))
        labels = None if view.logits is None else _slices(view.logits.argmax(dim=1))
        truth = None if cases.labels is None else _slices(cases.rows("labels", index))
        for at, case in enumerate(index.tolist()):
            count = int(masks[case].sum())
            for depth, item in enumerate(info[case]):
                row = _slice_row(item, magnitude[at, depth], target[at, depth])
                row |= {"lines": count, "acceleration": float(columns[case]) / max(1, count)}
                if labels is not None and truth is not None:
                    guess, right = labels[at, depth].cpu().numpy(), truth[at, depth].cpu().numpy()
                    row |= slice_dice(guess, right, data.label_names)
                    if item.slice >= 0:
                        key = (item.patient, item.frame)
                        predicted.setdefault(key, []).append((item, guess, right))
                found.slices.append(row)
    found.volumes, sizes = _volumes(predicted, data.label_names)
    found.hearts = hearts(sizes)
    return found


def slice_dice(guess: NDArray[Any], right: NDArray[Any], names: Mapping[str, int]) -> Row:
    """Dice of the labels that are in a slice, NaN for the others, and their mean."""
    row: Row = {}
    for name, value in names.items():
        if value:
            there = bool((right == value).any())
            row[f"dice_{name}"] = dice_of(guess == value, right == value) if there else math.nan
    row["dice"] = mean_of(row.values())
    return row


def hearts(sizes: Mapping[tuple[str, str], Mapping[str, tuple[float, float]]]) -> list[Row]:
    """Errors of left-ventricular volumes and ejection fraction of patients with both frames.

    Args:
        sizes: By patient and frame, of each label the volume found and the true one, in ml.

    Returns:
        Rows with ``edv_error_ml``, ``esv_error_ml`` and ``ef_error`` (percentage points), found minus true.
    """
    rows: list[Row] = []
    for patient in sorted({key[0] for key in sizes}):
        both = [sizes.get((patient, frame), {}).get("LV") for frame in ("ED", "ES")]
        if both[0] is None or both[1] is None:
            continue
        (edv, true_edv), (esv, true_esv) = both[0], both[1]
        if not all(math.isfinite(value) for value in (edv, esv, true_edv, true_esv)) or true_edv <= 0:
            continue
        fraction = 100.0 * (edv - esv) / edv if edv > 0 else math.nan
        rows.append(
            {
                "patient": patient,
                "edv_error_ml": edv - true_edv,
                "esv_error_ml": esv - true_esv,
                "ef_error": fraction - 100.0 * (true_edv - true_esv) / true_edv,
            }
        )
    return rows


def mean_of(values: Any) -> float:
    """Mean of the finite values; NaN without any."""
    finite = [float(value) for value in values if math.isfinite(float(value))]
    return sum(finite) / len(finite) if finite else math.nan


def _slice_row(item: SliceInfo, magnitude: Tensor, target: Tensor) -> Row:
    one, other = magnitude.unsqueeze(0), target.unsqueeze(0)
    return {
        "id": item.id,
        "patient": item.patient,
        "frame": item.frame,
        "slice": item.slice,
        "ssim": float(ssim(one, other)),
        "psnr": float(psnr(one, other)),
        "nmse": float(nmse(one, other)),
    }


def _slices(values: Tensor) -> Tensor:
    """Give single slices ``(B, H, W)`` a depth of one."""
    return values.unsqueeze(1) if values.ndim == 3 else values


def _volumes(
    predicted: Mapping[tuple[str, str], list[tuple[SliceInfo, NDArray[Any], NDArray[Any]]]],
    names: Mapping[str, int],
) -> tuple[list[Row], dict[tuple[str, str], dict[str, tuple[float, float]]]]:
    """Rows of volumes, and the volumes of their labels in ml, found and true."""
    rows: list[Row] = []
    sizes: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for (patient, frame), items in sorted(predicted.items()):
        ordered = sorted(items, key=lambda item: item[0].slice)
        guess, right = np.stack([item[1] for item in ordered]), np.stack([item[2] for item in ordered])
        # Rows, columns and slices in mm; slices come first here.
        rows_mm, columns_mm, slices_mm = ordered[0][0].spacing_mm
        spacing = (slices_mm, rows_mm, columns_mm)
        known = all(math.isfinite(size) and size > 0 for size in spacing)
        row: Row = {"patient": patient, "frame": frame, "slices": len(ordered)}
        voxel = float(np.prod(spacing)) / 1000.0 if known else math.nan
        sizes[patient, frame] = {}
        for name, value in names.items():
            if not value:
                continue
            found, true = guess == value, right == value
            row[f"dice_{name}"] = dice_of(found, true) if true.any() else math.nan
            distance = hd95_of(found, true, spacing) if known and true.any() else math.nan
            row[f"hd95_{name}"] = distance if math.isfinite(distance) else math.nan
            sizes[patient, frame][name] = (float(found.sum()) * voxel, float(true.sum()) * voxel)
        row["dice"] = mean_of(value for key, value in row.items() if key.startswith("dice_"))
        row["hd95"] = mean_of(value for key, value in row.items() if key.startswith("hd95_"))
        rows.append(row)
    return rows, sizes
