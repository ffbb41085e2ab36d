"""Label maps improved after prediction: by the corrector, by the reward net, by both.

What the learned reward knows can be used without training a policy. As post-processing it is the cheapest
rival of the method, and its labels are what self-training learns from at its best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.core.learned_reward.composite import CompositeReward
from medrl.core.learned_reward.correctors import Corrector
from medrl.core.learned_reward.net import RewardNet

Way = Literal["corrector", "reward", "both", "mixed"]


@dataclass(frozen=True)
class Refiner:
    """Improves label maps.

    Attributes:
        reward: A reward net with a class head, for every way but `corrector`.
        corrector: For every way but `reward`.
        weight: Share of the reward net in `mixed`, as in the composite reward.
        batch: Images at a time.
        device: Where the networks are.
    """

    reward: RewardNet | None = None
    corrector: Corrector | None = None
    weight: float = 0.25
    batch: int = 32
    device: str = "cpu"

    def corrected(self, masks: Tensor) -> Tensor:
        """Return what the corrector makes of label maps ``(N, *S)``."""
        corrector = self._corrector()
        return self._apply(masks, None, lambda actions, _images: corrector.correct(actions))

    def rewarded(self, masks: Tensor, images: Tensor) -> Tensor:
        """Return the labels that the reward net would choose, having seen image and label map."""
        net = self._reward()
        return self._apply(masks, images, lambda a, i: net.class_probabilities(i, a).argmax(1))

    def both(self, masks: Tensor, images: Tensor) -> Tensor:
        """Return what the corrector makes of the labels that the reward net would choose."""
        composite = self._composite()
        return self._apply(masks, images, lambda a, i: composite.refine(i, a))

    def mixed(self, masks: Tensor, images: Tensor) -> Tensor:
        """Return the labels that the composite reward would pay best: what PPO with that reward aims at."""
        composite = self._composite()
        return self._apply(masks, images, lambda a, i: composite.class_probabilities(i, a).argmax(1))

    def refine(self, way: Way, masks: Tensor, images: Tensor) -> Tensor:
        """Return label maps ``(N, *S)`` uint8 on the CPU, improved in one of the four ways."""
        if way == "corrector":
            return self.corrected(masks)
        return {"reward": self.rewarded, "both": self.both, "mixed": self.mixed}[way](masks, images)

    @torch.no_grad()
    def _apply(self, masks: Tensor, images: Tensor | None, change: Callable[[Tensor, Any], Tensor]) -> Tensor:
        def parts() -> Iterator[Tensor]:
            for start in range(0, len(masks), self.batch):
                actions = masks[start : start + self.batch].to(self.device).long()
                seen = None if images is None else images[start : start + self.batch].to(self.device).float()
                yield change(actions, seen).to(torch.uint8).cpu()

        return torch.cat(list(parts()))

    def _composite(self) -> CompositeReward:
        return CompositeReward(self._reward(), self._corrector(), weight=self.weight)

    def _reward(self) -> RewardNet:
        if self.reward is None:
            raise ConfigError("refining", why="there is no reward net")
        return self.reward

    def _corrector(self) -> Corrector:
        if self.corrector is None:
            raise ConfigError("refining", why="there is no corrector")
        return self.corrector
