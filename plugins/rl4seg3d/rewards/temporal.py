"""Less reward around what is doubtful in frames whose attributes jump."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medrl.core.errors import RuntimeFault
from medrl.core.learned_reward.fields import smooth
from medrl.core.validity.temporal import TemporalRules, check_sequence

ATTRIBUTES = ("lv_area", "myo_area", "epi_center_x", "epi_center_y")
"""Attributes that are looked at: those that need no landmark."""
BLUR_PX = 10.0
SMOOTHING_FRAMES = 1.1
_EVEN = 1e-5


def temporal_severity(
    actions: Tensor,
    rules: str | Path | TemporalRules = "echo_temporal",
    *,
    attributes: tuple[str, ...] = ATTRIBUTES,
    smoothing: float = SMOOTHING_FRAMES,
) -> Tensor:
    """Return how many attributes jump in each frame, smoothed over time.

    Args:
        actions: ``(N, X, Y, T)`` labels.
        rules: Temporal rules, see `medrl.core.validity.temporal`.
        attributes: Names of the attributes to look at.
        smoothing: Standard deviation in frames.

    Returns:
        ``(N, T)`` float32 on the device of the actions, 0 where nothing near is wrong.

    Raises:
        RuntimeFault: The actions have other than four axes.
    """
    if actions.dim() != 4:
        raise RuntimeFault("temporal reward", why=f"actions {tuple(actions.shape)}, expected (N, X, Y, T)")
    found = np.zeros((actions.shape[0], actions.shape[3]), dtype=np.float32)
    # All of them are shares of their own range, so that the size of a pixel does not matter.
    for row, labels in enumerate(actions.detach().cpu().numpy()):
        report = check_sequence(labels, (1.0, 1.0), rules, only=attributes)
        flags = np.sum(list(report.errors.values()), axis=0, dtype=np.float64)
        if flags.any():
            found[row] = ndimage.gaussian_filter1d(flags, smoothing)
    return torch.from_numpy(found).to(actions.device)


def temporal_penalty(
    rewards: Tensor,
    actions: Tensor,
    rules: str | Path | TemporalRules = "echo_temporal",
    *,
    strength: float = 1.0,
    blur_px: float = BLUR_PX,
    smoothing: float = SMOOTHING_FRAMES,
) -> Tensor:
    """Lower the reward of frames that do not fit their neighbours.

    Where the severity s of a frame is not 0, its lack of reward 1 − r is blurred over `blur_px`·(1 + s)
    pixels and stretched to [0, 1]; the reward becomes the lesser of itself and one minus that.

    Args:
        rewards: ``(N, X, Y, T)`` in [0, 1].
        actions: Labels of the same shape.
        rules: Temporal rules.
        strength: Part of the way from `rewards` to the lowered ones, in [0, 1].
        blur_px: Standard deviation of the blur in pixels.
        smoothing: Of the severity over time, in frames.

    Returns:
        ``(N, X, Y, T)``, nowhere greater than `rewards`.

    Raises:
        RuntimeFault: The shapes differ, or the strength is no number in [0, 1].

    Source: RL4Seg3D, `temporal_reward_nets_3d.py` (specification §6). Deviations: the penalty of a frame is
    that frame's, where the original takes that of the number of the sequence (§10.12); a frame whose lack of
    reward is even stays as it is; at the edges of the image, blurring weighs the pixels inside.
    """
    if rewards.shape != actions.shape or not 0.0 <= strength <= 1.0:
        raise RuntimeFault(
            "temporal reward",
            why=f"rewards {tuple(rewards.shape)}, actions {tuple(actions.shape)}, strength {strength}",
        )
    severity = temporal_severity(actions, rules, smoothing=smoothing)
    sample, frame = torch.nonzero(severity > 0, as_tuple=True)
    if sample.numel() == 0:
        return rewards
    own = rewards[sample, :, :, frame]
    lack = smooth((1.0 - own)[:, None], blur_px * (1.0 + severity[sample, frame]))[:, 0]
    least = lack.amin(dim=(1, 2), keepdim=True)
    spread = lack.amax(dim=(1, 2), keepdim=True) - least
    even = spread <= _EVEN
    stretched = (lack - least) / torch.where(even, torch.ones_like(spread), spread)
    lowered = torch.where(even, own, torch.minimum(own, 1.0 - stretched))
    result = rewards.clone()
    result[sample, :, :, frame] = own + strength * (lowered - own)
    return result
