"""The agent's reward: how much better the student is after the update that the agent's weights caused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medrl.core.types import Case

from .config import GraftConfig
from .data import GraftData
from .models import as_output
from .regions import Target, teacher_probabilities
from .samples import Batch, collate
from .weighting import composite_reward, ensemble, focus_dice, reward_ce


@dataclass
class RewardMeter:
    """Measures r(student) on reward cases, or on the training batch where there are none.

    Args:
        cfg: The run's config.
        data: The reward cases.
        device: Where the student is.

    r = α·100·(Dice of the student − Dice of the teachers' mean) − (1 − α)·CE. The reward of an action is r
    after the update that it caused minus r before it.

    Source: specification §5; the original takes r before the update, which its action did not cause.
    """

    cfg: GraftConfig
    data: GraftData
    device: torch.device

    def __post_init__(self) -> None:
        self._cached: dict[str, Batch] = {}

    @property
    def on_split(self) -> bool:
        """Whether there are reward cases of their own, or folds that take turns."""
        return bool(self.data.reward or self.data.folds)

    def fold(self, episode: int) -> int | None:
        """The fold of labelled cases that an episode measures on and must not train on."""
        return episode % len(self.data.folds) if self.data.folds else None

    def batch(self, episode: int, training: Batch) -> Batch:
        """The samples on which an episode measures: the next reward cases in turn, or the training batch."""
        cases, turn = self._cases(episode)
        if not cases:
            return training
        count = min(self.cfg.agent.reward_cases, len(cases))
        return self._read([cases[(turn * count + k) % len(cases)] for k in range(count)])

    @torch.no_grad()
    def level(self, student: nn.Module, batch: Batch) -> float:
        """R of the student now, in float32, mean over the labelled samples; 0 if none is labelled."""
        chosen = batch.labelled
        if not bool(chosen.any()):
            return 0.0
        return float(self._composite(_logits(student, batch.image[chosen]), batch).mean())

    @torch.no_grad()
    def rewards(self, logits: Tensor, batch: Batch) -> Tensor:
        """R of each labelled sample by the student's logits of the whole batch, ``(labelled,)``."""
        if not bool(batch.labelled.any()):
            return logits.new_zeros(0)
        return self._composite(logits[batch.labelled], batch)

    @torch.no_grad()
    def dice(self, student: nn.Module, episode: int) -> float:
        """Mean Dice of the student on all reward cases of an episode, for its end."""
        target: Target = self.data.plan.target
        scores = []
        cases, _ = self._cases(episode)
        for case in cases:
            batch = self._read([case])
            truth = target.encode(batch.label)
            found = target.probabilities(_logits(student, batch.image))
            scores.append(float(focus_dice(found, truth, target).mean()))
        return sum(scores) / len(scores) if scores else 0.0

    def _composite(self, logits: Tensor, batch: Batch) -> Tensor:
        """R of each labelled sample from the student's logits of these samples."""
        target, chosen = self.data.plan.target, batch.labelled
        truth = target.encode(batch.label[chosen])
        together = ensemble(
            [
                teacher_probabilities(item[chosen], target, family)
                for item, family in zip(batch.logits, self.data.families, strict=True)
            ]
        )
        return composite_reward(
            focus_dice(target.probabilities(logits), truth, target),
            focus_dice(together, truth, target),
            reward_ce(logits, truth, target),
            alpha=self.cfg.agent.reward_alpha,
        )

    def _cases(self, episode: int) -> tuple[Sequence[Case], int]:
        """Reward cases of an episode, and how often they were drawn from before."""
        folds = self.data.folds
        if folds:
            return folds[episode % len(folds)], episode // len(folds)
        return self.data.reward, episode

    def _read(self, cases: Sequence[Case]) -> Batch:
        """Reward cases as one batch, without features; each is read once."""
        found = []
        for case in cases:
            if case.id not in self._cached:
                sample = self.data.samples([case], teachers=True, taps=())[0]
                self._cached[case.id] = self.data.complete(collate([sample], self.device), taps=())
            found.append(self._cached[case.id])
        return Batch.join(found)


def _logits(student: nn.Module, image: Tensor) -> Tensor:
    with torch.autocast(image.device.type, enabled=False):
        return as_output(student(image)).main.float()
