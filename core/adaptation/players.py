"""The policy that learns, the one it is held to, and the critic: their optimisers and their update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medrl.core.rl.pixelwise import (
    CollapseGuard,
    PixelwisePPOConfig,
    Rollout,
    UpdateStats,
    policy_gradient_update,
    update,
)

from . import schedules
from .actors import Critic, PixelActor

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

Optimizers = dict[str, torch.optim.Optimizer]
"""One for ``actor``, one for ``critic`` if there is one."""


@dataclass(frozen=True, eq=False)
class Players:
    """The policy that learns, the one it is held to, and the critic."""

    actor: PixelActor
    reference: PixelActor | None
    critic: Critic | None

    def networks(self) -> dict[str, torch.nn.Module]:
        """What is trained, by name."""
        found: dict[str, torch.nn.Module] = {"actor": self.actor.network}
        return found | ({"critic": self.critic.network} if self.critic is not None else {})

    def prepare(self, rt: Runtime) -> Players:
        """Bring all to the device of a run, with equal weights on all ranks."""
        rt.prepare(self.actor.network, *([self.critic.network] if self.critic is not None else []))
        if self.reference is not None:
            rt.prepare(self.reference)
        return self

    def optimizers(self, rates: Mapping[str, float], weight_decay: float = 0.0) -> Optimizers:
        """Return one Adam for the actor, one for the critic."""
        return {
            name: torch.optim.Adam(network.parameters(), lr=rates[name], weight_decay=weight_decay)
            for name, network in self.networks().items()
        }


def set_rates(
    optimizers: Optimizers,
    rates: Mapping[str, float],
    step: int,
    steps: int,
    *,
    warmup: int,
    linear: bool,
    guard: CollapseGuard | None,
) -> float:
    """Set the rates of a step from 1 and return that of the actor.

    Args:
        optimizers: Of actor and critic.
        rates: Their largest rates.
        step: The step.
        steps: Of the whole stage.
        warmup: Steps over which rates rise.
        linear: Whether they fall to 0 afterwards.
        guard: Lowers them after a collapse.
    """
    part = schedules.warm_and_decay(step, steps, warmup, linear=linear)
    if guard is not None:
        part *= guard.rate
    set_ = {name: schedules.set_rate(item, rates[name] * part) for name, item in optimizers.items()}
    return set_["actor"]


def improve(
    rt: Runtime,
    players: Players,
    optimizers: Optimizers,
    played: Rollout,
    numbers: PixelwisePPOConfig,
    ids: list[str],
    *,
    limits: Mapping[str, float],
    plain: bool = False,
    rewards: Sequence[Tensor] = (),
) -> UpdateStats:
    """Update actor and critic on one rollout; each has its own loss, optimiser and limit of its gradient.

    Args:
        rt: The runtime.
        players: Actor and critic.
        optimizers: Theirs.
        played: The rollout.
        numbers: Of PPO.
        ids: Names of the images, for messages.
        limits: Largest gradient norm of each part; 0 = no limit.
        plain: The plain policy gradient in place of PPO.
        rewards: Several rewards ``(M, *S)`` in place of that of the rollout: in every inner step each has a
            pass and a gradient of its own, and the gradients are added.

    Returns:
        Means; with several rewards those of the last inner step under the last reward.
    """
    waiting: list[str] = []
    losses = len(optimizers) * max(1, len(rewards))

    def advance(part: str, loss: Tensor) -> None:
        rt.backward(loss, cases=ids)
        waiting.append(part)
        if len(waiting) == losses:
            # All go backward before one steps: a step shares the buffers of all networks between ranks.
            for name in dict.fromkeys(waiting):
                rt.step(optimizers[name], clip_norm=limits[name])
            waiting.clear()

    if plain:
        return policy_gradient_update(players.actor, played, step=advance, autocast=rt.autocast)
    if not rewards:
        return update(players.actor, players.critic, played, numbers, step=advance, autocast=rt.autocast)
    once = replace(numbers, inner_steps=1)
    for _ in range(numbers.inner_steps):
        for reward in rewards:
            own = replace(played, rewards=reward, fresh=None)
            stats = update(players.actor, players.critic, own, once, step=advance, autocast=rt.autocast)
    return stats
