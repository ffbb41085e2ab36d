"""What the policy sees of each teacher, pooled before anything else so that an episode stays small.

Four parts for each teacher and sample: a pooled map of its features and logits, the likeness of its features
to the student's, its quality, and its disagreement with the others (optional, as is a flag for cases that the
teacher was trained on).

Source: specification §5; models/policy.py of the original, which pools after the first convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int, int]

POOLED: Size = (5, 32, 32)


@dataclass(frozen=True)
class PolicyState:
    """The state of one batch.

    Attributes:
        spatial: For each teacher ``(B, C_i, 5, 32, 32)``; ``(B, C_i, D, H, W)`` if not pooled first.
        scalars: ``(B, N, s)``.
    """

    spatial: tuple[Tensor, ...]
    scalars: Tensor

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.scalars.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of the state."""
        return sum(t.numel() * t.element_size() for t in (*self.spatial, self.scalars))


def make_state(
    features: Sequence[Mapping[str, Tensor]],
    logits: Sequence[Tensor],
    *,
    taps: Sequence[str],
    similarity: Mapping[str, Tensor],
    quality: Tensor,
    disagreement: Tensor | None = None,
    in_sample: Tensor | None = None,
    pooled_first: bool = True,
    normalise: bool = True,
    size: Size = POOLED,
) -> PolicyState:
    """Build the state of a batch from what the teachers say about it.

    Args:
        features: For each teacher its features by tap, ``(B, F, D', H', W')``.
        logits: For each teacher ``(B, K, D, H, W)``.
        taps: Taps that are distilled.
        similarity: For each tap ``(B, N)``.
        quality: ``(B, N)``.
        disagreement: ``(B, N)``, if the policy has that part.
        in_sample: ``(B, N)``, 1 where the teacher was trained on the case, if the policy has that part.
        pooled_first: Pool every map to `size`; else resize to the first tap's grid as the original does.
        normalise: Divide each map, once pooled, by its root mean square, so that a teacher's scale says
            nothing.
        size: Of the pooled maps.

    Returns:
        Float32 tensors without a graph.
    """
    spatial = []
    for teacher, output in zip(features, logits, strict=True):
        parts = [teacher[tap].detach() for tap in taps] + [output.detach()]
        if pooled_first:
            parts = [_pooled(part, size) for part in parts]
        else:
            parts = [_matched(part.float(), parts[0]) for part in parts]
        if normalise:
            parts = [
                part / (part.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt() + 1e-6) for part in parts
            ]
        spatial.append(torch.cat(parts, dim=1))
    scalars = [similarity[tap].detach().float() for tap in taps] + [quality.detach().float()]
    scalars += [part.detach().float() for part in (disagreement, in_sample) if part is not None]
    return PolicyState(tuple(spatial), torch.stack(scalars, dim=2))


def state_channels(teacher: Mapping[str, int], taps: Sequence[str]) -> int:
    """Channels of one teacher's map: its taps and its logits."""
    return sum(teacher[tap] for tap in taps) + teacher["logits"]


def state_scalars(taps: Sequence[str], *, disagreement: bool, in_sample: bool = False) -> int:
    """Scalars of each teacher: likeness at each tap, quality, and the optional parts."""
    return len(tuple(taps)) + 1 + int(disagreement) + int(in_sample)


def _pooled(part: Tensor, size: Size) -> Tensor:
    """Means over the cells of a grid in float32, ``(B, C, *size)``.

    On a CPU the voxels of equal cells are added slice by slice, one channel at a time in a buffer that stays
    in its cache, so that the map as a whole is never copied to float32.
    """
    extent = part.shape[2:]
    if part.device.type != "cpu" or any(whole % cells for whole, cells in zip(extent, size, strict=True)):
        return F.adaptive_avg_pool3d(part.float(), size)
    channels = part.reshape(-1, *extent)
    depth, height, width = (whole // cells for whole, cells in zip(extent, size, strict=True))
    buffer = torch.empty(extent)
    cells = buffer.view(size[0], depth, size[1], height, extent[2])
    rows = torch.zeros(len(channels), size[0], size[1], extent[2])
    for channel, total in zip(channels, rows, strict=True):
        buffer.copy_(channel)
        for i, j in product(range(depth), range(height)):
            total += cells[:, i, :, j]
    means = rows.view(len(channels), *size, width).mean(dim=-1) / (depth * height)
    return means.view(*part.shape[:2], *size)


def _matched(part: Tensor, like: Tensor) -> Tensor:
    if part.shape[2:] == like.shape[2:]:
        return part
    return F.interpolate(part, size=tuple(like.shape[2:]), mode="trilinear", align_corners=True)
