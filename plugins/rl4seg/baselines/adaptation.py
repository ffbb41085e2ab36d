"""Adaptation without labels of any kind: statistics of the target images, and sharper predictions."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .budget import Budget, draw, optimise

if TYPE_CHECKING:
    from ..data import ImageSet


@torch.no_grad()
def adapt_batch_norm(network: nn.Module, target: ImageSet, budget: Budget) -> nn.Module:
    """Return the network with the batch statistics of all target images instead of those of the source.

    Each batch counts the same; parameters stay what they are, and so do layers without statistics.

    Source: Li et al. 2018, adaptive batch normalisation.
    """
    adapted = copy.deepcopy(network).to(budget.device)
    norms = [m for m in adapted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [module.momentum for module in norms]
    adapted.eval()
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the cumulative average
        module.train()
    for start in range(0, len(target.ids), budget.batch):
        adapted(target.images[start : start + budget.batch].to(budget.device).float())
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    adapted.eval()
    return adapted


def minimise_entropy(network: nn.Module, target: ImageSet, budget: Budget) -> nn.Module:
    """Return the network after steps on the mean entropy of its own predictions on target images.

    Only the gains and shifts of batch normalisation learn; a network without any learns as a whole.

    Source: Wang et al. 2021, Tent, over the training images of the target instead of the test stream.
    """
    adapted = copy.deepcopy(network)
    gains = [
        parameter
        for module in adapted.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in module.parameters()
    ]
    if gains:
        adapted.requires_grad_(False)
        for parameter in gains:
            parameter.requires_grad_(True)

    def loss(step: int) -> Tensor:
        images, _ = draw(target, budget, step, "target")
        return entropy(adapted(images).float())

    optimise(adapted, loss, budget)
    return adapted.requires_grad_(True)


def entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy over pixels of logits ``(N, K, *S)``, over ``log K``, in [0, 1]."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean() / math.log(logits.shape[1])
