"""Scores of whole sequences: overlap and distance to references, anatomical and temporal validity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from medrl.core.errors import DataError
from medrl.core.metrics import case_metrics, summarise_values
from medrl.core.metrics.cine import landmark_errors
from medrl.core.validity import Rules, is_valid
from medrl.core.validity.temporal import TemporalRules, check_sequence

from .data import SequenceSet
from .windows import Blender, plan_time, weight_map

EPI = "epi"
NUMBERS = ("dice", "hd", "anat_valid", "anat_valid_frames", "temporal_valid", "temporal_errors")
"""Numbers of a sequence that matter most."""


@dataclass(frozen=True)
class Scores:
    """Numbers of every sequence of a set.

    Attributes:
        ids: Identifier of each sequence.
        subjects: Patient of each sequence.
        values: Numbers by name, one for each sequence. With references ``dice`` (of the whole sequence) and
            ``hd`` (mean over frames, mm), means over labels, the same with ``_<label>``, and ``LM/…``, the
            errors of the ends of the mitral annulus, where there are LV and MYO. Always
            ``anat_valid`` (every frame), ``anat_valid_frames`` (share), ``temporal_valid`` and
            ``temporal_errors`` (frames with one).
    """

    ids: tuple[str, ...]
    subjects: tuple[str, ...]
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """Return every mean by name, over finite values."""
        return {name: summarise_values(values).mean for name, values in self.values.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return plain types for JSON; numbers that are not finite become text."""
        return {
            "ids": list(self.ids),
            "subjects": list(self.subjects),
            "values": {
                name: [v if math.isfinite(v) else str(v) for v in values]
                for name, values in self.values.items()
            },
        }


@torch.no_grad()
def probabilities(
    network: nn.Module | Callable[[Tensor], Tensor],
    frames: Tensor,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Class probabilities ``(K, X, Y, T)`` of a sequence ``(C, X, Y, T)`` in [0, 1].

    Windows of four frames, logits blended by Gaussian weights, as `medrl predict` does.

    Args:
        network: Gives logits ``(N, K, X, Y, 4)`` of windows; its mode is left as it is.
        frames: The sequence, of any length; its frames must fit the network.
        device: Where the network computes.
    """
    plan = plan_time(int(frames.shape[-1]))
    blender = Blender(weight_map(int(frames.shape[1]), int(frames.shape[2])), plan)
    found: list[Tensor] = []
    for start in plan.starts:
        window = frames[..., plan.window(start)].to(device, torch.float32)[None]
        logits = network(window)[0].float().cpu()
        found += [torch.softmax(frame, dim=0) for _, frame in blender.add(logits)]
    return torch.stack(found, dim=-1)


def segment(
    network: nn.Module | Callable[[Tensor], Tensor],
    frames: Tensor,
    *,
    device: torch.device | str = "cpu",
) -> NDArray[np.uint8]:
    """Greedy labels ``(X, Y, T)`` of a sequence; each frame keeps its largest piece of foreground."""
    labels = probabilities(network, frames, device=device).argmax(dim=0).to(torch.uint8).numpy()
    return largest_blobs(labels)


def largest_blobs(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep the largest 4-connected piece of foreground of each frame of ``(X, Y, T)``; empty ones stay."""
    kept = np.array(labels, copy=True)
    for time in range(kept.shape[-1]):
        frame = kept[..., time]
        pieces, count = ndimage.label(frame != 0)
        if count > 1:
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0
            frame[pieces != int(sizes.argmax())] = 0
    return kept


def score_masks(
    masks: list[NDArray[np.uint8]],
    sequences: SequenceSet,
    rules: Rules,
    temporal: TemporalRules | str = "echo_temporal",
) -> Scores:
    """Score label maps ``(X, Y, T)`` as they are.

    Raises:
        DataError: They do not fit the sequences.
    """
    if len(masks) != len(sequences):
        raise DataError("scoring", why=f"{len(masks)} label maps for {len(sequences)} sequences")
    values: dict[str, list[float]] = {}
    for number, mask in enumerate(masks):
        spacing = [float(step) for step in sequences.spacing_mm[number]]
        truth = None if sequences.labels is None else np.asarray(sequences.labels[number])
        for name, value in _of_one(mask, truth, spacing, sequences.label_names, rules, temporal).items():
            values.setdefault(name, []).append(value)
    return Scores(
        ids=sequences.ids,
        subjects=sequences.subjects,
        values={name: tuple(found) for name, found in values.items()},
    )


def _of_one(
    mask: NDArray[np.uint8],
    truth: NDArray[np.uint8] | None,
    spacing: list[float],
    label_names: Mapping[str, int],
    rules: Rules,
    temporal: TemporalRules | str,
) -> dict[str, float]:
    found: dict[str, float] = {}
    if truth is not None:
        if truth.shape != mask.shape:
            raise DataError("scoring", why=f"a prediction {mask.shape} for a reference {truth.shape}")
        parts = _regions(label_names)
        whole = _rows(mask, truth, parts, [*spacing, 1.0], ("dice",))
        frames = [_rows(mask[..., t], truth[..., t], parts, spacing, ("hd",)) for t in range(mask.shape[-1])]
        singles = [name for name in parts if name != EPI]
        for name in parts:
            found[f"dice_{name}"] = whole[name]["dice"]
            found[f"hd_{name}"] = _mean([frame[name]["hd"] for frame in frames])
        found = {
            "dice": _mean([found[f"dice_{name}"] for name in singles]),
            "hd": _mean([found[f"hd_{name}"] for name in singles]),
            **found,
            **_landmarks(mask, truth, spacing, label_names),
        }
    good = [is_valid(mask[..., t], rules) for t in range(mask.shape[-1])]
    report = check_sequence(mask, (spacing[0], spacing[1]), rules=temporal)
    return {
        **found,
        "anat_valid": float(all(good)),
        "anat_valid_frames": sum(good) / len(good),
        "temporal_valid": float(report.valid),
        "temporal_errors": float(len(report.wrong_frames)),
    }


def _landmarks(
    mask: NDArray[np.uint8], truth: NDArray[np.uint8], spacing: list[float], label_names: Mapping[str, int]
) -> dict[str, float]:
    """Errors of the mitral landmarks as ``LM/<name>``; NaN where the reference shows none."""
    values = {name.lower(): int(value) for name, value in label_names.items()}
    if not {"lv", "myo"} <= set(values):
        return {}
    report = landmark_errors(mask, truth, spacing, lv=values["lv"], myo=values["myo"])
    return {
        f"LM/{name}": math.nan if value is None else float(value) for name, value in report.to_dict().items()
    }


def _rows(
    mask: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    parts: Mapping[str, int | tuple[int, ...]],
    spacing: list[float],
    metrics: tuple[str, ...],
) -> dict[str, dict[str, float]]:
    rows = case_metrics(mask.astype(np.int64), truth.astype(np.int64), parts, spacing, metrics)
    return {row["label"]: {name: float(row[name]) for name in metrics} for row in rows}


def _regions(label_names: Mapping[str, int]) -> dict[str, int | tuple[int, ...]]:
    """Every label but the background, and LV with MYO as ``epi`` if both are there."""
    found: dict[str, int | tuple[int, ...]] = {
        name: int(value) for name, value in label_names.items() if int(value) != 0
    }
    by_name = {name.lower(): int(value) for name, value in label_names.items()}
    if "lv" in by_name and "myo" in by_name:
        found[EPI] = (by_name["lv"], by_name["myo"])
    return found


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
