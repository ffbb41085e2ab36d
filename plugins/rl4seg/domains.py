"""The images of both domains as the stages see them: who learns from which, and in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medrl.core.errors import ConfigError, DataError
from medrl.core.learned_reward import draw as draw_numbers
from medrl.core.rng import derive_seed, numpy_generator

from . import data
from .config import Rl4segConfig
from .data import Domain, ImageSet, SamplePlan

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager
    from medrl.core.runtime import Runtime

__all__ = ["Batch", "Domain", "Domains", "ImageSet", "draw", "load_domains", "pieces", "test_images"]

BLIND = ("rl4seg.random",)
"""Rewards without a network that look at no labels: controls."""
WITHOUT_TARGET = ("source", "corrector")
"""Stages that can do without target images."""


@dataclass(frozen=True, eq=False)
class Domains:
    """Labelled source images, and target images; labels of the latter are there only for an oracle.

    Attributes:
        unlabelled: The target; None where a stage that needs none is done without it.
    """

    source: Domain
    unlabelled: Domain | None

    @property
    def plan(self) -> SamplePlan:
        """How an image becomes what the network sees; `medrl predict` does the same."""
        return self.source.plan

    @property
    def target(self) -> Domain:
        """The target.

        Raises:
            DataError: There is none.
        """
        if self.unlabelled is None:
            raise DataError("target.root", why="no target images are named", do="--target DIR")
        return self.unlabelled

    @property
    def label_names(self) -> Mapping[str, int]:
        """Label values by name, background 0 first."""
        return self.source.train.label_names

    @property
    def classes(self) -> int:
        """K, background included."""
        return len(self.label_names)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return int(self.source.train.images.shape[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial size of the images."""
        return tuple(int(size) for size in self.source.train.images.shape[2:])

    @property
    def masks(self) -> Tensor:
        """Source masks ``(N, *S)``, of which an atlas is made.

        Raises:
            DataError: The source has no labels.
        """
        if self.source.train.labels is None:
            raise DataError("data.root", why="the source images have no labels")
        return self.source.train.labels

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the images: names of labels and channels, spacing, plan."""
        return {
            "label_names": dict(self.label_names),
            "channel_names": list(self.plan.channel_names),
            "spacing": self.source.train.spacing_mm.median(dim=0).values.tolist(),
            "plan": self.plan.to_meta(),
        }

    def digest(self) -> str:
        """SHA-256 of everything that training reads: source images and labels, target images."""
        whole = hashlib.sha256()
        sets = [self.source.train, self.source.val]
        sets += [] if self.unlabelled is None else [self.unlabelled.train, self.unlabelled.val]
        for images in sets:
            if images is not None:
                whole.update(_digest(images).encode())
        return whole.hexdigest()

    def watched(self, limit: int = 64) -> ImageSet:
        """Target images that watch over training: validation ones, else the first training ones."""
        images = self.target.val if self.target.val is not None and self.target.val.ids else self.target.train
        return subset(images, range(min(limit, len(images.ids))))

    def target_images(self, cfg: Rl4segConfig) -> ImageSet:
        """Target training images of an iteration.

        With pairs from predictions they grow by `pairs.images` in each iteration (specification §9), in an
        order drawn once; otherwise all take part from the beginning.
        """
        images = self.target.train
        if cfg.pairs.kind != "prediction" or not cfg.learns_reward:
            return images
        order = _order(cfg, len(images.ids))
        return subset(images, sorted(order[: cfg.iteration * cfg.pairs.images]))

    def new_images(self, cfg: Rl4segConfig) -> ImageSet:
        """Target training images that no iteration before has predicted.

        Raises:
            DataError: All are used up.
        """
        images = self.target.train
        order = _order(cfg, len(images.ids))
        own = order[(cfg.iteration - 1) * cfg.pairs.images : cfg.iteration * cfg.pairs.images]
        if not own:
            raise DataError(
                "target images",
                why=f"iteration {cfg.iteration} has none left of {len(images.ids)}; each takes "
                f"{cfg.pairs.images} new ones",
                do="fewer loop.iterations, a smaller pairs.images, or target.max_images=0",
            )
        return subset(images, sorted(own))


def load_domains(cfg: Rl4segConfig, manager: PluginManager, *, stage: str = "all") -> Domains:
    """Read both domains; target labels are read only for an oracle reward.

    Args:
        cfg: The config.
        manager: Knows the reward.
        stage: What the images are for; some stages need no target.

    Raises:
        ConfigError: A folder is not named, or an oracle is asked for without ``target.allow_labels``.
        DataError: The images cannot be used, or the domains do not fit each other.
    """
    oracle = bool(getattr(manager.registry("rewards").get(cfg.reward.name), "needs_truth", False))
    if cfg.target.root is None and stage not in WITHOUT_TARGET:
        raise ConfigError("target.root", why="no target images are named", do="--target DIR")
    source = data.load_source(cfg)
    target = None
    if cfg.target.root is not None:
        target = data.load_target(cfg, labels="train" if oracle else "none", plan=source.plan)
        _check(source, target)
    return Domains(source, target)


def test_images(cfg: Rl4segConfig, domains: Domains) -> ImageSet:
    """Target test images with their labels; where there are none, those that watch over training."""
    found = data.load_target(cfg, labels="test", plan=domains.plan).test
    return found if found is not None else domains.watched(limit=len(domains.target.train.ids))


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images of a set.

    Attributes:
        ids: Identifiers.
        index: Their numbers in the set.
        images: ``(N, C, *S)`` float32 on the device.
        labels: ``(N, *S)`` int64 on the device, if the set has labels.
    """

    ids: list[str]
    index: list[int]
    images: Tensor
    labels: Tensor | None

    def truth(self) -> Tensor:
        """The labels.

        Raises:
            DataError: The set has none.
        """
        if self.labels is None:
            raise DataError("training", why="these images have no labels")
        return self.labels


def draw(rt: Runtime, images: ImageSet, cfg: Rl4segConfig, *, stage: str, step: int, size: int) -> Batch:
    """Draw this rank's images of a step (from 1): passes over all, each in an order of its own.

    The draw depends on seed, stage, iteration and step alone, so that a resumed run goes on as it would
    have; two ranks with n images draw together what one rank draws with 2n.
    """
    seed = derive_seed(cfg.train.seed, "rl4seg", stage, cfg.iteration)
    numbers = np.arange(len(images.ids), dtype=np.int64)
    chosen = draw_numbers(numbers, size, seed=seed, step=step - 1, rank=rt.rank, world=rt.world_size)
    return take(images, chosen.tolist(), rt.device)


def take(images: ImageSet, index: Sequence[int], device: torch.device) -> Batch:
    """Return the images with these numbers."""
    at = list(index)
    labels = None if images.labels is None else images.labels[at].long().to(device)
    seen = images.images[at].to(device, torch.float32)
    return Batch([images.ids[number] for number in at], at, seen, labels)


def pieces(images: ImageSet, size: int) -> Iterator[Tensor]:
    """Yield all images in their order, some at a time ``(n, C, *S)``."""
    for start in range(0, len(images.ids), size):
        yield images.images[start : start + size].to(torch.float32)


def subset(images: ImageSet, index: Sequence[int]) -> ImageSet:
    """Return the set of the images with these numbers."""
    at = list(index)
    if at == list(range(len(images.ids))):
        return images
    return images.subset(at)


def _order(cfg: Rl4segConfig, count: int) -> list[int]:
    order: list[int] = numpy_generator(cfg.train.seed, "rl4seg", "target order").permutation(count).tolist()
    return order


def _digest(images: ImageSet) -> str:
    whole = hashlib.sha256("\0".join([*images.ids, *images.subjects]).encode())
    for start in range(0, len(images.ids), 64):
        whole.update(images.images[start : start + 64].contiguous().numpy().tobytes())
        if images.labels is not None:
            whole.update(images.labels[start : start + 64].contiguous().numpy().tobytes())
    return whole.hexdigest()


def _check(source: Domain, target: Domain) -> None:
    """Refuse domains of other channels or with patients in common."""
    if source.train.images.shape[1] != target.train.images.shape[1]:
        raise DataError(
            "target.root",
            why=f"its images have {target.train.images.shape[1]} channels, those of the source "
            f"{source.train.images.shape[1]}",
        )
