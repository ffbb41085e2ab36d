"""Features of the cells of many volumes, kept in memory as far as it reaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medrl.core.rng import torch_generator

from .features import cell_features, cell_grid

Size = tuple[int, int, int]

IN_MEMORY = 2**30
"""Bytes of features that are kept; those of further volumes are computed each time."""


class FeatureBank:
    """Features of cells by volume.

    Args:
        volumes: N of ``(X, Y, Z)``.
        cell: Voxels of a cell.
        device: Where they are computed and kept.
        limit: Bytes to keep.
    """

    def __init__(
        self,
        volumes: Sequence[Tensor],
        cell: Size = (2, 2, 2),
        *,
        device: torch.device | None = None,
        limit: int = IN_MEMORY,
    ) -> None:
        self.volumes = volumes
        self.cell = cell
        self.device = device or torch.device("cpu")
        self._left = limit
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.volumes)

    def grid(self, index: int) -> Size:
        """Cells of a volume along each axis."""
        return cell_grid(self.volumes[index].shape, self.cell)

    def volume(self, index: int) -> Tensor:
        """Voxels of a volume."""
        return self.volumes[index].to(self.device, torch.float32)

    def features(self, index: int) -> Tensor:
        """Features ``(F, X', Y', Z')`` of a volume."""
        if index in self._kept:
            return self._kept[index]
        found = cell_features(self.volume(index), self.cell)
        size = found.numel() * found.element_size()
        if size <= self._left:
            self._left -= size
            self._kept[index] = found
        return found

    def rows(self, index: int) -> Tensor:
        """Features of the cells one by one, ``(M, F)``."""
        return self.features(index).flatten(1).T

    def draw(self, index: int, count: int, seed: int, *names: object) -> Tensor:
        """Rows of at most `count` random cells of a volume, which depend on seed and names alone."""
        rows = self.rows(index)
        if len(rows) <= count:
            return rows.contiguous()
        source = torch_generator(seed, "spars", "cells", *names, index)
        chosen = torch.randperm(len(rows), generator=source)[:count].sort().values
        return rows[chosen.to(rows.device)]
