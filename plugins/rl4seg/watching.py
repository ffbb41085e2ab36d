"""What is measured while training, on images that training does not learn from; and the alarms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from medrl.core.adaptation import watching
from medrl.core.adaptation.actors import PixelActor
from medrl.core.adaptation.watching import RewardOf
from medrl.core.rng import torch_generator
from medrl.core.validity import Rules
from medrl.core.validity import is_valid as passes

from .config import Rl4segConfig
from .domains import Domains, ImageSet

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


def supervised(rt: Runtime, actor: PixelActor, data: Domains, rules: Rules) -> dict[str, float]:
    """Dice on the source validation images, and the share of valid masks on both domains."""

    def valid(mask: Tensor) -> bool:
        return passes(mask, rules)

    target = data.watched() if data.unlabelled is not None else None
    return watching.supervised(rt, actor, data.source.val, target, valid)


def policy(
    rt: Runtime,
    cfg: Rl4segConfig,
    actor: PixelActor,
    reward: RewardOf,
    images: ImageSet,
    rules: Rules,
) -> dict[str, float]:
    """Reward of sampled and of greedy label maps, share of valid greedy ones, share of foreground."""
    return watching.policy(
        rt,
        actor,
        reward,
        images,
        lambda mask: passes(mask, rules),
        sigma_px=cfg.ppo.sigma_px,
        stream=lambda name: torch_generator(cfg.train.seed, "rl4seg", "validation", name),
    )


class Watch(watching.Watch):
    """Compares what is measured with the beginning and warns, once each.

    Args:
        cfg: Its limits.
        speaks: Whether warnings are said, or only logged as numbers.
    """

    def __init__(self, cfg: Rl4segConfig, *, speaks: bool = True) -> None:
        advice = "" if cfg.loop.start == "style" else "start from the style-tuned actor (--start style), "
        super().__init__(cfg.ppo.alarm_validity, help=advice, speaks=speaks)
