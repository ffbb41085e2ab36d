"""Perturbations of networks, images and label maps whose strength is set by the Dice that they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.learned_reward.correctors import dice_per_image
from medrl.core.learned_reward.corruption import (
    CORRUPTION,
    AffineRanges,
    CorruptionRanges,
    corrupt_masks,
    jitter_masks,
)
from medrl.core.learned_reward.fields import generators, normals
from medrl.core.learned_reward.modes import class_logits, evaluating
from medrl.core.learned_reward.pairs import PredictionRecipe
from medrl.core.learned_reward.pairs.predictions import noisy_weights, with_contrast, with_noise
from medrl.core.rng import torch_generator

Kind = Literal["weight_noise", "contrast", "image_noise"]
KINDS: tuple[Kind, ...] = ("weight_noise", "contrast", "image_noise")
DROPS = (0.05, 0.12, 0.22)
"""Drops of Dice of the newer original."""

_LARGEST: dict[str, float] = {"weight_noise": 2.0, "contrast": 1.0, "image_noise": 2.0}
"""Greatest strength that is tried; of contrast, 1 leaves none."""
_STEPS = 12
_SLIGHT = AffineRanges(rotation=(-8.0, 8.0), scale=(0.9, 1.1), shift=(-0.05, 0.05))


@dataclass(frozen=True)
class Calibration:
    """The strength that costs as much Dice as asked for, or the nearest that was found.

    Attributes:
        kind: What is perturbed.
        target: Drop of Dice asked for.
        strength: Standard deviation of relative weight noise or of image noise, or the factor of contrast.
        drop: What it costs on the images of the calibration.
    """

    kind: Kind
    target: float
    strength: float
    drop: float


def calibrate(
    network: nn.Module,
    images: Tensor,
    *,
    classes: int,
    kind: str,
    drops: Sequence[float] = DROPS,
    seed: int = 0,
    draws: int = 4,
) -> list[Calibration]:
    """Find the strengths of a perturbation that lower the Dice of predictions by given amounts.

    The drop is one minus the Dice of perturbed with unperturbed predictions, mean over images, foreground
    classes and draws. The noise of a draw is the same for all strengths but for its size, so that the drop
    changes steadily; the strength is found by bisection.

    Args:
        network: ``(n, C, *S)`` to logits; its weights, buffers and mode stay what they are.
        images: ``(N, C, *S)`` in [0, 1], on the network's device.
        classes: K.
        kind: ``weight_noise``: noise on each parameter, relative to its root mean square. ``contrast``:
            blending with the mean. ``image_noise``: noise on the image, which is then divided by its maximum.
        drops: Wanted, in (0, 1).
        seed: Of the noise.
        draws: Draws of noise that are averaged.

    Returns:
        One for each drop. A drop that no strength reaches gets the strongest one, with what it costs.

    Raises:
        ConfigError: Unknown kind, or a drop outside (0, 1).

    Source: specification §10.18, §11: absolute noise of 0.1 to 0.25 on weights of deviation 0.015 leaves
    rubbish.
    """
    if kind not in KINDS or draws < 1 or not all(0.0 < drop < 1.0 for drop in drops):
        raise ConfigError(
            "calibrated perturbation",
            why=f"kind {kind}, drops {list(drops)}, {draws} draws",
            do=f"choose {', '.join(KINDS)}; drops between 0 and 1; at least one draw",
        )
    run = _Perturbed(network, images, classes, kind, seed, draws)
    return [_search(run, drop) for drop in drops]


def calibrated_recipe(
    network: nn.Module,
    images: Tensor,
    *,
    classes: int,
    drops: Sequence[float] = DROPS,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    draws: int = 4,
    base: PredictionRecipe | None = None,
) -> tuple[PredictionRecipe, list[Calibration]]:
    """Set the strengths of a recipe of prediction pairs by the Dice that they cost.

    Strengths that miss their drop by more than half of it are left out: a blend with the mean, for example,
    may not mislead a network that much. Weight noise is relative to each parameter.

    Args:
        network: See `calibrate`.
        images: See `calibrate`; a few are enough.
        classes: K.
        drops: Wanted.
        kinds: What is perturbed; the others are left out.
        seed: Of the noise.
        draws: Draws of noise that are averaged.
        base: All other settings of the recipe.

    Returns:
        The recipe for `prediction_pairs`, and what was found.
    """
    found = [
        item
        for kind in kinds
        for item in calibrate(
            network, images, classes=classes, kind=kind, drops=drops, seed=seed, draws=draws
        )
    ]
    used = [item for item in found if abs(item.drop - item.target) <= 0.5 * item.target]
    strengths = {kind: tuple(sorted({item.strength for item in used if item.kind == kind})) for kind in KINDS}
    recipe = replace(
        base or PredictionRecipe(),
        weight_noise=strengths["weight_noise"],
        noise_scale="relative",
        contrast=strengths["contrast"],
        image_noise=strengths["image_noise"],
    )
    return recipe, found


def move_base(
    masks: Tensor,
    shift_px: Sequence[float],
    tilt: Sequence[float] | None = None,
    *,
    structures: Sequence[int] | None = None,
) -> Tensor:
    """Stretch or shrink the ventricle along the columns so that its base misses the valve.

    The uppermost row stays where it is; the base of every column moves by ``shift_px·(1 + tilt·b)``, b from
    −1 at the left to 1 at the right. What the landmark reward net has to find, without an error elsewhere.

    Args:
        masks: ``(N, X, Y, T)`` or ``(N, X, Y)`` labels; the apex at small y.
        shift_px: N displacements along y in pixels; positive ones lie beyond the valve.
        tilt: N numbers in [−1, 1]: how much further the right end moves than the left one.
        structures: Labels that move; left out, all but 0. The others stay where nothing moved to.

    Returns:
        Labels of the same shape and type; frames without foreground stay empty.

    Raises:
        RuntimeFault: The numbers do not fit the masks.

    Source: RL4Seg3D, `utils/seg_perturbation.py`.
    """
    tilts = [0.0] * len(masks) if tilt is None else list(tilt)
    if masks.dim() not in (3, 4) or not len(masks) == len(shift_px) == len(tilts):
        raise RuntimeFault(
            "moved base", why=f"{len(shift_px)} shifts and {len(tilts)} tilts for {tuple(masks.shape)} masks"
        )
    source = masks.detach().cpu().numpy()
    frames = source if source.ndim == 4 else source[..., np.newaxis]
    moved = np.stack(
        [
            np.stack(
                [
                    _stretched(frame, float(by), float(lean), structures)
                    for frame in np.moveaxis(sample, -1, 0)
                ],
                axis=-1,
            )
            for sample, by, lean in zip(frames, shift_px, tilts, strict=True)
        ]
    )
    return torch.from_numpy(moved.reshape(source.shape)).to(masks.device)


def glitch_frames(
    masks: Tensor,
    classes: int,
    *,
    seed: int,
    keys: Sequence[object],
    share: float = 0.25,
    ranges: CorruptionRanges = CORRUPTION,
) -> Tensor:
    """Make single frames of windows wrong: moved, turned and corrupted, each on its own.

    Args:
        masks: ``(N, X, Y, T)`` labels.
        classes: K.
        seed: Of all draws.
        keys: N names that with the seed decide what is drawn.
        share: Probability of each frame.
        ranges: What makes it wrong.

    Returns:
        Labels of the same shape; frames that were not drawn are unchanged.

    Raises:
        RuntimeFault: The masks have other than four axes, or another number than the keys.
    """
    if masks.dim() != 4 or len(masks) != len(keys):
        raise RuntimeFault("glitches", why=f"{len(keys)} keys for masks {tuple(masks.shape)}")
    drawn = np.stack([stream.random(masks.shape[3]) for stream in generators(seed, "glitch", keys)])
    sample, frame = np.nonzero(drawn < share)
    if sample.size == 0:
        return masks
    at = torch.from_numpy(sample).to(masks.device), torch.from_numpy(frame).to(masks.device)
    single = masks[at[0], :, :, at[1]]
    names = [f"{keys[row]}/{t}" for row, t in zip(sample.tolist(), frame.tolist(), strict=True)]
    single = jitter_masks(single, seed=seed, keys=names, ranges=_SLIGHT)
    single = corrupt_masks(single, classes, seed=seed, keys=names, ranges=ranges)
    result = masks.clone()
    result[at[0], :, :, at[1]] = single.to(masks.dtype)
    return result


class _Perturbed:
    """Drop of Dice as a function of strength."""

    def __init__(
        self, network: nn.Module, images: Tensor, classes: int, kind: str, seed: int, draws: int
    ) -> None:
        self.network, self.images, self.classes = network, images, classes
        self.kind: Any = kind
        self.seed = seed
        self.draws = 1 if kind == "contrast" else draws
        self.clean = self._labels(None, images)

    def drop(self, strength: float) -> float:
        """One minus the mean Dice with the unperturbed predictions."""
        total = 0.0
        for number in range(self.draws):
            labels = self._perturbed(strength, number)
            total += float(dice_per_image(labels, self.clean, self.classes).mean())
        return 1.0 - total / self.draws

    def _perturbed(self, strength: float, number: int) -> Tensor:
        if self.kind == "contrast":
            return self._labels(None, with_contrast(self.images, 1.0 - strength))
        if self.kind == "weight_noise":
            generator = torch_generator(self.seed, "calibration", number)
            return self._labels(noisy_weights(self.network, strength, generator, relative=True), self.images)
        streams = generators(self.seed, f"calibration {number}", range(len(self.images)))
        noise = normals(streams, self.images.shape[1:]).to(self.images)
        return self._labels(None, with_noise(self.images, strength * noise))

    def _labels(self, weights: dict[str, Tensor] | None, images: Tensor) -> Tensor:
        with evaluating(self.network):
            output = (
                self.network(images) if weights is None else functional_call(self.network, weights, (images,))
            )
            return class_logits(output, self.classes).argmax(dim=1)


def _search(run: _Perturbed, target: float) -> Calibration:
    """Bisect the strength until its drop is the target."""
    low, high = 0.0, _LARGEST[run.kind]
    best = (math.inf, high, run.drop(high))
    best = (abs(best[2] - target), high, best[2])
    if best[2] > target:
        for _ in range(_STEPS):
            middle = 0.5 * (low + high)
            drop = run.drop(middle)
            best = min(best, (abs(drop - target), middle, drop))
            low, high = (low, middle) if drop > target else (middle, high)
    strength = 1.0 - best[1] if run.kind == "contrast" else best[1]
    return Calibration(run.kind, target, strength, best[2])


def _stretched(
    labels: NDArray[Any], shift: float, tilt: float, structures: Sequence[int] | None
) -> NDArray[Any]:
    """One frame ``(X, Y)`` whose base is moved; every column is read at stretched places."""
    inside = labels != 0 if structures is None else np.isin(labels, list(structures))
    columns = np.flatnonzero(inside.any(axis=1))
    if columns.size == 0 or shift == 0.0:
        return labels
    rows = np.flatnonzero(inside.any(axis=0))
    top, height = float(rows[0]), labels.shape[1]
    middle = 0.5 * (columns[0] + columns[-1])
    half = max(0.5 * (columns[-1] - columns[0]), 1.0)
    lean = np.clip((np.arange(labels.shape[0]) - middle) / half, -1.0, 1.0)
    base = np.where(inside.any(axis=1), height - 1 - inside[:, ::-1].argmax(axis=1), top) - top
    wanted = np.clip(base + shift * (1.0 + tilt * lean), 1.0, height - 2 - top)
    factor = np.where(base >= 2.0, wanted / np.maximum(base, 1.0), 1.0)
    place = top + (np.arange(height)[np.newaxis] - top) / factor[:, np.newaxis]
    nearest = np.rint(place).astype(np.int64)
    at = np.clip(nearest, 0, height - 1)
    arrives = np.take_along_axis(inside, at, axis=1) & (nearest >= 0) & (nearest < height)
    stays = np.where(inside, 0, labels)
    return np.where(arrives, np.take_along_axis(labels, at, axis=1), stays).astype(labels.dtype)
