"""The network of the original: the contents of the window, enlarged, and two layers of 64 for each head."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from medrl.plugins.spars.agent.policy import HuntAgent, orthogonal
from medrl.plugins.spars.lattice import ACTIONS, triple
from medrl.plugins.spars.observer import Needs, Seen


class FaithfulAgent(HuntAgent):
    """``MlpPolicy`` of Stable-Baselines3: separate actor and critic, tanh, 64 and 64.

    Args:
        window_size: Voxels of what is read. At the 256 x 256 x 180 of the original it has 1,509,958,343
            parameters.
        width: Units of a layer.

    Deviation: it reads voxels in [0, 1]; the original cast Hounsfield units to bytes, which wrap around.

    Source: SPARS best_RL.py; Stable-Baselines3 2.9.2, ActorCriticPolicy.

    >>> sum(weights.numel() for weights in FaithfulAgent((8, 8, 8)).parameters())
    74439
    """

    needs: Needs = "window"

    def __init__(self, window_size: Sequence[int], *, width: int = 64) -> None:
        super().__init__()
        size = math.prod(triple(window_size, "agent.window_size"))
        self.actor = _layers(size, width, ACTIONS, 0.01)
        self.critic = _layers(size, width, 1, 1.0)

    def logits_and_values(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """See `HuntAgent`."""
        flat = seen["window"].flatten(1)
        return self.actor(flat).float(), self.critic(flat).squeeze(1).float()


def _layers(size: int, width: int, out: int, gain: float) -> nn.Sequential:
    made = nn.Sequential(
        nn.Linear(size, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out)
    )
    if not made[0].weight.is_meta:
        made.apply(lambda layer: orthogonal(layer, math.sqrt(2.0)))
        orthogonal(made[4], gain)
    return made
