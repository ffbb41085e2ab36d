"""The agent that reads glimpses, which are looked up: what a step costs is a small network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.plugins.spars.agent.policy import HuntAgent, orthogonal
from medrl.plugins.spars.lattice import ACTIONS
from medrl.plugins.spars.observer import GLIMPSE, STATE, Needs, Observer, Seen


class CompactAgent(HuntAgent):
    """Three layers on glimpse and state, with two heads.

    Args:
        width: Units of a layer.
        trail: Let it read where somebody was in this episode.
        place: Let it read its own place in the volume and the way to the other window.

    >>> agent = CompactAgent()
    >>> seen = {"glimpse": torch.zeros(2, GLIMPSE), "state": torch.zeros(2, STATE)}
    >>> [tuple(item.shape) for item in agent(seen)]
    [(2, 6), (2,)]
    """

    needs: Needs = "features"

    def __init__(self, width: int = 128, *, trail: bool = True, place: bool = True) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError("agent.width", why=f"{width}", do="at least 1")
        self.body = nn.Sequential(
            nn.Linear(GLIMPSE + STATE, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.policy, self.value = nn.Linear(width, ACTIONS), nn.Linear(width, 1)
        self.body.apply(lambda layer: orthogonal(layer, math.sqrt(2.0)))
        orthogonal(self.policy, 0.01)
        orthogonal(self.value, 1.0)
        shown = torch.ones(STATE)
        if not place:
            shown[:6] = 0.0
        if not trail:
            shown[7:] = 0.0
        self.register_buffer("shown", shown, persistent=False)
        self.register_buffer("mean", torch.zeros(GLIMPSE))
        self.register_buffer("scale", torch.ones(GLIMPSE))
        self.shown: Tensor
        self.mean: Tensor
        self.scale: Tensor

    def logits_and_values(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """See `HuntAgent`."""
        glimpse = (seen["glimpse"] - self.mean) * self.scale
        found = self.body(torch.cat([glimpse, seen["state"] * self.shown], dim=1))
        return self.policy(found).float(), self.value(found).squeeze(1).float()

    @torch.no_grad()
    def fit_scales(self, observer: Observer, cases: Sequence[int] | None = None) -> None:
        """Standardise glimpses by their means and deviations over all places of volumes, all if None."""
        total, power = torch.zeros(2, GLIMPSE, dtype=torch.float64, device=self.mean.device)
        count = 0
        for index in range(len(observer.volumes)) if cases is None else cases:
            found = observer.glimpses(index).double().to(total.device)
            total, power = total + found.sum(dim=0), power + found.square().sum(dim=0)
            count += len(found)
        mean = total / count
        spread = (power / count - mean.square()).clamp(min=0.0).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(1.0 / spread.clamp(min=1e-3))
