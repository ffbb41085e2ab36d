"""Rollouts: what T steps in E episodes gave, their advantages, and minibatches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from medrl.core.errors import RuntimeFault
from medrl.core.rl.env import BatchedEnv, Observation, action_masks
from medrl.core.rl.gae import generalised_advantage


class ActorCritic(Protocol):
    """A policy with a value function, as rollouts and `medrl.core.rl.ppo` use it."""

    def act(
        self, observation: Observation, mask: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw actions ``(E, ...)``; give them with their log-probabilities and values ``(E,)``."""
        ...

    def evaluate_actions(
        self, observation: Observation, actions: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and values ``(N,)`` of given actions, with a graph."""
        ...

    def value(self, observation: Observation) -> Tensor:
        """Values ``(E,)``."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class RolloutBatch:
    """N steps, in no particular order.

    Attributes:
        observations: ``(N, ...)`` or a dict of such tensors.
        actions: ``(N, ...)``.
        log_probs: ``(N,)`` under the policy that acted.
        values: ``(N,)`` estimated when acting.
        advantages: ``(N,)``.
        returns: ``(N,)``.
        masks: ``(N, A)`` legal actions, or None.
    """

    observations: Observation
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return int(self.advantages.shape[0])

    def select(self, index: Tensor) -> RolloutBatch:
        """The steps at `index`."""
        chosen: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            chosen[item.name] = None if value is None else _map(value, lambda tensor: tensor[index])
        return replace(self, **chosen)

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[RolloutBatch]:
        """Every step once, in random order, `size` at a time; the last one may be smaller."""
        order = torch.randperm(len(self), generator=generator).to(self.advantages.device)
        for part in torch.split(order, size):
            yield self.select(part)


class RolloutBuffer:
    """Memory for T steps in E episodes, allocated at the first step.

    Args:
        steps: T.

    Example::

        buffer = RolloutBuffer(32)
        for _ in range(32):
            buffer.add(observation, actions, log_probs, values, rewards, terminated, truncated)
        batch = buffer.compute(last_value, gamma=0.99, lam=0.95)
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"a rollout needs at least one step, got {steps}")
        self.steps = steps
        self._size = 0
        self._data: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._size

    @property
    def full(self) -> bool:
        """Whether all T steps are there."""
        return self._size == self.steps

    def clear(self) -> None:
        """Forget the steps and keep the memory."""
        self._size = 0

    def __getitem__(self, name: str) -> Any:
        """The steps so far, ``(T, E, ...)``, by name of the argument of `add`."""
        return _map(self._data[name], lambda tensor: tensor[: self._size])

    def add(
        self,
        observations: Observation,
        actions: Tensor,
        log_probs: Tensor,
        values: Tensor,
        rewards: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        *,
        masks: Tensor | None = None,
        final_values: Tensor | None = None,
    ) -> None:
        """Store one step of all E episodes.

        Args:
            observations: ``(E, ...)``, what the policy saw.
            actions: ``(E, ...)``.
            log_probs: ``(E,)``.
            values: ``(E,)``.
            rewards: ``(E,)``.
            terminated: ``(E,)`` boolean.
            truncated: ``(E,)`` boolean.
            masks: ``(E, A)`` legal actions that the policy was given; in every step or in none.
            final_values: ``(E,)``, the value of the observation after this step; needed where `truncated`.

        Raises:
            RuntimeFault: If the buffer is full, a reward is not finite, or a needed part is missing.
        """
        if self.full:
            raise RuntimeFault(
                "rollout", why=f"all {self.steps} steps are stored", do="clear the buffer first"
            )
        if not bool(torch.isfinite(rewards).all()):
            where = torch.nonzero(~torch.isfinite(rewards)).flatten().tolist()
            raise RuntimeFault(
                "rollout",
                why=f"the reward of episode {where[0]} is not finite at step {self._size}",
                do="look at the reward function for that state",
            )
        if final_values is None:
            if bool(truncated.any()):
                raise RuntimeFault("rollout", why="an episode was truncated and no final value was given")
            final_values = torch.zeros_like(values)
        step = {
            "observations": observations,
            "actions": actions,
            "log_probs": log_probs,
            "values": values,
            "rewards": rewards,
            "terminated": terminated,
            "truncated": truncated,
            "final_values": final_values,
        }
        if masks is not None:
            step["masks"] = masks
        if not self._data:
            self._data = {name: _map(value, self._room) for name, value in step.items()}
        if step.keys() != self._data.keys():
            raise RuntimeFault("rollout", why="action masks were given in some steps and not in others")
        for name, value in step.items():
            _store(self._data[name], value, self._size)
        self._size += 1

    def compute(self, last_value: Tensor, *, gamma: float, lam: float) -> RolloutBatch:
        """Advantages and returns of all steps, flattened to ``(T * E, ...)``.

        Args:
            last_value: ``(E,)``, the value after the last step.
            gamma: Discount.
            lam: Trace decay of GAE.
        """
        advantages, returns = generalised_advantage(
            self["rewards"],
            self["values"],
            self["terminated"],
            last_value,
            gamma=gamma,
            lam=lam,
            truncated=self["truncated"],
            final_values=self["final_values"],
        )
        flat = {
            name: _map(self[name], lambda tensor: tensor.flatten(0, 1))
            for name in ("observations", "actions", "log_probs", "values", "masks")
            if name in self._data
        }
        return RolloutBatch(advantages=advantages.flatten(), returns=returns.flatten(), **flat)

    def _room(self, value: Tensor) -> Tensor:
        return torch.empty((self.steps, *value.shape), dtype=value.dtype, device=value.device)


@dataclass(frozen=True, kw_only=True)
class EpisodeRecord:
    """A finished episode: the sum of its rewards and its number of steps."""

    reward: float
    length: int


class Collector:
    """Steps a batched environment with a policy and remembers where it stopped.

    Args:
        env: The environment; it is reset at once.
        seed: Seeds the environment.

    Attributes:
        observation: What the policy sees next, ``(E, ...)``.
        episodes: Episodes that ended in the last call of `collect`.
    """

    def __init__(self, env: BatchedEnv, *, seed: int | None = None) -> None:
        self.env = env
        self.observation = env.reset(seed=seed)
        self.episodes: list[EpisodeRecord] = []
        self._rewards = torch.zeros(env.num_envs, dtype=torch.float64)
        self._lengths = torch.zeros(env.num_envs, dtype=torch.int64)

    @torch.no_grad()
    def collect(
        self, policy: ActorCritic, buffer: RolloutBuffer, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Fill the buffer and return the value ``(E,)`` after its last step, for `RolloutBuffer.compute`."""
        buffer.clear()
        self.episodes = []
        while not buffer.full:
            seen = _map(self.observation, torch.clone)
            masks = action_masks(self.env)
            masks = None if masks is None else masks.clone()
            actions, log_probs, values = policy.act(seen, masks, generator)
            following, rewards, terminated, truncated, _ = self.env.step(actions)
            ended = terminated | truncated
            cut = truncated & ~terminated
            final_values = policy.value(following) if bool(cut.any()) else torch.zeros_like(values)
            buffer.add(
                seen,
                actions,
                log_probs,
                values,
                rewards,
                terminated,
                truncated,
                masks=masks,
                final_values=final_values,
            )
            self._count(rewards, ended)
            if bool(ended.any()):
                following = self.env.reset(indices=torch.nonzero(ended).flatten())
            self.observation = following
        return policy.value(self.observation)

    def _count(self, rewards: Tensor, ended: Tensor) -> None:
        self._rewards += rewards.detach().cpu().double()
        self._lengths += 1
        for index in torch.nonzero(ended.cpu()).flatten().tolist():
            self.episodes.append(
                EpisodeRecord(reward=float(self._rewards[index]), length=int(self._lengths[index]))
            )
            self._rewards[index], self._lengths[index] = 0.0, 0


def _map(value: Any, function: Any) -> Any:
    """Apply a function to a tensor or to every tensor of a dict."""
    if isinstance(value, dict):
        return {name: function(item) for name, item in value.items()}
    return function(value)


def _store(memory: Any, value: Any, step: int) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            memory[name][step].copy_(item.detach())
    else:
        memory[step].copy_(value.detach())
