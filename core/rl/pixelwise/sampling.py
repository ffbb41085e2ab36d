"""Drawing label maps: each pixel from its own distribution, neighbours alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def correlated_categorical(
    probs: Tensor, sigma_px: float | Sequence[float] = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw a label in every pixel with exactly its probabilities, and alike in neighbouring pixels.

    A Gaussian copula: white noise is smoothed and brought back to unit variance in each pixel
    (`smooth_normal`), :math:`u = \Phi(g)` is then uniform in each pixel, and the label is the inverse of the
    cumulative distribution at u. Only the joint distribution depends on the scale. With independent draws a
    reward that judges shape sees salt and pepper; correlated ones are coherent pieces.

    Args:
        probs: ``(N, K, *S)``; each pixel is normalised to sum one. A label of probability 0 is never drawn.
        sigma_px: Standard deviation of the smoothing, in pixels; one number or one for each dimension of S.
            0 draws independently.
        generator: Where the noise comes from; it is drawn on the generator's device, so that a CPU generator
            gives the same labels for probabilities on any device (up to rounding of the probabilities).

    Returns:
        Labels ``(N, *S)``, int64, without a graph.

    Raises:
        ValueError: If `probs` has no spatial dimension, or `sigma_px` another number of scales.

    Source: the copula is Sklar's theorem with a Gaussian field, e.g. Nelsen 2006, section 2.
    """
    if probs.ndim < 3 or probs.shape[1] < 2:
        raise ValueError(f"probs must be (N, K, *S) with K of at least 2, got {tuple(probs.shape)}")
    shape = (probs.shape[0], *probs.shape[2:])
    scales = _scales(sigma_px, len(shape) - 1)
    with torch.no_grad():
        if any(scales):
            uniform = torch.special.ndtr(smooth_normal(shape, scales, generator, device=probs.device))
        else:
            place = generator.device if generator is not None else probs.device
            uniform = torch.rand(shape, generator=generator, device=place).to(probs.device)
        return inverse_cdf(probs, uniform)


def inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """The label ``(N, *S)`` at which the sum of ``probs (N, K, *S)`` passes ``uniform (N, *S)``."""
    steps = probs.detach().to(torch.promote_types(probs.dtype, torch.float32)).cumsum(dim=1)
    total = steps[:, -1]
    # Less than the total, and compared with "not less": a label without probability adds nothing to the sum,
    # so that neither u = 0 nor u = 1 (the rounded Φ of a large number) can fall on it.
    level = torch.minimum(uniform.to(steps.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    labels = torch.zeros_like(level, dtype=torch.int64)
    for label in range(probs.shape[1] - 1):
        labels += level >= steps[:, label]
    return labels


def smooth_normal(
    shape: Sequence[int],
    sigma_px: float | Sequence[float],
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw smooth Gaussian fields ``(N, *S)`` with mean 0 and variance 1 in every pixel, borders included.

    Inside, two pixels at distance d along one axis have correlation exp(-d² / (4 σ²)).

    Args:
        shape: ``(N, *S)``; the N fields are independent.
        sigma_px: Standard deviation of the smoothing kernel in pixels, for all axes of S or for each.
        generator: The noise is drawn on its device.
        device: Where the fields are wanted.
    """
    place = generator.device if generator is not None else torch.device(device)
    field = torch.randn(tuple(shape), generator=generator, device=place).to(device)
    for axis, sigma in enumerate(_scales(sigma_px, len(shape) - 1), start=1):
        if sigma > 0.0:
            kernel = _kernel(int(shape[axis]), sigma).to(field.device)
            field = (field.movedim(axis, -1) @ kernel.T).movedim(-1, axis)
    return field


@lru_cache(maxsize=32)
def _kernel(size: int, sigma: float) -> Tensor:
    """Gaussian smoothing as a matrix ``(size, size)`` whose rows have unit length: variance one is kept."""
    place = torch.arange(size, dtype=torch.float64)
    rows = torch.exp(-0.5 * ((place[:, None] - place[None, :]) / sigma).square())
    return (rows / rows.square().sum(dim=1, keepdim=True).sqrt()).float()


def _scales(sigma_px: float | Sequence[float], dims: int) -> tuple[float, ...]:
    scales = (
        tuple(float(item) for item in sigma_px)
        if isinstance(sigma_px, Sequence)
        else (float(sigma_px),) * dims
    )
    if len(scales) != dims:
        raise ValueError(f"sigma_px has {len(scales)} scales for {dims} spatial dimensions")
    if not all(0.0 <= scale < math.inf for scale in scales):
        raise ValueError(f"sigma_px must not be negative or infinite, got {scales}")
    return scales
