"""Pairs from labelled source images alone: changed style, label maps made wrong, the label as the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medrl.core.errors import DataError
from medrl.core.rng import derive_seed, numpy_generator

from ..corruption import (
    AFFINE,
    CORRUPTION,
    AffineRanges,
    CorruptionRanges,
    corrupt_masks,
    jitter_images,
    jitter_masks,
)
from ..fields import Range, checked_range, refuse, uniform
from ..modes import class_logits, evaluating
from ..sampling import sample_actions
from ..style import STYLE, StyleRanges, StyleShift
from .rows import PairOrigin
from .store import PairWriter

KINDS = ("true", "corrupted", "predicted", "swapped", "warped")


@dataclass(frozen=True, kw_only=True)
class SyntheticRecipe:
    """What synthetic pairs are made of; the shares need not sum to one.

    Attributes:
        true: Share of pairs with the label itself.
        corrupted: With the label corrupted by every family.
        predicted: With the output of one of the actors on the styled image; without actors these are
            corrupted too.
        swapped: With the label of another subject of the same part of the split.
        warped: With the label moved by an affine map and deformed smoothly.
        greedy: Part of `predicted` that takes the most probable labels; the others are sampled.
        temperature: At which they are sampled.
        sigma_px: Pixels over which neighbours are sampled alike.
        style: Of the images.
        corruption: Of `corrupted`; its warp is that of `warped`.
        affine: Of `warped`.
        spatial: Move image and label together, before anything else; None leaves them where they are.

    Raises:
        ConfigError: A share or range makes no sense.

    Source: findings step 4; `greedy` and `sigma_px` are medrl's.
    """

    true: float = 0.10
    corrupted: float = 0.30
    predicted: float = 0.45
    swapped: float = 0.05
    warped: float = 0.10
    greedy: float = 0.5
    temperature: Range = (1.0, 2.7)
    sigma_px: Range = (0.0, 2.0)
    style: StyleRanges = STYLE
    corruption: CorruptionRanges = CORRUPTION
    affine: AffineRanges = AFFINE
    spatial: AffineRanges | None = None

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in KINDS}
        refuse(
            "synthetic pairs",
            *(f"{name} is {share}, expected a share" for name, share in shares.items() if not share >= 0.0),
            "" if sum(shares.values()) > 0.0 else "all shares are 0",
            "" if 0.0 <= self.greedy <= 1.0 else f"greedy is {self.greedy}, expected a share in [0, 1]",
            checked_range("temperature", self.temperature, 0.0, 100.0, positive=True),
            checked_range("sigma_px", self.sigma_px, 0.0, 1000.0),
        )


SYNTHETIC = SyntheticRecipe()
"""The recipe of the findings."""


def synthetic_pairs(
    writer: PairWriter,
    *,
    count: int,
    images: Tensor,
    labels: Tensor,
    ids: Sequence[str],
    subjects: Sequence[str],
    actors: Mapping[str, Callable[[Tensor], Any]] | None = None,
    targets: Tensor | None = None,
    seed: int = 0,
    iteration: int = 0,
    recipe: SyntheticRecipe = SYNTHETIC,
    batch: int = 64,
    device: torch.device | str | None = None,
) -> None:
    """Make synthetic pairs and add them to a writer.

    Every image is used equally often, and the kinds have exactly their shares, up to rounding. All draws are
    derived from seed, iteration and the number of the pair: a rerun gives the same bytes. Weights, buffers
    and modes of the actors and the global random streams stay as they are.

    Args:
        writer: Takes the pairs.
        count: Number of pairs.
        images: ``(N, C, *S)`` labelled source images in [0, 1].
        labels: ``(N, *S)``.
        ids: Of each image.
        subjects: Of each image.
        actors: Networks by name, ``(n, C, *S)`` to logits ``(n, K, *S)``.
        targets: ``(M, C, *S)`` unlabelled target images to borrow style from.
        seed: Of everything.
        iteration: Round of the loop, part of every draw.
        recipe: What to make.
        batch: Pairs made together.
        device: Where images are changed and actors run; left out, where the images are.

    Raises:
        DataError: No image, or lengths that differ.
    """
    n = images.shape[0]
    if n == 0 or not n == labels.shape[0] == len(ids) == len(subjects):
        raise DataError(
            "synthetic pairs",
            why=f"{n} images, {labels.shape[0]} label maps, {len(ids)} ids, {len(subjects)} subjects",
        )
    maker = _Maker(
        writer=writer,
        images=images,
        labels=labels,
        ids=ids,
        subjects=subjects,
        actors=dict(actors or {}),
        targets=targets,
        seed=seed,
        iteration=iteration,
        recipe=recipe,
        device=torch.device(device) if device is not None else images.device,
    )
    kinds = _plan(recipe, count, seed, iteration, with_actors=bool(actors))
    sources = _sources(n, count, seed, iteration)
    for first in range(0, count, batch):
        last = min(first + batch, count)
        maker.make(range(first, last), kinds[first:last], sources[first:last])


@dataclass
class _Drawn:
    """Label maps of the pairs of one kind, and where they are from."""

    actions: Tensor
    strength: Sequence[float]
    maker: Sequence[str]
    partner: Sequence[str]


@dataclass
class _Maker:
    """Makes the pairs of one call, batch by batch."""

    writer: PairWriter
    images: Tensor
    labels: Tensor
    ids: Sequence[str]
    subjects: Sequence[str]
    actors: dict[str, Callable[[Tensor], Any]]
    targets: Tensor | None
    seed: int
    iteration: int
    recipe: SyntheticRecipe
    device: torch.device

    def __post_init__(self) -> None:
        self.own_seed = derive_seed(self.seed, "synthetic", self.iteration)
        self.shift = StyleShift(self.recipe.style, seed=self.own_seed)
        self.parts = [self.writer.split.part(subject) for subject in self.subjects]
        self.members = {
            part: [i for i, own in enumerate(self.parts) if own == part] for part in set(self.parts)
        }

    def make(self, numbers: range, kinds: Sequence[str], rows: NDArray[np.int64]) -> None:
        """Make and write the pairs with these numbers, of these kinds, on these images."""
        at = torch.from_numpy(rows)
        labels = self.labels[at].to(self.device)
        seen = self.images[at].to(self.device)
        if self.recipe.spatial is not None:
            moving = derive_seed(self.own_seed, "spatial")
            seen, labels = jitter_images(
                seen, labels, seed=moving, keys=list(numbers), ranges=self.recipe.spatial
            )
        styles = self.shift.draw(list(numbers), 0 if self.targets is None else self.targets.shape[0])
        styled = self.shift.apply(seen, styles, self.targets)
        # As they will be stored: actors and reward net look at the same bytes.
        styled = styled.mul(255.0).round().to(torch.uint8)
        actions = labels.clone()
        strength, maker, partner = [0.0] * len(rows), [""] * len(rows), [""] * len(rows)
        for kind in sorted(set(kinds) - {"true"}):
            chosen = [k for k, name in enumerate(kinds) if name == kind]
            here = torch.tensor(chosen, device=self.device)
            keys = [numbers[k] for k in chosen]
            drawn = self._draw(kind, styled[here], labels[here], rows[chosen], keys)
            actions[here] = drawn.actions.to(actions)
            for i, k in enumerate(chosen):
                strength[k], maker[k], partner[k] = drawn.strength[i], drawn.maker[i], drawn.partner[i]
        styled, actions, labels = styled.cpu(), actions.cpu(), labels.cpu()
        for k, number in enumerate(numbers):
            origin = PairOrigin(
                id=self.ids[rows[k]],
                subject=self.subjects[rows[k]],
                kind=kinds[k],
                domain="source",
                iteration=self.iteration,
                strength=strength[k],
                number=number,
                seed=self.seed,
                maker=maker[k],
                partner=partner[k],
                style_target=int(styles.target[k]),
            )
            self.writer.add(styled[k], actions[k], labels[k], origin)

    def _draw(
        self, kind: str, styled: Tensor, labels: Tensor, rows: NDArray[np.int64], keys: Sequence[int]
    ) -> _Drawn:
        if kind == "predicted":
            return self._predict(styled, keys)
        none = [""] * len(keys)
        if kind == "swapped":
            others = [self._partner(int(row), key) for row, key in zip(rows, keys, strict=True)]
            swapped = self.labels[torch.tensor(others)]
            return _Drawn(swapped, [0.0] * len(keys), none, [self.subjects[other] for other in others])
        ranges = self.recipe.corruption
        if kind == "warped":
            labels = jitter_masks(labels, seed=self.own_seed, keys=keys, ranges=self.recipe.affine)
            ranges = ranges.only("warp")
        wrong = corrupt_masks(labels, self.writer.classes, seed=self.own_seed, keys=keys, ranges=ranges)
        return _Drawn(wrong, [0.0] * len(keys), none, none)

    def _predict(self, styled: Tensor, keys: Sequence[int]) -> _Drawn:
        """Greedy or sampled output of one of the actors for each image."""
        unit = np.stack([numpy_generator(self.own_seed, "predicted", key).random(4) for key in keys])
        names = sorted(self.actors)
        who = np.floor(unit[:, 0] * len(names)).astype(np.int64)
        sampled = unit[:, 1] >= self.recipe.greedy
        heat = uniform(unit[:, 2], self.recipe.temperature)
        wide = uniform(unit[:, 3], self.recipe.sigma_px)
        actions = torch.zeros(styled.shape[0], *styled.shape[2:], dtype=torch.int64, device=styled.device)
        for index, name in enumerate(names):
            own = np.flatnonzero(who == index)
            if not own.size:
                continue
            at = torch.from_numpy(own).to(styled.device)
            with evaluating(self.actors[name]):
                logits = class_logits(self.actors[name](styled[at].float() / 255.0), self.writer.classes)
            drawn = sample_actions(
                logits,
                seed=self.own_seed,
                keys=[keys[int(k)] for k in own],
                temperature=heat[own],
                sigma_px=wide[own],
            )
            free = torch.from_numpy(sampled[own]).to(logits.device)
            free = free.view(-1, *[1] * (drawn.dim() - 1))
            actions[at] = torch.where(free, drawn, logits.argmax(dim=1))
        strength = np.where(sampled, heat, 0.0).tolist()
        return _Drawn(actions, strength, [names[index] for index in who], [""] * len(keys))

    def _partner(self, row: int, key: int) -> int:
        """Another subject's image of the same part; any image of the part if there is one subject only."""
        members = self.members[self.parts[row]]
        others = [i for i in members if self.subjects[i] != self.subjects[row]] or members
        return others[int(numpy_generator(self.own_seed, "partner", key).integers(len(others)))]


def _plan(recipe: SyntheticRecipe, count: int, seed: int, iteration: int, *, with_actors: bool) -> list[str]:
    """Kind of each pair: exact shares by largest remainder, in a random order."""
    shares = np.array([getattr(recipe, name) for name in KINDS], dtype=np.float64)
    if not with_actors:
        shares[1] += shares[2]
        shares[2] = 0.0
    exact = shares / shares.sum() * count
    numbers = np.floor(exact).astype(np.int64)
    rest = np.argsort(-(exact - numbers), kind="stable")[: count - int(numbers.sum())]
    numbers[rest] += 1
    kinds = np.repeat(np.arange(len(KINDS)), numbers)
    order = numpy_generator(seed, "synthetic kinds", iteration).permutation(count)
    return [KINDS[kind] for kind in kinds[order]]


def _sources(n: int, count: int, seed: int, iteration: int) -> NDArray[np.int64]:
    """Image of each pair: passes over all images, each in an order of its own."""
    passes = [
        numpy_generator(seed, "synthetic images", iteration, turn).permutation(n)
        for turn in range(-(-count // n))
    ]
    return np.concatenate(passes)[:count] if passes else np.zeros(0, np.int64)
