"""Settings of the data of rl4seg: the target domain, and how an image becomes what the network sees."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from medrl.core.config import Block

ATRIUM_NAMES = ("LA", "atrium", "left_atrium")
"""Names of the left atrium, which the default of `SampleConfig.merge` gives to the background."""


class TargetConfig(Block):
    """The unlabelled target domain; its labels are never opened in training unless `allow_labels`."""

    root: Path | None = None
    """Dataset folder, CSV file or HDF5 file of the target domain; relative paths are taken from the config
    file."""
    layout: Literal["auto", "nnunet", "msd", "folder", "manifest", "camus", "esed", "vital"] = "auto"
    """Folder layout; `auto` recognises it. `camus`, `esed` and `vital` are those of the original."""
    fold: int = Field(default=0, ge=0)
    """Where the dataset names no test images: the fold whose validation part is the test part."""
    folds: int = Field(default=5, ge=2)
    """Number of folds made when the dataset brings neither test images nor splits."""
    split_seed: int = 0
    """Seed of the folds, of the validation part and of `max_images`; independent of the training seed."""
    group_by: str = "patient"
    """`patient`, `case`, or a regular expression whose first group names the patient, as for `data`."""
    exclude: tuple[str, ...] = ()
    """Case identifiers to leave out."""
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the patients that watch over training, without their labels, where the dataset names no
    validation images (upstream: 100 images)."""
    max_images: int = Field(default=2500, ge=0)
    """Training images taken, drawn once by `split_seed`; 0 takes all (upstream: at most 2,500 more in each
    iteration)."""
    allow_labels: bool = False
    """Allow the training labels of the target to be read; only for an oracle reward or a target-supervised
    upper bound, never for adaptation."""


class SampleConfig(Block):
    """How an image file becomes what the network sees."""

    size: tuple[int, int] = (0, 0)
    """Pixels along the first and the second axis of the stored array. 0 takes the size of the source images
    where all agree, else 256."""
    keep_aspect: bool = False
    """Keep the shape of the pixels and fill up with black; otherwise the image is stretched to `size`, as the
    original does."""
    intensity: Literal["range", "percentile"] = "range"
    """`range` divides by 255 where an image goes beyond 1 (upstream); `percentile` maps the percentiles below
    to 0 and 1, channel by channel."""
    percentiles: tuple[float, float] = (0.5, 99.5)
    """Percentiles of the pixels that become 0 and 1 with `intensity: percentile`."""
    clahe: bool = True
    """Equalise the histogram of each region (CLAHE, `skimage.exposure.equalize_adapthist`). Switch it off for
    images that were equalised before. Source: upstream scripts/normalise_images.py."""
    clahe_clip: float = Field(default=0.01, gt=0, le=1)
    """Clip limit of CLAHE; higher is more contrast (upstream .01)."""
    merge: dict[str, str] = Field(default_factory=lambda: dict.fromkeys(ATRIUM_NAMES, "background"))
    """Labels to join, by name or value: ``{LA: background}``. The labels left are numbered anew in their
    order, without gaps. The default joins the left atrium to the background."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(extent < 0 for extent in self.size) or (0 in self.size and any(self.size)):
            raise ValueError(f"size must be two positive numbers, or 0 and 0; got {list(self.size)}")
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles must rise and lie in 0 to 100, got {[low, high]}")
        return self
