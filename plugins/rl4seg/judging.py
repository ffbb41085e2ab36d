"""The reward that a policy is trained with, ready to judge any of the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from medrl.core.errors import ConfigError
from medrl.core.rl.pixelwise import RewardFn

from . import parts
from .config import Rl4segConfig
from .domains import Domains, ImageSet
from .rewards import Reward, build_reward

if TYPE_CHECKING:
    from medrl.core.registry import Registry
    from medrl.core.runtime import Runtime


class Judge:
    """A reward, and for oracles the reference labels that it compares with.

    Args:
        reward: The reward.
        device: Where it computes.
    """

    def __init__(self, reward: Reward, device: torch.device) -> None:
        self.reward, self.device = reward, device

    def of(self, images: ImageSet, index: Sequence[int]) -> RewardFn:
        """Return the reward as a function of actions and of the images with these numbers.

        Raises:
            ConfigError: An oracle is asked about images whose labels were not read.
        """
        if not self.reward.needs_truth:
            return self.reward.bind()
        if images.labels is None:
            raise ConfigError(
                "reward.name",
                why="this reward compares with labels of the target, which are not read",
                do="--reward composite; an upper bound with labels: --allow-target-labels",
            )
        return self.reward.bind(torch.as_tensor(images.labels)[list(index)].long().to(self.device))


def open_judge(rt: Runtime, cfg: Rl4segConfig, data: Domains) -> Judge:
    """Build the reward of a config with the trained reward net and corrector that it asks for."""
    manager = rt.job.manager
    net = corrector = None
    if cfg.learns_reward:
        net = parts.reward_net(cfg, manager, channels=data.channels, classes=data.classes)
        parts.load_reward(cfg, net)
        net.requires_grad_(requires_grad=False).to(rt.device).eval()
    if cfg.reward.name == "rl4seg.composite":
        corrector = parts.ready_corrector(cfg, manager, data).to(rt.device)
    reward = build_reward(
        cast("Registry[Any]", manager.registry("rewards")),
        cfg.reward.name,
        classes=data.classes,
        reward_net=net,
        corrector=corrector,
        **cfg.reward.params,
    )
    return Judge(reward, rt.device)
