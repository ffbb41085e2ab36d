"""Annealed top-k: the likeliest cells of a volume tell its label; many become few, from several starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.errors import DataError
from medrl.core.rng import derive_seed, isolated, numpy_generator

from .bank import FeatureBank
from .fraction import one_cycle
from .maps import CellNetwork

if TYPE_CHECKING:
    from medrl.plugins.spars.data_config import TopkConfig

REFERENCE = 24576
"""Cells of the volumes for which k is given."""
BATCH = 8
"""Volumes of a step, half of them positive."""
CELLS = 8192
"""Random cells of a volume that are looked at."""


def annealed(step: int, steps: int, *, first: int, last: int, cells: int, whole: int) -> int:
    """K of a step (from 1): from `first` to `last` geometrically over the first three quarters.

    Args:
        step: Of the start.
        steps: Of the start.
        first: k for `REFERENCE` cells, at the beginning.
        last: k for `REFERENCE` cells, at the end.
        cells: Cells that are looked at.
        whole: Cells of the volume.
    """
    part = min(1.0, (step - 1) / max(1.0, 0.75 * steps - 1.0))
    k: float = first * (last / first) ** part * (whole / REFERENCE) * (cells / whole)
    return max(1, min(cells, round(k)))


def learn_topk(
    bank: FeatureBank,
    presence: Sequence[int],
    config: TopkConfig,
    *,
    seed: int,
    widths: Sequence[int] = (32, 32),
) -> tuple[CellNetwork, list[float]]:
    """Learn a presence map from labels of images; the start with the least bag loss is kept.

    Most starts stay where every volume looks alike (a loss of 0.69); the bag loss tells them from the others
    without any mask.

    Args:
        bank: Cells of the training volumes.
        presence: Label of each, 0 or 1.
        config: k, steps, starts.
        seed: Of weights and draws.
        widths: Hidden layers of the network.

    Returns:
        The network, and the bag loss of each start.

    Raises:
        DataError: A class has no volume.
    """
    classes = [[k for k, label in enumerate(presence) if label == value] for value in (0, 1)]
    if not all(classes):
        raise DataError(
            "labels of images",
            why="all training volumes are alike",
            do="give volumes with and without the object",
        )
    kept = [bank.draw(k, CELLS, seed, "topk") for k in range(len(bank))]
    found: list[tuple[float, int, CellNetwork]] = []
    for start in range(config.starts):
        with isolated(derive_seed(seed, "spars", "topk", start)):
            network = CellNetwork(widths).to(bank.device)
        network.learn_scale(torch.cat([rows[:: max(1, len(rows) // 512)] for rows in kept]))
        loss = _train(network, bank, kept, classes, config, seed, start)
        found.append((loss, start, network))
    best = min(found, key=lambda item: item[:2])
    return best[2], [item[0] for item in found]


def bag_logits(network: CellNetwork, bags: Sequence[Tensor], k: int) -> Tensor:
    """Mean of the k highest logits of each bag of rows ``(M, F)``; ``(B,)``."""
    sizes = [len(rows) for rows in bags]
    logits = torch.split(network.logits(torch.cat(list(bags))), sizes)
    return torch.stack([part.topk(min(k, len(part))).values.mean() for part in logits])


def _train(
    network: CellNetwork,
    bank: FeatureBank,
    kept: Sequence[Tensor],
    classes: Sequence[Sequence[int]],
    config: TopkConfig,
    seed: int,
    start: int,
) -> float:
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr)
    rng = numpy_generator(seed, "spars", "topk", "bags", start)
    for step in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, config.steps, highest=config.lr)
        drawn = [int(index) for part in classes for index in rng.choice(part, BATCH // 2)]
        k = _k(bank, kept, drawn[0], step, config)
        logits = bag_logits(network, [kept[index] for index in drawn], k)
        labels = torch.tensor([0.0, 1.0], device=logits.device).repeat_interleave(BATCH // 2)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _bag_loss(network, bank, kept, classes, config)


@torch.no_grad()
def _bag_loss(
    network: CellNetwork,
    bank: FeatureBank,
    kept: Sequence[Tensor],
    classes: Sequence[Sequence[int]],
    config: TopkConfig,
) -> float:
    """Mean bag loss of all training volumes, both classes alike."""
    losses = []
    for value, part in enumerate(classes):
        logits = [
            bag_logits(network, [kept[index]], _k(bank, kept, index, config.steps, config)) for index in part
        ]
        every = torch.cat(logits)
        losses.append(float(F.binary_cross_entropy_with_logits(every, torch.full_like(every, float(value)))))
    return sum(losses) / len(losses)


def _k(bank: FeatureBank, kept: Sequence[Tensor], index: int, step: int, config: TopkConfig) -> int:
    return annealed(
        step,
        config.steps,
        first=config.first,
        last=config.last,
        cells=len(kept[index]),
        whole=math.prod(bank.grid(index)),
    )
