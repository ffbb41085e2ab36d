"""The reward that a policy is trained with: that of several networks made one, or an oracle."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

from medrl.core.adaptation.rewards import Judge, RewardFn, build_reward
from medrl.core.learned_reward import CompositeReward

from . import parts
from .config import Rl4seg3dConfig
from .domains import Domains
from .rewards import FusedReward, temporal_penalty

if TYPE_CHECKING:
    from medrl.core.registry import Registry
    from medrl.core.runtime import Runtime


def open_judge(rt: Runtime, cfg: Rl4seg3dConfig, data: Domains) -> Judge:
    """Build the reward of a config with the trained nets and the corrector that it asks for."""
    manager, block = rt.job.manager, cfg.reward
    if not cfg.learns_reward:
        registry = cast("Registry[Any]", manager.registry("rewards"))
        return Judge(build_reward(registry, block.name, classes=data.classes), rt.device)
    nets: dict[str, RewardFn] = {}
    for name in block.nets:
        net = parts.ready_net(cfg, manager, name, data).to(rt.device)
        nets[name] = net.reward
        if name == "anatomical" and cfg.mixes_corrector:
            corrector = parts.ready_corrector(cfg, manager, data).to(rt.device)
            nets[name] = CompositeReward(net, corrector, weight=block.weight).reward
    penalty = partial(temporal_penalty, rules=cfg.temporal_rules, strength=block.temporal)
    fused = FusedReward(
        nets, fusion=block.fusion, stretch=block.stretch, penalty=penalty if block.temporal else None
    )
    return Judge(fused, rt.device)
