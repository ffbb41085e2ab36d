"""Tiny beating hearts of two devices, and settings that train on them in seconds: for trial runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medrl.core.phantoms.echo import write_echo_sequences

_NETWORK = {"name": "rl4seg3d.unet3d_small", "channels": [4, 8]}


def write(folder: Path) -> dict[str, Any]:
    """Write labelled sequences and others of another look; return the config of a loop of small stages."""
    size, frames = (32, 32), 8
    source = write_echo_sequences(folder / "source", cases=6, test_cases=2, seed=1, size=size, frames=frames)
    target = write_echo_sequences(
        folder / "target", cases=6, test_cases=2, seed=2, size=size, frames=frames, shift=0.5
    )
    return {
        "data": {"root": str(source), "layout": "auto", "folds": 3},
        "target": {"root": str(target), "layout": "auto"},
        "sample": {"spacing_mm": [0, 0], "equalise": "off"},
        "model": _NETWORK,
        "critic": _NETWORK,
        "reward_model": _NETWORK,
        "source": {"lr": 0.01},
        "pairs": {"count": 16},
        "ppo": {"warmup": 1, "validation_images": 2},
        "train": {"batch_size": 2},
    }
