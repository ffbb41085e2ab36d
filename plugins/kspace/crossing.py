"""Crossed reward models: each training case is seen and judged with one that never learned from its patient.

A reward model flatters its own training patients, so that the gain of a line in their cases is not the gain
in others. Instead of keeping patients back for the policy, the training patients are parted; for each part
one more reward model learns without it. New cases are seen with the reward model of all.

Source: cross-fitting, Chernozhukov et al. 2018; specification §5 asks for other patients for the policy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medrl.core.errors import CheckpointError, ConfigError, DataError
from medrl.core.rng import numpy_generator

from .cases import Cases
from .config import KspaceConfig
from .domain import Data, SliceInfo
from .features import ColumnFeatures
from .imaging import Imaging, View
from .observer import CaseObserver

_log = logging.getLogger("medrl.kspace")
FOLDER = "crossed"
"""Where the runs lie, in the run folder of the reward model."""


def part_of_patients(data: Data, cfg: KspaceConfig) -> dict[str, int]:
    """Deal the training patients; the same in every run of a dataset and split.

    Raises:
        DataError: There are fewer patients than parts.
    """
    patients, count = sorted(set(data.slices("train").patients)), cfg.seg.crossed
    if len(patients) < count:
        raise DataError(
            "seg.crossed",
            why=f"{len(patients)} training patients cannot be parted into {count}",
            do=f"--set seg.crossed={len(patients) if len(patients) > 1 else 0}",
        )
    order = numpy_generator(cfg.data.split_seed, "kspace", "crossed").permutation(len(patients)).tolist()
    return {patients[number]: place % count for place, number in enumerate(order)}


def without_part(data: Data, cfg: KspaceConfig) -> Data:
    """The data of one crossed reward model: training slices of its part are left out."""
    dealt = part_of_patients(data, cfg)
    train = data.slices("train")
    kept = [number for number, patient in enumerate(train.patients) if dealt[patient] != cfg.seg.part]
    return Data(replace(data.parts, train=train.subset(kept)))


def run_of(reward: Path, part: int) -> Path:
    """The run of a crossed reward model.

    Args:
        reward: Run folder, or a checkpoint in it, of the reward model of all.
        part: The part that it leaves out.

    Raises:
        ConfigError: There is none.
    """
    folder = reward if reward.is_dir() else reward.parent.parent
    found = folder / FOLDER / str(part)
    if not found.is_dir():
        raise ConfigError(
            f"inputs.reward {reward}",
            why=f"it has no crossed reward model {part}",
            do="train it with the same --crossed, or leave --crossed out",
        )
    return found


def refuse_known(path: Path, known: Sequence[str], dealt: Mapping[str, int], part: int) -> None:
    """Refuse a crossed reward model that learned from a patient whom it is to judge.

    Args:
        path: Its run.
        known: Patients that it learned from.
        dealt: Part of each patient.
        part: Its part.

    Raises:
        CheckpointError: It did.
    """
    both = sorted(name for name in known if dealt.get(name) == part)
    if both:
        raise CheckpointError(
            f"crossed reward model {path}",
            why=f"it learned from patient {both[0]}, whom it is to judge",
            do="train the reward model with the same data, fold and --crossed",
        )


def say_shared(reward: Sequence[str], policy: Sequence[str]) -> None:
    """Say where a reward model without crossed ones judges patients that it learned from."""
    both, all_of = set(reward) & set(policy), set(policy)
    if both:
        _log.info(
            "the reward model learned from %d of the policy's %d training patients, whose segmentations it "
            "flatters; --crossed 3 judges each with one that does not know it",
            len(both),
            len(all_of),
        )


class CrossedObserver(CaseObserver):
    """Sees each case with the reward model of its part.

    Args:
        cases: The cases.
        imaging: With the reward model of all; it sees whatever `on` is asked for.
        features: See `CaseObserver`.
        crossed: One for each part.
        part: ``(N,)`` int64, the part of each case; -1 is none, seen with `imaging`.
    """

    def __init__(
        self,
        cases: Cases,
        imaging: Imaging,
        features: ColumnFeatures | None,
        *,
        crossed: Sequence[Imaging],
        part: Tensor,
    ) -> None:
        super().__init__(cases, imaging, features)
        self.crossed = list(crossed)
        self.part = part.to(cases.device)

    def look(self, image: Tensor, case: Tensor, *, gradient: bool) -> View:
        """See `CaseObserver.look`; rows go to their models and come back in order."""
        part = self.part[case.to(self.part.device)]
        rows: list[Tensor] = []
        views: list[View] = []
        for number in sorted(set(part.tolist())):
            rows.append(torch.nonzero(part == number).flatten())
            imaging = self.imaging if number < 0 else self.crossed[number]
            views.append(imaging.look(image[rows[-1]], self.cases, gradient=gradient))
        if len(views) == 1:
            return views[0]
        back = torch.cat(rows).argsort()
        found: dict[str, Any] = {}
        for name in (item.name for item in fields(View)):
            parts = [getattr(view, name) for view in views]
            found[name] = None if parts[0] is None else torch.cat(parts)[back]
        return View(**found)


def parts_of_cases(info: Sequence[Sequence[SliceInfo]], dealt: Mapping[str, int]) -> Tensor:
    """The part of each case ``(N,)`` int64; -1 for patients that were not dealt."""
    return torch.tensor([dealt.get(slices[0].patient, -1) for slices in info], dtype=torch.int64)
