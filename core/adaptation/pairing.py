"""The stage that makes pairs: who writes them, and how the actors are asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from medrl.core.learned_reward import PairWriter, SubjectSplit

from .loop import Beat
from .settings import PairsConfig, StagedTrainConfig

TRIAL_SHARE = 0.5
"""Least share of the validation pairs in a trial: of its few pairs both parts need some."""


def pair_writer(
    folder: Path,
    pairs: PairsConfig,
    train: StagedTrainConfig,
    *,
    classes: int,
    subjects: Sequence[str],
    split_seed: int,
    iteration: int,
) -> PairWriter:
    """Return what writes the pairs of an iteration; no subject is in both parts.

    Args:
        folder: Where they go.
        pairs: Their kind and the share of the validation part.
        train: The seed, and whether this is a trial (`max_steps`).
        classes: Of the masks.
        subjects: Of the images.
        split_seed: Divides the subjects.
        iteration: From 1.
    """
    share = max(TRIAL_SHARE, pairs.validation) if train.max_steps else pairs.validation
    return PairWriter(
        folder,
        classes=classes,
        split=SubjectSplit.of(subjects, validation=share, seed=split_seed),
        provenance={"iteration": iteration, "kind": pairs.kind, "seed": train.seed},
    )


def asked(network: nn.Module, beat: Beat) -> Callable[[Tensor], Any]:
    """Return a network that lets a stop through before each answer."""

    def ask(images: Tensor) -> Any:
        beat()
        return network(images)

    return ask
