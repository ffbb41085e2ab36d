"""A reward that knows nothing: what PPO does on it is not due to the reward."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from medrl.core import rng


class RandomReward:
    """Uniform noise in [0, 1) for each pixel; ``(N, *S)``.

    The noise depends on the seed and on the label maps as a whole, so that a resumed run earns the same. No
    label is worth more than another.

    Args:
        seed: Another seed is other noise.
    """

    needs_truth: ClassVar[bool] = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @torch.no_grad()
    def __call__(self, actions: Tensor, images: Tensor, truth: Tensor | None = None) -> Tensor:
        """Reward ``(N, *S)``; neither image nor reference labels are looked at."""
        del images, truth
        digest = hashlib.sha256(actions.to("cpu", torch.uint8).contiguous().numpy().tobytes()).hexdigest()
        generator = rng.torch_generator(self.seed, "random-reward", digest)
        return torch.rand(actions.shape, generator=generator).to(actions.device)

    def bind(self, truth: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the reward as a function of actions and images."""
        del truth
        return lambda actions, images: self(actions, images)
