"""Synthetic data for trial runs, such as those of `medrl plugins check spars`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_trial(folder: Path) -> dict[str, Any]:
    """Write a few small phantoms of abdominal CT; return the config values that name them."""
    from medrl.core.phantoms.abdomen import write_abdomen

    root = write_abdomen(
        folder, cases=8, test_cases=3, seed=1, shape=(24, 24, 16), radius=(2.5, 4.0), distractors=(1, 1)
    )
    return {"data": {"root": str(root), "folds": 2}}
