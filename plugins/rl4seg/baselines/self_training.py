"""Supervised steps: on source labels, on the network's own confident labels, on labels that were refined."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from medrl.core.errors import DataError

from ..scoring import probabilities
from .budget import Budget, draw, optimise

if TYPE_CHECKING:
    from ..data import ImageSet

Augment = Callable[[Tensor, int], Tensor]
"""Changes the images ``(N, C, *S)`` of a step."""

IGNORED = 255
"""Label of pixels that teach nothing."""


def supervise(
    network: nn.Module, images: ImageSet, budget: Budget, *, augment: Augment | None = None
) -> nn.Module:
    """Return the network after cross-entropy steps on the labels of a set; pixels of `IGNORED` do not count.

    Raises:
        DataError: The set has no labels.
    """
    if images.labels is None:
        raise DataError("supervised training", why="the images have no labels")
    trained = copy.deepcopy(network)

    def loss(step: int) -> Tensor:
        batch, labels = draw(images, budget, step, "labelled")
        logits = trained(batch if augment is None else augment(batch, step)).float()
        # Zero, and not NaN, for a batch of which nothing counts.
        total = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp_min(1)

    optimise(trained, loss, budget)
    return trained


def self_train(
    network: nn.Module, target: ImageSet, labels: Tensor, budget: Budget, *, augment: Augment | None = None
) -> nn.Module:
    """Return the network after steps on given labels ``(N, *S)`` of target images, such as refined ones."""
    return supervise(network, with_labels(target, labels), budget, augment=augment)


def self_train_sure(
    network: nn.Module, target: ImageSet, budget: Budget, *, sure: float = 0.9, augment: Augment | None = None
) -> nn.Module:
    """Return the network after steps on its own starting labels, where their probability exceeds `sure`."""
    found = probabilities(network, target.images, batch=budget.batch, device=budget.device).max(1)
    labels = torch.where(found.values > sure, found.indices, torch.full_like(found.indices, IGNORED))
    return self_train(network, target, labels, budget, augment=augment)


def with_labels(images: ImageSet, labels: Tensor) -> ImageSet:
    """Return the set with other labels.

    Raises:
        DataError: The labels do not fit the images.
    """
    from dataclasses import replace

    expected = (len(images.ids), *images.images.shape[2:])
    if tuple(labels.shape) != expected:
        raise DataError("labels for training", why=f"{tuple(labels.shape)} instead of {expected}")
    return replace(images, labels=labels.to(torch.uint8))
