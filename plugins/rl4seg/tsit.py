"""TS-IT, a rival of the method: one binary network for each class, which teaches itself on target images.

From the middle of training on, each network also learns from its own predictions on unlabelled target images,
at pixels where it is sure on the image and on a jittered copy of it.

Source: specification §10, RL4Seg supervised/ts-it_optimizer.py. Deviation: the networks never see target
labels (the original's config gives them), the iterator over target images goes on for ever, and the jitter
has no saturation, which a grey image does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from medrl.core import rng
from medrl.core.errors import DataError

from .baselines.budget import Budget, draw, optimise

if TYPE_CHECKING:
    from .data import ImageSet

EPOCHS = 50
START = 25
"""Epochs of the original, and the first of them that uses target images."""
SURE = 0.85


def weight(epoch: float, epochs: float = EPOCHS, start: float = START) -> float:
    """Weight λ of the loss on target images: ``0.5 exp(-2 (1 - (e - s)/(E - s)))``, 0 before `start`."""
    if epoch < start:
        return 0.0
    return 0.5 * math.exp(-2.0 * (1.0 - (epoch - start) / (epochs - start)))


class OnePerClass(nn.Module):
    """The binary networks of all foreground classes as one network with `K` log-probabilities.

    The background gets ``1 - max p``; normalised, so that the most probable class wins where it exceeds 0.5.

    Attributes:
        networks: One network with one logit for each foreground class, in the order of the labels 1, 2, ….
    """

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(N, K, *S)`` logits of images ``(N, C, *S)``."""
        found = torch.cat([network(images) for network in self.networks], dim=1).float().sigmoid()
        background = 1.0 - found.amax(1, keepdim=True)
        return torch.cat([background, found], dim=1).clamp_min(1e-6).log()


def train(
    build: Callable[[], nn.Module],
    source: ImageSet,
    target: ImageSet,
    classes: int,
    budget: Budget,
    *,
    epochs: float = EPOCHS,
    start: float = START,
) -> OnePerClass:
    """Train one binary network for each foreground class.

    Args:
        build: Makes a network with one logit.
        source: Labelled images.
        target: Images without labels.
        classes: Number of classes, background included.
        budget: Optimiser steps of each network; they count as `epochs` epochs.
        epochs: Epochs that the steps stand for.
        start: First epoch that uses target images.

    Raises:
        DataError: The source has no labels.
    """
    if source.labels is None:
        raise DataError("TS-IT", why="the source images have no labels")
    networks: list[nn.Module] = []
    for label in range(1, classes):
        with rng.isolated(rng.derive_seed(budget.seed, "tsit", label)):
            network = build()
        _train_one(network, source, target, label, budget, epochs, start)
        networks.append(network)
    return OnePerClass(networks)


def _train_one(
    network: nn.Module,
    source: ImageSet,
    target: ImageSet,
    label: int,
    budget: Budget,
    epochs: float,
    start: float,
) -> None:
    generator = rng.torch_generator(budget.seed, "tsit-jitter", label)

    def loss(step: int) -> Tensor:
        images, labels = draw(source, budget, step, "source", label)
        logits = network(images)
        total = functional.binary_cross_entropy_with_logits(logits[:, 0], (labels == label).float())
        factor = weight((step - 1) / budget.steps * epochs, epochs, start)
        if factor > 0.0:
            plain, _ = draw(target, budget, step, "target", label)
            with torch.no_grad():
                before = network(plain)[:, 0].sigmoid()
            after = network(jittered(plain, generator))[:, 0]
            total = total + factor * consistency(before, after)
        return total

    optimise(network, loss, budget)


def consistency(before: Tensor, logits: Tensor, sure: float = SURE) -> Tensor:
    """Cross-entropy of the jittered prediction to its own hard labels where both predictions are sure.

    ``mean BCE(p ⊙ M, 1[p > 0.5] ⊙ M)`` over all pixels; M is 1 where both exceed `sure` or both lie below
    ``1 - sure``.

    Args:
        before: ``(N, *S)`` probabilities of the plain image.
        logits: ``(N, *S)`` logits of the jittered one.
        sure: The bound.
    """
    found = logits.detach().sigmoid()
    mask = ((before > sure) & (found > sure)) | ((before < 1.0 - sure) & (found < 1.0 - sure))
    terms = functional.binary_cross_entropy_with_logits(logits, (found > 0.5).float(), reduction="none")
    return (terms * mask).mean()


def jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images ``(N, C, *S)`` with other brightness and contrast, then blurred or sharpened, in [0, 1].

    Brightness and contrast factors lie in [0.4, 1.6]; half of the images are blurred by a Gaussian over 5 × 5
    pixels with σ in [0.1, 2], half sharpened by a factor in [1, 1.5], as torchvision's transforms do.
    """
    shape = (len(images),) + (1,) * (images.ndim - 1)
    bright, contrast, sigma, sharp, choice = torch.rand((5, len(images)), generator=generator).to(
        images.device
    )
    result = (images * (0.4 + 1.2 * bright).view(shape)).clamp(0, 1)
    mean = result.flatten(1).mean(1).view(shape)
    result = ((result - mean) * (0.4 + 1.2 * contrast).view(shape) + mean).clamp(0, 1)
    blurred = torch.stack(
        [_smoothed(image, float(0.1 + 1.9 * s)) for image, s in zip(result, sigma, strict=True)]
    )
    smooth = torch.stack([_smoothed(image, 0.7) for image in result])
    sharpened = smooth + (1.0 + 0.5 * sharp).view(shape) * (result - smooth)
    return torch.where((choice < 0.5).view(shape), blurred, sharpened).clamp(0, 1)


def _smoothed(image: Tensor, sigma: float) -> Tensor:
    """Smooth the last two axes of ``(C, *S)`` by a Gaussian over 5 × 5 pixels; edges are mirrored."""
    at = torch.arange(-2, 3, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = functional.pad(image.reshape(-1, 1, *image.shape[-2:]), (2, 2, 2, 2), mode="reflect")
    flat = functional.conv2d(flat, kernel.view(1, 1, 5, 1))
    return functional.conv2d(flat, kernel.view(1, 1, 1, 5)).reshape(image.shape)
