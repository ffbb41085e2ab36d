"""Every setting of kspace, with its meaning, unit, range and source.

"Original" is the published code: the settings of ASMR (robinyen/asmr), which the seed repository
(Hanson1331/ICASSP2025) copies. Section numbers are those of the specification in plugins/kspace/README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from medrl.core.config import Block, MethodConfig, ModelConfig, TrainConfig
from medrl.core.config.blocks import MachineField

from .data_config import SampleConfig, ScanConfig
from .play_config import AcquisitionConfig, BudgetConfig, RewardConfig

Stage = Literal["policy", "reward", "recon"]


class SupervisedConfig(Block):
    """What the supervised stages share: reward model and reconstruction, under random masks (§4)."""

    steps: int = Field(default=0, ge=0)
    """Optimiser steps; 0 takes as many as `epochs` need."""
    epochs: int = Field(default=150, ge=1)
    """Passes over the training slices; used only where `steps` is 0."""
    batch: int = Field(default=0, ge=0)
    """Slices a rank and step; 0 is train.batch_size."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Largest learning rate of AdamW."""
    weight_decay: float = Field(default=1e-2, ge=0.0)
    """Weight decay of AdamW."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """`cosine` rises over `warmup` and falls to a hundredth; `step`: a tenth every `step_epochs`
    (original)."""
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the steps over which the rate rises."""
    step_epochs: int = Field(default=3, ge=1)
    """For `step`."""
    clip_norm: float = Field(default=1.0, ge=0.0)
    """Largest gradient norm; 0 = no limit. Original: none."""
    ema: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Momentum of the running mean of the weights, which is what is kept; it starts as 1/10, 2/11, … of it.
    0 switches it off."""
    rates: tuple[float, float] = (0.05, 1.0)
    """Range of the share of columns in the random masks: half of them in the middle, the rest drawn with
    triangular weights. Source: ASMR ``mask_kspace``, masks/vds.py."""
    full: float = Field(default=0.08, ge=0.0, le=1.0)
    """Share of slices that are seen fully sampled. Original: 0."""
    select: Literal["last", "best"] = "best"
    """Weights that the policy takes: of the last step, or with the best validation."""
    accelerations: tuple[float, ...] = (1.0, 4.0, 8.0, 16.0)
    """Of the fixed validation masks, in turn."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0.0 < self.rates[0] <= self.rates[1] <= 1.0:
            raise ValueError(f"rates must rise and lie in 0 to 1, got {list(self.rates)}")
        if not self.accelerations or min(self.accelerations) < 1.0:
            raise ValueError("accelerations must be numbers from 1 upwards")
        return self


class AugmentConfig(Block):
    """Changes of a slice in image space, before its k-space is taken; 0 switches one off."""

    flip: float = Field(default=0.5, ge=0.0, le=1.0)
    """Probability of a mirrored slice, for either axis."""
    rotation: float = Field(default=15.0, ge=0.0)
    """Largest rotation in degrees."""
    scale: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Largest relative change of size."""
    shift: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Largest displacement along either axis, as a share of it."""
    gamma: float = Field(default=0.3, ge=0.0)
    """Largest absolute logarithm of the exponent of the magnitude."""
    phase: float = Field(default=0.5, ge=0.0)
    """Largest further quadratic phase in radians."""
    noise: float = Field(default=0.0, ge=0.0)
    """Largest standard deviation of further complex noise."""


class SegConfig(SupervisedConfig):
    """Stage `reward`: the segmentation network that judges acquisitions."""

    dice: float = Field(default=1.0, ge=0.0)
    """Weight of 1 - soft Dice beside the cross-entropy."""
    background: bool = False
    """Let the Dice count the background too."""
    image: float = Field(default=0.2, ge=0.0)
    """Weight of the mean absolute error of the image that some networks predict as well."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation."""
    crossed: int = Field(default=0, ge=0, le=20)
    """Crossed reward models: the training patients are parted into so many, and as many more reward models
    are trained, each without one part; the policy learns from each case with the one that does not know its
    patient. 0: one reward model for all, which flatters the patients that it was trained on; keep others
    back for the policy then."""
    part: int = Field(default=-1, ge=-1, json_schema_extra=MachineField)
    """The part that this crossed reward model leaves out; -1 is none."""

    @model_validator(mode="after")
    def _check_crossed(self) -> Self:
        if self.crossed == 1:
            raise ValueError("crossed must be 0, or at least 2")
        if self.part >= self.crossed:
            raise ValueError(f"part {self.part} does not exist, there are {self.crossed}")
        return self


class ReconConfig(SupervisedConfig):
    """Stage `recon`: the U-Net that improves zero-filled images (§3); used with acquisition.recon `unet`."""

    loss: Literal["l1", "ssim"] = "l1"
    """Mean absolute error, or 1 - SSIM."""


class WarmConfig(Block):
    """The warm start: imitation of the exact one-step gains of all columns (findings, recipe)."""

    kind: Literal["greedy", "none"] = "greedy"
    """`none` starts PPO from scratch (original)."""
    states: int = Field(default=3072, ge=1)
    """States whose gains are computed: half on the way of oracle and random policies, then half on the way of
    the policy itself."""
    chunk: int = Field(default=32, ge=1)
    """States that are computed at once on a rank; one step of the run."""
    epochs: int = Field(default=18, ge=1)
    """Passes over the states in each half."""
    batch: int = Field(default=128, ge=1)
    """States in a minibatch of a rank."""
    lr: float = Field(default=2e-3, gt=0.0)
    """Learning rate of AdamW, falling to a twentieth along a cosine in each half."""
    weight_decay: float = Field(default=0.03, ge=0.0)
    """Weight decay of AdamW."""
    entropy: float = Field(default=0.03, ge=0.0)
    """Weight of the entropy bonus; larger numbers give a flatter start for PPO."""
    oracle: float = Field(default=0.5, ge=0.0, le=1.0)
    """In the first half: share of lines that the oracle chooses; the others are random."""
    clip_norm: float = Field(default=1.0, ge=0.0)
    """Largest gradient norm; 0 = no limit."""
    span: int = Field(default=8, ge=0)
    """At most so many states of one acquisition; a longer one begins at a random place. 0 is no limit."""


class PpoConfig(Block):
    """Proximal policy optimisation (§6)."""

    updates: int = Field(default=200, ge=0)
    """Rollouts with their updates; 0 stops after the warm start. Original: 10,850 (1e8 steps)."""
    envs: int = Field(default=128, ge=1)
    """Episodes at a time, of each rank."""
    steps: int = Field(default=0, ge=0)
    """Steps of a rollout; 0 takes the largest budget. Original: 72."""
    epochs: int = Field(default=3, ge=1)
    """Passes over a rollout. Original: 2."""
    minibatch: int = Field(default=256, ge=1)
    """Steps in a minibatch."""
    gamma: float = Field(default=1.0, ge=0.0, le=1.0)
    """Discount. Original: 0.99; with 1 the return of `delta` is the whole improvement."""
    lam: float = Field(default=0.95, ge=0.0, le=1.0)
    """λ of GAE."""
    clip: float = Field(default=0.2, gt=0.0, lt=1.0)
    """ε of the clipped ratio."""
    value_clip: float = Field(default=0.2, ge=0.0)
    """Limit of the movement of values; 0 is none."""
    value_coef: float = Field(default=0.5, ge=0.0)
    """Weight of the value loss. The original halves the squared error and weighs it by 0.5: 0.25 here."""
    entropy: float = Field(default=0.003, ge=0.0)
    """Weight of the entropy bonus. Original: 0.01."""
    lr: float = Field(default=3e-4, gt=0.0)
    """Learning rate of AdamW. Original: 1e-4."""
    decay: Literal["linear", "constant"] = "linear"
    """Of the rate, to 0 at the end. Original: constant."""
    weight_decay: float = Field(default=1e-4, ge=0.0)
    """Weight decay of AdamW."""
    clip_norm: float = Field(default=0.5, ge=0.0)
    """Largest gradient norm; 0 = no limit."""
    target_kl: float = Field(default=0.02, ge=0.0)
    """An update ends where the approximate KL exceeds 1.5 times this; 0 is never (original)."""
    group: int = Field(default=8, ge=1)
    """Episodes of one case and budget; their mean return is taken off, so that easy cases teach as much as
    hard ones. 1 takes none off (original)."""
    normalise: Literal["rollout", "minibatch"] = "rollout"
    """Advantages are standardised over the rollout of all ranks, or in each minibatch (original)."""
    value_first: int = Field(default=0, ge=0)
    """First updates in which only the value learns: after a warm start the critic knows nothing."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.envs % self.group:
            raise ValueError(f"ppo.envs {self.envs} must be a multiple of ppo.group {self.group}")
        return self


class ValidationConfig(Block):
    """How the policy is watched."""

    cases: int = Field(default=64, ge=1)
    """At most so many validation cases, spread evenly over all."""


class SamplerConfig(Block):
    """How training cases are drawn."""

    kind: Literal["uniform", "weighted"] = "uniform"
    """`weighted`: every set of labels that occurs in a slice is as frequent as any other (original); made
    here, or read from `inputs.sampler`."""


class InputsConfig(Block):
    """Parts made elsewhere; what is given is not trained."""

    reward: Path | None = Field(default=None, json_schema_extra=MachineField)
    """Run or checkpoint of the reward model."""
    recon: Path | None = Field(default=None, json_schema_extra=MachineField)
    """Run or checkpoint of the reconstruction network."""
    sampler: Path | None = Field(default=None, json_schema_extra=MachineField)
    """Weights of cases, as `medrl kspace make-sampler` writes them."""


class KspaceTrainConfig(TrainConfig):
    """What all stages share; steps and rates are in the block of each stage."""

    max_steps: int = Field(default=0, ge=0)
    """Largest number of steps of any stage, for trials; 0 = no limit."""
    batch_size: int = Field(default=32, ge=1)
    """Slices a rank and step in supervised stages."""
    lr: float = Field(default=1e-3, gt=0)
    """Not used: each stage has a rate of its own."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Not used: each stage has its own."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Not used: each stage has its own."""
    accumulate: int = Field(default=1, ge=1, le=1)
    """One batch a step."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    validate_every: int = Field(default=0, ge=0)
    """Steps between validations; 0 = ten in each stage."""


class KspaceConfig(MethodConfig):
    """Choose lines of k-space one by one so that the image, and what is segmented in it, gets good."""

    data: ScanConfig = ScanConfig()
    """Dataset and split."""
    sample: SampleConfig = SampleConfig()
    """Slice to k-space."""
    acquisition: AcquisitionConfig = AcquisitionConfig()
    """Episodes."""
    budget: BudgetConfig = BudgetConfig()
    """Lines."""
    reward: RewardConfig = RewardConfig()
    """Rewards."""
    train: KspaceTrainConfig = KspaceTrainConfig()
    """Precision, seed, device; defaults of all stages."""
    model: ModelConfig = ModelConfig(name="kspace.unet")
    """The reward model: a segmentation network, by registry key."""
    recon_model: ModelConfig = ModelConfig(name="kspace.recon_unet")
    """The reconstruction network, by registry key."""
    agent: ModelConfig = ModelConfig(name="kspace.columns")
    """The network of the policy, by registry key."""
    features: tuple[Literal["lines", "energy", "spectra", "gradient", "pooled"], ...] = (
        "lines",
        "energy",
        "spectra",
        "gradient",
        "pooled",
    )
    """What a column agent knows of each column and of the image: counters; acquired energy; spectra of what
    the networks see; the derivative of the entropy; areas, centroids and deepest features."""
    blind: bool = False
    """Train the twin that sees the mask and the counters only: a mask that does not depend on the case."""
    seg: SegConfig = SegConfig()
    """Stage `reward`."""
    recon: ReconConfig = ReconConfig()
    """Stage `recon`."""
    sampler: SamplerConfig = SamplerConfig()
    """Draws of training cases."""
    warm: WarmConfig = WarmConfig()
    """Stage `policy`: warm start."""
    ppo: PpoConfig = PpoConfig()
    """Stage `policy`: reinforcement learning."""
    validation: ValidationConfig = ValidationConfig()
    """Validation of the policy."""
    inputs: InputsConfig = InputsConfig()
    """Parts made elsewhere."""
    stage: Stage = Field(default="policy", json_schema_extra=MachineField)
    """`policy` trains first whatever it needs and `inputs` does not bring; `reward` and `recon` train that
    part alone."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_blocks()
        return self

    def _check_blocks(self) -> None:
        """Refuse settings that contradict each other."""
        if self.reward.mode == "asmr" and self.reward.delay_step >= self.budget.train[1]:
            raise ValueError("reward.delay_step leaves no step of any episode with a reward")
        if self.acquisition.points and self.acquisition.geometry != "volume3d":
            raise ValueError("acquisition.points needs acquisition.geometry volume3d")
        if self.acquisition.recon == "unet" and self.acquisition.geometry == "volume3d":
            raise ValueError("acquisition.recon unet improves slices; use zf with volume3d")
        if self.warm.kind == "none" and self.ppo.updates == 0:
            raise ValueError("without a warm start and without PPO nothing is learned")

        self._check_lines()

    def _check_lines(self) -> None:
        """Refuse budgets for which a matrix of known size has too few lines."""
        width, play = self.sample.shape[1], self.acquisition
        if not width or play.points:
            return
        first, last = play.sampled_indices or (0, width - 1)
        start = (width - play.init_center + 1) // 2
        free = sum(not start <= line < start + play.init_center for line in range(first, last + 1))
        for name, most in (("train", self.budget.train[1]), ("eval", max(self.budget.eval))):
            if most > free:
                raise ValueError(f"budget.{name} reaches {most}, but {free} lines are left to choose")

    @property
    def needs_labels(self) -> bool:
        """Whether the reward compares segmentations."""
        return self.reward.mode == "asmr" or self.reward.seg > 0.0
