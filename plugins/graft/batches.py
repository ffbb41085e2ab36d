"""The endless batches of training: labelled, unlabelled, or both in each; and without a fold of cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from medrl.core.types import Case

from .config import GraftConfig
from .data import GraftData
from .lengths import shares, steps_per_epoch
from .samples import Batch, collate, in_files
from .subsets import fixed_loader

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


class Batches:
    """Endless batches; with unlabelled cases, half of each batch is labelled and half is not.

    With folds of reward cases there is one order of labelled cases for each fold, without that fold.

    Attributes:
        steps_per_epoch: Steps of an epoch, see `lengths.steps_per_epoch`.
    """

    def __init__(self, rt: Runtime, cfg: GraftConfig, data: GraftData) -> None:
        self.rt, self.cfg, self.data = rt, cfg, data
        count, rest_count = len(data.labelled), len(data.unlabelled)
        self.steps_per_epoch = steps_per_epoch(cfg, count, rest_count, rt.world_size)
        share, rest_share = shares(cfg, count, rest_count)
        self.labelled: list[Iterator[Any]] = []
        self.unlabelled: Iterator[Any] | None = None
        if data.labelled:
            for number, fold in enumerate(data.folds):
                held = {case.id for case in fold}
                rest = [case for case in data.labelled if case.id not in held]
                self.labelled.append(self._loader(f"labelled_without_{number}", rest, share))
            if not data.folds:
                self.labelled.append(self._loader("labelled", data.labelled, share))
        if data.unlabelled:
            self.unlabelled = self._loader("unlabelled", data.unlabelled, rest_share, labelled=False)

    def draw(self, held_out: int | None = None) -> Batch:
        """The next batch, without the labelled cases of a fold if one is named."""
        samples: list[Any] = []
        if self.labelled:
            samples += next(self.labelled[held_out or 0])
        if self.unlabelled is not None:
            samples += next(self.unlabelled)
        return self.data.complete(collate(samples, self.rt.device))

    def _loader(self, name: str, cases: Sequence[Case], size: int, *, labelled: bool = True) -> Iterator[Any]:
        samples = self.data.samples(cases, teachers=True, labelled=labelled, augment=self.cfg.augment)
        if self.cfg.split.fixed_subsets:
            own = fixed_loader(self.rt, samples, len(cases), batch_size=size, name=name, collate=in_files)
            self.rt.checkpoint.register(**{f"batches_{name}": own})
            return own
        made: Iterator[Any] = self.rt.loader(
            samples, batch_size=size, shuffle=True, collate=in_files, name=name
        )
        return made
