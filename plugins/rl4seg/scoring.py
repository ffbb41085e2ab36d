"""Scores of segmentations against references, image by image: the same for every method of rl4seg.

A prediction is greedy and keeps its largest connected piece of foreground (4-connected in two dimensions).
Dice, Hausdorff distance and its 95th percentile (mm) are those of `medrl.core.metrics`, with its rule for
empty masks; validity is that of the anatomical rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from medrl.core.errors import DataError
from medrl.core.metrics import case_metrics, summarise_values

if TYPE_CHECKING:
    from medrl.core.validity import Rules

    from .data import ImageSet

METRICS = ("dice", "hd", "hd95")
"""Metrics of every image; distances in mm."""
VALID = "valid"
EPI = "epi"

Network = nn.Module | Callable[[Tensor], Tensor]
"""Maps images ``(N, C, *S)`` to logits ``(N, K, *S)``."""


@dataclass(frozen=True)
class Scores:
    """Numbers of every image of a set.

    Attributes:
        ids: Identifier of each image.
        subjects: Patient of each image.
        values: Numbers by name, one for each image: ``dice``, ``hd``, ``hd95`` (means over labels), the same
            with ``_<label>``, and ``valid`` (0 or 1).
    """

    ids: tuple[str, ...]
    subjects: tuple[str, ...]
    values: Mapping[str, tuple[float, ...]]

    def mean(self, name: str = "dice") -> float:
        """Return the mean over images of the finite values."""
        return summarise_values(self.values[name]).mean

    def summary(self) -> dict[str, float]:
        """Return every mean by name, and how many distances are infinite, if any are."""
        found: dict[str, float] = {}
        for name, values in self.values.items():
            summary = summarise_values(values)
            found[name] = summary.mean
            if summary.infinite:
                found[f"{name}_infinite"] = float(summary.infinite)
        return found

    def by_subject(self, name: str) -> dict[str, float]:
        """Return the mean of each subject, over its finite values."""
        groups: dict[str, list[float]] = {}
        for subject, value in zip(self.subjects, self.values[name], strict=True):
            groups.setdefault(subject, []).append(value)
        return {subject: summarise_values(values).mean for subject, values in groups.items()}

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

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Scores:
        """Read what `as_dict` returned."""
        values = {name: tuple(float(v) for v in found) for name, found in content["values"].items()}
        return cls(ids=tuple(content["ids"]), subjects=tuple(content["subjects"]), values=values)


def score(
    prediction: Network | Tensor | NDArray[Any],
    images: ImageSet,
    rules: Rules | None = None,
    *,
    batch: int = 32,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Scores:
    """Score a network, its probabilities or its label maps against the references of a set.

    Args:
        prediction: Network that gives logits, probabilities ``(N, K, *S)``, or label maps ``(N, *S)``.
        images: Images with references.
        rules: Anatomical rules; without them there is no ``valid``.
        batch: Images at a time.
        device: Where a network computes.
        workers: Processes that check validity.

    Raises:
        DataError: The set has no references, or the prediction does not fit it.
    """
    if isinstance(prediction, Tensor | np.ndarray):
        masks = np.asarray(prediction)
        if masks.ndim == images.images.ndim and masks.dtype.kind == "f":
            masks = masks.argmax(axis=1)
    else:
        masks = segment(prediction, images.images, batch=batch, device=device).numpy()
    return score_masks(largest_blob(masks), images, rules, workers=workers)


def score_masks(
    masks: NDArray[Any], images: ImageSet, rules: Rules | None = None, *, workers: int = 0
) -> Scores:
    """Score label maps ``(N, *S)`` as they are, without keeping the largest piece.

    Raises:
        DataError: The set has no references, or the maps do not fit them.
    """
    if images.labels is None:
        raise DataError("scoring", why="these images have no references")
    truth = np.asarray(images.labels)
    if masks.shape != truth.shape:
        raise DataError("scoring", why=f"predictions {masks.shape} do not fit references {truth.shape}")
    parts = regions(images.label_names)
    spacing = np.asarray(images.spacing_mm, dtype=np.float64)
    singles = [name for name in parts if name != EPI]
    values: dict[str, list[float]] = {}
    for mask, reference, size in zip(masks, truth, spacing, strict=True):
        rows = {
            row["label"]: row
            for row in case_metrics(
                mask.astype(np.int64), reference.astype(np.int64), parts, size.tolist(), METRICS
            )
        }
        for metric in METRICS:
            found = [rows[name][metric] for name in singles]
            values.setdefault(metric, []).append(_mean(found))
            for name in parts:
                values.setdefault(f"{metric}_{name}", []).append(float(rows[name][metric]))
    if rules is not None:
        from medrl.core.validity import check_batch

        values[VALID] = [float(report.valid) for report in check_batch(masks, rules, workers=workers)]
    return Scores(
        ids=tuple(images.ids),
        subjects=tuple(images.subjects),
        values={name: tuple(found) for name, found in values.items()},
    )


def regions(label_names: Mapping[str, int]) -> dict[str, int | tuple[int, ...]]:
    """Return what is scored: every label but the background, and LV with MYO as ``epi`` if both are there."""
    found: dict[str, int | tuple[int, ...]] = {
        name: int(value) for name, value in label_names.items() if int(value) != 0
    }
    by_name = {name.lower(): int(value) for name, value in label_names.items()}
    if "lv" in by_name and "myo" in by_name:
        found[EPI] = (by_name["lv"], by_name["myo"])
    return found


@torch.no_grad()
def probabilities(
    network: Network, images: Tensor, *, batch: int = 32, device: torch.device | str = "cpu"
) -> Tensor:
    """Return ``(N, K, *S)`` class probabilities on the CPU, with the network in evaluation mode."""
    return torch.cat([part.cpu() for part in _forward(network, images, batch, device)])


@torch.no_grad()
def segment(
    network: Network, images: Tensor, *, batch: int = 32, device: torch.device | str = "cpu"
) -> Tensor:
    """Return greedy label maps ``(N, *S)`` uint8 on the CPU, with the network in evaluation mode."""
    return torch.cat(
        [part.argmax(1).to(torch.uint8).cpu() for part in _forward(network, images, batch, device)]
    )


def _forward(network: Network, images: Tensor, batch: int, device: torch.device | str) -> Any:
    training = isinstance(network, nn.Module) and network.training
    if isinstance(network, nn.Module):
        network.eval()
    try:
        for start in range(0, len(images), batch):
            part = images[start : start + batch].to(device=device, dtype=torch.float32)
            yield network(part).float().softmax(1)
    finally:
        if training and isinstance(network, nn.Module):
            network.train()


def largest_blob(masks: NDArray[Any]) -> NDArray[Any]:
    """Keep the largest connected piece of foreground of each label map ``(N, *S)``; empty maps stay empty.

    Pieces are connected by faces: 4-connected in two dimensions. Of equal pieces the first stays.
    """
    kept = np.array(masks, copy=True)
    for mask in kept:
        pieces, count = ndimage.label(mask != 0)
        if count > 1:
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0
            mask[pieces != int(sizes.argmax())] = 0
    return kept


def _mean(values: Sequence[float]) -> float:
    known = [float(value) for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
