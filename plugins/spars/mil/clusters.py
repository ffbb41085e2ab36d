"""Cluster, then select: cells of a kind that only positive volumes have are likely the object.

Nothing is learned by gradients here, so that there is no plateau to be stuck on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medrl.core.errors import DataError
from medrl.core.rng import torch_generator

from .bank import FeatureBank
from .maps import ClusterMap, assign

if TYPE_CHECKING:
    from medrl.plugins.spars.data_config import ClusterConfig

FULL_SCALE = 7.0
"""Score that becomes 1: clusters of tumours reach about 7 with 64 volumes of each class."""
LEAST_SCALE = 3.0
"""Where even the best cluster scores less, it may be chance, and nothing is stretched further."""


@torch.no_grad()
def learn_clusters(
    bank: FeatureBank, presence: Sequence[int], config: ClusterConfig, *, seed: int
) -> ClusterMap:
    """Learn a presence map from labels of images.

    Random cells of all volumes are clustered, several times. A cluster that is present in p1 positive and p0
    negative volumes (scaled to 64 of each) gets z = (p1 - p0) / sqrt(p1 + p0 + 1); a cell has the mean z of
    its clusters.

    Args:
        bank: Cells of the training volumes.
        presence: Label of each, 0 or 1.
        config: Numbers of cells, clusters and runs.
        seed: Of cells and first centres.

    Raises:
        DataError: A class has no volume, or there are fewer cells than clusters.
    """
    labels = torch.as_tensor(list(presence), dtype=torch.int64)
    sizes = [int((labels == value).sum()) for value in (0, 1)]
    if min(sizes) == 0:
        missing = "negative" if sizes[0] == 0 else "positive"
        raise DataError(
            "labels of images",
            why=f"there is no {missing} training volume",
            do="give volumes with and without the object, in every fold",
        )
    draws = [
        torch.cat([bank.draw(k, config.cells, seed, "cluster", run) for k in range(len(bank))])
        for run in range(config.runs)
    ]
    found = ClusterMap(config.runs, config.clusters, full_scale=FULL_SCALE).to(bank.device)
    found.learn_scale(torch.cat(draws))
    for run, rows in enumerate(draws):
        if len(rows) < config.clusters:
            raise DataError(
                "clusters",
                why=f"{len(rows)} cells for {config.clusters} clusters",
                do="fewer classifier.cluster.clusters",
            )
        source = torch_generator(seed, "spars", "clusters", run)
        found.centres[run] = k_means(
            found.standardised(rows), config.clusters, iterations=config.iterations, generator=source
        )
    present = torch.zeros(2, config.runs, config.clusters, device=bank.device)
    for index in range(len(bank)):
        rows = found.standardised(bank.rows(index))
        for run in range(config.runs):
            counts = torch.bincount(assign(rows, found.centres[run]), minlength=config.clusters)
            present[int(labels[index]), run] += counts >= config.least
    found.z.copy_(selection(present[1], present[0], sizes[1], sizes[0], scale=config.scale))
    return found


def selection(
    positive: Tensor, negative: Tensor, positives: int, negatives: int, *, scale: float = 64.0
) -> Tensor:
    """Score z of clusters from the numbers of positive and negative volumes that they are present in.

    >>> selection(torch.tensor([48.0]), torch.tensor([0.0]), 64, 64)
    tensor([6.8571])
    """
    p1, p0 = positive * (scale / positives), negative * (scale / negatives)
    return (p1 - p0) / torch.sqrt(p1 + p0 + 1.0)


def stretched(z: Tensor) -> Tensor:
    """Scores of clusters, multiplied so that the highest counts as certain, where none reaches `FULL_SCALE`.

    Small or faint objects share their clusters with other tissue, so that even the best scores less; seeds of
    pseudo-masks would then never be found.

    >>> stretched(torch.tensor([4.0, 1.0, -2.0]))
    tensor([ 7.0000,  1.7500, -3.5000])
    >>> stretched(torch.tensor([8.0, 1.0])), stretched(torch.tensor([1.5]))
    (tensor([8., 1.]), tensor([3.5000]))
    """
    return z * (FULL_SCALE / float(z.max().clamp(LEAST_SCALE, FULL_SCALE)))


def k_means(rows: Tensor, clusters: int, *, iterations: int, generator: torch.Generator) -> Tensor:
    """Centres ``(K, F)`` of rows ``(M, F)``; a cluster that becomes empty keeps its centre.

    The first centre is a random row, each further one the row farthest from all centres so far, so that rare
    kinds of cells get clusters of their own.
    """
    first = int(torch.randint(len(rows), (1,), generator=generator))
    chosen = [first]
    nearest = ((rows - rows[first]) ** 2).sum(dim=1)
    for _ in range(clusters - 1):
        farthest = int(nearest.argmax())
        chosen.append(farthest)
        nearest = torch.minimum(nearest, ((rows - rows[farthest]) ** 2).sum(dim=1))
    centres = rows[torch.tensor(chosen, device=rows.device)].clone()
    for _ in range(iterations):
        group = assign(rows, centres)
        counts = torch.bincount(group, minlength=clusters)
        sums = torch.zeros_like(centres).index_add_(0, group, rows)
        means = sums / counts.clamp(min=1)[:, None]
        centres = torch.where((counts > 0)[:, None], means, centres)
    return centres
