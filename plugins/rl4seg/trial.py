"""Tiny images of two devices, and settings that train on them in seconds: for trial runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medrl.core.phantoms.echo import write_echo

_NETWORK = {"name": "rl4seg.unet_small", "channels": [4, 8]}


def write(folder: Path) -> dict[str, Any]:
    """Write labelled images and others of another look; return the config of a loop of small stages."""
    size = (32, 32)
    source = write_echo(folder / "source", cases=10, test_cases=2, seed=1, shape=size)
    target = write_echo(folder / "target", cases=10, test_cases=4, seed=2, shape=size, shift=0.5)
    return {
        "data": {"root": str(source), "layout": "auto"},
        "target": {"root": str(target), "layout": "auto"},
        "sample": {"size": list(size), "clahe": False},
        "model": _NETWORK,
        "critic": _NETWORK,
        "reward_model": _NETWORK,
        "source": {"lr": 0.01},
        "pairs": {"count": 24},
        "ppo": {"warmup": 1, "validation_images": 4},
        "train": {"batch_size": 4},
    }
