"""Settings of the sequences that rl4seg3d trains on: source, target, and how a file becomes windows."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from medrl.core.config import Block, DataConfig


class SourceConfig(DataConfig):
    """The labelled source domain."""

    root: Path | None = None
    """Dataset folder, or the CSV file of the original; relative paths are taken from the config file."""
    reader: Literal["auto", "core", "original"] = "auto"
    """`original` reads ``img/<study>/<view>/<uuid>_0000.nii.gz`` and ``segmentation/…`` with a CSV file;
    `core` takes one of the layouts; `auto` recognises which."""
    split_column: str = ""
    """Column of the CSV file that says train, val, test or pred. Empty: ``lm_split2`` or
    ``split_official_test``, whichever there is, else the sequences are split by patient. The file is never
    written."""
    subset_frac: float = Field(default=1.0, gt=0.0)
    """Part of the training sequences that is used, drawn once by `split_seed`: a share up to 1, above that a
    number of sequences. Original: `subset_frac`."""
    max_image_area: int = Field(default=0, ge=0)
    """Layout of the original: leave out sequences whose frame has more pixels of 0.37 mm, by the columns H, W
    (pixels), dx, dy (cm) of the CSV file; 0 = no limit. Original: 600000 for iCardio."""


class TargetConfig(SourceConfig):
    """The unlabelled target domain; its labels are never opened in training unless `allow_labels`."""

    fold: int = Field(default=0, ge=0)
    """Where the dataset names no test sequences: the fold whose validation part is the test part."""
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the patients that watch over training, without their labels, where the dataset names no
    validation sequences."""
    max_images: int = Field(default=0, ge=0)
    """Training sequences taken, drawn once by `split_seed`; 0 takes all."""
    allow_labels: bool = False
    """Allow the training labels of the target to be read; only for an oracle reward or a target-supervised
    upper bound, never for adaptation."""
    gt_frac: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the training sequences whose true labels PPO takes as their action with reward 1, drawn once
    by `split_seed`; needs `allow_labels`; the adaptation is then semi-supervised. Original: `gt_frac`."""


class SampleConfig(Block):
    """How a sequence becomes windows of frames; prediction prepares it in the same way."""

    spacing_mm: tuple[float, float] = (0.37, 0.37)
    """Size of a pixel along x and y after resampling; time is never resampled. 0 keeps that of the file.
    Original: 0.37 mm."""
    size: tuple[int, int] = (0, 0)
    """Pixels of a window along x and y; smaller frames are filled up with black, larger ones cut, both about
    the centre. 0 takes the largest frame of both domains."""
    multiple: int = Field(default=32, ge=1)
    """The size of a frame is filled up to a multiple of this. Original: 32."""
    equalise: Literal["auto", "on", "off"] = "auto"
    """CLAHE of each frame; `auto` leaves images alone whose values already lie in 0 to 1."""
    windows: int = Field(default=1, ge=0)
    """Windows of each sequence of a batch; 0 takes as many as `max_tensor_volume` has room for. Original:
    `max_batch_size`."""
    max_tensor_volume: int = Field(default=5_000_000, ge=1)
    """Pixels of all windows of a sequence together, for `windows` 0. Original: 5e6 (Cardinal), 3e6 (iCardio).
    """
    merge: dict[str, str] = Field(
        default_factory=lambda: dict.fromkeys(("LA", "atrium", "left_atrium"), "background")
    )
    """Labels to join, by name or value, of either domain; the labels left are numbered anew in their order,
    without gaps. The default joins the left atrium to the background."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(extent < 0 for extent in self.size) or (0 in self.size and any(self.size)):
            raise ValueError(f"size must be two positive numbers, or 0 and 0; got {list(self.size)}")
        if any(extent < 0 for extent in self.spacing_mm) or (0 in self.spacing_mm and any(self.spacing_mm)):
            raise ValueError(f"spacing_mm must be two positive numbers, or 0 and 0: {list(self.spacing_mm)}")
        if any(extent % self.multiple for extent in self.size):
            raise ValueError(f"size {list(self.size)} must be a multiple of {self.multiple}")
        return self
