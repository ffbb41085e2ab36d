"""The endless batches of training: labelled, unlabelled, or both in each; and without a fold of cases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from medrl.core.types import Case

from .config import GraftConfig
from .data import GraftData
from .samples import Batch, collate, in_files

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


class Batches:
    """Endless batches; with unlabelled cases, half of each batch is labelled and half is not.

    With folds of reward cases there is one order of labelled cases for each fold, without that fold.

    Attributes:
        steps_per_epoch: Steps in which every case is seen once.
    """

    def __init__(self, rt: Runtime, cfg: GraftConfig, data: GraftData) -> None:
        self.rt, self.cfg, self.data = rt, cfg, data
        size = cfg.train.batch_size
        mixed = bool(data.labelled and data.unlabelled)
        self.labelled: list[Iterator[Any]] = []
        self.unlabelled: Iterator[Any] | None = None
        lengths = []
        if data.labelled:
            share = size // 2 if mixed else size
            for number, fold in enumerate(data.folds):
                held = {case.id for case in fold}
                rest = [case for case in data.labelled if case.id not in held]
                self.labelled.append(self._loader(f"labelled_without_{number}", rest, share))
            if not data.folds:
                self.labelled.append(self._loader("labelled", data.labelled, share))
            lengths.append(math.ceil(len(data.labelled) / (share * rt.world_size)))
        if data.unlabelled:
            share = size - size // 2 if mixed else size
            self.unlabelled = self._loader("unlabelled", data.unlabelled, share, labelled=False)
            lengths.append(math.ceil(len(data.unlabelled) / (share * rt.world_size)))
        self.steps_per_epoch = max(1, math.ceil(max(lengths) / cfg.train.accumulate))

    def draw(self, held_out: int | None = None) -> Batch:
        """The next batch, without the labelled cases of a fold if one is named."""
        samples: list[Any] = []
        if self.labelled:
            samples += next(self.labelled[held_out or 0])
        if self.unlabelled is not None:
            samples += next(self.unlabelled)
        return collate(samples, self.rt.device)

    def _loader(self, name: str, cases: Sequence[Case], size: int, *, labelled: bool = True) -> Iterator[Any]:
        samples = self.data.samples(cases, teachers=True, labelled=labelled, augment=self.cfg.augment)
        made: Iterator[Any] = self.rt.loader(
            samples, batch_size=size, shuffle=True, collate=in_files, name=name
        )
        return made
