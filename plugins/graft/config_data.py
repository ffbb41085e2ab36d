"""Settings of graft about cases: samples, targets, duties, teachers, augmentation, validation, epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from medrl.core.config import Block
from medrl.core.config.blocks import MachineField

TargetKind = Literal["auto", "regions", "binary", "3class", "binary_classes", "nested", "separate", "classes"]


class SampleConfig(Block):
    """How a case becomes the box of voxels that the network sees."""

    window: Literal["auto", "mask", "centre"] = "auto"
    """Where the box lies: `mask` anchors its depth to the organ mask and centres it in plane, `centre`
    is the middle of the image; `auto` takes `mask` if every case has the mask named below. Source:
    upstream dataset/pimedloader_3d.py."""
    size: tuple[int, int, int] = (0, 0, 0)
    """Depth, height, width of the box in voxels. 0 means: 20 slices for the depth of a mask window,
    otherwise the largest training image, rounded up to what the network can halve."""
    mask: str = "prostate"
    """Name of the organ mask (``masksTr/<name>/``, or simply ``masksTr/``)."""
    normalization: Literal["auto", "stats", "mask", "volume"] = "auto"
    """z-score of each channel by given statistics, by the voxels inside the organ mask, or by all
    voxels; `auto` takes `stats` if `stats_file` is given, else `mask` if every case has it, else
    `volume`."""
    stats_file: Path | None = None
    """JSON with mean and standard deviation for each case or for all; four forms are read."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(extent < 0 for extent in self.size):
            raise ValueError(f"size must not be negative, got {list(self.size)}")
        if self.normalization == "stats" and self.stats_file is None:
            raise ValueError("normalization `stats` needs stats_file")
        return self


class TargetConfig(Block):
    """What the network learns to predict."""

    kind: TargetKind = "auto"
    """`binary` = regions prostate {1,2,3} and cancer {2,3}, `3class` adds {3}, `binary_classes` = background,
    prostate, cancer as exclusive classes; of any
    dataset's labels, `nested` = each with all after it, `separate` = one sigmoid each, `classes` = one
    softmax class each; `auto` takes `binary` for the labels 0 to 3 with a prostate
    mask, else `classes`; `regions` takes regions where `auto` would take classes (upstream
    `--use-region-based-training`). Source: upstream region_converter.py."""


class SplitConfig(Block):
    """Which cases of the training fold do what."""

    labelled: int = Field(default=0, ge=0)
    """Train with the labels of this many cases only; the others teach through the teachers alone. 0 =
    all."""
    reward: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the labelled training cases on which the agent's reward is measured; they are never
    trained on, and are neither validation nor test. Used only with weighting `reinforce` and `align`;
    `legacy` measures on the batch and, as published, on the validation cases. 0 measures it on the batch."""
    reward_mode: Literal["split", "crossfit", "batch"] = "split"
    """`split` sets the reward cases apart for good. `crossfit` deals all labelled cases into folds that take
    turns: an episode trains without one fold and measures its reward there, so that no label is lost; but
    those cases are training data in the other episodes, and their reward is an optimistic one. `batch`
    measures on the batch that was just trained on."""
    reward_folds: int = Field(default=5, ge=2)
    """Folds of `crossfit`; at most one for each labelled case."""
    unlabelled_from_test: bool = False
    """Images without labels that the dataset lists for testing train too, through the teachers alone. They
    are then no test cases of this run: no result on them is one on unseen images."""
    selected_cases: Path | None = None
    """JSON with the identifiers of the only cases to train on: a list, or ``{"case_ids": [...]}``. Upstream
    `--selected-cases`."""
    overfit_batches: int = Field(default=0, ge=0)
    """Train on the cases of so many batches only, to see that a network can learn them by heart; 0 = all.
    Upstream `--overfit-batches`."""
    fixed_subsets: bool = False
    """Each rank keeps its own cases in every epoch, for ranks that read from disks of their own. Upstream
    `--use-fixed-subset-sampler`."""


class TeachersConfig(Block):
    """The frozen teachers: files that `medrl graft extract-features` wrote, or the networks themselves."""

    features: tuple[Path, ...] = ()
    """One folder for each teacher, or one folder that holds teacher_0, teacher_1, …; with `live`, run
    folders or checkpoints, also of nnU-Net v2; empty: no teachers, plain supervised training."""
    train: int = Field(default=0, ge=0, json_schema_extra=MachineField)
    """With `--by stage`: so many teachers are trained first on the same dataset, each without one fold, and
    read out into files unless `source` is `live`; 0: those of `features`, or none."""
    source: Literal["files", "live"] = "files"
    """`files` reads what was extracted before; `live` asks the networks about every batch, after
    augmentation, which costs N forward passes a step and no disk."""
    trust: bool = False
    """Read checkpoints of nnU-Net that hold pickled objects beside the weights of a live teacher; none is
    executed."""
    oof: Literal["off", "flag", "mean", "unseen"] = "off"
    """What follows from a teacher having been trained on a case of the student: nothing; a flag in the state
    of the policy; quality measured on cases that it did not see; or it teaches only those."""
    folds: tuple[int | Literal["all", "none"], ...] = ()
    """For `oof`, the fold of this dataset that each teacher did not see, `all` if it saw every case, `none`
    if it saw none; empty: as its files say."""
    verify: bool = True
    """Check the digest of each feature file when a process first opens it."""


class AugmentConfig(Block):
    """Random changes of the training images. Feature files fix the geometry: with them, only intensities."""

    scale: float = Field(default=0.1, ge=0.0, le=1.0)
    """Each channel is multiplied by 1 ± this."""
    shift: float = Field(default=0.1, ge=0.0, le=2.0)
    """Up to this many standard deviations are added."""
    noise: float = Field(default=0.0, ge=0.0, le=1.0)
    """Standard deviation of white noise."""
    mirror: tuple[Literal["depth", "height", "width"], ...] = ()
    """Axes that are reversed in half of the samples; with live teachers, or without any."""
    rotate: float = Field(default=0.0, ge=0.0, le=180.0)
    """Rotation in plane by up to so many degrees; likewise."""
    zoom: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Magnification by 1 ± this in plane; likewise."""

    @property
    def moves(self) -> bool:
        """Whether voxels change their place."""
        return bool(self.mirror) or self.rotate > 0 or self.zoom > 0


class ValidationConfig(Block):
    """Checks on the validation fold; how often is `train.validate_every` (0 = once an epoch)."""

    mode: Literal["full", "subset", "train"] = "full"
    """`subset` takes the first `max_cases` (20 if that is 0); `train` the labelled training cases, to see
    that a network learns them by heart. Upstream `--val-mode`."""
    batch_size: int = Field(default=1, ge=1)
    """Cases a forward pass."""
    max_cases: int = Field(default=0, ge=0)
    """Use only the first so many cases; 0 = all. Upstream `--val-subset-size`."""
    hd95: bool = False
    """Also measure the 95th percentile of surface distances in mm, for each case; takes time."""
    early_stopping: bool = False
    """End the run when the Dice of `target.focus` (cancer in the prostate) no longer rises. Upstream
    `--early-stopping`."""
    patience: int = Field(default=30, ge=1)
    """Validations without a rise before the end. Upstream `--early-stopping-patience`."""
    min_delta: float = Field(default=0.001, ge=0.0)
    """What counts as a rise. Upstream `--early-stopping-min-delta`."""
    panels: int = Field(default=2, ge=0)
    """Cases that are drawn at a validation, of training and of validation each; 0 = none. Upstream 10."""
    panels_every: int = Field(default=1, ge=1)
    """Draw at every so many validations."""
    nifti: bool = False
    """Write what is drawn as NIfTI files too."""


class EpochsConfig(Block):
    """Lengths in epochs, as the original counts; where one is given, it replaces the one in steps."""

    total: int | None = Field(default=None, ge=1)
    """Replaces `train.max_steps`. Upstream `--epochs`."""
    batches: int | None = Field(default=None, ge=1)
    """At most so many batches of a rank in an epoch; fewer where each case is seen before. Upstream
    `--batches-per-epoch`."""
    ramp: int | None = Field(default=None, ge=0)
    """Replaces `optim.ramp`. Upstream `--warmup-epochs`."""
    milestones: tuple[int, ...] = ()
    """Replace `optim.milestones`. Upstream `--milestones`."""
    agent_warmup: int | None = Field(default=None, ge=0)
    """Replaces `agent.warmup`. Upstream `--agent-warmup-epochs`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.milestones and self.total is None:
            raise ValueError("milestones in epochs need epochs.total")
        if any(epoch < 0 for epoch in self.milestones):
            raise ValueError(f"milestones must not be negative, got {list(self.milestones)}")
        return self
