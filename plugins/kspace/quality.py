"""How near a reconstruction is to its target: NMSE, PSNR and SSIM, batched and differentiable.

The first axis is the batch and is kept: of slices ``(B, H, W)``, or of volumes ``(B, D, H, W)``, which give
one value each, over all slices with one data range. Which of the two a number is must be said with it.

Source: fastMRI evaluate.py and losses.py; Wang et al. 2004 for SSIM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medrl.core.errors import ConfigError

__all__ = ["SsimTarget", "nmse", "psnr", "ssim"]

WINDOW = 7
K1, K2 = 0.01, 0.03


def nmse(images: Tensor, target: Tensor) -> Tensor:
    """‖x̂ - x‖² / ‖x‖² of each item ``(B,)``; complex or magnitude, as given.

    Of a zero-filled complex image it is the energy of the missing columns over the whole energy. A target of
    zeros gives infinity, or NaN where nothing differs.
    """
    return _power(images - target) / _power(target)


def psnr(images: Tensor, target: Tensor, data_range: Tensor | float | None = None) -> Tensor:
    """10 log10(range² / mean squared error) in dB of each item ``(B,)``; the range is max(x) by default.

    Infinite where nothing differs.
    """
    reach = _range(target, data_range)
    error = _power(images - target) / images[0].numel()
    return 10.0 * torch.log10(reach**2 / error)


def ssim(images: Tensor, target: Tensor, data_range: Tensor | float | None = None) -> Tensor:
    """Structural similarity of each item ``(B,)``; the mean over slices for volumes.

    A uniform window of 7×7, k1 = .01, k2 = .03, the unbiased covariance (49/48), range max(x) of the item,
    only windows that lie within the image.

    Args:
        images: ``(B, H, W)`` or ``(B, D, H, W)`` real.
        target: Of the same shape.
        data_range: ``(B,)`` or one number.

    Raises:
        ConfigError: The images are smaller than the window.
    """
    return SsimTarget(target, data_range).score(images)


class SsimTarget:
    """Targets whose local means and variances are computed once, for many images of the same target.

    Args:
        target: ``(B, H, W)`` or ``(B, D, H, W)`` real.
        data_range: ``(B,)`` or one number; max(x) of each item by default.

    Raises:
        ConfigError: The images are smaller than the window.
    """

    def __init__(self, target: Tensor, data_range: Tensor | float | None = None) -> None:
        if min(target.shape[-2:]) < WINDOW:
            raise ConfigError(
                "SSIM", why=f"images of {tuple(target.shape[-2:])} are smaller than {WINDOW}×{WINDOW}"
            )
        self.target = _single(target)
        self.mean = _window_mean(self.target)
        self.variance = _unbiased(_window_mean(self.target * self.target) - self.mean * self.mean)
        reach = _range(self.target, data_range).view(-1, *[1] * (target.ndim - 1))
        self.c1, self.c2 = (K1 * reach) ** 2, (K2 * reach) ** 2

    def score(self, images: Tensor) -> Tensor:
        """SSIM of each item ``(B,)``."""
        return self._compare(_single(images), self.target, self.mean, self.variance, self.c1, self.c2)

    def score_each(self, images: Tensor) -> Tensor:
        """SSIM ``(B, K)`` of K candidates ``(B, K, ...)`` for each target."""
        parts = (self.target, self.mean, self.variance, self.c1, self.c2)
        repeated = [part.repeat_interleave(images.shape[1], dim=0) for part in parts]
        flat = self._compare(_single(images).flatten(0, 1), *repeated)
        return flat.view(images.shape[:2])

    def select(self, index: Tensor) -> SsimTarget:
        """The targets with these numbers; nothing is computed again."""
        chosen = object.__new__(SsimTarget)
        chosen.target, chosen.mean, chosen.variance = (
            part[index] for part in (self.target, self.mean, self.variance)
        )
        chosen.c1, chosen.c2 = self.c1[index], self.c2[index]
        return chosen

    @staticmethod
    def _compare(x: Tensor, y: Tensor, mean: Tensor, variance: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
        own = _window_mean(x)
        own_variance = _unbiased(_window_mean(x * x) - own * own)
        shared = _unbiased(_window_mean(x * y) - own * mean)
        above = (2.0 * own * mean + c1) * (2.0 * shared + c2)
        below = (own * own + mean * mean + c1) * (own_variance + variance + c2)
        # 0 / 0 only where both are zero and so is the range: they agree.
        value = torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 1.0)
        return value.flatten(1).mean(dim=1)


def _window_mean(values: Tensor) -> Tensor:
    """Mean over every 7×7 window that lies within the image, one axis after the other."""
    return _sums_of_seven(_sums_of_seven(values, -1), -2) * (1.0 / WINDOW**2)


def _sums_of_seven(values: Tensor, axis: int) -> Tensor:
    """Sums of 7 neighbours along an axis, as 4 + 2 + 1; several times faster than pooling on a CPU."""
    count = values.shape[axis] - 6
    two = values.narrow(axis, 0, count + 5) + values.narrow(axis, 1, count + 5)
    four = two.narrow(axis, 0, count) + two.narrow(axis, 2, count)
    return four.narrow(axis, 0, count) + two.narrow(axis, 4, count) + values.narrow(axis, 6, count)


def _unbiased(covariance: Tensor) -> Tensor:
    return covariance * (WINDOW**2 / (WINDOW**2 - 1))


def _power(values: Tensor) -> Tensor:
    parts = torch.view_as_real(values) if values.is_complex() else _single(values)
    return (parts * parts).flatten(1).sum(dim=1)


def _range(target: Tensor, data_range: Tensor | float | None) -> Tensor:
    if data_range is None:
        return (target.abs() if target.is_complex() else target).flatten(1).amax(dim=1)
    reach = torch.as_tensor(data_range, device=target.device)
    return reach.to(target.real.dtype).expand(target.shape[0])


def _single(values: Tensor) -> Tensor:
    """At least float32: half precision loses the variance of a window."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
