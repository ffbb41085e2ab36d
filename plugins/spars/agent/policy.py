"""What all agents share: a categorical distribution over the six moves, and a value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.core.rl.distributions import MaskedCategorical
from medrl.core.rl.env import Observation
from medrl.plugins.spars.observer import Needs, Observer, Seen

if TYPE_CHECKING:
    from medrl.core.config import ModelConfig
    from medrl.core.manager import PluginManager


class HuntAgent(nn.Module, ABC):
    """A policy over moves with a value function.

    Attributes:
        needs: What the network reads beside the state, see `Observer.seen`.
    """

    needs: Needs

    @abstractmethod
    def logits_and_values(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Logits ``(B, 6)`` and expected returns ``(B,)``, float32."""

    def forward(self, seen: Seen, legal: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``(B, 6)``, minus infinity for illegal moves, and values ``(B,)``."""
        logits, values = self.logits_and_values(seen)
        return MaskedCategorical(logits, legal).log_probs, values

    def fit_scales(self, observer: Observer, cases: Sequence[int] | None = None) -> None:
        """Learn the scales of what is read from volumes, all if None; most networks have none to learn."""
        del observer, cases


class Sighted:
    """An agent with an observer: the `ActorCritic` of `medrl.core.rl`.

    Args:
        agent: The network.
        observer: Where what it reads comes from; another one for other volumes.
    """

    def __init__(self, agent: HuntAgent, observer: Observer) -> None:
        self.agent, self.observer = agent, observer

    def logits_and_values(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Logits ``(B, 6)`` and values ``(B,)``."""
        return self.agent.logits_and_values(self._seen(observation))

    @torch.no_grad()
    def act(
        self, observation: Observation, mask: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw moves ``(B,)``; give them with their log-probabilities ``(B,)`` and values ``(B,)``."""
        logits, values = self.logits_and_values(observation)
        policy = MaskedCategorical(logits, mask)
        actions = policy.sample(generator)
        return actions, policy.log_prob(actions), values

    @torch.no_grad()
    def act_with(
        self, observation: Observation, mask: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `act`, with Gumbel noise ``(B, 6)`` that the environment drew; zeros take the likeliest move."""
        logits, values = self.logits_and_values(observation)
        policy = MaskedCategorical(logits, mask)
        actions = (policy.log_probs + noise).argmax(dim=1)
        return actions, policy.log_prob(actions), values

    def evaluate_actions(
        self, observation: Observation, actions: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and values ``(B,)`` of given moves, with a graph."""
        logits, values = self.logits_and_values(observation)
        policy = MaskedCategorical(logits, mask)
        return policy.log_prob(actions), policy.entropy(), values

    @torch.no_grad()
    def value(self, observation: Observation) -> Tensor:
        """Values ``(B,)``."""
        return self.logits_and_values(observation)[1]

    def _seen(self, observation: Observation) -> Seen:
        if isinstance(observation, Tensor):
            raise ConfigError("observation", why="a tensor, expected a dict with case, node, time and trail")
        with torch.no_grad():
            return self.observer.seen(observation, self.agent.needs)


def build_agent(config: ModelConfig, manager: PluginManager, observer: Observer) -> HuntAgent:
    """Build the registered network of a config for what an observer gives.

    Raises:
        ConfigError: It is no `HuntAgent`, or refuses its parameters.
    """
    offered: Mapping[str, Any] = {"view_size": observer.view_size, "window_size": observer.window_size}
    network = manager.registry("agents").fit(config.name, offered, **config.params)
    if not isinstance(network, HuntAgent):
        raise ConfigError(f"agent.name {config.name}", why="it does not move windows", do="spars.compact")
    return network


def orthogonal(layer: nn.Module, gain: float) -> None:
    """Orthogonal weights and zero biases, as Stable-Baselines3 starts with."""
    if isinstance(layer, (nn.Linear, nn.Conv3d)):
        nn.init.orthogonal_(layer.weight, gain)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
