"""How good a learned reward is on held-out pairs: BCE, calibration, and whether it finds errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medrl.core.errors import RuntimeFault
from medrl.core.metrics import auroc, reliability

_LIMIT = 2**21


@dataclass(frozen=True)
class RewardQuality:
    """Measures of rewards as probabilities that the label of a pixel is right.

    Attributes:
        bce: Binary cross-entropy in nats.
        ece: Expected calibration error of the probability itself, bins ``(low, high]``.
        auroc: Of finding wrong pixels by 1 − r; NaN if all pixels are right, or all wrong.
        accuracy: Share of pixels whose label is right.
        reward: Mean reward.
        pixels: How many were looked at.
    """

    bce: float
    ece: float
    auroc: float
    accuracy: float
    reward: float
    pixels: int

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Plain values for a log; those that are NaN are left out."""
        return {
            f"{prefix}{key}": value for key, value in asdict(self).items() if not math.isnan(float(value))
        }


def reward_quality(
    rewards: Tensor, correct: Tensor, *, mask: Tensor | None = None, bins: int = 20, limit: int = _LIMIT
) -> RewardQuality:
    """Compare rewards with whether the labels were right.

    Args:
        rewards: ``(...)`` in [0, 1].
        correct: ``(...)`` true where the label is right.
        mask: ``(...)`` pixels to look at, such as `near_foreground`; the far background is easy.
        bins: Of the calibration error.
        limit: Pixels to look at; of more, every n-th is taken.

    Raises:
        RuntimeFault: The shapes differ.

    Source: specification §14.7; findings ("error AUROC near the predicted foreground").
    """
    if rewards.shape != correct.shape or (mask is not None and mask.shape != rewards.shape):
        raise RuntimeFault(
            "quality of a reward",
            why=f"rewards {tuple(rewards.shape)} and correctness {tuple(correct.shape)} differ",
        )
    r, y = rewards.detach().reshape(-1), correct.detach().reshape(-1)
    if mask is not None:
        chosen = mask.reshape(-1).to(torch.bool)
        r, y = r[chosen], y[chosen]
    every = max(1, math.ceil(r.numel() / limit))
    probability = r[::every].double().cpu().numpy()
    right = y[::every].cpu().numpy() != 0
    return quality_of_arrays(probability, right, bins=bins)


def held_out_quality(
    reward: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    radius: int = 3,
    bins: int = 20,
    limit: int = _LIMIT,
) -> dict[str, RewardQuality]:
    """Judge a reward on held-out pairs.

    Args:
        reward: Of actions ``(N, *S)`` and images ``(N, C, *S)``, such as `RewardNet.reward`.
        batches: Images, actions and truth ``(N, *S)``, on the device of the reward.
        radius: See `near_foreground`.
        bins: Of the calibration error.
        limit: Pixels to look at; memory has a bound however many pairs there are.

    Returns:
        ``all`` pixels, and those ``near`` foreground of the action.
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    every, total = 1, 0
    for images, actions, truth in batches:
        found = reward(actions, images).expand(actions.shape)
        near = near_foreground(actions, radius)
        parts = (found.float(), truth == actions, near)
        kept.append(cast(Any, tuple(part.reshape(-1)[::every].cpu() for part in parts)))
        total += kept[-1][0].numel()
        while total > 2 * limit:
            every *= 2
            kept = [cast(Any, tuple(part[::2] for part in item)) for item in kept]
            total = sum(item[0].numel() for item in kept)
    r, y, near = (torch.cat([item[i] for item in kept]) if kept else torch.zeros(0) for i in range(3))
    return {
        "all": reward_quality(r, y, bins=bins, limit=limit),
        "near": reward_quality(r, y, mask=near, bins=bins, limit=limit),
    }


def quality_of_arrays(
    probability: NDArray[np.float64], right: NDArray[np.bool_], *, bins: int = 20
) -> RewardQuality:
    """The same for flat arrays ``(n,)``."""
    if right.size == 0:
        return RewardQuality(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    clipped = np.clip(probability, 1e-7, 1.0 - 1e-7)
    bce = -np.where(right, np.log(clipped), np.log1p(-clipped)).mean()
    diagram = reliability(probability, right.astype(np.uint8), bins=bins)
    return RewardQuality(
        bce=float(bce),
        ece=diagram.ece,
        auroc=auroc(cast(Any, 1.0 - probability), cast(Any, ~right)),
        accuracy=float(right.mean()),
        reward=float(probability.mean()),
        pixels=int(right.size),
    )


def near_foreground(labels: Tensor, radius: int = 3) -> Tensor:
    """Mark pixels at most `radius` px (chessboard distance, in the plane) from a label that is not 0.

    Args:
        labels: ``(N, *S)``; a third spatial axis is time and does not widen.
        radius: In pixels; 0 marks the foreground itself.

    Returns:
        ``(N, *S)`` boolean.
    """
    found = (labels != 0).to(torch.float32)
    if radius > 0:
        planes = found if labels.dim() == 3 else found.movedim(-1, 1)
        planes = planes.reshape(-1, 1, *labels.shape[1:3])
        planes = F.max_pool2d(planes, 2 * radius + 1, stride=1, padding=radius)
        if labels.dim() == 3:
            found = planes[:, 0]
        else:
            found = planes.view(labels.shape[0], labels.shape[3], *labels.shape[1:3]).movedim(1, -1)
    return found > 0
