"""A compact agent: a one-dimensional convolution over the features of every column."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.agent.policy import LineAgent, Needs, Seen
from medrl.plugins.kspace.agent.trunk import Trunk, summary


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
        self.actor = Trunk(actions, features, pooled, width, embedding)
        self.policy = nn.Conv1d(width, 1, 1)
        self.critic = self.actor if shared else Trunk(actions, features, pooled, width, embedding)
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
        columns = self.column_scale(seen["columns"]).transpose(1, 2).contiguous()
        return columns, self.pooled_scale(seen["pooled"])

    def _policy_of(self, maps: Tensor) -> Tensor:
        return F.linear(maps, self.policy.weight.squeeze(-1), self.policy.bias)[..., 0].float()

    def _value_of(self, maps: Tensor) -> Tensor:
        out: Tensor = self.value(summary(maps))
        return out[:, 0].float()
