"""One game as a gymnasium environment, for trainers of other libraries."""

from __future__ import annotations

from typing import Any

import gymnasium
import torch

from medrl.core.rl.env import GymnasiumAdapter, Observation
from medrl.plugins.spars.env import HuntEnv
from medrl.plugins.spars.playing import hunt

GYM_ID = "medrl/SparsHunt-v0"
"""Its name in gymnasium; ``gymnasium.make("medrl.plugins.spars.gym_env:medrl/SparsHunt-v0")`` finds it."""


class HuntGym(GymnasiumAdapter):
    """The adapter of medrl for the first window of a game.

    The number of the volume is not observed, because a network could learn volumes by heart; build the
    environment with ``observe=("view",)`` to show the volume itself.

    Args:
        env: An environment with ``num_envs`` equal to 1.

    Raises:
        ConfigError: The environment holds more than one game.
    """

    def __init__(self, env: HuntEnv) -> None:
        super().__init__(env)
        shown = {name: space for name, space in env.observation_space.spaces.items() if name != "case"}
        self.observation_space = gymnasium.spaces.Dict(shown)

    def _observe(self, observation: Observation) -> Any:
        if isinstance(observation, torch.Tensor):
            return super()._observe(observation)
        return super()._observe({name: value for name, value in observation.items() if name != "case"})


def make_hunt(**settings: Any) -> HuntGym:
    """One game on drawn volumes, with the view; settings as of `hunt`."""
    return HuntGym(hunt(**{"view": True, **settings, "num_envs": 1}))


gymnasium.register(id=GYM_ID, entry_point=f"{__name__}:make_hunt")
