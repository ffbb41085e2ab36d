"""The reward net's verdict, and what a corrector makes of the label map that the net would choose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError

from .correctors import Corrector
from .encoding import at_action
from .net import RewardNet, fuse


class CompositeReward(nn.Module):
    """Reward r = w·r_img + (1 − w)·q(a), q the corrector's probabilities of the net's label map.

    r_img is the reward of the net; its label map is the most probable class of each pixel, given image and
    action, and the corrector (a denoiser that never saw an image) gives probabilities of each class for it.
    So the image decides where a structure lies, and the corrector that it has a plausible shape.

    Args:
        reward_net: With a class head.
        corrector: Any; the findings used a denoiser.
        weight: w in [0, 1].

    Raises:
        ConfigError: A binary head, other classes, or a weight outside [0, 1].

    Source: findings step 6.
    """

    def __init__(self, reward_net: RewardNet, corrector: Corrector, *, weight: float = 0.25) -> None:
        super().__init__()
        if reward_net.head != "class":
            raise ConfigError(
                "composite reward",
                why="a binary head tells no class for the corrector to look at",
                do="train the reward net with head class, or use it alone",
            )
        if reward_net.classes != corrector.classes:
            raise ConfigError(
                "composite reward",
                why=f"reward net of {reward_net.classes} classes, corrector of {corrector.classes}",
            )
        if not 0.0 <= weight <= 1.0:
            raise ConfigError("composite reward", why=f"weight is {weight}, expected a number in [0, 1]")
        self.reward_net = reward_net
        self.corrector = corrector
        self.weight = weight

    @torch.no_grad()
    def reward(self, actions: Tensor, images: Tensor) -> Tensor:
        """Reward ``(N, *S)`` in [0, 1] of actions ``(N, *S)`` on images ``(N, C, *S)``."""
        each = self.reward_net.member_probabilities(images, actions)
        direct = fuse(torch.stack([at_action(own, actions) for own in each]), self.reward_net.reduce)
        shape = self.corrector.probabilities(each.mean(dim=0).argmax(dim=1))
        return self.weight * direct + (1.0 - self.weight) * at_action(shape, actions)

    def forward(self, actions: Tensor, images: Tensor) -> Tensor:
        """The same as `reward`."""
        return self.reward(actions, images)

    @torch.no_grad()
    def class_probabilities(self, images: Tensor, actions: Tensor) -> Tensor:
        """Probabilities ``(N, K, *S)`` of which `reward` takes the action's, with one network."""
        own = self.reward_net.class_probabilities(images, actions)
        shape = self.corrector.probabilities(own.argmax(dim=1))
        return self.weight * own + (1.0 - self.weight) * shape

    @torch.no_grad()
    def refine(self, images: Tensor, actions: Tensor) -> Tensor:
        """Correct the label map that the net would choose: refinement without training; ``(N, *S)`` int64."""
        return self.corrector.correct(self.reward_net.class_probabilities(images, actions).argmax(dim=1))
