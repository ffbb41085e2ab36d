"""Probe quality: how well a linear read-out of a teacher's features finds the labels, leaving one case out.

Dice of a teacher's logits says nothing about its features. Here a multinomial logistic regression reads the
labels out of the standardised features of all labelled cases but one, and is scored on that one; quality is
the mean Dice over cases and structures. It needs no extra labels.

Source: measured on hippocampus images (five labelled cases); not part of the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.errors import DataError
from medrl.plugins.graft.losses.features import standardised

Read = Callable[[int], Tensor]


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of the read-out.

    Attributes:
        voxels: At most so many voxels of each case are fitted; every class keeps up to an equal share and
            the sampling is undone by weights, so that rare classes are seen and the fit stays unbiased.
        penalty: Weight of the squared coefficients.
        iterations: Steps of L-BFGS.
        seed: Draws the voxels.
    """

    voxels: int = 4096
    penalty: float = 1e-3
    iterations: int = 30
    seed: int = 0


def probe_quality(read: Read, labels: Sequence[Tensor], settings: ProbeSettings | None = None) -> float:
    """Leave-one-out quality of one teacher: the mean of `case_scores`, in [0, 1]."""
    scores = [score for score in case_scores(read, labels, settings) if not math.isnan(score)]
    return sum(scores) / len(scores) if scores else 0.0


def case_scores(read: Read, labels: Sequence[Tensor], settings: ProbeSettings | None = None) -> list[float]:
    """Leave-one-out score of one teacher on each case.

    Args:
        read: Gives the features ``(C, D, H, W)`` of case k of `labels`; called a few times, so that only
            one case is in memory at a time.
        labels: Label map ``(D, H, W)`` of each labelled case.
        settings: Of the read-out.

    Returns:
        For each case the mean Dice over its structures, in [0, 1]; NaN where it neither has nor gets one.

    Raises:
        DataError: Fewer than two labelled cases, no structure in any of them, or features on another grid
            than can be resized (not 4-dimensional).
    """
    settings = settings or ProbeSettings()
    if len(labels) < 2:
        raise DataError(
            "probe quality",
            why=f"{len(labels)} labelled case; leaving one out needs two",
            do="label more cases or choose another weighting",
        )
    labels = [item.cpu() for item in labels]
    values = torch.unique(torch.cat([torch.unique(item) for item in labels]))
    if values.numel() < 2:
        raise DataError("probe quality", why="the labelled cases hold one label only", do="check the labels")
    samples = [_sample(_standard(read(k)), item, values, settings, k) for k, item in enumerate(labels)]
    scores: list[float] = []
    for held, item in enumerate(labels):
        rest = [sample for k, sample in enumerate(samples) if k != held]
        taken, classes, weights = (torch.cat(parts) for parts in zip(*rest, strict=True))
        weight, bias = _fit(taken, classes, weights, len(values), settings)
        found = torch.einsum("kc,cdhw->kdhw", weight, _standard(read(held))) + bias.view(-1, 1, 1, 1)
        truth = _resized(item, tuple(found.shape[1:]))
        dice = _dice(values.to(found.device)[found.argmax(dim=0)], truth, values)
        scores.append(math.nan if dice is None else dice)
    return scores


def probe_scores(
    readers: Sequence[Read], labels: Sequence[Tensor], settings: ProbeSettings | None = None
) -> Tensor:
    """Scores of all teachers on all cases, ``(K, N)`` float64; NaN as `case_scores` has it."""
    found = [case_scores(read, labels, settings) for read in readers]
    return torch.tensor(found, dtype=torch.float64).T


def probe_qualities(
    readers: Sequence[Read], labels: Sequence[Tensor], settings: ProbeSettings | None = None
) -> Tensor:
    """Quality of each teacher, ``(N,)``."""
    return torch.tensor([probe_quality(read, labels, settings) for read in readers])


def _standard(features: Tensor) -> Tensor:
    if features.dim() != 4:
        raise DataError(
            "probe quality", why=f"features of shape {tuple(features.shape)}, expected (C, D, H, W)"
        )
    return standardised(features[None])[0]


def _resized(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Labels on the grid of the features, by nearest neighbour."""
    if tuple(labels.shape) == size:
        return labels
    return F.interpolate(labels[None, None].float(), size=size, mode="nearest")[0, 0].to(labels.dtype)


def _sample(
    features: Tensor, labels: Tensor, values: Tensor, settings: ProbeSettings, case: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw voxels of every class: features ``(n, C)``, class numbers ``(n,)``, weights ``(n,)``."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + case)
    flat = _resized(labels, tuple(features.shape[1:])).flatten()
    classes = torch.searchsorted(values, flat)
    share = max(1, settings.voxels // values.numel())
    chosen, weights = [], []
    for k in range(values.numel()):
        members = torch.nonzero(classes == k).flatten()
        if members.numel() > share:
            picked = members[torch.randperm(members.numel(), generator=generator)[:share]]
        else:
            picked = members
        chosen.append(picked)
        weights.append(torch.full((picked.numel(),), members.numel() / max(1, picked.numel())))
    index, weight = torch.cat(chosen), torch.cat(weights)
    taken = features.flatten(1).T[index.to(features.device)]
    return taken, classes[index].to(features.device), (weight / weight.sum()).to(features.device)


def _fit(
    features: Tensor, classes: Tensor, weights: Tensor, count: int, settings: ProbeSettings
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS: coefficients ``(K, C)`` and intercepts ``(K,)``."""
    weight = torch.zeros(count, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(count, device=features.device, requires_grad=True)
    share = weights / weights.sum()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=settings.iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        ce = F.cross_entropy(features @ weight.T + bias, classes, reduction="none")
        value = (ce * share).sum() + settings.penalty * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _dice(found: Tensor, truth: Tensor, values: Tensor) -> float | None:
    """Mean Dice over structures that are present or found; None if there is none."""
    scores = []
    for value in values[values != 0].tolist():
        a, b = found == value, truth.to(found.device) == value
        total = int(a.sum() + b.sum())
        if total:
            scores.append(2.0 * int((a & b).sum()) / total)
    return sum(scores) / len(scores) if scores else None
