"""The agent's reward: how much better the student is after the update that the agent's weights caused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
        """Whether there are reward cases of their own."""
        return bool(self.data.reward)

    def batch(self, episode: int, training: Batch) -> Batch:
        """The samples on which an episode measures: the next reward cases in turn, or the training batch."""
        cases = self.data.reward
        if not cases:
            return training
        count = min(self.cfg.agent.reward_cases, len(cases))
        return self._read([(episode * count + k) % len(cases) for k in range(count)])

    @torch.no_grad()
    def level(self, student: nn.Module, batch: Batch) -> float:
        """R of the student now, in float32, mean over the labelled samples; 0 if none is labelled."""
        chosen = batch.labelled
        if not bool(chosen.any()):
            return 0.0
        target = self.data.plan.target
        logits = _logits(student, batch.image[chosen])
        truth = target.encode(batch.label[chosen])
        dice = focus_dice(target.probabilities(logits), truth, target)
        together = ensemble([teacher_probabilities(item[chosen], target) for item in batch.logits])
        reward = composite_reward(
            dice,
            focus_dice(together, truth, target),
            reward_ce(logits, truth, target),
            alpha=self.cfg.agent.reward_alpha,
        )
        return float(reward.mean())

    @torch.no_grad()
    def dice(self, student: nn.Module) -> float:
        """Mean Dice of the student on all reward cases, for the end of an episode."""
        target: Target = self.data.plan.target
        scores = []
        for index in range(len(self.data.reward)):
            batch = self._read([index])
            truth = target.encode(batch.label)
            found = target.probabilities(_logits(student, batch.image))
            scores.append(float(focus_dice(found, truth, target).mean()))
        return sum(scores) / len(scores) if scores else 0.0

    def _read(self, indices: list[int]) -> Batch:
        """Reward cases as one batch; each is read once."""
        found = []
        for index in indices:
            case = self.data.reward[index]
            if case.id not in self._cached:
                samples = self.data.samples([case], teachers=True)
                self._cached[case.id] = collate([samples[0]]).to(self.device)
            found.append(self._cached[case.id])
        return Batch.join(found)


def _logits(student: nn.Module, image: Tensor) -> Tensor:
    with torch.autocast(image.device.type, enabled=False):
        return as_output(student(image)).main.float()
