"""Rewards that are learned from pairs of images and label maps, and what makes and uses such pairs.

Everything works on images ``(N, C, *S)`` in [0, 1] and label maps ``(N, *S)`` of K classes, S = (X, Y) or
(X, Y, T). Everything random is drawn from generators named by a seed and a key: the global streams are never
touched, and a rerun gives the same bytes.

====================== =====================================================================================
`encoding`, `net`      what a reward net sees; one network or several, class or binary head
`temperature`          the number that makes its probabilities come true
`quality`              BCE, calibration error and AUROC on held-out pairs
`style`, `corruption`  images in another style, label maps made wrong
`correctors`           label maps made plausible
`pairs`                what the reward net learns from: made, stored, split by subject
`composite`            reward net and corrector together
====================== =====================================================================================
"""

from __future__ import annotations

from .composite import CompositeReward
from .correctors import Corrector, CorrectorModule, LearnedCorrector, build_corrector
from .corruption import (
    AFFINE,
    AffineRanges,
    CorruptionRanges,
    corrupt_mask,
    corrupt_masks,
    jitter_images,
    jitter_masks,
)
from .encoding import encode, input_channels, one_hot
from .fields import from_params
from .net import RewardNet, fuse, stretch_frames, widen_input
from .pairs import (
    PairBatch,
    PairSet,
    PairWriter,
    PredictionRecipe,
    PredictionReport,
    SubjectSplit,
    SyntheticRecipe,
    draw,
    prediction_pairs,
    synthetic_pairs,
)
from .quality import RewardQuality, held_out_quality, near_foreground, reward_quality
from .sampling import sample_actions
from .style import StyleRanges, StyleShift, match_histogram, swap_amplitude
from .temperature import fit_temperature

__all__ = [
    "AFFINE",
    "AffineRanges",
    "CompositeReward",
    "Corrector",
    "CorrectorModule",
    "CorruptionRanges",
    "LearnedCorrector",
    "PairBatch",
    "PairSet",
    "PairWriter",
    "PredictionRecipe",
    "PredictionReport",
    "RewardNet",
    "RewardQuality",
    "StyleRanges",
    "StyleShift",
    "SubjectSplit",
    "SyntheticRecipe",
    "build_corrector",
    "corrupt_mask",
    "corrupt_masks",
    "draw",
    "encode",
    "fit_temperature",
    "from_params",
    "fuse",
    "held_out_quality",
    "input_channels",
    "jitter_images",
    "jitter_masks",
    "match_histogram",
    "near_foreground",
    "one_hot",
    "prediction_pairs",
    "reward_quality",
    "sample_actions",
    "stretch_frames",
    "swap_amplitude",
    "synthetic_pairs",
    "widen_input",
]
