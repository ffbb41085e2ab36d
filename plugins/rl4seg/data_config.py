"""Settings of the data of rl4seg: source, target, and how an image becomes what the network sees."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from medrl.core.config import Block, DataConfig


class SourceConfig(DataConfig):
    """The labelled source domain."""

    root: Path | None = None
    """Dataset folder, CSV file or HDF5 file; relative paths are taken from the config file."""
    reader: Literal["auto", "core", "camus", "esed", "vital"] = "auto"
    """`camus`, `esed` and `vital` read what the original reads; `core` takes one of the layouts; `auto`
    recognises which. Datasets with split columns or lists of their own keep to them."""
    split_column: str = ""
    """Column of a CSV file that says train, val, test or pred. Empty: ``split_<fold>``, else ``split_0``; a
    CSV without such a column is split by patient. The file is never written."""


class TargetConfig(SourceConfig):
    """The unlabelled target domain; its labels are never opened in training unless `allow_labels`."""

    fold: int = Field(default=0, ge=0)
    """Where the dataset names no test images: the fold whose validation part is the test part."""
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the patients that watch over training, without their labels, where the dataset names no
    validation images (original: 100 images)."""
    max_images: int = Field(default=2500, ge=0)
    """Training images taken, drawn once by `split_seed`; 0 takes all. Original: at most 2,500 more in each
    iteration."""
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
    """`range` divides by 255 where an image goes beyond 1 (original); `percentile` maps the percentiles below
    to 0 and 1, channel by channel."""
    percentiles: tuple[float, float] = (0.5, 99.5)
    """Percentiles of the pixels that become 0 and 1 with `intensity: percentile`."""
    clahe: bool = True
    """Equalise the histogram of each region (CLAHE, `skimage.exposure.equalize_adapthist`). Switch it off for
    images that were equalised before. Source: original scripts/normalise_images.py."""
    clahe_clip: float = Field(default=0.01, gt=0, le=1)
    """Clip limit of CLAHE; higher is more contrast. Original: .01."""
    merge: dict[str, str] = Field(
        default_factory=lambda: dict.fromkeys(("LA", "atrium", "left_atrium"), "background")
    )
    """Labels to join, by name or value, of either domain; the labels left are numbered anew in their order,
    without gaps. The default joins the left atrium to the background; ``merge.LA=LA`` keeps it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(extent < 0 for extent in self.size) or (0 in self.size and any(self.size)):
            raise ValueError(f"size must be two positive numbers, or 0 and 0; got {list(self.size)}")
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles must rise and lie in 0 to 100, got {[low, high]}")
        return self
