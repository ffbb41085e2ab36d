"""Temperature scaling: the one number by which logits are divided so that probabilities come true."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.errors import DataError

LOWEST, HIGHEST = 1e-2, 1e2
"""Limits of a fitted temperature; separable or contradictory logits have none inside."""
LIMIT = 2**22
"""Pixels that a fit looks at; of more, every n-th is taken."""
_STEPS = 200


def fit_temperature(logits: Tensor, targets: Tensor, *, limit: int = LIMIT) -> float:
    """Fit T so that the held-out loss of ``logits / T`` is least.

    The loss is convex in s = 1/T, and its slope is known: mean z·(σ(s·z) − y), or for classes the mean of
    the expected minus the true logit. The root of the slope is found by bisection in log s, which neither
    diverges nor depends on a learning rate.

    Args:
        logits: ``(...)`` of any shape for right or wrong, or ``(N, K, *S)`` of classes.
        targets: The same shape ``(...)`` with values in [0, 1], or ``(N, *S)`` class labels.
        limit: Pixels to look at.

    Returns:
        T in [0.01, 100]: at the lower limit if the logits are never wrong, at the upper one if they say
        nothing or the opposite of the truth.

    Raises:
        DataError: Nothing to fit, a value that is not finite, or shapes that do not fit.

    Source: Guo et al. 2017. Deviation: the original scales (1 − z, z), which is σ((2z − 1)/T), by LBFGS with
    10,000 iterations (specification §8, §13.12).

    >>> logits, right = torch.full((10,), 3.0), torch.tensor([1.0] * 8 + [0.0] * 2)
    >>> print(f"{fit_temperature(logits, right):.4f} = {3 / math.log(4):.4f}")
    2.1640 = 2.1640
    """
    if logits.shape == targets.shape:
        z, y = logits.reshape(-1), targets.reshape(-1)
        every = _stride(z.numel(), limit)
        z, y = z[::every].double(), y[::every].double()
    elif logits.dim() == targets.dim() + 1 and logits.shape[:1] + logits.shape[2:] == targets.shape:
        z = logits.movedim(1, -1).reshape(-1, logits.shape[1])
        y = targets.reshape(-1)
        every = _stride(y.numel(), limit)
        z, y = z[::every].double(), y[::every].to(torch.int64)
    else:
        raise DataError(
            "temperature",
            why=f"logits {tuple(logits.shape)} do not fit targets {tuple(targets.shape)}",
        )
    if z.numel() == 0 or not bool(torch.isfinite(z).all()):
        why = "a logit is not finite" if z.numel() else "no held-out pixel"
        raise DataError("temperature", why=why, do="hold out pairs of at least one subject")
    low, high = math.log(1.0 / HIGHEST), math.log(1.0 / LOWEST)
    if _slope(z, y, math.exp(high)) <= 0.0:
        return LOWEST
    if _slope(z, y, math.exp(low)) >= 0.0:
        return HIGHEST
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        if high - low < 1e-12:
            break
        if _slope(z, y, math.exp(middle)) > 0.0:
            high = middle
        else:
            low = middle
    return math.exp(-0.5 * (low + high))


def nll(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of ``logits / temperature``: BCE, or CE for classes; shapes as above."""
    scaled = logits.double() / temperature
    if logits.shape == targets.shape:
        return float(F.binary_cross_entropy_with_logits(scaled, targets.double()))
    return float(F.cross_entropy(scaled, targets.to(torch.int64)))


def _slope(z: Tensor, y: Tensor, scale: float) -> float:
    """Derivative of the mean loss by s = 1/T."""
    if z.dim() == 1:
        return float((z * (torch.sigmoid(scale * z) - y)).mean())
    expected = (torch.softmax(scale * z, dim=1) * z).sum(dim=1)
    return float((expected - z.gather(1, y[:, None]).squeeze(1)).mean())


def _stride(count: int, limit: int) -> int:
    return max(1, math.ceil(count / limit))
