"""Settings that methods of this kind share; a method adds its own and overrides what differs.

"Original" is the published code of RL4Seg (arnaudjudge/RL4Seg c718218) with the settings of its pre-release,
unless a method says otherwise; the numbers behind it are section numbers of its specification.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from medrl.core.config import Block, TrainConfig

Select = Literal["last", "best"]
CorrectorKind = Literal["denoiser", "vae", "morphology", "atlas", "none"]


class StageConfig(Block):
    """What every training stage has."""

    steps: int = Field(default=2000, ge=0)
    """Optimiser steps (PPO: rollouts); 0 takes as many as `epochs` need."""
    epochs: int = Field(default=50, ge=1)
    """Passes over the training images; used only where `steps` is 0."""
    batch: int = Field(default=0, ge=0)
    """Images a rank and step; 0 is train.batch_size."""
    lr: float = Field(default=1e-3, ge=0.0)
    """Learning rate of Adam; 0 is train.lr."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Weight decay of Adam."""
    clip_norm: float = Field(default=0.0, ge=0.0)
    """Largest gradient norm; 0 = no limit."""


class SupervisedConfig(StageConfig):
    """Supervised training on labelled source images: stages `source` and `style`."""

    lr: float = Field(default=2e-3, ge=0.0)
    """Learning rate of Adam; 0 is train.lr. Original: 1e-3."""
    schedule: Literal["one_cycle", "constant"] = "one_cycle"
    """`one_cycle` rises to the rate and falls to almost nothing; the original's rate is constant."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Of the cross-entropy."""
    spatial: float = Field(default=0.0, ge=0.0, le=3.0)
    """Strength of random rotation, scaling and shift of images and labels alike, for sources of few patients:
    1 goes as far as 15°, 0.85 to 1.2 times, and 8 % of the side. That of `style` is for synthetic pairs too.
    Original: none."""
    select: Select = "last"
    """Weights that the next stages take: of the last step, or with the best Dice on the source validation
    images (original)."""


class StyleConfig(SupervisedConfig):
    """Further supervised training on source images whose style is changed; labels stay as they are."""

    strength: float = Field(default=1.0, ge=0.0)
    """How far the changes go; 0 leaves images alone, borrowing apart."""
    families: tuple[Literal["gamma", "contrast", "bias", "shadow", "blur", "noise", "borrow"], ...] = (
        "gamma",
        "contrast",
        "bias",
        "shadow",
        "blur",
        "noise",
        "borrow",
    )
    """What is changed; `borrow` takes from unlabelled target images."""
    borrow: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of images that take the histogram or the low frequencies of an unlabelled target image."""


class CorrectorConfig(StageConfig):
    """What makes a label map anatomically plausible; learned ones see source masks only."""

    schedule: Literal["one_cycle", "constant"] = "one_cycle"
    """As that of the supervised stages."""
    kind: CorrectorKind = "denoiser"
    """`denoiser`: a U-Net from corrupted to true masks; `vae`: a variational autoencoder of masks (original);
    `morphology`: largest blobs and filled holes; `atlas`: the most similar source mask; `none`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Further settings of that kind."""


class PairsConfig(Block):
    """The images, masks and true labels from which the reward net learns."""

    kind: Literal["synthetic", "prediction"] = "synthetic"
    """`synthetic`: styled source images with corrupted, predicted, swapped and warped masks, judged by source
    labels; `prediction`: predictions on target images, judged by themselves where they are plausible, else
    by the corrector (original)."""
    count: int = Field(default=8000, ge=1)
    """Number of synthetic pairs of an iteration."""
    images: int = Field(default=2500, ge=1)
    """`prediction`: new target images of an iteration. Original: `rl_num_predict`."""
    keep: bool = False
    """Learn from the pairs of all iterations so far (original), not only from those of the present actor."""
    validation: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of subjects, by hash and so the same in every iteration, whose pairs validate the reward net."""
    minimum_dice: float = Field(default=0.95, ge=0.0, le=1.0)
    """`prediction`: least Dice of a prediction with its corrected mask for it to count as plausible."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Further settings of that kind: shares of masks, strengths of noise."""


class PPOConfig(StageConfig):
    """One iteration of reinforcement learning on unlabelled target images."""

    algorithm: Literal["ppo", "pg"] = "ppo"
    """`pg` is the plain policy gradient: no critic, no ratio, no reference."""
    lr: float = Field(default=5e-4, ge=0.0)
    """Learning rate of the actor; 0 is train.lr."""
    critic_lr: float = Field(default=5e-4, gt=0.0)
    """Learning rate of the critic."""
    clip_norm: float = Field(default=0.5, ge=0.0)
    """Largest gradient norm of the actor, apart from the critic; 0 = no limit."""
    critic_clip_norm: float = Field(default=0.0, ge=0.0)
    """The same for the critic. Original: no limit."""
    warmup: int = Field(default=10, ge=0)
    """Rollouts over which the rate rises linearly."""
    decay: Literal["linear", "constant"] = "linear"
    """Of the rate, after the warm-up, to 0 at the end."""
    clip: float = Field(default=0.2, gt=0.0, lt=1.0)
    """ε of the clipped ratio."""
    inner_steps: int = Field(default=3, ge=1)
    """k, updates on one rollout. Original: 5."""
    entropy: float = Field(default=0.0, ge=0.0)
    """c_H, weight of the entropy bonus."""
    kl: float = Field(default=0.02, ge=0.0)
    """β, weight of the log-ratio to the reference policy, taken off the reward."""
    reference: Literal["start", "source", "previous"] = "start"
    """The policy that β holds on to: the actor of loop.start, the source actor (original), or the actor that
    this iteration starts from."""
    per_iteration: Literal["same", "original"] = "same"
    """`original`: in iteration i, c_H/(2i), β/(2i) and i times the batch."""
    baseline: Literal["constant", "critic", "group"] = "constant"
    """What is taken off the reward: a number, the critic (original), or the mean of several samples of the
    same image."""
    baseline_value: float = Field(default=0.5, ge=0.0, le=1.0)
    """The number of `constant`."""
    group: int = Field(default=4, ge=2)
    """Samples of an image for `group`."""
    sigma_px: float = Field(default=2.0, ge=0.0)
    """Width in pixels over which neighbours are sampled alike, with exact marginals; 0 = independent
    pixels (original)."""
    pseudo_labels: bool = False
    """With pairs `prediction`: images whose prediction was plausible take that mask as their action with
    reward 1 (original)."""
    pseudo_target: Literal["reward", "one"] = "one"
    """What the critic learns for such images: 1, as the advantage assumes, or the reward (original)."""
    select: Select = "last"
    """Weights of the iteration: of the last rollout, or with the best reward on target validation images
    (original)."""
    validation_images: int = Field(default=64, ge=1)
    """At most so many target images, without labels, measure reward and validity while training."""
    alarm_validity: float = Field(default=0.2, ge=0.0, le=1.0)
    """Warn where the share of valid masks at the start is less."""
    collapse: float = Field(default=0.2, ge=0.0, lt=0.5)
    """Go back to the last good weights, and halve the rate, where the foreground of the most probable masks
    falls below this part of the reference's: an empty mask is never left again. 0 switches the guard off."""

    @property
    def uses_critic(self) -> bool:
        """Whether a critic is trained."""
        return self.algorithm == "ppo" and self.baseline == "critic"


class StagedTrainConfig(TrainConfig):
    """What all stages share; steps and rates are in the block of each stage."""

    max_steps: int = Field(default=0, ge=0)
    """Largest number of steps of any training stage, for trials; 0 = no limit."""
    batch_size: int = Field(default=16, ge=1)
    """Images a rank and step, where a stage names no `batch`."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of stages whose own `lr` is 0; every stage has one of its own unless told otherwise."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=0.0)
    """Each stage has its own."""
    clip_norm: float = Field(default=0.0, ge=0.0, le=0.0)
    """Each stage has its own."""
    accumulate: int = Field(default=1, ge=1, le=1)
    """One batch a step."""
    validate_every: int = Field(default=0, ge=0)
    """Steps between validations in a stage; 0 = four in each stage, or one an epoch where `steps` is 0."""
