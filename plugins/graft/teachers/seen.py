"""Which cases a teacher was trained on: there, what it says is better than on cases that it never saw.

Each of five fold teachers saw four of the five folds that the student learns from. `teachers.oof` says what
follows: nothing (``off``); the policy is told (``flag``); quality is measured on unseen cases only
(``mean``); or that, and a teacher teaches only cases that it did not see (``unseen``).

Source: specification §8 (11) and §9.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from medrl.core.errors import ConfigError

if TYPE_CHECKING:
    from medrl.core.dataset import Split
    from medrl.core.types import Case

_log = logging.getLogger("medrl.graft")

Fold = int | Literal["all", "none"]
"""The fold whose validation cases a teacher did not see; ``all``: it saw every case, ``none``: no case."""


@dataclass(frozen=True)
class TrainedOn:
    """What is known of a teacher's training cases; neither part is known of files that do not say it.

    Attributes:
        images: Digests of the images it was trained on (`Prepared.image_hash`).
        fold: See `Fold`.
    """

    images: frozenset[str] | None = None
    fold: Fold | None = None

    @classmethod
    def from_record(cls, record: Any) -> TrainedOn:
        """Read what `to_record` gave; anything else says nothing."""
        if not isinstance(record, Mapping):
            return cls()
        images, fold = record.get("images"), record.get("fold")
        known = isinstance(fold, int) and not isinstance(fold, bool) and fold >= 0
        return cls(
            images=frozenset(map(str, images)) if isinstance(images, list) else None,
            fold=fold if known or fold in ("all", "none") else None,
        )

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON and checkpoints; empty where nothing is known."""
        record: dict[str, Any] = {}
        if self.images is not None:
            record["images"] = sorted(self.images)
        if self.fold is not None:
            record["fold"] = self.fold
        return record


def seen_cases(
    names: Sequence[str],
    known: Sequence[TrainedOn],
    given: Sequence[Fold],
    cases: Sequence[Case],
    image_hash: Callable[[Case], str],
    fold: Callable[[int], Split],
) -> dict[str, tuple[bool, ...]]:
    """Find out for each case which teachers were trained on it.

    Args:
        names: Of the teachers.
        known: What their files say.
        given: What the config says instead; empty to believe the files.
        cases: Cases of the student.
        image_hash: Digest of a case's images.
        fold: A fold of the student's dataset by its number.

    Returns:
        By case identifier, one truth value for each teacher.

    Raises:
        ConfigError: Nothing is known of a teacher, or `given` has another length.
    """
    if given and len(given) != len(names):
        raise ConfigError(
            "teachers.folds",
            why=f"{len(given)} folds for {len(names)} teachers",
            do="give one for each teacher",
        )
    table: dict[str, list[bool]] = {case.id: [] for case in cases}
    for number, name in enumerate(names):
        found = TrainedOn(fold=given[number]) if given else known[number]
        if found.images is not None:
            images = found.images
            seen = {case.id for case in cases if image_hash(case) in images}
        elif isinstance(found.fold, int):
            seen = {case.id for case in fold(found.fold).train}
        elif found.fold is not None:
            seen = {case.id for case in cases} if found.fold == "all" else set()
        else:
            raise ConfigError(
                "teachers.oof",
                why=f"teacher {name} does not say which cases it was trained on",
                do="--set teachers.folds=[0,1,…]: the fold that each teacher did not see, or all, or none",
            )
        _log.info("teacher %s was trained on %d of %d cases", name, len(seen & set(table)), len(table))
        for case_id, row in table.items():
            row.append(case_id in seen)
    return {case_id: tuple(row) for case_id, row in table.items()}


def unseen_only(weights: Mapping[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
    """Give teachers no weight on samples that they were trained on; each row keeps its sum.

    A sample that every teacher saw keeps its weights, and so does one whose unseen teachers have none.

    Args:
        weights: ``(B, N)`` by kind.
        seen: ``(B, N)`` bool.
    """
    found = {}
    for kind, given in weights.items():
        kept = torch.where(seen.to(given.device), torch.zeros_like(given), given)
        left, total = kept.sum(dim=1, keepdim=True), given.sum(dim=1, keepdim=True)
        found[kind] = torch.where(left > 0, kept * (total / left.clamp_min(1e-12)), given)
    return found


def unseen_means(quality: Tensor, seen: Tensor) -> Tensor:
    """Mean quality of each teacher over the cases that it did not see, ``(N,)``.

    A teacher that saw them all takes the mean over the teachers that did not.

    Args:
        quality: ``(K, N)`` of K labelled cases; NaN where there is nothing to measure.
        seen: ``(K, N)`` bool.

    Raises:
        ConfigError: Every teacher saw every case.
    """
    unseen = ~seen & ~quality.isnan()
    counts = unseen.sum(dim=0)
    if not bool(counts.any()):
        raise ConfigError(
            "teachers.oof",
            why="every teacher was trained on every labelled case, so that no quality is out of fold",
            do="--teacher-oof off, or label cases that some teacher did not see",
        )
    means = torch.where(unseen, quality, torch.zeros_like(quality)).sum(dim=0) / counts.clamp_min(1)
    rest = means[counts > 0].mean()
    if bool((counts == 0).any()):
        _log.warning(
            "teachers %s saw every labelled case: their quality is taken as the mean of the others",
            torch.nonzero(counts == 0).flatten().tolist(),
        )
    return torch.where(counts > 0, means, rest)
