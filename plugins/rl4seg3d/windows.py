"""Windows of frames: where they begin, reflected ends, and blending frame by frame.

A window holds whole frames, so windows only move in time. Frames are finished in order: as soon as no further
window sees a frame, its blended output leaves `Blender` and its memory is free. So the memory of a
prediction does not depend on the length of the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from medrl.core.errors import ConfigError, RuntimeFault

Blend = Literal["gaussian", "legacy", "uniform"]
BLENDS: tuple[Blend, ...] = ("gaussian", "legacy", "uniform")

WINDOW = 4
"""Frames in a window."""
STRIDE = 2
"""Largest distance of neighbouring windows."""
SIGMA = 0.125
"""Width of the Gaussian as a part of the window's size, on each axis."""
LEAST_WEIGHT = 1e-3
LEGACY_SIZE = (352, 288, 20)
"""Window for which the original computes its weights once, whatever the window is."""


def window_starts(length: int) -> list[int]:
    """Return where the windows of four frames begin: evenly spread, the first at 0, the last at the end.

    >>> window_starts(7), window_starts(8)
    ([0, 2, 3], [0, 2, 4])

    Raises:
        ConfigError: There are fewer frames than a window has.
    """
    if length < WINDOW:
        raise ConfigError("windows", why=f"{length} frames, a window has {WINDOW}")
    room = length - WINDOW
    count = math.ceil(room / STRIDE) + 1
    return [0] if count == 1 else [round(k * room / (count - 1)) for k in range(count)]


@dataclass(frozen=True)
class TimePlan:
    """How a sequence is laid into windows.

    Attributes:
        frames: Which frame of the sequence lies at each place of the padded one.
        first: Place of the first frame of the sequence.
        length: Frames of the sequence.
        starts: Where windows begin, in order. Those that see reflected frames only are left out: nothing of
            what they give would be kept.
    """

    frames: tuple[int, ...]
    first: int
    length: int
    starts: tuple[int, ...]

    def window(self, start: int) -> list[int]:
        """Return the frames of the sequence that a window sees."""
        return list(self.frames[start : start + WINDOW])


def plan_time(length: int) -> TimePlan:
    """Reflect a sequence at both ends, as far as the original does, and lay it into windows.

    Six frames are added at each end, or all but one where there are no more than six. A single frame is
    repeated.

    Deviation: the original makes an empty result of a single frame.
    """
    if length < 1:
        raise ConfigError("windows", why="a sequence without frames")
    pad = 6 if length > 6 else length - 1
    if length == 1:
        return TimePlan((0,) * WINDOW, 0, 1, (0,))
    period = 2 * (length - 1)
    frames = []
    for place in range(-pad, length + pad):
        back = place % period
        frames.append(back if back < length else period - back)
    starts = [s for s in window_starts(len(frames)) if s + WINDOW > pad and s < pad + length]
    return TimePlan(tuple(frames), pad, length, tuple(starts))


@lru_cache(maxsize=4)
def weight_map(width: int, height: int, blend: Blend = "gaussian") -> Tensor:
    """Return the weight of each voxel of a window `(X, Y, T)`, float32.

    ``gaussian`` is the product of a Gaussian on each axis, at least 0.001 (or its own least value);
    ``legacy`` is the one for 352×288×20 voxels, read at the nearest lower index, as the original caches it;
    ``uniform`` is 1.

    Raises:
        ConfigError: No such way of blending.
    """
    size = (width, height, WINDOW)
    if blend == "uniform":
        return torch.ones(size)
    if blend not in BLENDS:
        raise ConfigError(f"blend '{blend}'", why=f"expected one of {', '.join(BLENDS)}")
    whole = size if blend == "gaussian" else LEGACY_SIZE
    lines = []
    for length in whole:
        at = torch.arange(length, dtype=torch.float32) - (length - 1) / 2
        lines.append(torch.exp(-0.5 * (at / (SIGMA * length)) ** 2))
    weights = lines[0][:, None, None] * lines[1][None, :, None] * lines[2][None, None, :]
    weights.clamp_(min=max(float(weights.min()), LEAST_WEIGHT))
    if blend == "legacy":
        picks = [
            torch.arange(n, dtype=torch.int64) * length // n for n, length in zip(size, whole, strict=True)
        ]
        weights = weights[picks[0]][:, picks[1]][:, :, picks[2]].contiguous()
    return weights


class Blender:
    """Blends the outputs of windows that come in order, and gives frames back as they are finished.

    Args:
        weights: `(X, Y, T)` of `weight_map`.
        plan: The windows.

    Equal outputs give exactly their value: each frame holds the weighted mean so far, which the next window
    moves by its share.
    """

    def __init__(self, weights: Tensor, plan: TimePlan) -> None:
        self.weights = weights
        self.plan = plan
        self._mean: dict[int, Tensor] = {}
        self._total: dict[int, Tensor] = {}
        self._next = 0
        self._frame = 0

    def add(self, output: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Add the output `(K, X, Y, T)` of the next window.

        Yields:
            `(frame, output (K, X, Y))` of every frame that no further window changes.

        Raises:
            RuntimeFault: All windows were added, or the output has another length.
        """
        if self._next >= len(self.plan.starts) or output.shape[-1] != WINDOW:
            raise RuntimeFault(
                "blending",
                why=f"window {self._next + 1} of {len(self.plan.starts)}, {output.shape[-1]} frames",
            )
        start = self.plan.starts[self._next]
        self._next += 1
        last = self.plan.first + self.plan.length
        for place in range(WINDOW):
            at = start + place
            if not self.plan.first <= at < last:
                continue
            weight = self.weights[..., place]
            if at not in self._mean:
                self._mean[at] = output[..., place].float().clone()
                self._total[at] = weight.clone()
            else:
                self._total[at] += weight
                self._mean[at].lerp_(output[..., place].float(), weight / self._total[at])
        reached = self.plan.starts[self._next] if self._next < len(self.plan.starts) else last
        for at in sorted(key for key in self._mean if key < reached):
            del self._total[at]
            yield at - self.plan.first, self._mean.pop(at)


def chunks(length: int) -> list[list[int]]:
    """Return the frames of chunks of four without overlap; the last ends with the sequence.

    A sequence of fewer frames is one chunk with its last frame repeated.
    """
    if length < WINDOW:
        return [[min(k, length - 1) for k in range(WINDOW)]]
    starts = list(range(0, length - WINDOW + 1, WINDOW))
    if starts[-1] + WINDOW < length:
        starts.append(length - WINDOW)
    return [list(range(start, start + WINDOW)) for start in starts]


def take(images: Tensor, frames: Sequence[int]) -> Tensor:
    """Return some frames of `(…, T)`."""
    return images[..., list(frames)]
