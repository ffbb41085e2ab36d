"""Acquisitions under way: images that grow line by line, and what they are judged by."""

from __future__ import annotations

import torch
from torch import Tensor

from medrl.plugins.kspace.cases import Cases
from medrl.plugins.kspace.fourier import ColumnReconstruction, PointReconstruction
from medrl.plugins.kspace.rewards import Quality, Truth


class UnderWay:
    """Zero-filled images of B acquisitions, to which lines are added.

    Args:
        cases: The cases.
        quality: Says what is judged.
        case: ``(B,)`` number of each case.
        mask: ``(B, A)`` lines that are there already.

    Attributes:
        lines: The lines as they add to images.
        images: ``(B, [C], [D], H, W)`` complex.
        truth: What the images are judged by.
    """

    def __init__(self, cases: Cases, quality: Quality, case: Tensor, mask: Tensor) -> None:
        kspace = cases.rows("kspace", case)
        self._width = cases.width
        self.lines: ColumnReconstruction | PointReconstruction
        if cases.points:
            self.lines = PointReconstruction(kspace)
            self.images = self.lines.images(mask.view(len(mask), -1, cases.width))
        else:
            self.lines = ColumnReconstruction(kspace, volume=cases.volume)
            self.images = self.lines.images(mask)
        self.truth: Truth = quality.truth(cases, case)

    def put(self, where: Tensor, other: UnderWay) -> None:
        """Replace some acquisitions."""
        if isinstance(self.lines, ColumnReconstruction) and isinstance(other.lines, ColumnReconstruction):
            self.lines.lines[where] = other.lines.lines
        elif isinstance(self.lines, PointReconstruction) and isinstance(other.lines, PointReconstruction):
            self.lines.hybrid[where] = other.lines.hybrid
        self.images[where] = other.images
        self.truth.put(where, other.truth)

    def add(self, lines: Tensor) -> None:
        """Add a line ``(E,)`` to each image."""
        if isinstance(self.lines, PointReconstruction):
            depth = torch.div(lines, self._width, rounding_mode="floor")
            self.lines.add(self.images, depth, lines % self._width)
        else:
            self.lines.add(self.images, lines)

    def with_each(self, lines: Tensor) -> Tensor:
        """What each image would be with each of K further lines ``(B, K)``: ``(B, K, [C], [D], H, W)``."""
        if isinstance(self.lines, ColumnReconstruction):
            return self.lines.with_each(self.images, lines)
        found = []
        for number in range(lines.shape[1]):
            line = lines[:, number]
            depth = torch.div(line, self._width, rounding_mode="floor")
            found.append(self.lines.add(self.images.clone(), depth, line % self._width))
        return torch.stack(found, dim=1)
