"""Rewards of windows of frames: their fusion, and a penalty for frames that jump.

Actions are ``(N, X, Y, T)``, images ``(N, C, X, Y, T)``, rewards ``(N, X, Y, T)`` in [0, 1].
"""

from __future__ import annotations

from .fused import FusedReward
from .fusion import fuse, normalise
from .temporal import temporal_penalty, temporal_severity

__all__ = ["FusedReward", "fuse", "normalise", "temporal_penalty", "temporal_severity"]
