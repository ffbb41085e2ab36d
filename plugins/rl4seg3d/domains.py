"""The sequences of both domains as the stages see them: who learns from which, in which order."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import Tensor

from medrl.core.adaptation import sets
from medrl.core.adaptation.sets import Batch, ImageSet, draw_index
from medrl.core.errors import ConfigError, DataError
from medrl.core.rng import derive_seed, numpy_generator

from . import data
from .config import Rl4seg3dConfig
from .data import FRAMES, Domain, SequencePlan, SequenceSet

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager
    from medrl.core.runtime import Runtime

__all__ = ["Batch", "Domains", "ImageSet", "SequenceSet", "draw", "load_domains", "test_sequences"]

METHOD = "rl4seg3d"
WITHOUT_TARGET = ("source", "corrector")
"""Stages that can do without target sequences."""


class Domains(sets.Domains[SequenceSet, SequencePlan]):
    """Labelled source sequences, and target sequences; labels of the latter are there only for an oracle."""

    @property
    def size(self) -> tuple[int, int]:
        """Pixels of a window along x and y."""
        return self.source.train.size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Spatial size of a window."""
        return (*self.size, FRAMES)

    @property
    def masks(self) -> Tensor:
        """Masks of source windows ``(N, X, Y, T)``, of which an atlas is made.

        Raises:
            DataError: The source has no labels.
        """
        found = self.source.train.some_windows(0).labels
        if found is None:
            raise DataError("data.root", why="the source sequences have no labels")
        return found

    def watched(self, limit: int = 64) -> ImageSet:
        """Windows of target sequences that watch over training, at most so many."""
        return self.watching().some_windows(limit)

    def validated(self, limit: int = 128) -> ImageSet | None:
        """Windows of the source validation sequences, at most so many; None if there is none."""
        return None if self.source.val is None else self.source.val.some_windows(limit)

    def target_sequences(self, cfg: Rl4seg3dConfig) -> SequenceSet:
        """Target training sequences of an iteration.

        With pairs from predictions they grow by `pairs.images` in each iteration, in an order drawn once;
        otherwise all take part from the beginning.
        """
        sequences = self.target.train
        if cfg.pairs.kind != "prediction" or not cfg.learns_reward:
            return sequences
        order = _order(cfg, len(sequences))
        return sequences.subset(sorted(order[: cfg.iteration * cfg.pairs.images]))

    def new_sequences(self, cfg: Rl4seg3dConfig) -> SequenceSet:
        """Target training sequences that no iteration before has predicted.

        Raises:
            DataError: All are used up.
        """
        sequences = self.target.train
        order = _order(cfg, len(sequences))
        own = order[(cfg.iteration - 1) * cfg.pairs.images : cfg.iteration * cfg.pairs.images]
        if not own:
            raise DataError(
                "target sequences",
                why=f"iteration {cfg.iteration} has none left of {len(sequences)}; each takes "
                f"{cfg.pairs.images} new ones",
                do="fewer loop.iterations, a smaller pairs.images, or target.max_images=0",
            )
        return sequences.subset(sorted(own))


def load_domains(cfg: Rl4seg3dConfig, manager: PluginManager, *, stage: str = "all") -> Domains:
    """Read both domains; target labels are read only for an oracle reward, or where PPO may take some.

    Args:
        cfg: The config.
        manager: Knows the reward.
        stage: What the sequences are for; some stages need no target.

    Raises:
        ConfigError: A folder is not named, or an oracle is asked for without ``target.allow_labels``.
        DataError: The sequences cannot be used, or the domains do not fit each other.
    """
    oracle = bool(getattr(manager.registry("rewards").get(cfg.reward.name), "needs_truth", False))
    if cfg.target.root is None and stage not in WITHOUT_TARGET:
        raise ConfigError("target.root", why="no target sequences are named", do="--target DIR")
    source = data.load_source(cfg)
    if cfg.target.root is None:
        return Domains(source, None)
    known = oracle or cfg.target.gt_frac > 0.0
    target = data.load_target(cfg, source.plan, labels="train" if known else "none")
    one, two = source.train.size, target.train.size
    size = max(one[0], two[0]), max(one[1], two[1])
    found = Domains(_resized(source, size), _resized(target, size))
    found.check_channels()
    return found


def test_sequences(cfg: Rl4seg3dConfig, domains: Domains) -> SequenceSet:
    """Target test sequences with their labels; where there are none, those that watch over training."""
    found = data.load_target(cfg, domains.plan, labels="test").test
    return (found if found is not None else domains.watching()).resized(domains.size)


def draw(
    rt: Runtime,
    sequences: SequenceSet,
    cfg: Rl4seg3dConfig,
    *,
    stage: str,
    step: int,
    size: int,
    known: Collection[str] = (),
) -> Batch:
    """Draw this rank's windows of a step (from 1): passes over all sequences, a window anywhere in each.

    The draw depends on seed, stage, iteration and step alone, so that a resumed run goes on as it would have.

    Args:
        rt: The runtime.
        sequences: From which to draw.
        cfg: The config.
        stage: Name of the draw.
        step: From 1.
        size: Sequences; each gives ``sample.windows`` windows.
        known: Names of windows whose labels are known; a sequence that has one gives that one.

    Deviation: every start is equally likely; the original never draws the last.
    """
    fixed = {name.rpartition("_t")[0]: int(name.rpartition("_t")[2]) for name in known}
    seed = derive_seed(cfg.train.seed, METHOD, stage, cfg.iteration)
    each = windows_of(cfg, sequences.size)
    drawn = draw_index(rt, len(sequences), seed=seed, step=step, size=size)
    chosen = [number for number in drawn for _ in range(each)]
    starts = numpy_generator(seed, "start", step, rt.rank).random(len(chosen))
    windows = []
    for row, (number, place) in enumerate(zip(chosen, starts, strict=True)):
        frames = sequences.frames(number)
        first = int(place * max(1, frames - FRAMES + 1))
        if row % each == 0:
            first = fixed.get(sequences.ids[number], first)
        windows.append((number, tuple(min(first + k, frames - 1) for k in range(FRAMES))))
    cut = sequences.windows(windows)
    labels = None if cut.labels is None else cut.labels.long().to(rt.device)
    return Batch(list(cut.ids), chosen, cut.images.to(rt.device), labels)


def windows_of(cfg: Rl4seg3dConfig, size: tuple[int, int]) -> int:
    """Windows that each sequence of a batch gives."""
    room = cfg.sample.max_tensor_volume // (size[0] * size[1] * FRAMES)
    return cfg.sample.windows or max(1, room)


def known_sequences(cfg: Rl4seg3dConfig, sequences: SequenceSet) -> frozenset[str]:
    """Names of the target training sequences whose true labels PPO may take, by ``target.gt_frac``."""
    count = round(cfg.target.gt_frac * len(sequences))
    order = numpy_generator(cfg.target.split_seed, METHOD, "known sequences").permutation(len(sequences))
    return frozenset(sequences.ids[number] for number in order[:count].tolist())


def _resized(domain: Domain, size: tuple[int, int]) -> Domain:
    val, test = (None if part is None else part.resized(size) for part in (domain.val, domain.test))
    return Domain(train=domain.train.resized(size), val=val, test=test, plan=domain.plan)


def _order(cfg: Rl4seg3dConfig, count: int) -> list[int]:
    order: list[int] = numpy_generator(cfg.train.seed, METHOD, "target order").permutation(count).tolist()
    return order
