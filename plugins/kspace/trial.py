"""Tiny hearts, and settings that train on them in seconds: for trial runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medrl.core.phantoms.cardiac import write_cardiac


def write(folder: Path) -> dict[str, Any]:
    """Write four patients and one for testing; return the config of a run of six steps.

    The policy collects states and imitates twice, and updates twice, so that every part of it is met.
    """
    write_cardiac(folder, cases=4, test_cases=1, shape=(16, 16), slices=2, frames=1)
    return {
        "data": {"root": str(folder), "folds": 2},
        "sample": {"shape": [16, 16]},
        "acquisition": {"init_center": 2},
        "budget": {"train": [2, 3], "eval": [2, 3]},
        "model": {"name": "kspace.compact", "widths": [4, 8]},
        "agent": {"name": "kspace.columns", "width": 8},
        "warm": {"states": 4, "chunk": 2, "epochs": 1, "batch": 4},
        "ppo": {"updates": 2, "envs": 4, "group": 2, "minibatch": 8, "epochs": 1},
        "train": {"batch_size": 4},
        "validation": {"cases": 2},
    }
