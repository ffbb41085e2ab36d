"""Tiny phantoms of abdominal CT, and settings that train on them in seconds: for trial runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medrl.core.phantoms.abdomen import write_abdomen


def write(folder: Path) -> dict[str, Any]:
    """Write eight volumes to learn on and two to test on; return the config of a run of six steps.

    Self-play imitates three times and updates three times, so that every part of it is met.
    """
    write_abdomen(
        folder, cases=8, test_cases=2, seed=1, shape=(24, 24, 16), radius=(2.5, 4.0), distractors=(1, 1)
    )
    return {
        "data": {"root": str(folder), "folds": 2},
        "classifier": {
            "least_auc": 0.0,
            "cluster": {"cells": 60, "clusters": 12, "runs": 1, "iterations": 2},
            "head": {"steps": 6, "widths": [8], "batch": 256},
            "pseudo": {"rounds": 1, "smallest": 4},
        },
        "score": {"window": [8, 8, 4]},
        "warm": {"steps": 3, "batch": 16},
        "ppo": {"updates": 3, "envs": 4, "steps": 4, "minibatch": 8},
        "env": {"horizon": 6},
        "map": {"episodes": 2, "horizon": 4, "smallest": 4},
        "validation": {"volumes": 2, "episodes": 1},
    }
