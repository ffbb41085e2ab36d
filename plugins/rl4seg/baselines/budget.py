"""The same optimiser, schedule and number of steps for every baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from medrl.core import rng
from medrl.core.adaptation.actors import PixelActor
from medrl.core.errors import RuntimeFault

if TYPE_CHECKING:
    from ..data import ImageSet

_PATIENCE = 3


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a baseline may spend.

    Attributes:
        steps: Optimiser steps.
        batch: Images of a step.
        lr: Highest learning rate of Adam.
        seed: Seed of every draw.
        warmup: Steps over which the rate rises from 0.
        decay: Whether the rate falls linearly to 0 after the warm-up.
        clip: Limit of the gradient norm; 0 for none.
        batch_norm: ``batch`` adapts statistics to the batches, ``frozen`` keeps those of the start.
        bf16: Whether to compute in bfloat16.
        device: Where to compute.
    """

    steps: int
    batch: int = 16
    lr: float = 5e-4
    seed: int = 1
    warmup: int = 10
    decay: bool = True
    clip: float = 0.5
    batch_norm: str = "batch"
    bf16: bool = False
    device: str = "cpu"

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        if step <= self.warmup:
            return self.lr * step / (self.warmup + 1)
        if not self.decay:
            return self.lr
        return self.lr * (self.steps - step + 1) / max(1, self.steps - self.warmup)


def optimise(network: nn.Module, loss: Callable[[int], Tensor], budget: Budget) -> list[float]:
    """Take the steps of a budget on ``loss(step)`` (from 1) and return the losses.

    A loss or gradient that is not finite changes nothing; the network ends in evaluation mode.

    Raises:
        RuntimeFault: Three losses in a row were not finite.
    """
    device = torch.device(budget.device)
    network.to(device)
    actor = network if isinstance(network, PixelActor) else None
    mode = actor.bn_mode if actor is not None else "batch"
    if actor is not None:  # it decides for itself what training mode means
        actor.bn_mode = "eval" if budget.batch_norm == "frozen" else "batch"
    network.train()
    if budget.batch_norm == "frozen":
        frozen_batch_norm(network)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=budget.lr)
    history: list[float] = []
    lost = 0
    for step in range(1, budget.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = budget.rate(step)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=budget.bf16):
            value = loss(step)
        history.append(float(value.detach()))
        norm = math.nan
        if math.isfinite(history[-1]):
            value.backward()  # type: ignore[no-untyped-call]
            norm = float(nn.utils.clip_grad_norm_(network.parameters(), budget.clip or math.inf))
        if math.isfinite(norm):
            optimizer.step()
            lost = 0
            continue
        lost += 1
        if lost == _PATIENCE:
            raise RuntimeFault(
                f"a baseline at step {step}",
                why=f"{lost} losses or gradients in a row were not finite",
                do="lower its learning rate",
            )
    if actor is not None:
        actor.bn_mode = mode
    network.eval()
    return history


def frozen_batch_norm(network: nn.Module) -> None:
    """Put the batch normalisations of a network into evaluation mode: their statistics stay what they are."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def draw(images: ImageSet, budget: Budget, step: int, *names: object) -> tuple[Tensor, Tensor]:
    """Return images ``(B, C, *S)`` and labels ``(B, *S)`` of a step; without labels, zeros.

    The order of an epoch depends on seed, names and epoch alone; every image comes once in an epoch.
    """
    at = torch.from_numpy(indices(len(images.ids), budget.batch, budget.seed, step, *names))
    device = torch.device(budget.device)
    chosen = images.images[at].to(device=device, dtype=torch.float32)
    if images.labels is None:
        return chosen, torch.zeros((len(at), *chosen.shape[2:]), dtype=torch.long, device=device)
    return chosen, torch.as_tensor(images.labels)[at].to(device=device, dtype=torch.long)


def indices(
    count: int, batch: int, seed: int, step: int, *names: object
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the images of a step (from 1): consecutive pieces of permutations, one for each epoch."""
    first = (step - 1) * batch
    found = [
        int(_order(count, seed, place // count, names)[place % count])
        for place in range(first, first + batch)
    ]
    return np.asarray(found, dtype=np.int64)


def _order(
    count: int, seed: int, epoch: int, names: tuple[object, ...]
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.asarray(rng.numpy_generator(seed, "baseline", *names, epoch).permutation(count), dtype=np.int64)
