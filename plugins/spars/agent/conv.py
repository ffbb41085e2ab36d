"""The agent that reads a low-resolution view: the volume, and the window in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medrl.plugins.spars.agent.policy import HuntAgent, orthogonal
from medrl.plugins.spars.lattice import ACTIONS, triple
from medrl.plugins.spars.observer import STATE, Needs, Seen


class ConvAgent(HuntAgent):
    """Two strided convolutions and a layer of 128, with two heads (specification §6).

    Args:
        view_size: Cells of the view.
        channels: Of the two convolutions.
        width: Units of the layer.
        state: Also read the state: way to the other window, time left and trail.

    >>> agent = ConvAgent((8, 8, 6))
    >>> seen = {"view": torch.zeros(2, 2, 8, 8, 6), "state": torch.zeros(2, STATE)}
    >>> [tuple(item.shape) for item in agent(seen)]
    [(2, 6), (2,)]
    """

    needs: Needs = "view"

    def __init__(
        self,
        view_size: Sequence[int] = (16, 16, 12),
        *,
        channels: Sequence[int] = (16, 32),
        width: int = 128,
        state: bool = True,
    ) -> None:
        super().__init__()
        size = triple(view_size, "agent.view_size")
        first, second = channels
        self.features = nn.Sequential(
            nn.Conv3d(2, first, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv3d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        cells = math.prod((-(-length // 2) + 1) // 2 for length in size)
        self.reads_state = bool(state)
        self.body = nn.Sequential(nn.Linear(second * cells + (STATE if state else 0), width), nn.ReLU())
        self.policy, self.value = nn.Linear(width, ACTIONS), nn.Linear(width, 1)
        for part in (self.features, self.body):
            part.apply(lambda layer: orthogonal(layer, math.sqrt(2.0)))
        orthogonal(self.policy, 0.01)
        orthogonal(self.value, 1.0)

    def logits_and_values(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """See `HuntAgent`."""
        found = self.features(seen["view"])
        if self.reads_state:
            found = torch.cat([found, seen["state"]], dim=1)
        found = self.body(found)
        return self.policy(found).float(), self.value(found).squeeze(1).float()
