"""The environment on drawn volumes, for whoever has no run: to check it, to play it, to learn on it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from medrl.core import rng
from medrl.core.errors import ConfigError

from .boxsum import integral, window_means
from .env import HuntEnv
from .lattice import Size
from .rewards import DifferenceReward, MultiscaleReward, Reward, ShapedReward, SignReward
from .table import ScoreTable


class BrightScorer:
    """The score of a window is its mean above a level: of drawn volumes, how much of the ball is in it.

    Args:
        level: Voxels above it count.
    """

    kind = "bright"
    has_dense = True

    def __init__(self, level: float = 0.5) -> None:
        self.level = float(level)
        self.digest = hashlib.sha256(f"bright {self.level}".encode()).hexdigest()

    def dense(self, volume: Tensor) -> Tensor:
        """1 where a voxel is above the level ``(X, Y, Z)`` float32."""
        return (volume > self.level).float()

    def windows(self, volume: Tensor, corners: Tensor, window: Size) -> Tensor:
        """Parts of windows above the level ``(M,)``."""
        return window_means(integral(self.dense(volume)), corners, window)


def hunt(
    *,
    num_envs: int = 4,
    volumes: int = 6,
    size: tuple[int, int, int] = (24, 24, 16),
    window: tuple[int, int, int] = (8, 8, 8),
    stride: int = 4,
    horizon: int = 16,
    tau: float | None = 0.3,
    reward: Literal["sign", "difference", "multiscale", "shaped"] = "sign",
    start: Literal["random", "centre"] = "random",
    view: bool = False,
    seed: int = 0,
) -> HuntEnv:
    """Hunt for a bright ball in dim volumes, against a window that moves at random.

    Runs make the environment of their own volumes and classifiers, see `HuntEnv`.

    Args:
        num_envs: Games at once.
        volumes: Volumes to choose from.
        size: Their voxels, at least 12 along each axis.
        window: Voxels of a window.
        stride: Voxels of a move.
        horizon: Steps of a game.
        tau: Score that ends a game; null is never.
        reward: ``sign``, ``difference``, ``multiscale`` or ``shaped``.
        start: ``random`` or ``centre``.
        view: Also observe the volume at low resolution, with the window in it.
        seed: Of volumes and games.

    Raises:
        ConfigError: The numbers do not fit each other.
    """
    if volumes < 1 or min(size) < 12:
        raise ConfigError("spars.hunt", why=f"{volumes} volumes of {list(size)}", do="at least 1, and 12")
    rewards: dict[str, Reward] = {
        "sign": SignReward(),
        "difference": DifferenceReward(),
        "multiscale": MultiscaleReward(),
        "shaped": ShapedReward(),
    }
    if reward not in rewards:
        raise ConfigError("reward", why=f"unknown: {reward!r}", do=", ".join(rewards))
    generator = rng.torch_generator(seed, "spars", "balls")
    drawn = [_ball(size, generator) for _ in range(volumes)]
    table = ScoreTable(drawn, BrightScorer(), window=window, stride=stride)
    return HuntEnv(
        table,
        rewards[reward],
        num_envs=num_envs,
        start=start,
        tau=tau,
        horizon=horizon,
        observe=("view",) if view else (),
        seed=seed,
    )


def _ball(size: Sequence[int], generator: torch.Generator) -> Tensor:
    axes = torch.meshgrid(*(torch.arange(length) for length in size), indexing="ij")
    place, noise = torch.rand(3, generator=generator), torch.rand(tuple(size), generator=generator)
    centre = [5.0 + float(u) * (length - 11) for u, length in zip(place, size, strict=True)]
    far = torch.stack([(axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)]).sum(0)
    return torch.where(far <= 16.0, 0.8, 0.1) + 0.1 * noise
