"""How large the demonstrations are, and what suits their images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REGIONS = {"prostate": (1, 2, 3), "cancer": (2, 3)}
"""What is evaluated: the whole gland, and both kinds of cancer together."""

TUNED = {
    "train": {"lr": 1.0e-2},
    "distill": {"feature_weight": 0.1, "logit_weight": 3.0, "temperature": 2.0},
}
"""What suits the phantoms, laid over the preset."""

SWAPPED = "learned from labels that had cancer and healthy gland swapped"
UNTRAINED = "was never trained"


@dataclass(frozen=True)
class Scale:
    """Size of a demonstration.

    Attributes:
        shape: ``(X, Y, Z)`` voxels of the phantoms.
        teacher_cases: Cases of hospital A.
        student_cases: Cases of hospital B; one fifth validates.
        test_cases: Cases that no stage sees.
        labelled: Cases of hospital B that have labels.
        good: Teachers trained properly, each without one fold.
        swapped: Teachers that learn from labels in which healthy gland and cancer are swapped.
        untrained: Teachers that were never trained.
        teacher_steps: Training steps of a teacher.
        random_reward: Whether to run the agent on noise too.
        panels: Test cases shown in the report.
    """

    shape: tuple[int, int, int]
    teacher_cases: int
    student_cases: int
    test_cases: int
    labelled: int
    good: int
    swapped: int
    untrained: int
    teacher_steps: int
    random_reward: bool
    panels: int


SCALES = {
    "smoke": Scale(
        shape=(40, 40, 10),
        teacher_cases=16,
        student_cases=12,
        test_cases=8,
        labelled=5,
        good=2,
        swapped=1,
        untrained=0,
        teacher_steps=200,
        random_reward=False,
        panels=3,
    ),
    "small": Scale(
        shape=(48, 48, 12),
        teacher_cases=30,
        student_cases=20,
        test_cases=12,
        labelled=5,
        good=3,
        swapped=1,
        untrained=1,
        teacher_steps=400,
        random_reward=True,
        panels=6,
    ),
}


@dataclass(frozen=True)
class Student:
    """One row of students: its config beside the shared one, and what it stands for."""

    key: str
    name: str
    role: str
    values: Mapping[str, Any]
