"""Label maps made wrong in the ways in which segmentation networks go wrong.

Label maps ``(N, *S)`` of K classes, S = (X, Y) or (X, Y, T). What is done in the plane moves smoothly through
the frames of a window; only single pixels differ from frame to frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medrl.core.errors import ConfigError, RuntimeFault

from .fields import (
    Range,
    checked_range,
    column,
    coordinates,
    generators,
    log_uniform,
    normals,
    refuse,
    sample_images,
    sample_labels,
    smooth_field,
    uniform,
)

_BLOBS = 2
_BANDS = 2
_KNOTS = 5

FAMILIES = ("warp", "blob", "grow", "band", "salt")


@dataclass(frozen=True, kw_only=True)
class AffineRanges:
    """A random affine map in the plane, about the centre of the image.

    Attributes:
        rotation: Degrees.
        scale: Factor of sizes, even in its logarithm.
        shift: Part of the side, along each axis.

    Raises:
        ConfigError: A range makes no sense.
    """

    rotation: Range = (-15.0, 15.0)
    scale: Range = (0.85, 1.2)
    shift: Range = (-0.08, 0.08)

    def scaled(self, strength: float) -> AffineRanges:
        """Go `strength` times as far."""
        low, high = (math.log(value) * strength for value in self.scale)
        return AffineRanges(
            rotation=(self.rotation[0] * strength, self.rotation[1] * strength),
            scale=(math.exp(low), math.exp(high)),
            shift=(self.shift[0] * strength, self.shift[1] * strength),
        )

    def __post_init__(self) -> None:
        refuse(
            "affine map",
            checked_range("rotation", self.rotation, -180.0, 180.0),
            checked_range("scale", self.scale, 0.0, 10.0, positive=True),
            checked_range("shift", self.shift, -1.0, 1.0),
        )


@dataclass(frozen=True, kw_only=True)
class CorruptionRanges:
    """How probable and how strong each family of corruption is; probability 0 leaves a family out.

    Lengths are parts of the smaller side of the image. A sample for which chance chose no family gets one.

    Attributes:
        warp: Probability of a smooth deformation.
        warp_size: Its standard deviation at the knots of a 5 by 5 grid.
        blob: Probability of one or two ellipses that get another label.
        blob_size: Their semi-axes.
        grow: Probability that a class grows over its neighbours; if background grows, structures are eroded.
        grow_size: By how much.
        band: Probability of one or two straight bands that become background.
        band_size: Their width.
        salt: Probability of single wrong pixels.
        salt_share: Their share, even in its logarithm.

    Raises:
        ConfigError: A range makes no sense, or every probability is 0.

    Source: findings step 3; the ranges are medrl's.
    """

    warp: float = 0.7
    warp_size: Range = (0.01, 0.05)
    blob: float = 0.4
    blob_size: Range = (0.03, 0.15)
    grow: float = 0.5
    grow_size: Range = (0.016, 0.06)
    band: float = 0.3
    band_size: Range = (0.02, 0.1)
    salt: float = 0.3
    salt_share: Range = (0.002, 0.05)

    def __post_init__(self) -> None:
        chances = [getattr(self, name) for name in FAMILIES]
        refuse(
            "corruption",
            *(
                f"{name} is {value}, expected a probability"
                for name, value in zip(FAMILIES, chances, strict=True)
                if not 0.0 <= value <= 1.0
            ),
            "" if any(chance > 0 for chance in chances) else "every family is left out",
            checked_range("warp_size", self.warp_size, 0.0, 1.0),
            checked_range("blob_size", self.blob_size, 0.0, 1.0, positive=True),
            checked_range("grow_size", self.grow_size, 0.0, 0.25),
            checked_range("band_size", self.band_size, 0.0, 1.0),
            checked_range("salt_share", self.salt_share, 0.0, 1.0, positive=True),
        )

    def only(self, *families: str) -> CorruptionRanges:
        """These families always, and no others: warp, blob, grow, band, salt.

        Raises:
            ConfigError: A family is unknown.
        """
        unknown = set(families) - set(FAMILIES)
        if unknown or not families:
            raise ConfigError("corruption", why=f"unknown families: {', '.join(sorted(unknown)) or 'none'}")
        chances: dict[str, Any] = {name: float(name in families) for name in FAMILIES}
        return replace(self, **chances)


AFFINE = AffineRanges()
"""Moderate affine maps."""
CORRUPTION = CorruptionRanges()
"""Every family of corruption."""


def jitter_masks(
    masks: Tensor, *, seed: int, keys: Sequence[object], ranges: AffineRanges = AFFINE
) -> Tensor:
    """Move label maps by random affine maps, the same in all frames.

    Args:
        masks: ``(N, *S)`` of any integer type.
        seed: Of all draws.
        keys: N names that with the seed decide what is drawn.
        ranges: How far.

    Returns:
        ``(N, *S)`` of the same type; beyond the border the border's labels continue.
    """
    streams = _streams(masks, seed, "jitter", keys)
    if not streams:
        return masks.clone()
    return sample_labels(masks, *_affine(masks, streams, ranges))


def jitter_images(
    images: Tensor, masks: Tensor, *, seed: int, keys: Sequence[object], ranges: AffineRanges = AFFINE
) -> tuple[Tensor, Tensor]:
    """Move images and their label maps by the same random affine maps, all frames alike.

    Args:
        images: ``(N, C, *S)``.
        masks: ``(N, *S)`` of any integer type.
        seed: Of all draws.
        keys: N names that with the seed decide what is drawn.
        ranges: How far.

    Returns:
        Images, linearly interpolated and 0 beyond the border, and label maps as from `jitter_masks`.
    """
    streams = _streams(masks, seed, "jitter", keys)
    if not streams:
        return images.clone(), masks.clone()
    x, y = _affine(masks, streams, ranges)
    return sample_images(images, x, y), sample_labels(masks, x, y)


def _affine(masks: Tensor, streams: list[np.random.Generator], ranges: AffineRanges) -> tuple[Tensor, Tensor]:
    """Where each pixel of moved label maps comes from, −1 to 1 along x and y."""
    r = ranges
    unit = np.stack([stream.random(4) for stream in streams])
    dims = masks.dim()

    def number(values: NDArray[Any]) -> Tensor:
        return column(values, dims, masks.device)

    angle = number(np.deg2rad(uniform(unit[:, 0], r.rotation)))
    scale = number(log_uniform(unit[:, 1], r.scale))
    shift_x, shift_y = (2.0 * number(uniform(unit[:, i], r.shift)) for i in (2, 3))
    x, y = _plane(masks)
    aspect = (masks.shape[1] - 1) / max(1, masks.shape[2] - 1)
    away_x, away_y = (x - shift_x) / scale, (y - shift_y) / scale
    from_x = torch.cos(angle) * away_x + torch.sin(angle) / aspect * away_y
    from_y = torch.cos(angle) * away_y - torch.sin(angle) * aspect * away_x
    return from_x.expand(masks.shape), from_y.expand(masks.shape)


def corrupt_masks(
    masks: Tensor,
    classes: int,
    *,
    seed: int,
    keys: Sequence[object],
    ranges: CorruptionRanges = CORRUPTION,
) -> Tensor:
    """Corrupt label maps: warp, relabelled blobs, growth or erosion, lost bands, wrong pixels.

    Args:
        masks: ``(N, *S)`` of any integer type, labels in [0, classes).
        classes: K ≥ 2.
        seed: Of all draws.
        keys: N names that with the seed decide what is drawn, whatever the batch.
        ranges: Probability and strength of each family.

    Returns:
        ``(N, *S)`` of the same type, labels in [0, classes).

    Raises:
        RuntimeFault: Another number of keys than masks, or a label outside [0, classes).
    """
    streams = _streams(masks, seed, "corruption", keys)
    return _corrupt(masks, classes, streams, ranges)


def corrupt_mask(
    mask: Tensor, classes: int, rng: np.random.Generator, ranges: CorruptionRanges = CORRUPTION
) -> Tensor:
    """Corrupt one label map ``(*S)`` with a generator of the caller's; see `corrupt_masks`."""
    return _corrupt(mask.unsqueeze(0), classes, [rng], ranges)[0]


def _corrupt(
    masks: Tensor, classes: int, streams: list[np.random.Generator], ranges: CorruptionRanges
) -> Tensor:
    if not streams:
        return masks.clone()
    if int(masks.min()) < 0 or int(masks.max()) >= classes:
        raise RuntimeFault(
            "corruption of masks",
            why=f"labels from {int(masks.min())} to {int(masks.max())} for {classes} classes",
        )
    unit = np.stack([stream.random(64) for stream in streams])
    chances = np.array([getattr(ranges, name) for name in FAMILIES])
    active = unit[:, : len(FAMILIES)] < chances
    # A sample that would stay as it is gets one of the families that are in use.
    usable = np.cumsum(chances) / chances.sum()
    instead = np.searchsorted(usable, unit[:, 5], side="right").clip(0, len(FAMILIES) - 1)
    idle = np.flatnonzero(~active.any(axis=1))
    active[idle, instead[idle]] = True
    changed = masks.clone()
    steps: tuple[Callable[..., Tensor], ...] = (_warp, _relabel, _grow, _drop, _salt)
    for family, step in enumerate(steps):
        rows = np.flatnonzero(active[:, family])
        if rows.size:
            at = torch.from_numpy(rows).to(masks.device)
            chosen = [streams[row] for row in rows]
            changed[at] = step(changed[at], classes, unit[rows, 8:], chosen, ranges)
    return changed


def _warp(
    masks: Tensor, classes: int, unit: NDArray[Any], streams: list[np.random.Generator], ranges: Any
) -> Tensor:
    """Deform smoothly."""
    del classes
    shape = masks.shape[1:]
    knots = normals(streams, (2, _KNOTS, _KNOTS))
    if len(shape) == 3:  # most of the deformation stays, a part of it goes from one end to the other
        ends = normals(streams, (2, _KNOTS, _KNOTS, 2))
        knots = 0.9 * knots.unsqueeze(-1) + math.sqrt(1.0 - 0.9**2) * ends
    field = smooth_field(knots.to(masks.device), shape)
    size = column(uniform(unit[:, 0], ranges.warp_size), masks.dim(), masks.device)
    x, y = _plane(masks)
    side = min(shape[:2])
    return sample_labels(
        masks,
        x + field[:, 0] * size * (2.0 * side / max(1, shape[0] - 1)),
        y + field[:, 1] * size * (2.0 * side / max(1, shape[1] - 1)),
    )


def _relabel(
    masks: Tensor, classes: int, unit: NDArray[Any], streams: list[np.random.Generator], ranges: Any
) -> Tensor:
    """Give another label to one or two ellipses whose centres lie on foreground, a quarter anywhere."""
    del streams
    places = _anchors(masks, unit[:, 1 : 1 + 2 * _BLOBS], astray=0.25)
    x, y = _pixels(masks)
    for k in range(_BLOBS):
        u = unit[:, 6 + 6 * k : 12 + 6 * k]
        wide = _size(uniform(u[:, 0], ranges.blob_size), masks)
        high = _size(uniform(u[:, 1], ranges.blob_size), masks)
        angle = column(uniform(u[:, 2], (0.0, math.pi)), masks.dim(), masks.device)
        drift = _drift(masks, uniform(u[:, 3], (0.0, 2.0 * math.pi)), 0.5 * (wide + high))
        across_x = x - places[k][0] - drift[0]
        across_y = y - places[k][1] - drift[1]
        along = torch.cos(angle) * across_x + torch.sin(angle) * across_y
        beside = torch.cos(angle) * across_y - torch.sin(angle) * across_x
        inside = (along / wide).square() + (beside / high).square() <= 1.0
        if k:  # the second one only for half of the samples
            inside = inside & (column(u[:, 5], masks.dim(), masks.device) < 0.5)
        label = column(np.floor(u[:, 4] * classes), masks.dim(), masks.device).to(masks.dtype)
        masks = torch.where(inside, label, masks)
    return masks


def _grow(
    masks: Tensor, classes: int, unit: NDArray[Any], streams: list[np.random.Generator], ranges: Any
) -> Tensor:
    """Let one class of each sample grow over all others, or over one of them only."""
    del streams
    dims, side = masks.dim(), min(masks.shape[1:3])
    # Background and structures are equally probable: erosion is as frequent as growth.
    drawn = np.where(unit[:, 19] < 0.5, 0, 1 + np.floor(unit[:, 18] * (classes - 1)))
    grower = column(drawn, dims, masks.device).to(masks.dtype)
    victim = (grower + 1 + column(np.floor(unit[:, 20] * (classes - 1)), dims, masks.device)) % classes
    anyone = column(unit[:, 21], dims, masks.device) < 0.5
    radius = np.maximum(1, np.rint(uniform(unit[:, 22], ranges.grow_size) * side)).astype(np.int64)
    planes = masks if dims == 3 else masks.movedim(-1, 1)
    grown = (planes == (grower if dims == 3 else grower.movedim(-1, 1))).to(torch.float32)
    frames = grown.reshape(grown.shape[0], -1, *masks.shape[1:3])
    left = column(radius, 4, masks.device)
    for turn in range(int(radius.max())):
        # A 3 by 3 square and a cross in turn: nearly a disc.
        if turn % 2 == 0:
            wider = torch.maximum(
                F.max_pool2d(frames, (3, 1), stride=1, padding=(1, 0)),
                F.max_pool2d(frames, (1, 3), stride=1, padding=(0, 1)),
            )
        else:
            wider = F.max_pool2d(frames, 3, stride=1, padding=1)
        frames = torch.where(left > turn, wider, frames)
    covered = (frames[:, 0] if dims == 3 else frames.movedim(1, -1)) > 0
    return torch.where(covered & (anyone | (masks == victim)), grower, masks)


def _drop(
    masks: Tensor, classes: int, unit: NDArray[Any], streams: list[np.random.Generator], ranges: Any
) -> Tensor:
    """Turn one or two straight bands through foreground into background."""
    del classes, streams
    places = _anchors(masks, unit[:, 24 : 24 + 2 * _BANDS])
    x, y = _pixels(masks)
    for k in range(_BANDS):
        u = unit[:, 30 + 4 * k : 34 + 4 * k]
        angle = column(uniform(u[:, 0], (0.0, math.pi)), masks.dim(), masks.device)
        width = _size(uniform(u[:, 1], ranges.band_size), masks)
        drift = _drift(masks, uniform(u[:, 2], (0.0, 2.0 * math.pi)), width)
        across = torch.cos(angle) * (x - places[k][0] - drift[0])
        across = across + torch.sin(angle) * (y - places[k][1] - drift[1])
        inside = across.abs() <= 0.5 * width
        if k:
            inside = inside & (column(u[:, 3], masks.dim(), masks.device) < 0.3)
        masks = torch.where(inside, torch.zeros_like(masks), masks)
    return masks


def _salt(
    masks: Tensor, classes: int, unit: NDArray[Any], streams: list[np.random.Generator], ranges: Any
) -> Tensor:
    """Give single pixels a random label."""
    shape = tuple(masks.shape[1:])
    share = log_uniform(unit[:, 40], ranges.salt_share)
    drawn = np.stack([stream.random(shape, dtype=np.float32) for stream in streams])
    limit = share.reshape(-1, *[1] * len(shape))
    # What is left of a number below the limit is itself evenly distributed, and chooses the label.
    label = np.minimum(np.floor(drawn / limit * classes), classes - 1)
    hit = torch.from_numpy(drawn < limit).to(masks.device)
    return torch.where(hit, torch.from_numpy(label).to(masks.device).to(masks.dtype), masks)


def _streams(masks: Tensor, seed: int, name: str, keys: Sequence[object]) -> list[np.random.Generator]:
    if masks.dim() not in (3, 4) or masks.shape[0] != len(keys):
        raise RuntimeFault(name, why=f"{len(keys)} keys for label maps of shape {tuple(masks.shape)}")
    return generators(seed, name, keys)


def _plane(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates −1 to 1 along x and y, to be broadcast with the masks."""
    x, y = coordinates(masks.shape[1:], masks.device)
    return (x, y) if masks.dim() == 3 else (x.unsqueeze(-1), y.unsqueeze(-1))


def _pixels(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in pixels along x and y, to be broadcast with the masks."""
    x, y = (torch.arange(size, device=masks.device, dtype=torch.float32) for size in masks.shape[1:3])
    x, y = x[:, None], y[None, :]
    return (x, y) if masks.dim() == 3 else (x.unsqueeze(-1), y.unsqueeze(-1))


def _size(parts: NDArray[np.float32], masks: Tensor) -> Tensor:
    """A part of the smaller side in pixels, at least one, to be broadcast with the masks."""
    return (column(parts, masks.dim(), masks.device) * min(masks.shape[1:3])).clamp_min(1.0)


def _anchors(masks: Tensor, unit: NDArray[Any], *, astray: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    """Random foreground pixels, x and y of each; any pixel for a share of samples or without foreground."""
    flat = (masks if masks.dim() == 3 else masks[..., masks.shape[3] // 2]).flatten(1) != 0
    count = flat.sum(dim=1)
    rank = flat.cumsum(dim=1)
    places = []
    for k in range(unit.shape[1] // 2):
        u = torch.from_numpy(unit[:, 2 * k].copy()).to(masks.device)
        wanted = (u * count).floor().to(torch.int64) + 1
        found = (rank < wanted[:, None]).sum(dim=1)
        anywhere = (u * flat.shape[1]).floor().to(torch.int64)
        strays = torch.from_numpy(unit[:, 2 * k + 1] < astray).to(masks.device)
        at = torch.where((count > 0) & ~strays, found, anywhere).clamp(0, flat.shape[1] - 1)
        shape = (-1, *[1] * (masks.dim() - 1))
        places.append(((at // masks.shape[2]).float().view(shape), (at % masks.shape[2]).float().view(shape)))
    return places


def _drift(masks: Tensor, angle: NDArray[np.float32], length: Tensor) -> tuple[Tensor, Tensor]:
    """How far something has moved in each frame: evenly, `length` over the whole window; 0 for one frame."""
    if masks.dim() == 3:
        zero = torch.zeros((), device=masks.device)
        return zero, zero
    along = torch.linspace(-0.5, 0.5, masks.shape[3], device=masks.device)
    way = column(angle, 4, masks.device)
    return torch.cos(way) * length * along, torch.sin(way) * length * along
