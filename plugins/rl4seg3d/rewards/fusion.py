"""Several rewards made one, voxel by voxel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medrl.core.errors import RuntimeFault
from medrl.core.learned_reward.net import Reduce, stretch_frames
from medrl.core.learned_reward.net import fuse as fuse_stacked


def fuse(rewards: Sequence[Tensor], how: Reduce = "min") -> Tensor:
    """Make one reward of any number of them.

    Args:
        rewards: One or more ``(N, *S)`` in [0, 1].
        how: ``min`` (original), ``mean`` or ``product``.

    Returns:
        ``(N, *S)``.

    Raises:
        RuntimeFault: There is none, or their shapes differ.
        ConfigError: Unknown `how`.

    Source: specification §6, fusion. Deviation: the original fuses the first two and forgets the others.

    >>> fuse([torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.4, 0.6, 0.2])]).tolist()
    [0.0, 0.5, 0.20000000298023224]
    """
    shapes = {tuple(reward.shape) for reward in rewards}
    if len(shapes) != 1:
        raise RuntimeFault("fused reward", why=f"{len(rewards)} rewards of shapes {sorted(shapes)}")
    return fuse_stacked(torch.stack(tuple(rewards)), how)


def normalise(rewards: Tensor) -> Tensor:
    """Stretch every frame so that its least reward is 0 and its greatest 1; the result is always finite.

    A constant frame stays as it is, where the original divides by zero. A reward that is not finite earns 0.

    Args:
        rewards: ``(N, X, Y, T)``.

    Source: specification §6, §10.11: (r − min) / max(r − min), frame by frame.
    """
    finite = torch.isfinite(rewards)
    if not bool(finite.all()):
        rewards = torch.where(finite, rewards, torch.zeros_like(rewards))
    return stretch_frames(rewards)
