"""The reward that a policy is trained with, ready to judge any of the images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from medrl.core.adaptation.rewards import Judge, build_reward

from . import parts
from .config import Rl4segConfig
from .domains import Domains

if TYPE_CHECKING:
    from medrl.core.registry import Registry
    from medrl.core.runtime import Runtime


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
