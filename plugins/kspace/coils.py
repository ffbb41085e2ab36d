"""Several receive coils: sensitivities from the centre lines, combination, and SENSE by conjugate gradients.

Arrays have the coils on axis 1: k-space and coil images ``(B, C, [D], H, W)``, combined images
``(B, [D], H, W)``. All coils share one mask ``(B, W)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fourier import PLANE, SPACE, fftc, ifftc
from .masks import centre_block

__all__ = [
    "cg_sense",
    "combine",
    "estimate_sensitivities",
    "expand",
    "root_sum_of_squares",
]

TINY = 1e-12


def root_sum_of_squares(coil_images: Tensor) -> Tensor:
    """√Σ|x_c|² over the coils, real."""
    return coil_images.abs().square().sum(dim=1).sqrt()


def combine(coil_images: Tensor, sensitivities: Tensor | None = None, *, eps: float = TINY) -> Tensor:
    """One image of all coils: Σ S̄_c x_c / (Σ|S_c|² + ε), complex; without sensitivities the RSS, real.

    Args:
        coil_images: ``(B, C, [D], H, W)`` complex.
        sensitivities: As `coil_images`.
        eps: Keeps pixels that no coil sees from dividing by zero.
    """
    if sensitivities is None:
        return root_sum_of_squares(coil_images)
    weight = sensitivities.abs().square().sum(dim=1) + eps
    return (sensitivities.conj() * coil_images).sum(dim=1) / weight


def expand(images: Tensor, sensitivities: Tensor) -> Tensor:
    """What each coil sees of an image: S_c x."""
    return sensitivities * images.unsqueeze(1)


def estimate_sensitivities(
    kspace: Tensor, lines: int, *, volume: bool = False, cutoff: float = 1e-3
) -> Tensor:
    """Sensitivities from the centre lines: coil images of low resolution over their root sum of squares.

    The block is tapered (Hann) along columns and readout, so that edges do not ring; Σ|S_c|² = 1 where the
    object is, and 0 where the low-resolution image is below `cutoff` of its maximum.

    Args:
        kspace: ``(B, C, [D], H, W)`` complex; only the block in its middle is read.
        lines: Centre columns, and as many points of the readout.
        volume: Transform along depth too.
        cutoff: Share of the maximum.

    Returns:
        ``(B, C, [D], H, W)`` complex.
    """
    height, width = int(kspace.shape[-2]), int(kspace.shape[-1])
    across = _taper(width, min(lines, width), kspace)
    along = _taper(height, min(lines, height), kspace)
    low = ifftc(kspace * along.unsqueeze(-1) * across, SPACE if volume else PLANE)
    whole = root_sum_of_squares(low)
    seen = whole > cutoff * whole.flatten(1).amax(dim=1).view(-1, *[1] * (whole.ndim - 1))
    return low / whole.clamp_min(TINY).unsqueeze(1) * seen.unsqueeze(1)


def cg_sense(
    kspace: Tensor,
    mask: Tensor,
    sensitivities: Tensor,
    *,
    iterations: int = 10,
    l2: float = 1e-3,
    volume: bool = False,
) -> Tensor:
    """Minimise ‖M F S x - y‖² + l2 ‖x‖² by conjugate gradients from zero: ``(B, [D], H, W)`` complex.

    Args:
        kspace: ``(B, C, [D], H, W)`` complex; columns out of the mask are not read.
        mask: ``(B, W)``.
        sensitivities: As `kspace`.
        iterations: Steps.
        l2: Weight of the penalty.
        volume: Transform along depth too.

    Source: Pruessmann et al. 2001.
    """
    dims = SPACE if volume else PLANE
    columns = mask.view(mask.shape[0], *[1] * (kspace.ndim - 2), mask.shape[-1])

    def normal(images: Tensor) -> Tensor:
        seen = fftc(expand(images, sensitivities), dims) * columns
        return (sensitivities.conj() * ifftc(seen, dims)).sum(dim=1) + l2 * images

    residual = (sensitivities.conj() * ifftc(kspace * columns, dims)).sum(dim=1)
    images = torch.zeros_like(residual)
    direction = residual
    power = _inner(residual, residual)
    # An item that is solved to rounding stays: more steps would only raise what the mask does not see.
    least = power * torch.finfo(power.dtype).eps ** 2
    for _ in range(iterations):
        image_of = normal(direction)
        step = power / _inner(direction, image_of).clamp_min(TINY) * (power > least)
        images = images + step * direction
        residual = residual - step * image_of
        new = _inner(residual, residual)
        direction = residual + new / power.clamp_min(TINY) * direction
        power = new
    return images


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Real part of the inner product of each item, shaped to multiply images."""
    value = (first.conj() * second).real.flatten(1).sum(dim=1)
    return value.view(-1, *[1] * (first.ndim - 1))


def _taper(size: int, count: int, like: Tensor) -> Tensor:
    """A Hann window over the middle `count` of `size` places, never zero within."""
    first, last = centre_block(size, count)
    window = torch.zeros(size, dtype=like.real.dtype, device=like.device)
    window[first:last] = torch.hann_window(count + 2, periodic=False, dtype=window.dtype, device=like.device)[
        1:-1
    ]
    return window
