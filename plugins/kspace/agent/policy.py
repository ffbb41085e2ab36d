"""What all agents share: a masked categorical distribution over lines, and a value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.core.rl.distributions import MaskedCategorical
from medrl.core.rl.env import Observation

Seen: TypeAlias = Mapping[str, Tensor]
"""What an agent's network reads, by name; see `LineAgent.needs`."""

Needs: TypeAlias = Literal["image", "features", "lines"]


class Observer(Protocol):
    """Turns observations of the environment into what an agent's network reads."""

    def seen(self, observation: Mapping[str, Tensor], needs: Needs) -> Seen:
        """Return the tensors that an agent with these needs reads, ``(B, ...)``."""
        ...


class LineAgent(nn.Module, ABC):
    """A policy over lines with a value function.

    Attributes:
        needs: What the network reads: ``image`` is ``image`` ``(B, [D], H, W)`` complex, ``remaining``
            ``(B, 1)`` and, of stacks, ``slices`` ``(B, D)``; ``features`` is ``columns`` ``(B, F, W)`` and
            ``pooled`` ``(B, G)``; ``lines`` the same without any feature of what was measured.
        actions: Number of lines.
        longest: Largest budget that the network can tell apart; 0 is any.
    """

    needs: Needs
    actions: int
    longest: int = 0

    @abstractmethod
    def logits(self, seen: Seen) -> Tensor:
        """Logits ``(B, actions)``, float32."""

    @abstractmethod
    def values(self, seen: Seen) -> Tensor:
        """Expected returns ``(B,)``, float32."""

    def logits_and_values(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Both at once, for agents whose parts share work."""
        return self.logits(seen), self.values(seen)

    def distribution(self, seen: Seen, legal: Tensor | None) -> MaskedCategorical:
        """The distribution over the legal lines ``(B, actions)``."""
        return MaskedCategorical(self.logits(seen), legal)

    def forward(self, seen: Seen, legal: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``(B, actions)``, minus infinity for illegal lines, and values ``(B,)``."""
        logits, values = self.logits_and_values(seen)
        return MaskedCategorical(logits, legal).log_probs, values

    def check_budget(self, budget: int) -> None:
        """Refuse a budget that the network cannot tell from a smaller one.

        Raises:
            ConfigError: The budget is above `longest`.
        """
        if self.longest and budget > self.longest:
            raise ConfigError(
                f"budget of {budget} lines",
                why=f"the agent counts the remaining lines up to {self.longest}",
                do="build the agent with a larger steps_dim, or lower the budget",
            )


class Sighted:
    """An agent with an observer: the `ActorCritic` of `medrl.core.rl`.

    Args:
        agent: The network.
        observer: Where observations come from; another one for another set of cases.
    """

    def __init__(self, agent: LineAgent, observer: Observer) -> None:
        self.agent = agent
        self.observer = observer

    def distribution(self, observation: Observation, legal: Tensor | None) -> MaskedCategorical:
        """The distribution over the legal lines ``(B, actions)``."""
        return self.agent.distribution(self._seen(observation), legal)

    @torch.no_grad()
    def act(
        self, observation: Observation, mask: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw lines ``(B,)``; give them with their log-probabilities ``(B,)`` and values ``(B,)``."""
        logits, values = self.agent.logits_and_values(self._seen(observation))
        policy = MaskedCategorical(logits, mask)
        actions = policy.sample(generator)
        return actions, policy.log_prob(actions), values

    def evaluate_actions(
        self, observation: Observation, actions: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and values ``(B,)`` of given lines, with a graph."""
        logits, values = self.agent.logits_and_values(self._seen(observation))
        policy = MaskedCategorical(logits, mask)
        return policy.log_prob(actions), policy.entropy(), values

    @torch.no_grad()
    def value(self, observation: Observation) -> Tensor:
        """Values ``(B,)``."""
        return self.agent.values(self._seen(observation))

    @torch.no_grad()
    def greedy(self, observation: Observation, mask: Tensor | None) -> Tensor:
        """The most probable legal lines ``(B,)``; the first of equals."""
        return self.distribution(observation, mask).mode()

    def _seen(self, observation: Observation) -> Seen:
        if isinstance(observation, Tensor):
            raise ConfigError("observation", why="a tensor, expected a dict with case, mask and counters")
        with torch.no_grad():
            return self.observer.seen(observation, self.agent.needs)
