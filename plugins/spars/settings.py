"""Blocks of the config that data, classifier and scores read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from medrl.core.config import Block, DataConfig

Size = tuple[int, int, int]


class VolumeDataConfig(DataConfig):
    """Where the volumes are, how they are split, and what is looked for."""

    presence: Path | None = None
    """CSV with the header ``case_id,label``, label 1 where the object is present; the default is
    presence.csv in the dataset's folder."""
    target: tuple[str, ...] = ()
    """Names of the labels that make the object in voxel masks; empty takes the last label. Masks are opened
    for evaluation only, unless classifier.label_source is `crop`."""
    organ: tuple[str, ...] = ()
    """Names of the labels that make the organ around the object, the object included; empty for none."""
    channel: int = Field(default=0, ge=0)
    """Channel of the images that is looked at."""
    test_fold: int = Field(default=-1, ge=-1)
    """The fold that is tested on where the dataset sets no cases aside; -1 for none."""


class SampleConfig(Block):
    """How a file becomes a volume in [0, 1]."""

    norm: Literal["ct", "percentile"] = "ct"
    """`ct` clips to hu_window; `percentile` to percentiles of the foreground of each volume."""
    hu_window: tuple[float, float] | None = (-200.0, 250.0)
    """Hounsfield units that become 0 and 1; null keeps raw values."""
    percentiles: tuple[float, float] = (0.5, 99.5)
    """Percentiles inside the foreground (above the mean of the volume) that become 0 and 1."""
    volume_size: Size | None = None
    """Voxels along x, y, z that each volume is resampled to; null keeps the size."""
    spacing_mm: tuple[float, float, float] | None = None
    """Voxel size that each volume is resampled to; null keeps it. Not together with volume_size."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.volume_size is not None and self.spacing_mm is not None:
            raise ValueError("give volume_size or spacing_mm, not both")
        if self.volume_size is not None and min(self.volume_size) < 1:
            raise ValueError(f"volume_size must be positive, got {list(self.volume_size)}")
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {list(self.spacing_mm)}")
        if self.hu_window is not None and self.hu_window[0] >= self.hu_window[1]:
            raise ValueError(f"hu_window must rise, got {list(self.hu_window)}")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles must rise within 0 to 100, got {list(self.percentiles)}")
        return self


class ClusterConfig(Block):
    """Clusters of cells that occur in positive volumes only."""

    cells: int = Field(default=400, ge=1)
    """Random cells of each volume that clusters are made of."""
    clusters: int = Field(default=320, ge=2)
    """Number of clusters."""
    iterations: int = Field(default=6, ge=1)
    """Iterations of k-means."""
    runs: int = Field(default=3, ge=1)
    """Runs with other cells and seeds, whose scores are averaged."""
    present: int = Field(default=2, ge=1)
    """Cells of a cluster from which on it is present in a volume."""
    full_scale: float = Field(default=7.0, gt=0)
    """Score that becomes 1."""


class TopKConfig(Block):
    """Cells whose highest scores tell the label of a volume; k falls while it learns."""

    first: int = Field(default=1200, ge=1)
    """k at the start, in cells."""
    last: int = Field(default=32, ge=1)
    """k at the end."""
    steps: int = Field(default=400, ge=1)
    """Optimiser steps of a start."""
    batch: int = Field(default=8, ge=2)
    """Volumes of a step, half of them positive."""
    lr: float = Field(default=3e-3, gt=0)
    """Highest learning rate."""
    restarts: int = Field(default=4, ge=1)
    """Starts, of which the one with the least bag loss is kept."""
    cells: int = Field(default=8192, ge=1)
    """Random cells of a volume that are looked at in training."""


class FractionConfig(Block):
    """A head that tells which fraction of a cell the object fills."""

    width: int = Field(default=32, ge=1)
    """Units of each of its two hidden layers."""
    steps: int = Field(default=900, ge=1)
    """Optimiser steps of a round."""
    rounds: int = Field(default=2, ge=1)
    """Rounds: pseudo-masks of the first come from the presence map, of later ones from the head itself."""
    batch: int = Field(default=4096, ge=1)
    """Cells of a step."""
    lr: float = Field(default=1e-2, gt=0)
    """Highest learning rate of one cycle."""
    weight: float = Field(default=20.0, ge=0)
    """A cell weighs 1 + this × its fraction."""
    cells: int = Field(default=8192, ge=1)
    """Random cells of a volume beside those in pseudo-masks."""
    growth: float = Field(default=1.6, gt=1)
    """A round whose pseudo-masks grow or shrink by more than this factor is refused, and the head of the round
    before is kept."""


class WindowTrainingConfig(Block):
    """Training of networks that see windows: bags of windows, or crops chosen by masks."""

    crop: Size = (16, 16, 8)
    """Window in voxels."""
    enlarge: Size | None = None
    """Size that a window is enlarged to; null keeps it. `faithful` needs 256, 256, 180."""
    steps: int = Field(default=300, ge=1)
    """Optimiser steps."""
    batch: int = Field(default=4, ge=1)
    """Volumes of a step."""
    windows: int = Field(default=16, ge=1)
    """Windows of a volume: the bag for label_source `image`, crops for `crop`."""
    top: int = Field(default=2, ge=1)
    """Windows with the highest logits whose mean is the logit of the bag."""
    anneal: bool = True
    """Fall from all windows of a bag to `top` over the first half of training."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of Adam."""
    dilate: bool = True
    """Dilate masks once by the six neighbours before crops are labelled, as the original does."""
    bounded: bool = True
    """Keep crops inside the volume; the original lets positive crops stick out."""


class ClassifierConfig(Block):
    """What scores windows, and how it is learned."""

    kind: Literal["fraction", "presence", "compact", "faithful"] = "fraction"
    """`fraction`: mean of a dense map that tells how much of each cell the object fills. `presence`: maximum of
    the map that this is learned from. `compact`: small convolutional network. `faithful`: network of the
    original."""
    label_source: Literal["image", "crop"] = "image"
    """`image`: labels of whole images alone, no mask is opened. `crop`: masks of training cases choose and
    label crops, as in the original; recorded with every result."""
    mil: Literal["cluster", "topk"] = "cluster"
    """How the presence map is learned from labels of images."""
    cell: Size = (2, 2, 2)
    """Voxels of a cell of the dense maps."""
    cluster: ClusterConfig = ClusterConfig()
    """mil `cluster`."""
    topk: TopKConfig = TopKConfig()
    """mil `topk`."""
    fraction: FractionConfig = FractionConfig()
    """Kind `fraction`."""
    window: WindowTrainingConfig = WindowTrainingConfig()
    """Kinds `compact` and `faithful`."""
    gate: bool = True
    """Drop what is no likelier than the likeliest place of object-free validation volumes."""
    calibrate: bool = True
    """Fit a temperature on validation volumes."""
    min_auc: float = Field(default=0.65, ge=0, le=1)
    """Area under the ROC curve of image labels on validation volumes below which training is refused."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "presence" and self.label_source == "crop":
            raise ValueError("kind presence is learned from labels of images; use fraction with crop")
        if self.topk.last > self.topk.first:
            raise ValueError("topk.last must not exceed topk.first")
        return self
