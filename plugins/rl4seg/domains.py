"""The images of both domains as the stages see them: who learns from which, and in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from medrl.core.adaptation import sets
from medrl.core.adaptation.sets import Batch, draw_index, pieces, subset, take
from medrl.core.errors import ConfigError, DataError
from medrl.core.rng import derive_seed, numpy_generator

from . import data
from .config import Rl4segConfig
from .data import Domain, ImageSet, SamplePlan

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager
    from medrl.core.runtime import Runtime

__all__ = ["Batch", "Domain", "Domains", "ImageSet", "draw", "load_domains", "pieces", "test_images"]

WITHOUT_TARGET = ("source", "corrector")
"""Stages that can do without target images."""


class Domains(sets.Domains[ImageSet, SamplePlan]):
    """Labelled source images, and target images; labels of the latter are there only for an oracle."""

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

    def watched(self, limit: int = 64) -> ImageSet:
        """Target images that watch over training, at most so many."""
        images = self.watching()
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
    if cfg.target.root is None:
        return Domains(source, None)
    target = data.load_target(cfg, labels="train" if oracle else "none", plan=source.plan)
    found = Domains(source, target)
    found.check_channels()
    return found


def test_images(cfg: Rl4segConfig, domains: Domains) -> ImageSet:
    """Target test images with their labels; where there are none, those that watch over training."""
    found = data.load_target(cfg, labels="test", plan=domains.plan).test
    return found if found is not None else domains.watched(limit=len(domains.target.train.ids))


def draw(rt: Runtime, images: ImageSet, cfg: Rl4segConfig, *, stage: str, step: int, size: int) -> Batch:
    """Draw this rank's images of a step (from 1): passes over all, each in an order of its own.

    The draw depends on seed, stage, iteration and step alone, so that a resumed run goes on as it would have.
    """
    seed = derive_seed(cfg.train.seed, "rl4seg", stage, cfg.iteration)
    index = draw_index(rt, len(images.ids), seed=seed, step=step, size=size)
    return take(images, index, rt.device)


def _order(cfg: Rl4segConfig, count: int) -> list[int]:
    order: list[int] = numpy_generator(cfg.train.seed, "rl4seg", "target order").permutation(count).tolist()
    return order
