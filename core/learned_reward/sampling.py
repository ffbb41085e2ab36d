"""Label maps drawn from the probabilities of a network, one stream of random numbers for each image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medrl.core.rl.pixelwise.sampling import inverse_cdf

from .fields import correlated, generators, normals


def sample_actions(
    logits: Tensor,
    *,
    seed: int,
    keys: Sequence[object],
    temperature: NDArray[np.float32] | float = 1.0,
    sigma_px: NDArray[np.float32] | float = 0.0,
) -> Tensor:
    """Draw a label for each pixel from softmax(logits / temperature), exactly.

    One uniform number a pixel is looked up in the cumulative probabilities. With `sigma_px` these numbers
    are those of a Gaussian copula, correlated over that many pixels in the plane; each pixel's own
    distribution is the same.

    Args:
        logits: ``(N, K, *S)``.
        seed: Of all draws.
        keys: N names that with the seed decide what is drawn.
        temperature: One for all images or one each, ``(N,)``.
        sigma_px: Likewise, in pixels.

    Returns:
        ``(N, *S)`` int64.
    """
    count, shape = logits.shape[0], logits.shape[2:]
    streams = generators(seed, "action", keys)
    if not streams:
        return torch.zeros(0, *shape, dtype=torch.int64, device=logits.device)
    sigma = torch.from_numpy(np.broadcast_to(np.float32(sigma_px), (count,)).copy())
    if bool((sigma > 0).any()):
        noise = correlated(normals(streams, (1, *shape)).to(logits.device), sigma)[:, 0]
        chance = torch.special.ndtr(noise)
    else:
        drawn = np.stack([stream.random(tuple(shape), dtype=np.float32) for stream in streams])
        chance = torch.from_numpy(drawn).to(logits.device)
    heat = torch.from_numpy(np.broadcast_to(np.float32(temperature), (count,)).copy()).to(logits.device)
    scaled = logits.float() / heat.view(-1, *[1] * (logits.dim() - 1))
    return inverse_cdf(torch.softmax(scaled, dim=1), chance)
