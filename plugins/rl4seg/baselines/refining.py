"""Label maps improved after prediction: by the corrector, by the reward net, by both.

What the learned reward knows can be used without training a policy. As post-processing it is the cheapest
rival of the method, and its labels are what self-training learns from at its best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.core.learned_reward.correctors import Corrector

Way = Literal["corrector", "reward", "both", "mixed"]


class ClassReward(Protocol):
    """A reward net that names the class of each pixel (`medrl.core.learned_reward.RewardNet`)."""

    def class_probabilities(self, images: Tensor, actions: Tensor) -> Tensor:
        """Return ``(N, K, *S)`` of images ``(N, C, *S)`` and label maps ``(N, *S)``."""
        ...


@dataclass(frozen=True)
class Refiner:
    """Improves label maps.

    Attributes:
        reward: The reward net, if `reward`, `both` or `mixed` is asked for.
        corrector: The corrector, if anything but `reward` is.
        weight: Share of the reward net in `mixed`, as in the composite reward.
        batch: Images at a time.
        device: Where the networks are.
    """

    reward: ClassReward | None = None
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
        return self._apply(masks, images, self._chosen)

    def both(self, masks: Tensor, images: Tensor) -> Tensor:
        """Return what the corrector makes of the labels that the reward net would choose."""
        corrector = self._corrector()
        return self._apply(masks, images, lambda a, i: corrector.correct(self._chosen(a, i)))

    def mixed(self, masks: Tensor, images: Tensor) -> Tensor:
        """Return the labels that the composite reward would pay best: what PPO with that reward aims at."""
        return self._apply(masks, images, lambda a, i: self._mixture(a, i).argmax(1))

    def refine(self, way: Way, masks: Tensor, images: Tensor) -> Tensor:
        """Return label maps ``(N, *S)`` uint8 on the CPU, improved in one of the four ways."""
        if way == "corrector":
            return self.corrected(masks)
        return {"reward": self.rewarded, "both": self.both, "mixed": self.mixed}[way](masks, images)

    def _mixture(self, actions: Tensor, images: Tensor) -> Tensor:
        seen = self._reward().class_probabilities(images, actions)
        plausible = self._corrector().probabilities(seen.argmax(1))
        return self.weight * seen + (1.0 - self.weight) * plausible.to(seen.dtype)

    def _chosen(self, actions: Tensor, images: Tensor) -> Tensor:
        return self._reward().class_probabilities(images, actions).argmax(1)

    @torch.no_grad()
    def _apply(self, masks: Tensor, images: Tensor | None, change: Callable[[Tensor, Any], Tensor]) -> Tensor:
        def parts() -> Iterator[Tensor]:
            for start in range(0, len(masks), self.batch):
                actions = masks[start : start + self.batch].to(self.device).long()
                seen = None if images is None else images[start : start + self.batch].to(self.device).float()
                yield change(actions, seen).to(torch.uint8).cpu()

        return torch.cat(list(parts()))

    def _reward(self) -> ClassReward:
        if self.reward is None or not hasattr(self.reward, "class_probabilities"):
            raise ConfigError("refining", why="there is no reward net that tells classes")
        return self.reward

    def _corrector(self) -> Corrector:
        if self.corrector is None:
            raise ConfigError("refining", why="there is no corrector")
        return self.corrector
