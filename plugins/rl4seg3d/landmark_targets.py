"""What the landmark reward net learns: where a misplaced mitral annulus costs reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from medrl.core.errors import DataError
from medrl.core.metrics.landmarks import base_points

LIMIT_MM = 4.0
"""Errors up to this cost nothing."""
_SCALE = 200.0
_LOST_MM = 10.0
"""Error that a prediction without landmarks counts as."""


def blur_px(error_px: float, width: int) -> float:
    """Return the standard deviation of the smoothing in pixels for an error on an image of this width.

    >>> blur_px(20, 400)
    10.0
    """
    return error_px / width * _SCALE


def landmark_target(
    action: NDArray[Any],
    truth: NDArray[Any],
    spacing_mm: Sequence[float],
    *,
    limit_mm: float = LIMIT_MM,
    lv: int = 1,
    myo: int = 2,
) -> NDArray[np.float32]:
    """Make the target of one frame: 1 where the base lies right, down to 0 along the way from wrong to right.

    For each end of the mitral annulus that is more than `limit_mm` away, the line from where it is to where
    it should be is smoothed and stretched to [0, 1]; the target is one minus the greater of both.

    Args:
        action: ``(X, Y)`` labels; only their largest blob counts.
        truth: ``(X, Y)`` reference labels.
        spacing_mm: ``(2,)`` pixel size along X and Y.
        limit_mm: See above.
        lv: Label of the cavity.
        myo: Label of the wall.

    Returns:
        ``(X, Y)`` float32 in [0, 1]; ones if the reference has no such points.

    Source: RL4Seg3D, `landmark_reward_unet_3d_datamodule.py` (specification §6). Deviation: an action without
    such points, on which the original stops, lacks reward around those of the reference, like an error of
    10 mm.
    """
    from skimage.draw import line_aa

    wanted = base_points(truth, lv=lv, myo=myo)
    result = np.ones(action.shape, dtype=np.float32)
    if not np.isfinite(wanted).all():
        return result
    found = base_points(_largest_blob(action), lv=lv, myo=myo)
    size = np.asarray(spacing_mm, dtype=np.float64)
    lost = not np.isfinite(found).all()
    for own, right in zip(wanted if lost else found, wanted, strict=True):
        error_px = _LOST_MM / float(size.mean()) if lost else float(np.hypot(*(own - right)))
        error_mm = _LOST_MM if lost else float(np.hypot(*((own - right) * size)))
        if error_mm <= limit_mm:
            continue
        x, y, value = line_aa(int(own[0]), int(own[1]), int(right[0]), int(right[1]))
        drawn = np.zeros(action.shape, dtype=np.float64)
        drawn[x, y] = value
        if lost:
            drawn[int(right[0]), int(right[1])] = 1.0
        drawn = ndimage.gaussian_filter(drawn, blur_px(error_px, action.shape[0]))
        spread = float(np.ptp(drawn))
        if spread > 0.0:
            lack = (drawn - drawn.min()) / spread
            np.minimum(result, (1.0 - lack).astype(np.float32), out=result)
    return result


def landmark_targets(
    actions: Tensor,
    truths: Tensor,
    spacing_mm: Tensor | Sequence[Any] | NDArray[Any],
    *,
    limit_mm: float = LIMIT_MM,
    lv: int = 1,
    myo: int = 2,
) -> Tensor:
    """Make the targets of windows, frame by frame.

    Args:
        actions: ``(N, X, Y, T)`` labels.
        truths: Reference labels of the same shape.
        spacing_mm: ``(2,)``, or one for each window, ``(N, 2)``.
        limit_mm: See `landmark_target`.
        lv: Label of the cavity.
        myo: Label of the wall.

    Returns:
        ``(N, X, Y, T)`` float32 in [0, 1] on the device of the actions: `truth` of `RewardNet.loss`.

    Raises:
        DataError: The shapes do not fit.
    """
    size = np.asarray(spacing_mm, dtype=np.float64)
    if actions.dim() != 4 or actions.shape != truths.shape or size.shape not in ((2,), (len(actions), 2)):
        raise DataError(
            "landmark targets",
            why=f"actions {tuple(actions.shape)}, reference {tuple(truths.shape)}, spacing {size.shape}",
        )
    sizes = np.broadcast_to(size, (len(actions), 2))
    own, right = actions.detach().cpu().numpy(), truths.detach().cpu().numpy()
    made = np.ones(own.shape, dtype=np.float32)
    for row in range(own.shape[0]):
        for t in range(own.shape[3]):
            made[row, ..., t] = landmark_target(
                own[row, ..., t], right[row, ..., t], sizes[row], limit_mm=limit_mm, lv=lv, myo=myo
            )
    return torch.from_numpy(made).to(actions.device)


def _largest_blob(labels: NDArray[Any]) -> NDArray[Any]:
    """Labels without what is not joined to the largest 4-connected foreground."""
    numbers, count = ndimage.label(labels != 0)
    if count < 2:
        return labels
    largest = 1 + int(np.bincount(numbers.ravel())[1:].argmax())
    return np.where(numbers == largest, labels, 0)
