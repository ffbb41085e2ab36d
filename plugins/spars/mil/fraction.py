"""The fraction head: rows to learn from, draws, and the guards of a round of pseudo-masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.rng import torch_generator

from .bank import FeatureBank
from .features import cell_means
from .maps import CellNetwork

if TYPE_CHECKING:
    from medrl.plugins.spars.data_config import HeadConfig, PseudoConfig

CELLS = 8192
"""Random cells of a volume that are learned from, beside all cells with some of the object."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Cells to learn from.

    Attributes:
        features: ``(M, F)``.
        fraction: ``(M,)`` in [0, 1], how much of each cell the object fills.
    """

    features: Tensor
    fraction: Tensor

    def __len__(self) -> int:
        return len(self.fraction)


@torch.no_grad()
def collect(bank: FeatureBank, masks: Sequence[Tensor | None], *, seed: int, cells: int = CELLS) -> Rows:
    """Gather cells of all volumes: those that a mask touches, and random others.

    Args:
        bank: Cells of the volumes.
        masks: ``(X, Y, Z)`` bool of each; None for nothing.
        seed: Of the random cells.
        cells: Of a volume, beside those that the mask touches.
    """
    features, fractions = [], []
    for index, mask in enumerate(masks):
        rows = bank.rows(index)
        if mask is None:
            fraction = torch.zeros(len(rows), device=rows.device)
        else:
            fraction = cell_means(mask.to(rows.device, torch.float32), bank.cell).flatten()
        chosen = fraction > 0
        if len(rows) > cells:
            source = torch_generator(seed, "spars", "rows", index)
            chosen[torch.randperm(len(rows), generator=source)[:cells].to(rows.device)] = True
        else:
            chosen[:] = True
        features.append(rows[chosen])
        fractions.append(fraction[chosen])
    return Rows(torch.cat(features), torch.cat(fractions))


def draw(rows: Rows, count: int, *, seed: int, step: int, rank: int = 0, world_size: int = 1) -> Rows:
    """The rows of one rank in a step: all ranks draw together what one would draw alone."""
    source = torch_generator(seed, "spars", "fraction", step)
    drawn = torch.randint(len(rows), (count * world_size,), generator=source)
    own = drawn[rank * count : (rank + 1) * count].to(rows.fraction.device)
    return Rows(rows.features[own], rows.fraction[own])


def fraction_loss(head: CellNetwork, rows: Rows, *, weight: float) -> Tensor:
    """Binary cross-entropy of each cell against its fraction, which weighs 1 + weight × fraction."""
    losses = F.binary_cross_entropy_with_logits(head.logits(rows.features), rows.fraction, reduction="none")
    return (losses * (1.0 + weight * rows.fraction)).mean()


def one_cycle(step: int, steps: int, *, highest: float, warm: float = 0.3) -> float:
    """Learning rate of a step (from 1): up from 1/25 over the first 30 %, down to 1/25e4, by cosines.

    Source: Smith and Topin 2018, as in `torch.optim.lr_scheduler.OneCycleLR`.
    """
    peak = max(1.0, warm * steps) - 1.0
    place = float(step - 1)
    if place <= peak:
        return _between(highest / 25.0, highest, place / peak if peak else 1.0)
    return _between(highest, highest / 25e4, (place - peak) / max(steps - 1 - peak, 1.0))


def optimiser(head: CellNetwork, config: HeadConfig) -> torch.optim.AdamW:
    """AdamW of the head."""
    return torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=1e-2)


@dataclass(frozen=True)
class RoundFacts:
    """What is known of a round of pseudo-masks without any mask.

    Attributes:
        voxels: Of all pseudo-masks.
        found: Share of positive training volumes with a pseudo-mask.
        auc: Of the head's score of whole validation volumes; NaN where it cannot be told.
    """

    voxels: int
    found: float
    auc: float = float("nan")


def refused(before: RoundFacts, after: RoundFacts, config: PseudoConfig) -> str:
    """Why a round is left out, as a sentence; empty if it is kept.

    Args:
        before: Of the round before.
        after: Of this round.
        config: Guards.
    """
    growth = after.voxels / max(before.voxels, 1)
    if growth > config.growth or growth < 1.0 / config.growth:
        return f"pseudo-masks became {growth:.2f} times as large (pseudo.growth is {config.growth:g})"
    if before.auc - after.auc > config.auc_loss:
        return f"the area under the ROC curve of images fell from {before.auc:.3f} to {after.auc:.3f}"
    return ""


def _between(first: float, last: float, part: float) -> float:
    cosine = float(torch.cos(torch.tensor(torch.pi * part, dtype=torch.float64)))
    return last + (first - last) * 0.5 * (1.0 + cosine)
