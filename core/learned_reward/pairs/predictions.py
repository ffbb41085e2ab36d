"""Pairs from predictions on unlabelled target images, judged by themselves or by a corrector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from medrl.core.errors import DataError
from medrl.core.rng import derive_seed, numpy_generator, torch_generator

from ..correctors import Corrector, dice_per_image
from ..fields import generators, normals, refuse
from ..modes import class_logits, evaluating
from ..sampling import sample_actions
from .rows import PairOrigin
from .store import PairWriter

Validity = Callable[[Tensor], Sequence[bool] | NDArray[np.bool_] | Tensor]
"""Tells for label maps ``(N, *S)``, int64 on the CPU, which are anatomically valid."""


@dataclass(frozen=True, kw_only=True)
class PredictionRecipe:
    """How prediction pairs are made; the defaults are the original's.

    Attributes:
        minimum_dice: A prediction counts as plausible if it is valid and its Dice with its corrected self is
            greater than this.
        dice: ``mean`` over the foreground classes, or ``highest``, the highest label only (a bug of the
            original).
        swap: Pair a plausible prediction with the sampled action of a random image.
        weight_noise: Standard deviations of noise on every parameter of the network; () for none.
        noise_scale: ``absolute`` (original), or ``relative`` to the root mean square of each parameter.
        weight_draws: Different draws of this noise for each strength; an image gets one of them by its hash.
        contrast: Factors of contrast of the image that the network sees.
        image_noise: Standard deviations of noise on it.
        corrections: Pair the sampled action of an implausible prediction with its corrected self, if valid.
        skip_empty: Leave out perturbed predictions without foreground (original).
        sigma_px: Pixels over which neighbours are sampled alike; 0 is independent (original).

    Raises:
        ConfigError: A value makes no sense.

    Source: specification §5; the toggles `predict_do_*` are `swap`, `weight_noise`, `contrast` together with
    `image_noise`, and `corrections`.
    """

    minimum_dice: float = 0.95
    dice: Literal["mean", "highest"] = "mean"
    swap: bool = True
    weight_noise: tuple[float, ...] = (0.005, 0.01, 0.015, 0.02)
    noise_scale: Literal["absolute", "relative"] = "absolute"
    weight_draws: int = 8
    contrast: tuple[float, ...] = (0.7, 0.8)
    image_noise: tuple[float, ...] = (0.05, 0.1)
    corrections: bool = True
    skip_empty: bool = True
    sigma_px: float = 0.0

    def __post_init__(self) -> None:
        lists = {name: getattr(self, name) for name in ("weight_noise", "contrast", "image_noise")}
        refuse(
            "prediction pairs",
            *(
                f"{name} is {list(values)}, expected different numbers that are not negative"
                for name, values in lists.items()
                if len(set(values)) != len(values) or any(value < 0 for value in values)
            ),
            "" if 0.0 <= self.minimum_dice <= 1.0 else f"minimum_dice is {self.minimum_dice}",
            "" if self.dice in ("mean", "highest") else f"dice is '{self.dice}', expected mean or highest",
            "" if self.noise_scale in ("absolute", "relative") else f"noise_scale is '{self.noise_scale}'",
            "" if self.weight_draws >= 1 else f"weight_draws is {self.weight_draws}",
            "" if self.sigma_px >= 0.0 else f"sigma_px is {self.sigma_px}",
        )


PREDICTION = PredictionRecipe()
"""The original's recipe, 9 pairs for a plausible prediction."""


@dataclass(frozen=True, eq=False)
class PredictionReport:
    """What was found on N predicted images.

    Attributes:
        ids: Of the images.
        greedy: ``(N, *S)`` uint8, the most probable labels.
        valid: ``(N,)`` whether they are anatomically valid.
        agreement: ``(N,)`` Dice with their corrected selves.
        plausible: ``(N,)`` valid and in agreement: these are pseudo-labels.
        corrected: ``(N,)`` implausible, but with a valid correction.
    """

    ids: tuple[str, ...]
    greedy: Tensor
    valid: Tensor
    agreement: Tensor
    plausible: Tensor
    corrected: Tensor

    @property
    def pseudo_labels(self) -> Mapping[str, Tensor]:
        """Plausible label maps ``(*S)`` by the id of their image."""
        return {self.ids[i]: self.greedy[i] for i in torch.nonzero(self.plausible).flatten().tolist()}

    def counts(self) -> dict[str, int]:
        """Numbers for a log."""
        used = self.plausible | self.corrected
        return {
            "images": len(self.ids),
            "valid": int(self.valid.sum()),
            "plausible": int(self.plausible.sum()),
            "corrected": int(self.corrected.sum()),
            "dropped": int((~used).sum()),
        }


def prediction_pairs(
    writer: PairWriter,
    *,
    network: nn.Module,
    images: Tensor,
    ids: Sequence[str],
    subjects: Sequence[str],
    valid: Validity,
    corrector: Corrector,
    seed: int = 0,
    iteration: int = 0,
    recipe: PredictionRecipe = PREDICTION,
    batch: int = 32,
    device: torch.device | str | None = None,
    domain: str = "target",
) -> PredictionReport:
    """Predict images, make pairs of what was predicted and add them to a writer.

    For each image: ã the greedy label map, a a sampled one, c the corrected ã. If ã is plausible, ã is the
    truth of up to nine pairs: a of some image, ã of the network with noise on its weights (4), on the image
    with less contrast (2) and with noise on it (2); the stored image is always the unchanged one. Else, if c
    is valid, c is the truth of one pair with a. Else the image is dropped.

    All draws are derived from seed, iteration and the image's id. Noisy weights are used without touching the
    network's own; weights, buffers, modes and the global random streams stay bit for bit what they were.

    Args:
        writer: Takes the pairs, image by image.
        network: The actor's network, ``(n, C, *S)`` to logits.
        images: ``(N, C, *S)`` in [0, 1].
        ids: Of each image, unique.
        subjects: Of each image.
        valid: The anatomical rules.
        corrector: See `medrl.core.learned_reward.correctors`.
        seed: Of everything.
        iteration: Round of the loop, part of every draw.
        recipe: What to make.
        batch: Images predicted together.
        device: Where the network and the corrector are; left out, where the images are.
        domain: Written beside each pair.

    Raises:
        DataError: Lengths that differ, ids that are not unique, or another number of verdicts than masks.

    Source: specification §5, §13.7, §13.8, §14.6. Deviations: d is the mean over classes; the swapped action
    is that of a random image of the same part of the split, not of the batch; images share
    `weight_draws` draws of weight noise, instead of one each.
    """
    if not images.shape[0] == len(ids) == len(subjects) or len(set(ids)) != len(ids):
        raise DataError(
            "prediction pairs",
            why=f"{images.shape[0]} images, {len(set(ids))} different of {len(ids)} ids, "
            f"{len(subjects)} subjects",
        )
    place = torch.device(device) if device is not None else images.device
    own_seed = derive_seed(seed, "prediction", iteration)
    predictor = _Predictor(network, writer.classes, images, batch, place)
    report, sampled, corrected = _judge(predictor, ids, valid, corrector, own_seed, recipe)
    plausible = torch.nonzero(report.plausible).flatten().tolist()
    made: dict[int, list[tuple[str, float, str, Tensor]]] = {row: [] for row in range(len(ids))}
    if recipe.swap:
        parts = [writer.split.part(subject) for subject in subjects]
        for row in plausible:
            members = [i for i, part in enumerate(parts) if part == parts[row]]
            other = members[int(numpy_generator(own_seed, "swap", ids[row]).integers(len(members)))]
            made[row].append(("swap", 0.0, subjects[other], sampled[other]))
    perturbed = (
        *_by_weight_noise(predictor, plausible, ids, own_seed, recipe),
        *_by_contrast(predictor, plausible, recipe),
        *_by_image_noise(predictor, plausible, ids, own_seed, recipe),
    )
    for kind, strength, row, action in perturbed:
        if not recipe.skip_empty or bool((action != 0).any()):
            made[row].append((kind, strength, "", action))
    if recipe.corrections:
        for row in torch.nonzero(report.corrected).flatten().tolist():
            made[row].append(("correction", 0.0, "", sampled[row]))
    for row, found in made.items():
        truth = report.greedy[row] if report.plausible[row] else corrected[row]
        for kind, strength, partner, action in found:
            origin = PairOrigin(
                id=ids[row],
                subject=subjects[row],
                kind=kind,
                domain=domain,
                iteration=iteration,
                strength=strength,
                seed=seed,
                partner=partner,
            )
            writer.add(images[row], action, truth, origin)
    return report


class _Predictor:
    """Predicts rows of images in batches, with weights, buffers and modes as they are."""

    def __init__(
        self, network: nn.Module, classes: int, images: Tensor, batch: int, device: torch.device
    ) -> None:
        self.network, self.classes = network, classes
        self.images, self.size, self.device = images, batch, device

    def __call__(
        self,
        rows: Sequence[int],
        *,
        change: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yield rows and their logits ``(n, K, *S)``, on images that `change` has seen."""
        for first in range(0, len(rows), self.size):
            part = rows[first : first + self.size]
            seen = self.images[torch.tensor(part, dtype=torch.int64)].to(self.device, torch.float32)
            if change is not None:
                seen = change(seen, part)
            with evaluating(self.network):
                if weights is None:
                    output = self.network(seen)
                else:
                    output = functional_call(self.network, dict(weights), (seen,))
                yield part, class_logits(output, self.classes)

    def greedy(
        self,
        rows: Sequence[int],
        *,
        change: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield each row and its most probable labels ``(*S)``, uint8 on the CPU."""
        for part, logits in self(rows, change=change, weights=weights):
            labels = logits.argmax(dim=1).to(torch.uint8).cpu()
            yield from zip(part, labels, strict=True)


def _judge(
    predictor: _Predictor,
    ids: Sequence[str],
    valid: Validity,
    corrector: Corrector,
    seed: int,
    recipe: PredictionRecipe,
) -> tuple[PredictionReport, Tensor, Tensor]:
    """Predict, sample and correct all images; the report, sampled and corrected label maps, uint8."""
    size = (len(ids), *predictor.images.shape[2:])
    greedy, sampled, corrected = (torch.zeros(size, dtype=torch.uint8) for _ in range(3))
    agreement = torch.zeros(len(ids))
    is_valid, is_mended = (torch.zeros(len(ids), dtype=torch.bool) for _ in range(2))
    for part, logits in predictor(range(len(ids))):
        at = torch.tensor(part)
        best = logits.argmax(dim=1)
        drawn = sample_actions(logits, seed=seed, keys=[ids[i] for i in part], sigma_px=recipe.sigma_px)
        mended = corrector.correct(best)
        dice = dice_per_image(best, mended, predictor.classes, only_highest=recipe.dice == "highest")
        greedy[at], sampled[at], corrected[at] = (
            item.to("cpu", torch.uint8) for item in (best, drawn, mended)
        )
        agreement[at] = dice.cpu()
        is_valid[at] = _verdicts(valid, best.cpu())
        doubtful = ~(is_valid[at] & (agreement[at] > recipe.minimum_dice))
        if bool(doubtful.any()):
            is_mended[at[doubtful]] = _verdicts(valid, mended.cpu()[doubtful])
    plausible = is_valid & (agreement > recipe.minimum_dice)
    report = PredictionReport(
        ids=tuple(ids),
        greedy=greedy,
        valid=is_valid,
        agreement=agreement,
        plausible=plausible,
        corrected=is_mended & ~plausible,
    )
    return report, sampled, corrected


def _by_weight_noise(
    predictor: _Predictor, rows: Sequence[int], ids: Sequence[str], seed: int, recipe: PredictionRecipe
) -> Iterable[tuple[str, float, int, Tensor]]:
    """Greedy label maps of the network with noise on its weights, each strength from clean weights."""
    draws: dict[int, list[int]] = {}
    for row in rows:
        draws.setdefault(derive_seed(seed, "draw", ids[row]) % recipe.weight_draws, []).append(row)
    for strength in recipe.weight_noise:
        for number, own in sorted(draws.items()):
            generator = torch_generator(seed, "weight noise", strength, number)
            weights = noisy_weights(
                predictor.network, strength, generator, relative=recipe.noise_scale == "relative"
            )
            for row, action in predictor.greedy(own, weights=weights):
                yield "weight_noise", strength, row, action


def _by_contrast(
    predictor: _Predictor, rows: Sequence[int], recipe: PredictionRecipe
) -> Iterable[tuple[str, float, int, Tensor]]:
    for factor in recipe.contrast:
        for row, action in predictor.greedy(rows, change=lambda seen, _, f=factor: with_contrast(seen, f)):  # type: ignore[misc]
            yield "contrast", factor, row, action


def _by_image_noise(
    predictor: _Predictor, rows: Sequence[int], ids: Sequence[str], seed: int, recipe: PredictionRecipe
) -> Iterable[tuple[str, float, int, Tensor]]:
    for sigma in recipe.image_noise:

        def change(seen: Tensor, part: Sequence[int], sigma: float = sigma) -> Tensor:
            streams = generators(seed, f"image noise {sigma}", [ids[row] for row in part])
            return with_noise(seen, sigma * normals(streams, seen.shape[1:]).to(seen.device))

        for row, action in predictor.greedy(rows, change=change):
            yield "image_noise", sigma, row, action


def with_contrast(images: Tensor, factor: float) -> Tensor:
    """Blend each image with its mean, clip to [0, 1], as torchvision's `adjust_contrast` on gray images."""
    mean = images.mean(dim=tuple(range(1, images.dim())), keepdim=True)
    return (factor * images + (1.0 - factor) * mean).clamp(0.0, 1.0)


def with_noise(images: Tensor, noise: Tensor) -> Tensor:
    """Add noise and divide each image by its maximum, if that is positive."""
    noisy = images + noise
    most = noisy.amax(dim=tuple(range(1, images.dim())), keepdim=True)
    return noisy / torch.where(most > 0, most, torch.ones_like(most))


def noisy_weights(
    network: nn.Module, strength: float, generator: torch.Generator, *, relative: bool
) -> dict[str, Tensor]:
    """Return the parameters plus noise, drawn on the CPU in the order of their names.

    Args:
        network: Keeps its own parameters.
        strength: Standard deviation of the noise.
        generator: On the CPU.
        relative: Times the root mean square of each parameter.
    """
    noisy = {}
    for name, parameter in sorted(network.named_parameters()):
        clean = parameter.detach()
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        scale = strength * (clean.square().mean().sqrt() if relative else 1.0)
        noisy[name] = clean + scale * noise
    return noisy


def _verdicts(valid: Validity, masks: Tensor) -> Tensor:
    found: Any = valid(masks)
    verdicts = found.cpu() if isinstance(found, Tensor) else torch.tensor([bool(item) for item in found])
    if verdicts.shape != masks.shape[:1]:
        raise DataError(
            "anatomical rules", why=f"{tuple(verdicts.shape)} verdicts for {masks.shape[0]} masks"
        )
    return verdicts.to(torch.bool)
