r"""Episodes: rewards and what is needed to learn from them.

The policy does not change inside an episode, and the REINFORCE gradient is linear in the rewards. So
instead of keeping every state, an eligibility trace :math:`e_t = γe_{t-1} + ∇\log π(a_t|s_t)` is carried
along, and :math:`\sum_t G_t∇\log π_t = \sum_t r_te_t + γR_Te_{T-1}`. Memory and checkpoint are a few times
the policy's size, whatever the length of the episode. `StoredEpisode` keeps the pooled states instead; the
published update needs them, because it changes the policy several times within one episode.

Source: specification §5; traces after Sutton and Barto, chapter 12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from medrl.core.errors import CheckpointError
from medrl.core.rl.gae import discounted_returns
from medrl.core.rl.reinforce import standardise
from medrl.plugins.graft.agent.state import PolicyState


class TraceEpisode:
    """The running sums of one episode.

    Args:
        parameters: Of the policy; their order is kept.
        gamma: Discount of later rewards.
    """

    def __init__(self, parameters: Sequence[Tensor], *, gamma: float) -> None:
        self.parameters = tuple(parameters)
        self.gamma = gamma
        self.clear()

    def clear(self) -> None:
        """Start a new episode."""
        self.rewards: list[float] = []
        self.trace, self.weighted, self.score, self.entropy = (
            [torch.zeros_like(p, requires_grad=False) for p in self.parameters] for _ in range(4)
        )

    def __len__(self) -> int:
        return len(self.rewards)

    def add(self, log_prob: Tensor, entropy: Tensor | None, reward: float) -> None:
        """Take in one step: log π of the action and the entropy (scalars with a graph), and its reward.

        Without an entropy bonus, `entropy` is None and costs no backward pass.
        """
        self.take(*self.gradients(log_prob, entropy), reward)

    def gradients(self, log_prob: Tensor, entropy: Tensor | None) -> tuple[list[Tensor], list[Tensor] | None]:
        """Gradients of log π and of the entropy, for `take`; the policy must not change in between."""
        score = self._gradient(log_prob, retain=entropy is not None)
        return score, None if entropy is None else self._gradient(entropy, retain=False)

    def take(self, score: Sequence[Tensor], spread: Sequence[Tensor] | None, reward: float) -> None:
        """Take in one step by its gradients."""
        with torch.no_grad():
            for i, gradient in enumerate(score):
                self.trace[i].mul_(self.gamma).add_(gradient)
                self.weighted[i].add_(self.trace[i], alpha=reward)
                self.score[i].add_(gradient)
                if spread is not None:
                    self.entropy[i].add_(spread[i])
        self.rewards.append(reward)

    def returns(self, terminal: float = 0.0) -> Tensor:
        """Returns G ``(T,)``, float64."""
        rewards = torch.tensor(self.rewards, dtype=torch.float64)
        return discounted_returns(rewards, gamma=self.gamma, terminal=terminal)

    def gradient(self, *, terminal: float, baseline: float, scale: float, beta: float) -> list[Tensor]:
        """Gradient of −mean(Â·log π) − β·mean(H) with Â = (G − baseline)/scale."""
        steps = max(1, len(self.rewards))
        found = []
        for trace, weighted, score, spread in zip(
            self.trace, self.weighted, self.score, self.entropy, strict=True
        ):
            gained = weighted + self.gamma * terminal * trace - baseline * score
            found.append(-(gained / scale + beta * spread) / steps)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        return {
            "rewards": list(self.rewards),
            **{name: [t.clone() for t in getattr(self, name)] for name in _SUMS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: A key is missing, or the policy has another shape.
        """
        try:
            rewards, sums = list(state["rewards"]), {name: list(state[name]) for name in _SUMS}
        except KeyError as error:
            raise CheckpointError("episode of the agent", why=f"the checkpoint lacks {error}") from error
        shapes = [p.shape for p in self.parameters]
        if any([t.shape for t in tensors] != shapes for tensors in sums.values()):
            raise CheckpointError("episode of the agent", why="it belongs to a policy of another shape")
        self.rewards = [float(value) for value in rewards]
        for name, tensors in sums.items():
            setattr(self, name, [t.to(p).clone() for t, p in zip(tensors, self.parameters, strict=True)])

    def _gradient(self, value: Tensor, *, retain: bool) -> list[Tensor]:
        if not value.requires_grad:
            return [torch.zeros_like(p) for p in self.parameters]
        found = torch.autograd.grad(value, self.parameters, retain_graph=retain, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.parameters, strict=True)]


_SUMS = ("trace", "weighted", "score", "entropy")


class StoredEpisode:
    """Pooled states and rewards of one episode, for the published update."""

    def __init__(self) -> None:
        self.states: list[PolicyState] = []
        self.rewards: list[float] = []

    def add(self, state: PolicyState, reward: float) -> None:
        """Take in one step."""
        self.states.append(state)
        self.rewards.append(reward)

    def clear(self) -> None:
        """Start a new episode."""
        self.states, self.rewards = [], []

    def __len__(self) -> int:
        return len(self.states)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint; it grows with the episode."""
        return {
            "rewards": list(self.rewards),
            "spatial": [list(state.spatial) for state in self.states],
            "scalars": [state.scalars for state in self.states],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: A key is missing.
        """
        try:
            pairs = zip(state["spatial"], state["scalars"], strict=True)
            self.states = [PolicyState(tuple(spatial), scalars) for spatial, scalars in pairs]
            self.rewards = [float(value) for value in state["rewards"]]
        except KeyError as error:
            raise CheckpointError("episode of the agent", why=f"the checkpoint lacks {error}") from error


def published_losses(
    episode: StoredEpisode,
    weights: Callable[[PolicyState], Tensor],
    *,
    gamma: float,
    terminal: float,
    minibatch: int = 4,
) -> Iterator[Tensor]:
    """Losses −mean(Ĝ·Σ_i log w_i) of the published episode update, one for each minibatch, in order.

    The caller goes back and steps after each, so that later minibatches see the changed policy. Returns are
    standardised over the episode. This loss ignores which action was taken: it only pulls the weights
    towards or away from uniform, and is kept for comparison.

    Args:
        episode: With at least one step; one step gives a return of zero, not NaN.
        weights: Gives ``(B, N)`` with a graph for a state.
        gamma: Discount.
        terminal: R_T.
        minibatch: Steps in each loss.
    """
    returns = standardise(discounted_returns(torch.tensor(episode.rewards), gamma=gamma, terminal=terminal))
    for start in range(0, len(episode), minibatch):
        part = range(start, min(start + minibatch, len(episode)))
        terms = [
            returns[t] * weights(episode.states[t]).clamp_min(1e-8).log().sum(dim=1).mean() for t in part
        ]
        yield -torch.stack(terms).mean()


def published_step_loss(weights: Tensor, rewards: Tensor) -> Tensor:
    """The published step update: BCE(w, 1) weighted by σ(reward), the reward standardised and clipped at ±3.

    It pulls every weight towards 1, that is towards uniform after the softmax; kept for comparison.

    Args:
        weights: ``(B, N)`` with a graph.
        rewards: ``(B,)``.
    """
    scaled = torch.sigmoid(standardise(rewards.float()).clamp(-3.0, 3.0)).unsqueeze(1)
    return -(scaled * weights.float().clamp(1e-7, 1.0).log()).mean()
