"""The networks that turn a state into one score for each teacher, built whole before any optimiser.

Source: specification §5; models/policy.py of the original, whose first convolutions were made during the
first forward pass and therefore never trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.plugins.graft.agent.state import POOLED, PolicyState


class TeacherEncoder(nn.Module):
    """Three convolutions that read one teacher's map: C → 16 → 32 → 64 channels, then the mean over space."""

    def __init__(self, channels: int, *, pooled_first: bool = True) -> None:
        super().__init__()
        self.pooled_first = pooled_first
        self.conv1 = nn.Conv3d(channels, 16, 3, padding=1)
        self.conv2 = nn.Conv3d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv3d(32, 64, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Encode ``(B, C, D, H, W)`` as ``(B, 64)``."""
        x = F.relu(self.conv1(maps))
        if not self.pooled_first:
            x = F.adaptive_avg_pool3d(x, POOLED)
        x = F.adaptive_avg_pool3d(F.relu(self.conv2(x)), (2, 8, 8))
        return F.relu(self.conv3(x)).mean(dim=(2, 3, 4))


class TeacherPolicy(nn.Module):
    """Scores of all teachers from their states, one head for each kind of action.

    Args:
        channels: Map channels of each teacher (`state_channels`).
        scalars: Scalars of each teacher (`state_scalars`).
        heads: Kinds of action: ``neg1``, ``neg2``, ``logits``.
        pooled_first: The maps are already pooled; else pool after the first convolution, as the original.
        residual: Start every head at zero, so that the policy begins exactly at its prior.
        factors: Three learnable factors for the published mixture (`--dynamic`).

    With five teachers, 34 channels, three scalars and one head: 463,125 parameters.
    """

    def __init__(
        self,
        channels: Sequence[int],
        scalars: int,
        *,
        heads: Sequence[str] = ("neg1",),
        pooled_first: bool = True,
        residual: bool = True,
        factors: bool = False,
    ) -> None:
        super().__init__()
        teachers = len(channels)
        if teachers < 1 or not heads:
            raise ConfigError("policy", why="it needs at least one teacher and one kind of action")
        self.teachers, self.head_names = teachers, tuple(heads)
        self.encoders = nn.ModuleList([TeacherEncoder(c, pooled_first=pooled_first) for c in channels])
        self.trunk = nn.Linear(teachers * (64 + scalars), 128, bias=False)
        self.heads = nn.ModuleDict({name: nn.Linear(128, teachers) for name in self.head_names})
        self.factors = nn.Parameter(torch.ones(3)) if factors else None
        if residual:
            for head in self.heads.values():
                nn.init.zeros_(cast("nn.Linear", head).weight)
                nn.init.zeros_(cast("nn.Linear", head).bias)

    def forward(self, state: PolicyState) -> dict[str, Tensor]:
        """Return float32 scores ``(B, N)`` for each kind of action; softmax turns them into weights."""
        with torch.autocast(state.scalars.device.type, enabled=False):
            encoded = [
                encoder(maps.float()) for encoder, maps in zip(self.encoders, state.spatial, strict=True)
            ]
            described = torch.cat([torch.stack(encoded, dim=1), state.scalars.float()], dim=2)
            hidden = F.relu(self.trunk(described.flatten(1)))
            return {name: self.heads[name](hidden) for name in self.head_names}


class FreePolicy(nn.Module):
    """Scores that depend on no state: one number for each teacher and kind of action, zero at first."""

    def __init__(self, teachers: int, *, heads: Sequence[str] = ("neg1",)) -> None:
        super().__init__()
        self.teachers, self.head_names = teachers, tuple(heads)
        self.scores = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(teachers)) for name in self.head_names}
        )
        self.factors = None

    def forward(self, state: PolicyState | None = None) -> dict[str, Tensor]:
        """Return scores ``(B, N)``, the same for every sample; ``(1, N)`` without a state."""
        batch = 1 if state is None else state.batch
        return {name: self.scores[name].expand(batch, -1) for name in self.head_names}
