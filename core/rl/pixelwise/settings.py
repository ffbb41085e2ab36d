"""Numbers of pixel-wise PPO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medrl.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PixelwisePPOConfig:
    """Numbers of pixel-wise PPO; the defaults are the defaults of the original's class.

    Attributes:
        clip: ε, the ratio of a pixel is clipped to [1 - ε, 1 + ε].
        inner_steps: Updates on the actions of one rollout.
        entropy: Weight c_H of the mean entropy of a pixel.
        kl: β, what each pixel's reward pays for log π(a) - log π_ref(a).
        baseline: What is subtracted from the reward: the value of the ``critic``, one number (``constant``),
            or the mean reward of the ``group`` of actions drawn for the same image, pixel by pixel.
        constant: The number of the constant baseline; 0 is no baseline.
        samples: Actions drawn for each image; at least two with the group baseline.
        sigma_px: Scale of the correlation between the actions of neighbouring pixels, in pixels, one number
            or one for each spatial dimension; 0 draws each pixel by itself. See `correlated_categorical`.
        eps_greedy: Probability that the action of an image is the most probable one everywhere.
        recompute_forced: Reward the label map that a forced image got. Deviation: the original keeps the
            reward of the drawn action that it replaced; false does so.
        forced_target: What the critic learns for forced actions: their ``reward``, as in the original, or
            ``one``, as the advantage assumes.
        max_grad_norm: Norm that the gradient of the actor is clipped to; 0 is no clipping.
        critic_max_grad_norm: The same of the critic.

    Raises:
        ConfigError: Listing every number out of its range.

    Source: Judge et al. 2024 (RL4Seg), PPO.py.
    """

    clip: float = 0.2
    inner_steps: int = 5
    entropy: float = 0.0
    kl: float = 0.0
    baseline: Literal["critic", "constant", "group"] = "critic"
    constant: float = 0.5
    samples: int = 1
    sigma_px: float | Sequence[float] = 0.0
    eps_greedy: float = 0.0
    recompute_forced: bool = True
    forced_target: Literal["reward", "one"] = "reward"
    max_grad_norm: float = 0.5
    critic_max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        scales = self.sigma_px if isinstance(self.sigma_px, Sequence) else (self.sigma_px,)
        checks = {
            "clip": 0.0 < self.clip < 1.0,
            "inner_steps": self.inner_steps >= 1,
            "entropy": 0.0 <= self.entropy < math.inf,
            "kl": 0.0 <= self.kl < math.inf,
            "baseline": self.baseline in ("critic", "constant", "group"),
            "constant": 0.0 <= self.constant <= 1.0,
            "samples": self.samples >= (2 if self.baseline == "group" else 1),
            "sigma_px": all(0.0 <= scale < math.inf for scale in scales),
            "eps_greedy": 0.0 <= self.eps_greedy <= 1.0,
            "forced_target": self.forced_target in ("reward", "one"),
            "max_grad_norm": 0.0 <= self.max_grad_norm < math.inf,
            "critic_max_grad_norm": 0.0 <= self.critic_max_grad_norm < math.inf,
        }
        problems = [
            f"{name}: {getattr(self, name)} is out of range" for name, good in checks.items() if not good
        ]
        if problems:
            raise ConfigError("pixel-wise ppo", why="numbers out of range", problems=problems)
