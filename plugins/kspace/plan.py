"""What each step of a policy run does: collect states, imitate, or PPO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .config import KspaceConfig
from .schedules import IMITATION_FLOOR, cosine

Phase = Literal["collect", "imitate", "ppo"]
HALVES = 2


@dataclass(frozen=True)
class Plan:
    """The steps of a run, one after the other: two halves of collecting and imitating, then PPO.

    Attributes:
        collects: Steps of collecting in each half; 0 without a warm start.
        epochs: Passes of imitation in each half.
        updates: Updates of PPO.
        decays: Whether the rate of PPO falls to 0.
    """

    collects: int
    epochs: int
    updates: int
    decays: bool = True

    @classmethod
    def of(cls, cfg: KspaceConfig, world_size: int = 1) -> Plan:
        """The plan of a config; ranks share the states."""
        collects = epochs = 0
        if cfg.warm.kind == "greedy":
            collects = math.ceil(cfg.warm.states / (HALVES * cfg.warm.chunk * world_size))
            epochs = cfg.warm.epochs
        return cls(collects, epochs, cfg.ppo.updates, cfg.ppo.decay == "linear")

    @property
    def warm(self) -> int:
        """Steps of the warm start."""
        return HALVES * (self.collects + self.epochs)

    @property
    def total(self) -> int:
        """All steps."""
        return self.warm + self.updates

    def at(self, step: int) -> tuple[Phase, int]:
        """The phase of a step (from 1), and its number in the phase (from 1, both halves counted on).

        >>> plan = Plan(collects=2, epochs=3, updates=5)
        >>> [plan.at(step) for step in (1, 3, 6, 8, 11)]
        [('collect', 1), ('imitate', 1), ('collect', 3), ('imitate', 4), ('ppo', 1)]
        """
        if step > self.warm:
            return "ppo", step - self.warm
        half, place = divmod(step - 1, self.collects + self.epochs)
        if place < self.collects:
            return "collect", half * self.collects + place + 1
        return "imitate", half * self.epochs + place - self.collects + 1

    def half(self, step: int) -> int:
        """0 or 1 in the warm start."""
        return (step - 1) // (self.collects + self.epochs)

    def ends_phase(self, step: int) -> bool:
        """Whether the next step does something else."""
        return step < self.total and self.at(step)[0] != self.at(step + 1)[0]

    def imitation_factor(self, number: int) -> float:
        """Factor of the rate of an imitation pass: half a cosine in each half."""
        return cosine((number - 1) % self.epochs + 1, self.epochs, floor=IMITATION_FLOOR)

    def ppo_factor(self, number: int) -> float:
        """Factor of the rate of a PPO update."""
        return 1.0 - (number - 1) / self.updates if self.decays else 1.0
