"""Pairs of image and label map with the truth beside them: made, stored, split by subject, read."""

from __future__ import annotations

from .predictions import (
    PREDICTION,
    PredictionRecipe,
    PredictionReport,
    Validity,
    prediction_pairs,
    with_contrast,
    with_noise,
)
from .rows import PairBatch, PairOrigin, PairRow
from .split import PARTS, Part, SubjectSplit
from .store import MANIFEST, PairSet, PairWriter, draw
from .synthetic import KINDS, SYNTHETIC, SyntheticRecipe, synthetic_pairs

__all__ = [
    "KINDS",
    "MANIFEST",
    "PARTS",
    "PREDICTION",
    "SYNTHETIC",
    "PairBatch",
    "PairOrigin",
    "PairRow",
    "PairSet",
    "PairWriter",
    "Part",
    "PredictionRecipe",
    "PredictionReport",
    "SubjectSplit",
    "SyntheticRecipe",
    "Validity",
    "draw",
    "prediction_pairs",
    "synthetic_pairs",
    "with_contrast",
    "with_noise",
]
