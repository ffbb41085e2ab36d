"""Settings of a prediction beside those that every method has."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from medrl.core.config import Block


class TTOConfig(Block):
    """Test-time optimisation of the actor on one file, against its reward nets."""

    mode: Literal["off", "auto", "force"] = "off"
    """`auto`: where the first prediction is not valid, anatomically in each frame or over time."""
    passes: int = Field(default=4, ge=1)
    """Passes over the chunks of a file. Original: 4."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Learning rate of Adam. Original: 0.001."""
    clip: float = Field(default=0.2, gt=0.0)
    """ε of the clipped ratio."""
    kl: float = Field(default=0.01, ge=0.0)
    """β, weight of the distance to the first actor. Original: 0.01."""
    entropy: float = Field(default=0.1, ge=0.0)
    """c_H, weight of the entropy. Original: 0.1."""
    views: int = Field(default=3, ge=1)
    """Augmented copies of each chunk. Original: 3."""
    patience: int = Field(default=2, ge=1)
    """Passes without a better worst frame after which it stops."""
    clip_norm: float = Field(default=0.5, ge=0.0)
    """Largest gradient norm; 0 = no limit."""
    seed: int = Field(default=1, ge=0)
    """Seed; with the content of a file it gives everything random of that file."""


class PredictConfig(Block):
    """How files are read, predicted and written."""

    equalise: Literal["auto", "on", "off"] | None = None
    """CLAHE of each frame; left out: as the network was trained, or `auto`."""
    spacing_mm: tuple[float, float] | None = None
    """Pixel size of the network; left out: as it was trained, or 0.37."""
    pixel_size_mm: tuple[float, float] | None = None
    """Replaces the pixel size that the files give."""
    time_axis: int = Field(default=-1, ge=-1, le=2)
    """Which axis of a file is time."""
    blend: Literal["gaussian", "legacy", "uniform"] = "gaussian"
    """How windows are joined."""
    rewards: bool = True
    """Judge the result by the reward nets, if there are any, and write their maps."""
    fusion: Literal["min", "mean", "product"] = "min"
    """How several rewards become one."""
    gif: bool = False
    """Write a moving picture of each file."""
    mp4: bool = False
    """As MP4; needs the program ffmpeg, which the extra `video` brings."""
    overwrite: bool = False
    """Replace results that exist."""
    rules: str | None = None
    """Anatomical rules; left out: those that the model was trained with, or `echo`."""
    temporal_rules: str | None = None
    """Temporal rules; left out: those that the model was trained with, or `echo_temporal`."""
    trust: bool = False
    """Run TorchScript packages; read pickled objects of old checkpoints, of which nothing is run."""
    view: str | None = None
    """View of the heart that a package is told."""
    reward_files: tuple[tuple[str, Path], ...] = ()
    """Further reward nets by name."""
    tto: TTOConfig = TTOConfig()
    """Test-time optimisation."""
