"""Settings of data and classifier of spars: which volumes, what is looked for, and what scores windows."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from medrl.core.config import Block, DataConfig
from medrl.core.config.blocks import MachineField


def _positive(name: str, values: tuple[int, ...]) -> None:
    if not values or min(values) < 1:
        raise ValueError(f"{name} must be positive, got {list(values)}")


class HuntDataConfig(DataConfig):
    """The volumes, their image labels, and how they are split; whole patients only."""

    presence: Path | None = Field(default=None, json_schema_extra=MachineField)
    """CSV file with the columns `case_id` and `label` (1: the volume holds what is looked for, 0: it does
    not); null takes `presence.csv` in the dataset folder. The original has none: it takes masks."""
    target: tuple[str, ...] = ("tumour", "tumor", "lesion", "cancer")
    """Names of labels of the masks that count as what is looked for; the first that the dataset has. Masks
    are opened for evaluation, and in training only with `classifier.label_source` crop. A number in quotes
    is a label value."""
    test_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the patients that are set aside for the test where the dataset sets none aside."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.target:
            raise ValueError("target is empty: nothing is looked for; name a label, such as tumour")
        return self


class SampleConfig(Block):
    """How a volume becomes numbers."""

    hu_window: tuple[float, float] | None = (-200.0, 250.0)
    """Values that become 0 and 1; null takes `percentiles` of each volume, for what is no CT. Original: none,
    raw values."""
    percentiles: tuple[float, float] = (0.5, 99.5)
    """Without `hu_window`: percentiles inside the foreground that become 0 and 1."""
    volume_size: tuple[int, int, int] | None = None
    """Resize every volume to so many voxels (trilinear); null keeps its own. Specification: 256, 256, 180."""
    spacing_mm: tuple[float, float, float] | None = None
    """Resample every volume to this voxel size instead; null keeps its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hu_window is not None and not self.hu_window[0] < self.hu_window[1]:
            raise ValueError(f"hu_window must rise, got {list(self.hu_window)}")
        if not 0.0 <= self.percentiles[0] < self.percentiles[1] <= 100.0:
            raise ValueError(f"percentiles must rise within 0 to 100, got {list(self.percentiles)}")
        if self.volume_size is not None and self.spacing_mm is not None:
            raise ValueError("volume_size and spacing_mm contradict each other; give one")
        if self.volume_size is not None and min(self.volume_size) < 1:
            raise ValueError(f"volume_size must be positive, got {list(self.volume_size)}")
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {list(self.spacing_mm)}")
        return self


class ClusterConfig(Block):
    """`cluster_mil`: find cells that only positive volumes hold (findings, recipe 1 and 2)."""

    grid: tuple[int, int, int] = (2, 2, 2)
    """Voxels of a cell along each axis."""
    cells: int = Field(default=400, ge=1)
    """Random cells of each volume that are clustered."""
    clusters: int = Field(default=320, ge=2)
    """K of k-means."""
    iterations: int = Field(default=6, ge=1)
    """Of k-means."""
    runs: int = Field(default=3, ge=1)
    """Clusterings whose scores are averaged."""
    least: int = Field(default=2, ge=1)
    """Cells of a cluster that make it present in a volume."""
    scale: float = Field(default=64.0, gt=0.0)
    """Counts are scaled to so many volumes of a class."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _positive("grid", self.grid)
        return self


class TopkConfig(Block):
    """`topk`: cell scores whose k largest make the bag logit; k is annealed, the bag loss chooses a start."""

    starts: int = Field(default=6, ge=1)
    """Restarts."""
    steps: int = Field(default=400, ge=1)
    """Optimiser steps of a start."""
    first: int = Field(default=1200, ge=1)
    """k at the beginning, as for a volume of 64 × 64 × 48."""
    last: int = Field(default=32, ge=1)
    """k at the end."""
    lr: float = Field(default=5e-3, gt=0.0, le=1.0)
    """Learning rate of AdamW."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.last > self.first:
            raise ValueError(
                f"k must fall from first to last, got {self.first} to {self.last}; exchange them"
            )
        return self


class PseudoConfig(Block):
    """Pseudo-masks of positive training volumes, and their guards (findings, recipe 3)."""

    rounds: int = Field(default=1, ge=1)
    """Rounds of pseudo-masks and fraction head; a guarded round that fails is left out."""
    region: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Stage-1 score above which voxels are looked at, dilated by `dilate`."""
    dilate: int = Field(default=2, ge=0)
    """Voxels."""
    seed: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Stage-1 score of seeds; what is not connected to one is dropped."""
    otsu: bool = True
    """Split the region by Otsu's threshold and keep the side of the seeds."""
    smallest: int = Field(default=50, ge=0)
    """Voxels below which a component is dropped."""
    growth: float = Field(default=3.0, gt=1.0)
    """Guard: a round whose masks grow or shrink by more than this factor is left out."""
    auc_loss: float = Field(default=0.05, ge=0.0, le=1.0)
    """Guard: a round that loses more of the validation image AUC is left out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.seed < self.region:
            raise ValueError(
                f"seeds lie within the region, got seed {self.seed:g} below region {self.region:g}; "
                "raise seed or lower region"
            )
        return self


class HeadConfig(Block):
    """The fraction head: share of a cell that is tumour (findings, recipe 4)."""

    widths: tuple[int, ...] = (32, 32)
    """Hidden layers."""
    steps: int = Field(default=900, ge=1)
    """Optimiser steps of a round."""
    batch: int = Field(default=4096, ge=1)
    """Cells of a step."""
    lr: float = Field(default=1e-2, gt=0.0, le=1.0)
    """Largest rate of AdamW, one cycle."""
    weight: float = Field(default=20.0, ge=0.0)
    """A cell weighs 1 + this × fraction."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(width < 1 for width in self.widths):
            raise ValueError(f"widths must be positive, got {list(self.widths)}")
        return self


class GateConfig(Block):
    """Components that tumour-free validation volumes show as well are dropped (findings, recipe 5)."""

    on: bool = True
    """Use it."""
    component: float = Field(default=0.3, ge=0.0, le=1.0)
    """p above which components are formed."""
    statistic: Literal["share", "peak"] = "share"
    """What counts in a component: the share of its voxels with a presence above 0.3, or the largest presence
    (findings; it let more distractors through)."""
    margin: float = Field(default=0.01, ge=0.0, le=1.0)
    """Added to the largest value of components of tumour-free validation volumes."""
    limits: tuple[float, float] = (0.05, 0.6)
    """Between which the gate lies."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0.0 <= self.limits[0] <= self.limits[1] <= 1.0:
            raise ValueError(f"limits must rise within 0 to 1, got {list(self.limits)}; try [0.05, 0.6]")
        return self


class NetConfig(Block):
    """Training of the networks `compact` and `faithful` on windows."""

    steps: int = Field(default=400, ge=1)
    """Optimiser steps. Original: 192."""
    patients: int = Field(default=4, ge=1)
    """Volumes of a step."""
    windows: int = Field(default=16, ge=1)
    """Windows of a volume (K of the bag). Original: 10 crops, 5 of them on the tumour."""
    top: int = Field(default=2, ge=1)
    """Bag logit = mean of the so many largest window logits."""
    lr: float = Field(default=1e-3, gt=0.0, le=1.0)
    """Learning rate of Adam."""
    crop: tuple[int, int, int] = (96, 96, 64)
    """`label_source` crop: size of the crops; where that is larger than a volume, or the network is not
    the faithful one, crops are of the size of the window."""
    enlarge: tuple[int, int, int] = (256, 256, 180)
    """Size to which the faithful network enlarges whatever it sees, trilinearly."""
    channels: tuple[int, ...] = (8, 16, 32, 64)
    """Of the compact network."""
    dilate: bool = True
    """`label_source` crop: dilate masks once before cropping."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("crop", "enlarge", "channels"):
            _positive(name, getattr(self, name))
        if self.top > self.windows:
            raise ValueError(f"top {self.top} exceeds windows {self.windows}; give at most that")
        return self


class ClassifierConfig(Block):
    """The classifier: presence labels in, scores of windows out (specification §3; findings)."""

    kind: Literal["fraction", "presence", "compact", "faithful"] = "fraction"
    """`fraction`: fraction head on pseudo-masks; `presence`: the stage-1 map of the MIL alone; `compact` and
    `faithful`: networks on windows (original: faithful)."""
    label_source: Literal["image", "crop"] = "image"
    """`image`: presence labels alone, no mask is opened; `crop`: labels of crops from masks (original)."""
    mil: Literal["cluster_mil", "topk"] = "cluster_mil"
    """What finds the cells, for `fraction` and `presence`."""
    cluster: ClusterConfig = ClusterConfig()
    """Of `cluster_mil`."""
    topk: TopkConfig = TopkConfig()
    """Of `topk`."""
    pseudo: PseudoConfig = PseudoConfig()
    """Of `fraction`."""
    head: HeadConfig = HeadConfig()
    """Of `fraction`."""
    gate: GateConfig = GateConfig()
    """Of `fraction`."""
    net: NetConfig = NetConfig()
    """Of `compact` and `faithful`."""
    calibrate: bool = True
    """Fit a temperature on validation volumes. Original: no."""
    least_auc: float = Field(default=0.6, ge=0.0, le=1.0)
    """Validation image AUC below which nothing is trained on these scores; 0 never refuses."""
    patients: int = Field(default=0, ge=0)
    """Training volumes of the classifier, the first so many; 0 is all. Original: 8, 12, 16, 20 or 24."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "presence" and self.label_source == "crop":
            raise ValueError(
                "kind presence is learned from labels of images, not of crops; use fraction, or "
                "label_source image"
            )
        return self
