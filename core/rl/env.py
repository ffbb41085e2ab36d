"""Environments in batches of tensors, and the gymnasium view of one of them.

A batched environment holds E independent episodes on one device and steps them together. It does not
restart an episode by itself: whoever collects reads the last observation first (a final map, a value to
bootstrap from) and then calls `reset(indices=...)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medrl.core.errors import ConfigError

Observation: TypeAlias = Tensor | dict[str, Tensor]
"""``(E, ...)``, or a dict of such tensors."""


@runtime_checkable
class BatchedEnv(Protocol):
    """E episodes stepped together; every tensor has E as its first dimension.

    Attributes:
        num_envs: E.
        observation_space: gymnasium space of *one* observation, without the first dimension.
        action_space: gymnasium space of *one* action.
    """

    num_envs: int
    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]

    def reset(self, seed: int | None = None, indices: Tensor | None = None) -> Observation:
        """Start new episodes and return the observations of all E.

        Args:
            seed: Seeds all random numbers of the environment; None goes on with those it has.
            indices: ``(n,)`` which episodes to start anew; None is all. The others are left as they are.
        """
        ...

    def step(self, actions: Tensor) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Take one action ``(E, ...)`` in each episode.

        Returns:
            Observations ``(E, ...)``; rewards ``(E,)`` float; terminated ``(E,)`` boolean: the episode
            ended by its own rules; truncated ``(E,)`` boolean: a time limit cut it; info: plain values
            and tensors ``(E, ...)``.
        """
        ...


def action_masks(env: BatchedEnv) -> Tensor | None:
    """The legal actions ``(E, A)`` for the observation returned last, or None if all are always legal.

    An environment with illegal actions has a method ``action_masks() -> Tensor``, boolean.
    """
    masks = getattr(env, "action_masks", None)
    return None if masks is None else masks()


class GymnasiumAdapter(gymnasium.Env[Any, Any]):  # type: ignore[misc]
    """One episode of a batched environment as a gymnasium environment.

    It passes gymnasium's checker, and trainers written for gymnasium can learn on it.

    Args:
        env: A batched environment with ``num_envs`` equal to 1.

    Raises:
        ConfigError: If the environment holds more than one episode.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - the name and type are gymnasium's

    def __init__(self, env: BatchedEnv) -> None:
        if env.num_envs != 1:
            raise ConfigError(
                "gymnasium adapter",
                why=f"the environment holds {env.num_envs} episodes, expected 1",
                do="build it with num_envs=1",
            )
        self.env = env
        self.observation_space = env.observation_space
        self.action_space = env.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; without a seed the next one is drawn from gymnasium's generator."""
        super().reset(seed=seed)
        drawn = seed if seed is not None else int(self.np_random.integers(2**31 - 1))
        return self._observe(self.env.reset(seed=drawn)), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one action."""
        batch = torch.as_tensor(np.asarray(action)).unsqueeze(0)
        observation, reward, terminated, truncated, info = self.env.step(batch)
        return (
            self._observe(observation),
            float(reward[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            {name: _first(value) for name, value in info.items()},
        )

    def action_masks(self) -> NDArray[np.bool_]:
        """Legal actions ``(A,)``; all are legal if the environment has no masks."""
        masks = action_masks(self.env)
        if masks is None:
            return np.ones(int(getattr(self.action_space, "n", 1)), dtype=np.bool_)
        legal: NDArray[np.bool_] = masks[0].cpu().numpy().astype(np.bool_)
        return legal

    def _observe(self, observation: Observation) -> Any:
        if isinstance(observation, Mapping):
            return {name: self._array(value, name) for name, value in observation.items()}
        return self._array(observation, None)

    def _array(self, value: Tensor, name: str | None) -> NDArray[Any]:
        space: Any = self.observation_space if name is None else self.observation_space[name]  # type: ignore[index]
        return np.array(value[0].detach().cpu().numpy(), dtype=space.dtype)


def _first(value: Any) -> Any:
    """The first episode's part of an entry of info, as a plain value or an array."""
    if isinstance(value, Tensor):
        one = value[0].detach().cpu() if value.ndim else value.detach().cpu()
        return one.item() if one.ndim == 0 else one.numpy()
    return value
