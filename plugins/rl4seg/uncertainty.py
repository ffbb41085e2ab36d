"""How far a confidence map can be trusted: calibration, agreement with the errors, ranking of the errors.

A reward in [0, 1] that estimates how likely each label is right is a confidence, and 1 - reward an
uncertainty. It stands beside what is usual: the actor's own probability, Monte Carlo dropout, an ensemble,
and test-time augmentation, each with its own prediction.

Calibration looks at pixels where prediction or reference is foreground; the rest is easy and hides errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from medrl.core import rng
from medrl.core.errors import DataError
from medrl.core.metrics import adaptive_calibration_error, auroc, dice, mutual_information, reliability

from .scoring import probabilities

BINS = 20
"""Bins of the calibration errors, ``(low, high]``. Source: RL4Seg uncertainty_reward.py."""
NEAR = 3
"""Pixels around the predicted foreground in which errors are ranked."""


@dataclass(frozen=True)
class Confidence:
    """Predictions with the probability that each pixel of them is right.

    Attributes:
        masks: ``(N, *S)`` label maps.
        maps: ``(N, *S)`` in [0, 1].
    """

    masks: NDArray[Any]
    maps: NDArray[Any]


@dataclass(frozen=True)
class Quality:
    """How good the confidence of one method is.

    Attributes:
        ece: Expected calibration error over equally wide bins.
        mce: Largest gap of any bin.
        ace: The same as `ece` over bins of equally many pixels.
        nmi: Mean over images of the normalised mutual information of being right and confidence.
        error_auroc: How well low confidence finds wrong pixels on the foreground of prediction or reference.
        near_auroc: The same within `NEAR` pixels of the predicted foreground.
        r_mean: Pearson correlation over images of Dice and mean uncertainty.
        r_sum: The same with the sum of uncertainty over the predicted foreground's size.
        dice: Mean over images and labels of the Dice that the correlations use.
    """

    ece: float
    mce: float
    ace: float
    nmi: float
    error_auroc: float
    near_auroc: float
    r_mean: float
    r_sum: float
    dice: float

    def as_dict(self) -> dict[str, float]:
        """Return the numbers by name."""
        return asdict(self)


def assess(found: Confidence, truth: NDArray[Any]) -> Quality:
    """Measure a confidence against references ``(N, *S)``.

    Source: RL4Seg uncertainty_reward.py. Deviation: bins are closed above, so that a confidence of 1 counts;
    ACE is weighted by pixels and not divided by the number of bins; Dice is the mean over labels and not that
    of all foreground together; images whose mutual information is not defined are left out.

    Raises:
        DataError: Shapes differ.
    """
    masks, maps, truth = np.asarray(found.masks), np.asarray(found.maps), np.asarray(truth)
    if not masks.shape == maps.shape == truth.shape:
        raise DataError(
            "uncertainty",
            why=f"predictions {masks.shape}, confidence {maps.shape}, references {truth.shape}",
        )
    right = masks == truth
    foreground = (masks != 0) | (truth != 0)
    confidence, correct = maps[foreground], right[foreground]
    diagram = reliability(confidence, correct, bins=BINS)
    near = np.stack([dilated(mask != 0, NEAR) for mask in masks]) if len(masks) else foreground
    scores = [mean_dice(mask, reference) for mask, reference in zip(masks, truth, strict=True)]
    unsure = 1.0 - maps.reshape(len(maps), -1).astype(np.float64)
    size = (masks != 0).reshape(len(masks), -1).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(size > 0, unsure.sum(1) / size, np.nan)
    shared = [mutual_information(a, b) for a, b in zip(right, maps, strict=True)]
    return Quality(
        ece=diagram.ece,
        mce=diagram.mce,
        ace=adaptive_calibration_error(confidence, correct),
        nmi=_finite_mean(shared),
        error_auroc=_error_auroc(confidence, correct),
        near_auroc=_error_auroc(maps[near], right[near]),
        r_mean=pearson(scores, unsure.mean(1)),
        r_sum=pearson(scores, relative),
        dice=_finite_mean(scores),
    )


def pearson(a: Sequence[float] | NDArray[Any], b: Sequence[float] | NDArray[Any]) -> float:
    """Return Pearson's correlation over pairs of finite values; NaN where one side does not vary."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    known = np.isfinite(first) & np.isfinite(second)
    first, second = first[known], second[known]
    if first.size < 2 or np.ptp(first) == 0.0 or np.ptp(second) == 0.0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def mean_dice(mask: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return the mean Dice over the labels that either map holds; NaN if both are empty."""
    labels = sorted({int(v) for v in np.unique(mask)} | {int(v) for v in np.unique(reference)} - {0})
    return _finite_mean([dice(mask == value, reference == value) for value in labels if value != 0])


def dilated(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """Return a mask grown by so many pixels in every direction, corners cut."""
    grown: NDArray[np.bool_] = ndimage.binary_dilation(mask, iterations=pixels)
    return grown


# --- where confidence comes from -------------------------------------------------------------


def of_probabilities(found: Tensor) -> Confidence:
    """The greedy prediction of probabilities ``(N, K, *S)`` with the probability of the predicted class.

    Deviation: RL4Seg's rivals use 1 - normalised entropy, which is no probability of being right.
    """
    best = found.float().max(1)
    return Confidence(best.indices.to(torch.uint8).numpy(), best.values.numpy())


@torch.no_grad()
def of_reward(
    reward: Callable[[Tensor, Tensor], Tensor],
    masks: Tensor,
    images: Tensor,
    *,
    batch: int = 32,
    device: torch.device | str = "cpu",
) -> Confidence:
    """Predictions ``(N, *S)`` with what a reward ``(actions, images) -> (N, *S)`` says about them."""
    parts = [
        reward(masks[at : at + batch].to(device).long(), images[at : at + batch].to(device).float()).cpu()
        for at in range(0, len(masks), batch)
    ]
    return Confidence(masks.to(torch.uint8).numpy(), torch.cat(parts).float().numpy())


def ensemble(
    networks: Sequence[nn.Module], images: Tensor, *, batch: int = 32, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the mean probabilities ``(N, K, *S)`` of several networks."""
    return _average(probabilities(network, images, batch=batch, device=device) for network in networks)


def mc_dropout(
    network: nn.Module,
    images: Tensor,
    *,
    passes: int = 10,
    p: float = 0.25,
    seed: int = 0,
    batch: int = 32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the mean probabilities over passes with channels dropped at random after each convolution block.

    The batch statistics stay frozen; nothing else is random, and the global streams are left as they were.

    Source: Gal and Ghahramani 2016; 10 passes at 0.25 as in RL4Seg, which also drops in a network that was
    trained without.
    """
    with rng.isolated(rng.derive_seed(seed, "mc-dropout")), _dropping(network, p):
        return _average(probabilities(network, images, batch=batch, device=device) for _ in range(passes))


def augmented(
    network: nn.Module,
    images: Tensor,
    *,
    views: int = 8,
    seed: int = 0,
    batch: int = 32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the mean probabilities over views that differ in contrast, gamma and place.

    A view is moved by whole pixels, up to 3 % of each side, and its probabilities are moved back; mirroring
    is left out, because echocardiograms have a left and a right. The first view is the image itself.
    """
    generator = rng.numpy_generator(seed, "test-time-augmentation")
    axes = tuple(range(2, images.ndim))
    found = [probabilities(network, images, batch=batch, device=device)]
    for _ in range(views - 1):
        gamma, gain = float(np.exp(generator.normal(0.0, 0.2))), float(generator.uniform(0.85, 1.15))
        shifts = [
            int(generator.integers(-reach, reach + 1))
            for reach in (max(1, round(0.03 * images.shape[axis])) for axis in axes)
        ]
        view = (images.float().clamp(0, 1) ** gamma * gain).clamp(0, 1)
        moved = probabilities(network, _moved(view, shifts), batch=batch, device=device)
        found.append(_moved(moved, [-shift for shift in shifts]))
    return _average(iter(found))


def _moved(array: Tensor, shifts: Sequence[int]) -> Tensor:
    """Move ``(N, C, *S)`` by whole pixels; what comes in repeats the edge."""
    pad = [extent for shift in reversed(shifts) for extent in (max(shift, 0), max(-shift, 0))]
    padded = functional.pad(array, pad, mode="replicate")
    for axis, shift in enumerate(shifts, start=2):
        padded = padded.narrow(axis, max(-shift, 0), array.shape[axis])
    return padded


def _average(parts: Iterator[Tensor]) -> Tensor:
    total: Tensor | None = None
    count = 0
    for part in parts:
        total = part if total is None else total + part
        count += 1
    if total is None:
        raise DataError("uncertainty", why="no predictions to average")
    return total / count


@contextmanager
def _dropping(network: nn.Module, p: float) -> Iterator[None]:
    """Drop whole channels after every activation of a network, as long as the block runs."""
    activations = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU)

    def drop(_module: nn.Module, _given: Any, output: Tensor) -> Tensor:
        return functional.dropout2d(output, p) if output.ndim == 4 else functional.dropout3d(output, p)

    hooks = [
        module.register_forward_hook(drop) for module in network.modules() if isinstance(module, activations)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- files -----------------------------------------------------------------------------------


def save_maps(
    path: Path,
    ids: Sequence[str],
    images: NDArray[Any],
    truth: NDArray[Any],
    found: Confidence,
) -> Path:
    """Write HDF5 with a group for each image: ``img``, ``gt``, ``pred``, ``reward_map``, ``accuracy_map``.

    Deviation: ``accuracy_map`` holds 1 where the prediction is right; the original's holds the errors.

    Raises:
        DataError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise DataError(str(path), why="HDF5 needs h5py", do="pip install 'medrl[io]'") from error
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(temporary, "w") as file:
        for number, name in enumerate(ids):
            group = file.create_group(name.replace("/", "_"))
            content = {
                "img": images[number],
                "gt": truth[number],
                "pred": found.masks[number],
                "reward_map": found.maps[number].astype(np.float32),
                "accuracy_map": (found.masks[number] == truth[number]).astype(np.uint8),
            }
            for key, array in content.items():
                group.create_dataset(key, data=array, compression="gzip", compression_opts=1)
    temporary.replace(path)
    return path


def averages(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each number over seeds; what is not finite is left out."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: _finite_mean([row[name] for row in rows if name in row]) for name in names}


def _error_auroc(confidence: NDArray[Any], correct: NDArray[Any]) -> float:
    return auroc(1.0 - np.asarray(confidence, dtype=np.float64), ~np.asarray(correct, dtype=np.bool_))  # type: ignore[arg-type]


def _finite_mean(values: Sequence[float]) -> float:
    known = [float(value) for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
