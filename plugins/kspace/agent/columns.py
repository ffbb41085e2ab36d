"""A compact agent: a one-dimensional convolution over the features of every column."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.agent.policy import LineAgent, Needs, Seen

KERNEL = 5
DILATIONS = (1, 2, 4)


class FeatureScale(nn.Module):
    """Shift and scale of features, set once from examples and part of the weights; nothing at first.

    Args:
        count: Number of features.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("scale", torch.ones(count))

    @torch.no_grad()
    def fit(self, examples: Tensor) -> None:
        """Standardise features ``(N, count, ...)``; one that never changes is only centred."""
        flat = examples.transpose(0, 1).flatten(1).double()
        spread = flat.std(dim=1, correction=0)
        self.mean.copy_(flat.mean(dim=1))
        self.scale.copy_(torch.where(spread > 1e-6, 1.0 / spread.clamp_min(1e-6), 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Standardised features of the same shape ``(N, count, ...)``."""
        shape = (1, -1, *[1] * (features.ndim - 2))
        return (features - self.mean.view(shape)) * self.scale.view(shape)


class ColumnAgent(LineAgent):
    """Logits of all columns from the features of each, and a value from what they have in common.

    Residual blocks of dilated convolutions along the columns, with a learned vector for every column and the
    features of the whole image added to each. Actor and critic are separate unless they share the trunk.

    Args:
        actions: Number of columns.
        features: Features of each column, F.
        pooled: Features of the whole image, G; 0 for none.
        width: Channels.
        embedding: Length of the learned vector of each column.
        shared: One trunk for actor and critic.
        blind: Whether the features say nothing of what was measured, only what was acquired; such an agent
            is a mask that does not depend on the case.
        policy_gain: Gain of the last layer of the actor; small numbers begin with a nearly uniform policy.

    Attributes:
        column_scale: Standardises the features of columns; see `fit_scales`.
        pooled_scale: Standardises those of the whole image.
    """

    def __init__(
        self,
        *,
        actions: int,
        features: int,
        pooled: int = 0,
        width: int = 28,
        embedding: int = 8,
        shared: bool = False,
        blind: bool = False,
        policy_gain: float = 0.01,
    ) -> None:
        super().__init__()
        if min(actions, features, width) < 1 or min(pooled, embedding) < 0 or width % 4:
            raise ConfigError(
                "kspace.columns",
                why=f"{actions} actions, {features} and {pooled} features, width {width}, "
                f"embedding {embedding}",
                do="positive numbers, and a width that 4 divides",
            )
        self.needs: Needs = "lines" if blind else "features"
        self.actions, self.shared = int(actions), bool(shared)
        self.column_scale = FeatureScale(features)
        self.pooled_scale = FeatureScale(pooled)
        self.actor = _Trunk(actions, features, pooled, width, embedding)
        self.policy = nn.Conv1d(width, 1, 1)
        self.critic = self.actor if shared else _Trunk(actions, features, pooled, width, embedding)
        self.value = nn.Linear(2 * width, 1)
        for weight, gain in ((self.policy.weight, policy_gain), (self.value.weight, 1.0)):
            nn.init.orthogonal_(weight.view(1, -1), gain)
        for bias in (self.policy.bias, self.value.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def fit_scales(self, seen: Seen) -> None:
        """Standardise by the features of some states; call it once, before the first step of training."""
        self.column_scale.fit(seen["columns"])
        if seen["pooled"].shape[1]:
            self.pooled_scale.fit(seen["pooled"])

    def logits(self, seen: Seen) -> Tensor:
        """Logits ``(B, actions)``."""
        return self._policy_of(self.actor(*self._inputs(seen)))

    def values(self, seen: Seen) -> Tensor:
        """Expected returns ``(B,)``."""
        return self._value_of(self.critic(*self._inputs(seen)))

    def logits_and_values(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Both; a shared trunk runs once."""
        inputs = self._inputs(seen)
        maps = self.actor(*inputs)
        return self._policy_of(maps), self._value_of(maps if self.shared else self.critic(*inputs))

    def _inputs(self, seen: Seen) -> tuple[Tensor, Tensor]:
        return self.column_scale(seen["columns"]), self.pooled_scale(seen["pooled"])

    def _policy_of(self, maps: Tensor) -> Tensor:
        out: Tensor = self.policy(maps)
        return out[:, 0].float()

    def _value_of(self, maps: Tensor) -> Tensor:
        out: Tensor = self.value(_summary(maps))
        return out[:, 0].float()


class _Trunk(nn.Module):
    def __init__(self, actions: int, features: int, pooled: int, width: int, embedding: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(embedding, actions) * 0.02)
        self.stem = nn.Conv1d(features + embedding, width, 1)
        self.whole = nn.Linear(pooled, width, bias=False) if pooled else None
        self.blocks = nn.ModuleList(_Block(width, dilation) for dilation in DILATIONS)

    def forward(self, columns: Tensor, pooled: Tensor) -> Tensor:
        known = self.embedding.unsqueeze(0).expand(columns.shape[0], -1, -1)
        maps = self.stem(torch.cat([columns, known], dim=1))
        if self.whole is not None:
            maps = maps + self.whole(pooled).unsqueeze(-1)
        for block in self.blocks:
            maps = block(maps)
        return F.relu(maps)


class _Block(nn.Module):
    """Look left and right, and at the summary of all columns; add to what was there."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.near = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2 * dilation, dilation=dilation)
        self.context = nn.Linear(2 * width, width)
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        inner = F.relu(self.norm(maps))
        inner = self.near(inner) + self.context(_summary(inner)).unsqueeze(-1)
        out: Tensor = maps + self.mix(F.relu(inner))
        return out


def _summary(maps: Tensor) -> Tensor:
    """Mean and largest value over the columns, ``(B, 2C)``."""
    return torch.cat([maps.mean(dim=-1), maps.amax(dim=-1)], dim=1)
