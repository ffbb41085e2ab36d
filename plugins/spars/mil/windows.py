"""Windows to learn from: bags of an image with its label, and crops that masks choose and label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

Size = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Crops:
    """Windows of one volume.

    Attributes:
        corners: ``(M, 3)`` int64, minimum corners in voxels.
        size: Of every window, in voxels.
        labels: ``(M,)`` float32; of crops their own, of a bag that of the image.
    """

    corners: Tensor
    size: Size
    labels: Tensor


def fitted(window: Sequence[int], shape: Sequence[int]) -> Size:
    """A window no larger than the volume."""
    x, y, z = (min(int(size), int(full)) for size, full in zip(window, shape, strict=True))
    return x, y, z


def draw_bag(
    shape: Sequence[int], label: int, window: Size, count: int, generator: torch.Generator, *, step: int = 4
) -> Crops:
    """Random windows of a volume, on the lattice of `step` voxels.

    Args:
        shape: Of the volume.
        label: Of the image.
        window: In voxels.
        count: Windows.
        generator: Source of the corners.
        step: Of the lattice.
    """
    size = fitted(window, shape)
    free = [(full - part) // step + 1 for full, part in zip(shape, size, strict=True)]
    drawn = torch.stack([torch.randint(n, (count,), generator=generator) for n in free], dim=1) * step
    return Crops(drawn, size, torch.full((count,), float(label)))


def cut(volume: Tensor, corners: Tensor, size: Sequence[int], *, margin: int = 0) -> Tensor:
    """Windows ``(M, *size)`` of a volume ``(X, Y, Z)`` at minimum corners ``(M, 3)``.

    Args:
        volume: What is cut.
        corners: In voxels.
        size: In voxels.
        margin: Voxels that are cut in addition on every side; zeros outside the volume.
    """
    if margin:
        volume = F.pad(volume, [margin] * 6)
    dx, dy, dz = (int(value) + 2 * margin for value in size)
    return torch.stack([volume[x : x + dx, y : y + dy, z : z + dz] for x, y, z in corners.tolist()])


def dilated(mask: Tensor) -> Tensor:
    """A mask ``(X, Y, Z)`` dilated once by its six neighbours, as the original does before it crops."""
    return torch.from_numpy(ndimage.binary_dilation(mask.numpy()))


def draw_crops(mask: Tensor, window: Size, count: int, generator: torch.Generator) -> Crops:
    """Crops of a volume that a mask chooses and labels; half are positive where there is an object.

    The minimum corner of a positive crop is a random voxel of the object, that of a negative one any other
    voxel. A crop is positive if it holds any voxel of the object.

    Deviation: corners are moved into the volume, where the original stretches slivers; and the label is the
    maximum of the crop at native resolution, where the original truncates an interpolated one, so that small
    objects become negative (§9.7, §9.14).

    Args:
        mask: ``(X, Y, Z)`` bool, of the object.
        window: In voxels.
        count: Crops.
        generator: Source of the corners.
    """
    size = fitted(window, mask.shape)
    most = torch.tensor([full - part for full, part in zip(mask.shape, size, strict=True)])
    flat = mask.flatten()
    inside = flat.nonzero().flatten()
    positives = count // 2 if len(inside) else 0
    places = [inside[torch.randint(len(inside), (positives,), generator=generator)]] if positives else []
    places.append(_others(flat, count - positives, generator))
    index = torch.cat(places).numpy()
    corners = torch.from_numpy(np.stack(np.unravel_index(index, tuple(mask.shape)), axis=1))
    corners = torch.minimum(corners, most)
    labels = [float(cut(mask, corners[k : k + 1], size).any()) for k in range(len(corners))]
    return Crops(corners, size, torch.tensor(labels))


def bag_logit(logits: Tensor, top: int) -> Tensor:
    """Mean of the `top` highest of the window logits ``(B, K)`` of each bag; ``(B,)``.

    >>> bag_logit(torch.tensor([[0.0, 4.0, 2.0]]), 2)
    tensor([3.])
    """
    return logits.topk(min(top, logits.shape[1]), dim=1).values.mean(dim=1)


def annealed_top(step: int, steps: int, *, windows: int, top: int) -> int:
    """Windows whose mean is the logit of a bag at a step (from 1): all at first, `top` from half-way on."""
    part = min(1.0, (step - 1) / max(1.0, steps / 2))
    count: float = windows * (top / windows) ** part
    return max(top, round(count))


def bag_loss(logits: Tensor, labels: Tensor, top: int) -> Tensor:
    """Binary cross-entropy of bags with window logits ``(B, K)`` and labels ``(B,)``."""
    return F.binary_cross_entropy_with_logits(bag_logit(logits, top), labels)


def _others(flat: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random voxels outside the object; nothing lists all of them."""
    found: list[Tensor] = []
    have = 0
    for _ in range(64):
        drawn = torch.randint(len(flat), (2 * count + 8,), generator=generator)
        drawn = drawn[~flat[drawn]]
        found.append(drawn)
        have += len(drawn)
        if have >= count:
            break
    kept = torch.cat(found)[:count]
    # A mask that leaves nearly nothing outside: repeat what there is, or take any voxel.
    if len(kept) < count:
        rest = (~flat).nonzero().flatten() if not bool(flat.all()) else torch.arange(len(flat))
        kept = torch.cat([kept, rest[torch.randint(len(rest), (count - len(kept),), generator=generator)]])
    return kept
