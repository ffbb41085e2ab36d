"""Random changes of image style under which labels stay right, alone or towards unlabelled target images.

Images ``(N, C, *S)`` in [0, 1], S = (X, Y) or (X, Y, T). All frames of a sample get the same style; only the
noise is drawn anew in each frame, as speckle is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    correlated,
    generators,
    log_uniform,
    normals,
    refuse,
    smooth,
    smooth_field,
    uniform,
)

_FINE = 2.0**36
_SHADOWS = 2
_KNOTS = 4


@dataclass(frozen=True, kw_only=True)
class StyleRanges:
    """How far each family of changes goes; None leaves a family out.

    Lengths are parts of the smaller side of the image, so that 64² and 256² look alike.

    Attributes:
        gamma: Exponent of the intensities, even in its logarithm.
        contrast: Factor of the distance to the mean.
        bias: Standard deviation of the logarithm of a smooth multiplicative field.
        shadow: Strength of 0 to 2 dark bands of random direction and beginning, 1 is black.
        shadow_width: Standard deviation of their profile.
        blur: Width of a Gaussian.
        noise: Standard deviation of additive Gaussian noise.
        grain: Width over which the noise is correlated; None is white noise.
        borrow: Share of samples that borrow from a target image, if target images are given.
        histogram: Of these, the share that takes its histogram; the others take its low-frequency amplitudes.
        amplitude: Largest frequency that is taken, as a part of the sampling frequency.

    Raises:
        ConfigError: A range is not ordered or out of bounds.

    Source: findings step 2; the ranges are medrl's.
    """

    gamma: Range | None = (0.6, 1.7)
    contrast: Range | None = (0.5, 1.2)
    bias: Range | None = (0.0, 0.4)
    shadow: Range | None = (0.2, 0.9)
    shadow_width: Range = (0.03, 0.12)
    blur: Range | None = (0.0, 0.02)
    noise: Range | None = (0.0, 0.12)
    grain: Range | None = None
    borrow: float = 0.5
    histogram: float = 0.5
    amplitude: Range = (0.01, 0.06)

    def __post_init__(self) -> None:
        refuse(
            "style",
            checked_range("gamma", self.gamma, 0.0, 10.0, positive=True),
            checked_range("contrast", self.contrast, 0.0, 10.0),
            checked_range("bias", self.bias, 0.0, 3.0),
            checked_range("shadow", self.shadow, 0.0, 1.0),
            checked_range("shadow_width", self.shadow_width, 0.0, 1.0, positive=True),
            checked_range("blur", self.blur, 0.0, 0.5),
            checked_range("noise", self.noise, 0.0, 10.0),
            checked_range("grain", self.grain, 0.0, 0.5),
            checked_range("amplitude", self.amplitude, 0.0, 0.5),
            *(
                f"{name} is {value}, expected a share in [0, 1]"
                for name, value in (("borrow", self.borrow), ("histogram", self.histogram))
                if not 0.0 <= value <= 1.0
            ),
        )

    def scaled(self, strength: float) -> StyleRanges:
        """The same families, going `strength` times as far; 0 leaves images alone (borrowing apart)."""

        def around_one(limits: Range | None) -> Range | None:
            if limits is None:
                return None
            return max(0.0, 1.0 + (limits[0] - 1.0) * strength), max(0.0, 1.0 + (limits[1] - 1.0) * strength)

        def from_zero(limits: Range | None, most: float) -> Range | None:
            if limits is None:
                return None
            return min(most, limits[0] * strength), min(most, limits[1] * strength)

        gamma = None if self.gamma is None else (self.gamma[0] ** strength, self.gamma[1] ** strength)
        return replace(
            self,
            gamma=gamma,
            contrast=around_one(self.contrast),
            bias=from_zero(self.bias, 3.0),
            shadow=from_zero(self.shadow, 1.0),
            blur=from_zero(self.blur, 0.5),
            noise=from_zero(self.noise, 10.0),
        )

    def only(self, *families: str) -> StyleRanges:
        """Leave out every family that is not named: gamma, contrast, bias, shadow, blur, noise, borrow."""
        optional = ("gamma", "contrast", "bias", "shadow", "blur", "noise", "grain")
        kept = {*families, *(("grain",) if "noise" in families else ())}
        unknown = set(families) - {*optional, "borrow"}
        if unknown:
            raise ConfigError("style", why=f"unknown families: {', '.join(sorted(unknown))}")
        none: dict[str, Any] = {name: None for name in optional if name not in kept}
        changed = replace(self, **none)
        return changed if "borrow" in kept else replace(changed, borrow=0.0)


STYLE = StyleRanges()
"""Every family of the recipe."""


@dataclass(frozen=True, eq=False)
class Styles:
    """The style drawn for each of N samples.

    Attributes:
        target: ``(N,)`` index of the target image that a sample borrows from, or −1.
    """

    gamma: NDArray[np.float32]
    contrast: NDArray[np.float32]
    bias: NDArray[np.float32]
    shadow: NDArray[np.float32]
    blur: NDArray[np.float32]
    noise: NDArray[np.float32]
    grain: NDArray[np.float32]
    target: NDArray[np.int64]
    by_histogram: NDArray[np.bool_]
    amplitude: NDArray[np.float32]
    knots: Tensor
    streams: list[np.random.Generator]


class StyleShift:
    """Draws and applies styles; the same seed and key give the same style, whatever the batch.

    Args:
        ranges: How far each family goes.
        seed: Of all draws.

    >>> shift = StyleShift(seed=3)
    >>> image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> bool((shift(image, ["a", "b"]) == shift(image, ["a", "b"])).all())
    True
    """

    def __init__(self, ranges: StyleRanges = STYLE, *, seed: int = 0) -> None:
        self.ranges = ranges
        self.seed = seed

    def __call__(self, images: Tensor, keys: Sequence[object], targets: Tensor | None = None) -> Tensor:
        """Change the style of each image.

        Args:
            images: ``(N, C, *S)`` in [0, 1]; stays unchanged itself.
            keys: N names, such as (case, step); they alone decide what is drawn.
            targets: ``(M, C, *S)`` unlabelled target images to borrow from; any M, any size.

        Returns:
            ``(N, C, *S)`` float32 in [0, 1].

        Raises:
            RuntimeFault: Another number of keys than images, or targets with other channels.
        """
        return self.apply(images, self.draw(keys, 0 if targets is None else targets.shape[0]), targets)

    def draw(self, keys: Sequence[object], targets: int = 0) -> Styles:
        """Draw one style for each key, given how many target images there are to borrow from."""
        streams = generators(self.seed, "style", keys)
        unit = np.stack([stream.random(32) for stream in streams]) if keys else np.zeros((0, 32))
        knots = normals(streams, (1, _KNOTS, _KNOTS)) if keys else torch.zeros(0, 1, _KNOTS, _KNOTS)
        r, n = self.ranges, len(keys)
        zeros, ones = np.zeros(n, np.float32), np.ones(n, np.float32)
        count = np.floor(unit[:, 6] * (_SHADOWS + 1))
        bands = np.zeros((n, _SHADOWS, 5), np.float32)
        for k in range(_SHADOWS):
            u = unit[:, 10 + 6 * k : 16 + 6 * k]
            strength = uniform(u[:, 0], r.shadow) if r.shadow else zeros
            bands[:, k, 0] = np.where(k < count, strength, 0.0)
            bands[:, k, 1] = uniform(u[:, 1], (0.0, 2.0 * math.pi))
            bands[:, k, 2] = uniform(u[:, 2], (-0.8, 0.8))
            bands[:, k, 3] = log_uniform(u[:, 3], r.shadow_width)
            bands[:, k, 4] = uniform(u[:, 4], (-1.2, 0.6))
        borrows = (unit[:, 22] < r.borrow) & (targets > 0)
        return Styles(
            gamma=log_uniform(unit[:, 0], r.gamma) if r.gamma else ones,
            contrast=uniform(unit[:, 1], r.contrast) if r.contrast else ones,
            bias=uniform(unit[:, 2], r.bias) if r.bias else zeros,
            shadow=bands,
            blur=uniform(unit[:, 3], r.blur) if r.blur else zeros,
            noise=uniform(unit[:, 4], r.noise) if r.noise else zeros,
            grain=uniform(unit[:, 5], r.grain) if r.grain and r.noise else zeros,
            target=np.where(borrows, np.floor(unit[:, 24] * targets).astype(np.int64), -1),
            by_histogram=unit[:, 23] < r.histogram,
            amplitude=uniform(unit[:, 25], r.amplitude),
            knots=knots,
            streams=streams,
        )

    def apply(self, images: Tensor, styles: Styles, targets: Tensor | None = None) -> Tensor:
        """Apply drawn styles, once: the noise is drawn here. Arguments and result as in a call."""
        if images.dim() not in (4, 5) or images.shape[0] != len(styles.streams):
            raise RuntimeFault(
                "style", why=f"{len(styles.streams)} keys for images of shape {tuple(images.shape)}"
            )
        dims, device, side = images.dim(), images.device, min(images.shape[2:4])
        x = images.to(torch.float32).clamp(0.0, 1.0)
        if images.shape[0] == 0:
            return x
        if self.ranges.gamma:
            x = x.pow(column(styles.gamma, dims, device))
        if self.ranges.contrast:
            mean = x.mean(dim=tuple(range(1, dims)), keepdim=True)
            factor = column(styles.contrast, dims, device)
            x = factor * x + (1.0 - factor) * mean
        if self.ranges.bias:
            field = smooth_field(styles.knots.to(device), images.shape[2:])
            x = x * torch.exp(column(styles.bias, dims, device) * field)
        if self.ranges.shadow:
            x = x * _shadows(styles.shadow, images.shape[2:], device)
        if self.ranges.blur:
            x = smooth(x, torch.from_numpy(styles.blur) * side)
        if self.ranges.noise:
            noise = normals(styles.streams, images.shape[1:]).to(device)
            if self.ranges.grain:
                noise = correlated(noise, torch.from_numpy(styles.grain) * side)
            x = x + column(styles.noise, dims, device) * noise
        x = x.clamp(0.0, 1.0)
        if targets is not None and (styles.target >= 0).any():
            x = self._borrow(x, styles, targets)
        return x

    def _borrow(self, x: Tensor, styles: Styles, targets: Tensor) -> Tensor:
        if targets.shape[1] != x.shape[1]:
            raise RuntimeFault(
                "style", why=f"target images have {targets.shape[1]} channels, images have {x.shape[1]}"
            )
        x = x.clone()
        chosen = styles.target >= 0
        for rows, by_histogram in (
            (chosen & styles.by_histogram, True),
            (chosen & ~styles.by_histogram, False),
        ):
            if not rows.any():
                continue
            at = torch.from_numpy(np.flatnonzero(rows))
            given = targets[torch.from_numpy(styles.target[rows]).to(targets.device)]
            given = given.to(x.device, torch.float32)
            at = at.to(x.device)
            if by_histogram:
                x[at] = match_histogram(x[at], given)
            else:
                x[at] = swap_amplitude(x[at], given, torch.from_numpy(styles.amplitude[rows]))
        return x.clamp_(0.0, 1.0)


def match_histogram(images: Tensor, references: Tensor) -> Tensor:
    """Give each image the histogram of its reference, channel by channel.

    The r-th smallest intensity becomes the reference's r-th smallest; equal intensities stay equal and take
    the mean of their share. All frames together are one histogram.

    Args:
        images: ``(N, C, *S)``.
        references: ``(N, C, *R)``; where R has other sizes, its quantiles are interpolated.

    Returns:
        ``(N, C, *S)`` float32.
    """
    rows = images.reshape(images.shape[0] * images.shape[1], -1)
    wanted = references.reshape(rows.shape[0], -1).sort(dim=1).values.double()
    unit = wanted.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / _FINE
    count = rows.shape[1]
    if wanted.shape[1] != count:
        wanted = F.interpolate(wanted[:, None], size=count, mode="linear", align_corners=False)[:, 0]
    values, order = rows.sort(dim=1)
    place = torch.arange(count, device=rows.device).expand_as(order)
    differs = values[:, 1:] != values[:, :-1]
    edge = torch.ones_like(differs[:, :1])
    first = torch.where(torch.cat((edge, differs), dim=1), place, 0).cummax(dim=1).values
    after = torch.where(torch.cat((differs, edge), dim=1), place + 1, count)
    after = after.flip(1).cummin(dim=1).values.flip(1)
    # Whole numbers: their sums are exact, and deterministic on every device.
    total = F.pad((wanted / unit).round().to(torch.int64).cumsum(dim=1), (1, 0))
    mean = (total.gather(1, after) - total.gather(1, first)) / (after - first) * unit
    return torch.zeros_like(rows, dtype=torch.float32).scatter_(1, order, mean.float()).view(images.shape)


def swap_amplitude(images: Tensor, references: Tensor, limit: Tensor | float) -> Tensor:
    """Give each image the low-frequency amplitudes of its reference and keep its phases.

    Args:
        images: ``(N, C, *S)``.
        references: ``(N, C, *R)``; resized to the grid of the images.
        limit: Largest frequency taken, along each axis, in cycles a pixel of the smaller side; ``(N,)`` or
            one number. Frequency 0, the mean, is always taken.

    Returns:
        ``(N, C, *S)`` float32, not clipped.

    Frames share one change: each coefficient is scaled by the ratio of the mean amplitudes over frames,
    which for single images is the swap itself.

    Source: Yang and Soatto 2020, "FDA: Fourier domain adaptation for semantic segmentation".
    """
    width, height = images.shape[2:4]
    if references.shape[2:4] != images.shape[2:4]:
        size = (width, height, *references.shape[4:])
        mode = "bilinear" if references.dim() == 4 else "trilinear"
        references = F.interpolate(references, size=size, mode=mode, align_corners=False)
    spectrum = torch.fft.rfft2(images.float(), dim=(2, 3))
    have, want = spectrum.abs(), torch.fft.rfft2(references.float(), dim=(2, 3)).abs()
    have = have.mean(dim=4) if have.dim() == 5 else have
    want = want.mean(dim=4) if want.dim() == 5 else want
    x = torch.fft.fftfreq(width, 1.0 / width, device=images.device).abs()
    y = torch.fft.rfftfreq(height, 1.0 / height, device=images.device)
    most = torch.as_tensor(limit, dtype=torch.float32, device=images.device).reshape(-1, 1, 1)
    low = torch.maximum(x[:, None], y[None, :]) <= most * min(width, height)
    ratio = torch.where(low[:, None], want / have.clamp_min(1e-6), torch.ones_like(have))
    if images.dim() == 5:
        ratio = ratio.unsqueeze(-1)
    swapped: Tensor = torch.fft.irfft2(spectrum * ratio, s=(width, height), dim=(2, 3))
    return swapped


def _shadows(bands: NDArray[np.float32], shape: Sequence[int], device: torch.device) -> Tensor:
    """Factors ``(N, 1, *S)`` of dark bands: strength, direction, offset, width, beginning of each."""
    x, y = coordinates(shape, device)
    factor = torch.ones((), device=device)
    for k in range(bands.shape[1]):
        strength, angle, offset, width, start = (
            torch.from_numpy(np.ascontiguousarray(bands[:, k, i])).to(device)[:, None, None] for i in range(5)
        )
        across = (x * torch.cos(angle) + y * torch.sin(angle) - offset) / (2.0 * width)
        along = y * torch.cos(angle) - x * torch.sin(angle)
        gate = torch.sigmoid((along - start) / 0.1)
        factor = factor * (1.0 - strength * torch.exp(-0.5 * across.square()) * gate)
    factor = factor.unsqueeze(1)
    return factor if len(shape) == 2 else factor.unsqueeze(-1)
