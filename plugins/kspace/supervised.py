"""What the supervised stages share: batches under random masks, running means of weights, schedules."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medrl.core.rng import numpy_generator, torch_generator

from . import schedules
from .augment import augmented
from .cases import Cases
from .config import AugmentConfig, KspaceConfig, SupervisedConfig
from .fourier import fft2c, ifft2c
from .imaging import Imaging
from .masks import density_masks, validation_masks

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


@dataclass(frozen=True, eq=False)
class Batch:
    """Some cases under masks.

    Attributes:
        ids: Their names.
        cases: The cases alone, changed by augmentation.
        mask: ``(B, A)`` bool.
    """

    ids: list[str]
    cases: Cases
    mask: Tensor

    def images(self, imaging: Imaging) -> Tensor:
        """What the masked lines give, ``(B, [D], H, W)``."""
        everything = torch.arange(len(self.cases))
        return imaging.reconstruct(self.cases, everything, self.mask)


def draw_batch(
    rt: Runtime,
    cases: Cases,
    cfg: KspaceConfig,
    stage: SupervisedConfig,
    *,
    name: str,
    step: int,
    augment: AugmentConfig | None = None,
) -> Batch:
    """Draw this rank's cases of a step (from 1), augment them, and draw their masks.

    All draws depend on seed, stage, step and place alone: two ranks with n slices draw together what one rank
    draws with 2n, and a resumed run goes on as it would have.
    """
    size = batch_of(stage, cfg)
    first = (step - 1) * size * rt.world_size + rt.rank * size
    places = range(first, first + size)
    index = [_at(cfg.train.seed, name, len(cases), place) for place in places]
    sources = [torch_generator(cfg.train.seed, "kspace", name, "slice", place) for place in places]
    batch = cases.select(index)
    if augment is not None and cases.geometry == "slice" and not cases.coils:
        batch = _changed(batch, augment, sources)
    rates = torch.tensor([_rate(stage, source) for source in sources], dtype=torch.float64)
    padding = ~_columns(batch)
    rows = [
        density_masks(batch.width, rates[k : k + 1], source, padding=padding[k : k + 1])
        for k, source in enumerate(sources)
    ]
    mask = torch.cat(rows)
    if cases.points:
        mask = mask.repeat(1, cases.actions // cases.width) & batch.possible.cpu()
    return Batch(list(batch.ids), batch, mask.to(cases.device))


def held_batches(cases: Cases, stage: SupervisedConfig, size: int, rt: Runtime) -> list[Batch]:
    """This rank's share of the validation cases under masks that never change."""
    padding = ~_columns(cases)
    masks = validation_masks(cases.ids, cases.width, accelerations=stage.accelerations, padding=padding)
    if cases.points:
        masks = masks.repeat(1, cases.actions // cases.width)
    own = list(range(rt.rank, len(cases), rt.world_size))
    found = []
    for start in range(0, len(own), size):
        at = own[start : start + size]
        found.append(Batch([cases.ids[k] for k in at], cases.select(at), masks[at].to(cases.device)))
    return found


def batch_of(stage: SupervisedConfig, cfg: KspaceConfig) -> int:
    """Slices a rank and step."""
    return stage.batch or cfg.train.batch_size


def steps_of(stage: SupervisedConfig, cfg: KspaceConfig, count: int, world_size: int = 1) -> int:
    """Optimiser steps of a stage over so many slices."""
    steps = stage.steps or per_epoch(stage, cfg, count, world_size) * stage.epochs
    return min(steps, cfg.train.max_steps) if cfg.train.max_steps else steps


def per_epoch(stage: SupervisedConfig, cfg: KspaceConfig, count: int, world_size: int = 1) -> int:
    """Optimiser steps of a pass over so many slices."""
    return math.ceil(count / (batch_of(stage, cfg) * world_size))


def interval_of(cfg: KspaceConfig, steps: int) -> int:
    """Steps between validations."""
    return cfg.train.validate_every or max(1, steps // 10)


def rate_of(stage: SupervisedConfig, step: int, steps: int, epoch: int) -> float:
    """The learning rate of a step; `epoch` is the number of steps of a pass."""
    if stage.schedule == "cosine":
        return stage.lr * schedules.cosine(step, steps, warmup=stage.warmup)
    if stage.schedule == "step":
        return stage.lr * schedules.stepwise(step, epoch, stage.step_epochs)
    return stage.lr


class RunningMean(nn.Module):
    """A running mean of the weights of a network, which itself goes on learning.

    The momentum rises as (1 + n) / (10 + n) to its full value, so that short runs are not held back by the
    first weights. Buffers of running statistics are averaged as well, counters are copied.

    Args:
        network: Whose weights.
        momentum: Of old weights.
    """

    updates: Tensor

    def __init__(self, network: nn.Module, momentum: float) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(requires_grad=False).eval()
        self.momentum = momentum
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the present weights."""
        count = int(self.updates)
        keep = min(self.momentum, (1 + count) / (10 + count))
        new = network.state_dict()
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[name], 1.0 - keep)
            else:
                value.copy_(new[name])
        self.updates += 1


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Numbers and tensors as plain numbers."""
    return {
        name: float(value.detach()) if isinstance(value, Tensor) else float(value)
        for name, value in values.items()
    }


# -- private -----------------------------------------------------------------------------------------


def _at(seed: int, name: str, count: int, place: int) -> int:
    """The case at a place of an endless list of passes, each in an order of its own."""
    order = numpy_generator(seed, "kspace", name, "order", place // count).permutation(count)
    return int(order[place % count])


def _rate(stage: SupervisedConfig, source: torch.Generator) -> float:
    """Share of columns that a slice is seen with."""
    full, share = (float(value) for value in torch.rand(2, generator=source, dtype=torch.float64))
    if full < stage.full:
        return 1.0
    low, high = stage.rates
    return low + (high - low) * share


def _columns(cases: Cases) -> Tensor:
    """Columns that hold a measurement ``(N, W)`` bool: those that may be acquired, and the initial ones."""
    lines = (cases.possible | cases.initial).cpu()
    return lines.view(len(cases), -1, cases.width).any(dim=1) if cases.points else lines


def _changed(batch: Cases, augment: AugmentConfig, sources: list[torch.Generator]) -> Cases:
    """The same slices after augmentation."""
    from dataclasses import replace

    images, labels = augmented(ifft2c(batch.kspace), batch.labels, augment, sources)
    return replace(batch, kspace=fft2c(images), target=images.abs(), labels=labels)
