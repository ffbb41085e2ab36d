"""Measuring and calibrating a reward net on pairs of subjects that it does not learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.errors import DataError
from medrl.core.learned_reward import PairBatch, PairSet, RewardNet, held_out_quality

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


class Pairs(Protocol):
    """Pairs that are read by their numbers."""

    def batch(self, numbers: Sequence[int] | NDArray[np.int64]) -> PairBatch:
        """Read pairs."""


_BATCH = 16
_HELD = 512
"""Validation pairs that are looked at."""


def divided(pairs: PairSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the pairs to learn from, and of those held out, thinned out evenly."""
    own, held = pairs.numbers("train"), pairs.numbers("val")
    return own, held[:: max(1, -(-len(held) // _HELD))]


def check_pairs(
    pairs: PairSet,
    own: NDArray[np.int64],
    held: NDArray[np.int64],
    *,
    classes: int,
    shape: tuple[int, ...],
) -> None:
    """Refuse pairs that cannot be learned from.

    Args:
        pairs: The pairs.
        own: Numbers of those to learn from.
        held: Numbers of those held out.
        classes: K of the data.
        shape: ``(C, *S)`` of their images.

    Raises:
        DataError: There are too few, or they are of other images.
    """
    if len(own) == 0 or len(held) == 0:
        raise DataError(
            "pairs",
            why=f"{len(own)} for training, {len(held)} for validation",
            do="more images (pairs.images), a larger pairs.validation, a better actor (--start style), or "
            "--pairs synthetic",
        )
    if pairs.classes != classes or pairs.shape != shape:
        raise DataError(
            "pairs",
            why=f"{pairs.classes} classes of {list(pairs.shape)}, the data have {classes} of {list(shape)}",
        )


def members(net: RewardNet) -> list[RewardNet]:
    """Return the networks of a reward net as reward nets of their own, sharing the weights."""
    return [
        RewardNet(
            [network],
            classes=net.classes,
            head=net.head,
            encoding=net.encoding,
            criterion=net.criterion,
        )
        for network in net.networks
    ]


def validate(rt: Runtime, net: RewardNet, pairs: PairSet, held: NDArray[np.int64]) -> dict[str, float]:
    """Fit the temperature on pairs of held-out subjects, and measure the reward on them.

    AUROC (of finding wrong pixels), calibration error, binary cross-entropy and mean reward are those near
    the foreground of the mask; `val_loss` is what training makes small, without the temperature. All ranks do
    the same.
    """
    temperature = net.calibrate(batches(rt, pairs, held))
    quality = held_out_quality(net.reward, batches(rt, pairs, held))
    losses: list[tuple[int, float]] = []
    net.eval()
    for batch in batches(rt, pairs, held):
        with torch.no_grad(), rt.autocast():
            losses.append((len(batch.images), float(net.loss(*batch))))
    net.train()
    near = quality["near"]
    found = {"auroc": near.auroc, "ece": near.ece, "bce": near.bce, "reward": near.reward}
    return {
        "val_loss": sum(count * value for count, value in losses) / len(held),
        **{f"val_{name}": value for name, value in found.items() if value == value},
        "temperature": sum(temperature) / len(temperature),
    }


def batches(rt: Runtime, pairs: Pairs, numbers: NDArray[np.int64]) -> Iterator[PairBatch]:
    """Yield pairs on the device, some at a time."""
    for start in range(0, len(numbers), _BATCH):
        yield pairs.batch(numbers[start : start + _BATCH]).to(rt.device)
