"""One acquisition as a gymnasium environment, for trainers of other libraries."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch

from medrl.core.rl.env import GymnasiumAdapter, Observation
from medrl.plugins.kspace.env import KSpaceEnv


class LineGym(GymnasiumAdapter):
    """The adapter of medrl for lines of k-space.

    The number of the case is not observed, because a network could learn cases by heart; build the
    environment with ``observe=("zf",)`` or other parts to show what was measured.

    Trainers without action masks may ask for lines that cannot be acquired: the nearest one that can is
    acquired in their place, the lower of two, and the info says so as ``line``. With masks (`action_masks`)
    that never happens.

    Args:
        env: An environment with ``num_envs`` equal to 1.

    Raises:
        ConfigError: The environment holds more than one episode.
    """

    def __init__(self, env: KSpaceEnv) -> None:
        super().__init__(env)
        shown = {name: space for name, space in env.observation_space.spaces.items() if name != "case"}
        self.observation_space = gymnasium.spaces.Dict(shown)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Acquire a line, or the nearest that can be acquired."""
        legal = np.flatnonzero(self.action_masks())
        line = int(legal[np.abs(legal - int(action)).argmin()]) if len(legal) else int(action)
        observation, reward, terminated, truncated, info = super().step(np.int64(line))
        return observation, reward, terminated, truncated, {**info, "line": line}

    def _observe(self, observation: Observation) -> Any:
        if isinstance(observation, torch.Tensor):
            return super()._observe(observation)
        return super()._observe({name: value for name, value in observation.items() if name != "case"})
