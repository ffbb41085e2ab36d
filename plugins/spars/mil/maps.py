"""Maps over cells: where the object may be (from clusters or a network), and how much of a cell it fills."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .features import COUNT

_CHUNK = 65536


class Standardised(nn.Module):
    """Base of what reads features: they are centred and scaled by numbers of the training volumes."""

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int = COUNT) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    @torch.no_grad()
    def learn_scale(self, rows: Tensor) -> None:
        """Take mean and standard deviation of rows ``(M, F)``."""
        exact = rows.double()
        self.mean.copy_(exact.mean(dim=0))
        self.scale.copy_(exact.std(dim=0).clamp(min=1e-6))

    def standardised(self, rows: Tensor) -> Tensor:
        """Rows ``(M, F)`` in units of the training volumes."""
        return (rows - self.mean) / self.scale


class ClusterMap(Standardised):
    """Scores a cell by its clusters: how much more often they occur in positive volumes.

    Args:
        runs: Clusterings whose scores are averaged.
        clusters: Clusters of each.
        full_scale: Score that becomes 1.
        features: Of a cell.
    """

    centres: Tensor
    z: Tensor

    def __init__(self, runs: int, clusters: int, *, full_scale: float = 7.0, features: int = COUNT) -> None:
        super().__init__(features)
        self.full_scale = full_scale
        self.register_buffer("centres", torch.zeros(runs, clusters, features))
        self.register_buffer("z", torch.zeros(runs, clusters))

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """Presence ``(M,)`` of cells ``(M, F)``; may be negative, and 1 is certain."""
        found = torch.zeros(len(rows), device=rows.device)
        for run in range(len(self.z)):
            found += self.z[run][assign(self.standardised(rows), self.centres[run])]
        return found / (len(self.z) * self.full_scale)


class CellNetwork(Standardised):
    """Multilayer perceptron over the features of a cell; gives one logit.

    Args:
        widths: Hidden layers.
        features: Of a cell.
    """

    def __init__(self, widths: Sequence[int] = (32, 32), *, features: int = COUNT) -> None:
        super().__init__(features)
        sizes = [features, *widths]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def logits(self, rows: Tensor) -> Tensor:
        """Logits ``(M,)`` of cells ``(M, F)``."""
        found: Tensor = self.layers(self.standardised(rows))
        return found.squeeze(-1)

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """Probabilities ``(M,)`` of cells ``(M, F)``, without gradients."""
        return torch.cat([torch.sigmoid(self.logits(part)) for part in torch.split(rows, _CHUNK)])


def assign(rows: Tensor, centres: Tensor) -> Tensor:
    """The nearest of the centres ``(K, F)`` of each row ``(M, F)``; of equal ones the first."""
    half = 0.5 * (centres * centres).sum(dim=1)
    return torch.cat([(half - part @ centres.T).argmin(dim=1) for part in torch.split(rows, _CHUNK)])


def map_of(network: nn.Module, features: Tensor) -> Tensor:
    """Apply a map to features ``(F, X', Y', Z')``; gives ``(X', Y', Z')``."""
    found: Tensor = network(features.flatten(1).T.contiguous())
    return found.view(features.shape[1:])
