"""The 25 views of test-time augmentation, and their mean where each of them saw something.

Views change whole frames and all frames alike. Shifts and rotations move what they see out of the image; the
original counts such pixels as probability 0, so that its probabilities sum to less than 1 near borders.
Here each view is weighted by where it saw the image (0 or 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

CONTRASTS = (1.1, 0.9, 1.25, 0.75)
SHIFTS_PX = (40, 60, 80, 120)
ANGLES_DEG = (5.0, 10.0, -5.0, -10.0)


@dataclass(frozen=True)
class View:
    """One way to show frames to a network.

    Attributes:
        kind: What is changed.
        amount: Factor of the contrast, pixels of the shift, degrees of the rotation.
        axis: Axis of a shift, 0 or 1.
    """

    kind: Literal["identity", "contrast", "shift", "rotate"] = "identity"
    amount: float = 0.0
    axis: int = 0

    @property
    def name(self) -> str:
        """Name in reports, such as ``shift x -40``."""
        if self.kind == "identity":
            return "identity"
        place = f" {'xy'[self.axis]}" if self.kind == "shift" else ""
        return f"{self.kind}{place} {self.amount:g}"

    def apply(self, images: Tensor) -> Tensor:
        """Change frames `(…, X, Y, T)`."""
        if self.kind == "contrast":
            return adjust_contrast(images, self.amount)
        if self.kind == "shift":
            return shifted(images, round(self.amount), self.axis)
        if self.kind == "rotate":
            return rotated(images, self.amount)
        return images

    def invert(self, outputs: Tensor) -> Tensor:
        """Bring outputs `(…, X, Y, T)` back to where the pixels were; 0 where the view saw nothing."""
        if self.kind == "shift":
            return shifted(outputs, -round(self.amount), self.axis)
        if self.kind == "rotate":
            return rotated(outputs, -self.amount)
        return outputs

    def seen(self, width: int, height: int) -> Tensor | None:
        """Return where the view saw the image `(X, Y)`, 0 or 1; None for everywhere."""
        if self.kind in ("identity", "contrast"):
            return None
        ones = torch.ones(width, height, 1)
        return self.invert(self.apply(ones))[..., 0]


IDENTITY = View()


def views(width: int, height: int, *, rotations: bool = True) -> tuple[View, ...]:
    """Return the 25 views of the original, the plain one first.

    Deviation: a shift as large as the image shows nothing of it and is left out.

    Source: RL4Seg3D, RLmodule_3D.py.
    """
    found = [IDENTITY, *(View("contrast", factor) for factor in CONTRASTS)]
    for axis, size in ((0, width), (1, height)):
        for pixels in SHIFTS_PX:
            if pixels < size:
                found += [View("shift", pixels, axis), View("shift", -pixels, axis)]
    if rotations:
        found += [View("rotate", angle) for angle in ANGLES_DEG]
    return tuple(found)


class MeanOfViews:
    """The mean over views of one frame, added one after the other.

    Args:
        chosen: The views; the first must see everything.
        width: Size of a frame along X.
        height: Size of a frame along Y.
    """

    def __init__(self, chosen: tuple[View, ...], width: int, height: int) -> None:
        self.chosen = chosen
        self._seen = [view.seen(width, height) for view in chosen]
        self._shares: list[Tensor | float] = []
        total = torch.zeros(width, height)
        for number, seen in enumerate(self._seen, start=1):
            if seen is None:
                total = total + 1.0
                whole = all(other is None for other in self._seen[:number])
                self._shares.append(1.0 / number if whole else 1.0 / total)
            else:
                total = total + seen
                self._shares.append(seen / total)

    def add(self, mean: Tensor | None, number: int, probabilities: Tensor) -> Tensor:
        """Add the turned-back probabilities `(K, X, Y)` of the view of that number; return the mean so far.

        The mean moves by the share of the new view, so that equal probabilities stay as they are.
        """
        if mean is None:
            return probabilities.clone()
        share = self._shares[number]
        if isinstance(share, float):
            return mean.lerp_(probabilities, share)
        return mean.lerp_(probabilities, share.to(mean.device))


def adjust_contrast(images: Tensor, factor: float) -> Tensor:
    """Return ``clip(factor x + (1 - factor) mean, 0, 1)``, with the mean of each frame of `(…, X, Y, T)`."""
    mean = images.mean(dim=(-3, -2), keepdim=True)
    return (factor * images + (1.0 - factor) * mean).clamp_(0.0, 1.0)


def shifted(images: Tensor, pixels: int, axis: int) -> Tensor:
    """Move `(…, X, Y, T)` by whole pixels along an axis of the frames; zeros come in."""
    where = axis - 3
    size = images.shape[where]
    result = torch.zeros_like(images)
    kept = size - abs(pixels)
    if kept > 0:
        start = max(pixels, 0)
        result.narrow(where, start, kept).copy_(images.narrow(where, max(-pixels, 0), kept))
    return result


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Rotate `(…, X, Y, T)` about the centre of the frames: nearest pixel, zeros come in.

    All frames and channels are turned by one gather.
    """
    index, inside = _rotation(images.shape[-3], images.shape[-2], degrees)
    flat = images.reshape(*images.shape[:-3], -1, images.shape[-1])
    turned = flat.index_select(-2, index.to(images.device)).reshape(images.shape)
    return turned * inside.to(device=images.device, dtype=images.dtype)[..., None]


@lru_cache(maxsize=32)
def _rotation(width: int, height: int, degrees: float) -> tuple[Tensor, Tensor]:
    """Return from which pixel each pixel is taken `(X·Y,)`, and whether there is one `(X, Y)`."""
    angle = math.radians(degrees)
    x = torch.arange(width, dtype=torch.float64)[:, None] - (width - 1) / 2
    y = torch.arange(height, dtype=torch.float64)[None, :] - (height - 1) / 2
    from_x = torch.round(math.cos(angle) * x + math.sin(angle) * y + (width - 1) / 2)
    from_y = torch.round(-math.sin(angle) * x + math.cos(angle) * y + (height - 1) / 2)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    index = from_x.clamp(0, width - 1) * height + from_y.clamp(0, height - 1)
    return index.to(torch.int64).reshape(-1), inside
