"""One reward of several networks for windows of frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from medrl.core.errors import ConfigError, did_you_mean
from medrl.core.learned_reward.net import REDUCTIONS, Reduce

from .fusion import fuse, normalise

RewardFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Penalty: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class FusedReward:
    """The rewards of any number of networks, stretched frame by frame and made one.

    A network's part is any function of actions ``(N, X, Y, T)`` and images ``(N, C, X, Y, T)``, such as
    `RewardNet.reward`, which divides logits by the temperature of that net.

    Args:
        nets: Rewards by the name of the network, such as ``anatomical`` and ``landmark``.
        fusion: ``min`` (original), ``mean`` or ``product``.
        stretch: Stretch each frame of each reward to [0, 1] first (original).
        penalty: Applied to the fused reward and the actions, such as `temporal_penalty`.

    Raises:
        ConfigError: There is no network, or an unknown way of fusing.

    Source: specification §6. Deviation: every net has its own temperature, where the original divides the
    logits of the first alone.
    """

    needs_truth: ClassVar[bool] = False

    def __init__(
        self,
        nets: Mapping[str, RewardFn],
        *,
        fusion: Reduce = "min",
        stretch: bool = True,
        penalty: Penalty | None = None,
    ) -> None:
        if not nets:
            raise ConfigError("fused reward", why="there is no network", do="name one or more")
        if fusion not in REDUCTIONS:
            raise ConfigError(f"fusion '{fusion}'", why=did_you_mean(fusion, REDUCTIONS))
        self.nets = dict(nets)
        self.fusion: Reduce = fusion
        self.stretch = stretch
        self.penalty = penalty

    @torch.no_grad()
    def __call__(self, actions: Tensor, images: Tensor, truth: Tensor | None = None) -> Tensor:
        """Reward ``(N, X, Y, T)`` in [0, 1]; finite wherever the nets are stretched."""
        del truth
        return self.fused(list(self.maps(actions, images).values()), actions)

    @torch.no_grad()
    def fused(self, maps: Sequence[Tensor], actions: Tensor) -> Tensor:
        """Make one reward of what `maps` gave for these actions."""
        found = fuse(maps, self.fusion)
        return found if self.penalty is None else self.penalty(found, actions)

    @torch.no_grad()
    def maps(self, actions: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Return the reward of every network by its name, stretched if that is asked for."""
        found = {name: net(actions, images).float() for name, net in self.nets.items()}
        return {name: normalise(reward) for name, reward in found.items()} if self.stretch else found

    def bind(self, truth: Tensor | None = None) -> RewardFn:
        """Return the reward as a function of actions and images."""
        del truth
        return lambda actions, images: self(actions, images)
