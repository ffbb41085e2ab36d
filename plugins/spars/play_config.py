"""Settings of windows, episodes, self-play and maps of spars."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from medrl.core.config import Block

OWN = "spars"
"""Plugin of rewards that are named without one."""


class ScoreConfig(Block):
    """Windows and their scores."""

    window: tuple[int, int, int] = (16, 16, 8)
    """Voxels. Original: 48, 48, 24 in volumes of 256 × 256 × 180."""
    stride: tuple[int, int, int] = (4, 4, 4)
    """Voxels of a move."""
    batch: int = Field(default=64, ge=1)
    """Windows that a network scores at once where it has no dense form."""
    scales: tuple[float, ...] = (1.0,)
    """Relative sizes of windows about the same centre whose scores are averaged; for dense scorers."""
    cache: bool = True
    """Keep tables of scores on disk, by content."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, values in (("window", self.window), ("stride", self.stride)):
            if min(values) < 1:
                raise ValueError(f"{name} must be positive, got {list(values)}; give voxels")
        if any(step > size for step, size in zip(self.stride, self.window, strict=True)):
            raise ValueError(
                f"stride {list(self.stride)} exceeds window {list(self.window)}: voxels between "
                "windows would have no score; give at most the window"
            )
        if not self.scales or min(self.scales) <= 0.0:
            raise ValueError(f"scales must be positive numbers, got {list(self.scales)}; try [1.0]")
        return self


class EnvConfig(Block):
    """Episodes of two windows that hunt in one volume (specification §4)."""

    start: Literal["random", "centre", "corner_center"] = "random"
    """Where both windows begin; `corner_center` puts their minimum corner in the centre (original)."""
    bounds: Literal["mask", "noop"] = "mask"
    """Moves that would leave the volume cannot be chosen, or change nothing."""
    tie: Literal["zero", "win"] = "zero"
    """Reward of equal scores: 0, or a win of the first window (original)."""
    tau: float = Field(default=2.0, ge=0.0, le=2.0)
    """An episode ends where a score, which is at most 1, exceeds this; 2 is never. Original: 0.3."""
    horizon: int = Field(default=32, ge=1)
    """Steps, then the episode is cut off."""
    writers: Literal["agent", "both"] = "both"
    """Whose windows are painted: of the first, or of both."""
    original_painting: bool = False
    """Paint the first window with the score of the second, and lose the map of episodes that end by `tau`:
    the defects of the original."""
    reward: str = f"{OWN}.sign"
    """Registry key of the reward. `spars.sign` of the difference of scores (original); `spars.difference`
    itself; `spars.multiscale`, the sign for scores averaged over windows of several sizes; `spars.shaped`
    adds what the score gained by the move. A name without a plugin is one of spars."""
    reward_params: dict[str, Any] = Field(default_factory=dict)
    """Further settings of that reward, such as `found` of `spars.shaped`."""
    shaping: float = Field(default=10.0, ge=0.0)
    """Weight of that gain."""

    @field_validator("reward")
    @classmethod
    def _own(cls, name: str) -> str:
        return name if "." in name else f"{OWN}.{name}"


class WarmConfig(Block):
    """Imitation before self-play, on training volumes."""

    kind: Literal["planned", "multiscale", "greedy", "none"] = "planned"
    """Whom to imitate: the exact plan by value iteration on the table of scores of each training volume;
    greedy look-ahead for scores of several sizes, or for the score alone; `none`: nobody (original)."""
    gamma: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Discount of the plan."""
    steps: int = Field(default=300, ge=1)
    """Optimiser steps."""
    batch: int = Field(default=512, ge=1)
    """States of a step."""
    lr: float = Field(default=1e-3, gt=0.0, le=1.0)
    """Learning rate of Adam."""
    entropy: float = Field(default=0.02, ge=0.0)
    """Weight of the entropy bonus."""


class PpoConfig(Block):
    """Proximal policy optimisation (specification §6)."""

    updates: int = Field(default=150, ge=0)
    """Rollouts with their updates. Original: 10,000."""
    envs: int = Field(default=64, ge=1)
    """Episodes at a time, of each rank. Original: 1."""
    steps: int = Field(default=32, ge=1)
    """Steps of a rollout."""
    minibatch: int = Field(default=512, ge=1)
    """Steps in a minibatch. Original: 8."""
    epochs: int = Field(default=2, ge=1)
    """Passes over a rollout. Original: 1."""
    gamma: float = Field(default=0.99, ge=0.0, le=1.0)
    """Discount."""
    lam: float = Field(default=0.95, ge=0.0, le=1.0)
    """λ of GAE."""
    clip: float = Field(default=0.2, gt=0.0, lt=1.0)
    """ε of the clipped ratio."""
    entropy: float = Field(default=0.01, ge=0.0)
    """Weight of the entropy bonus. Original: 0."""
    value_coef: float = Field(default=0.5, ge=0.0)
    """Weight of the value loss."""
    lr: float = Field(default=3e-4, gt=0.0, le=1.0)
    """Learning rate of Adam (ε 1e-5)."""
    decay: Literal["linear", "constant"] = "constant"
    """Of the rate."""
    clip_norm: float = Field(default=0.5, ge=0.0)
    """Largest gradient norm; 0 = no limit."""
    value_first: int = Field(default=0, ge=0)
    """First updates in which only the value learns: after a warm start the critic knows nothing."""
    target_kl: float = Field(default=0.0, ge=0.0)
    """An update ends where the approximate KL exceeds 1.5 times this; 0 is never."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.updates and self.value_first >= self.updates:
            raise ValueError(
                f"value_first {self.value_first} leaves the policy none of {self.updates} updates; give fewer"
            )
        return self


class OpponentConfig(Block):
    """Whom the learner plays (specification §5)."""

    kind: Literal["frozen", "pool", "live"] = "frozen"
    """`frozen`: the latest copy; `pool`: one of several copies; `live`: itself, which the original does."""
    pool: int = Field(default=8, ge=1, le=8)
    """Copies that a pool keeps."""
    latest: float = Field(default=0.8, ge=0.0, le=1.0)
    """Probability of the latest copy; else one of the pool, all alike."""
    every: int = Field(default=32, ge=1)
    """Steps of each environment between copies."""
    dummy_first: bool = False
    """Play the first rollout against a window that always moves up (original)."""


class MapConfig(Block):
    """From visits to a mask (specification §7; findings, recipe 7)."""

    policy: Literal["scan", "greedy", "self-play", "random", "tiles"] = "scan"
    """Who visits, where `medrl predict` is not told: the exhaustive scan, which no policy has beaten; greedy
    look-ahead; the trained policy (original); a random walk; tiles in random order."""
    paint: Literal["dense", "nested", "coarse"] = "dense"
    """What visited windows paint: the dense map inside them, scores of finer windows inside them, or their
    own score (original)."""
    fine: tuple[int, int, int] = (4, 4, 4)
    """`nested`: the finer window."""
    fine_stride: tuple[int, int, int] = (2, 2, 2)
    """`nested`: its stride."""
    aggregate: Literal["sum", "mean", "max"] = "max"
    """What becomes of several visits. Original: sum."""
    normalise: bool = False
    """Divide the map by its maximum; dense maps are probabilities already."""
    threshold: float | None = None
    """Of the map; null is chosen on validation. Original: 0.5, on the plain sum."""
    floor: float = Field(default=0.0, ge=0.0)
    """A map whose maximum is not above this gives an empty mask."""
    thresholds: tuple[float, ...] = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
    """Among which validation chooses."""
    choose: Literal["image", "mask"] = "image"
    """What chooses on validation: image labels alone, or masks."""
    smallest: int = Field(default=50, ge=0)
    """Voxels below which a component is dropped."""
    largest: bool = False
    """Keep only the largest component."""
    episodes: int = Field(default=8, ge=1)
    """Rollouts of a volume."""
    horizon: int = Field(default=32, ge=1)
    """Steps of a rollout."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, sizes in (("fine", self.fine), ("fine_stride", self.fine_stride)):
            if min(sizes) < 1:
                raise ValueError(f"{name} must be positive, got {list(sizes)}; give voxels")
        if any(step > size for step, size in zip(self.fine_stride, self.fine, strict=True)):
            raise ValueError(
                f"fine_stride {list(self.fine_stride)} exceeds fine {list(self.fine)}: voxels between "
                "windows would have no score; give at most the window"
            )
        if not self.thresholds:
            raise ValueError("thresholds is empty: there is nothing to choose from; give some")
        sums = self.aggregate == "sum" and self.paint != "dense" and not self.normalise
        given = self.thresholds if self.threshold is None else (self.threshold, *self.thresholds)
        wrong = [value for value in given if value < 0.0 or (value >= 1.0 and not sums)]
        if wrong:
            raise ValueError(
                f"thresholds must be from 0 to below 1, got {wrong[0]:g}; only those of plain sums go beyond"
            )
        return self


class ValidationConfig(Block):
    """How self-play is watched."""

    volumes: int = Field(default=8, ge=1)
    """At most so many validation volumes."""
    episodes: int = Field(default=4, ge=1)
    """Episodes of each."""
