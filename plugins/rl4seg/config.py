"""Every setting of rl4seg, with its meaning, unit, range and source.

"Original" is the published code (arnaudjudge/RL4Seg c718218) with the settings of its pre-release; the
numbers behind it are section numbers of the specification in plugins/rl4seg/README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from medrl.core.config import Block, MethodConfig, ModelConfig, TrainConfig
from medrl.core.config.blocks import MachineField

from .data_config import SampleConfig, SourceConfig, TargetConfig

Stage = Literal["all", "source", "style", "corrector", "pairs", "reward", "ppo", "test"]
Select = Literal["last", "best"]
CorrectorKind = Literal["denoiser", "vae", "morphology", "atlas", "none"]


class ActorConfig(Block):
    """The policy over the labels of each pixel."""

    kind: Literal["auto", "categorical", "binary"] = "auto"
    """`categorical` has one logit for each class, `binary` one logit for two; `auto` is categorical."""
    bn_mode: Literal["eval", "batch"] = "eval"
    """Batch norm of actor and critic in PPO: frozen statistics, so that the first ratio is exactly 1, or
    statistics of the batch (original). The reference always has frozen statistics."""
    eps_greedy: float = Field(default=0.0, ge=0.0, le=1.0)
    """With this probability an image takes the greedy label map instead of the sampled one. Original:
    `eps_greedy_term` 0."""


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


class RewardConfig(StageConfig):
    """The reward function and the network behind it."""

    name: str = "rl4seg.composite"
    """Registry key of the reward. `rl4seg.composite`: the reward net and the corrector of what it would
    choose; `rl4seg.reward_unet`: the reward net alone (original); the others compare with target labels,
    which only target.allow_labels permits."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Further settings of that reward, such as `weight` of the composite."""
    head: Literal["class", "binary"] = "class"
    """The net tells the class of each pixel, or (original) only whether the given label is right."""
    encoding: Literal["onehot", "scalar"] = "onehot"
    """The mask enters as one channel a class, or (original) as one channel of label values."""
    init: Literal["style", "source", "actor", "random"] = "style"
    """Start of the reward net; the style, source or present actor with a wider first layer, where the
    networks are of one kind. Original: `random`."""
    nets: int = Field(default=1, ge=1)
    """Independently trained nets."""
    reduce: Literal["min", "mean"] = "min"
    """How several nets become one reward."""
    schedule: Literal["one_cycle", "constant", "plateau"] = "one_cycle"
    """`plateau`: a tenth after ten validations without progress (original)."""
    calibrated: bool = False
    """Use the fitted temperature in PPO too, not only for uncertainty maps. Original: fitted, not used."""
    select: Select = "last"
    """Weights that PPO takes: of the last step, or with the least loss on the validation pairs (original)."""


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


class LoopConfig(Block):
    """How the stages follow each other."""

    iterations: int = Field(default=1, ge=1)
    """Rounds of pairs, reward net and PPO. Original: 4."""
    start: Literal["style", "source"] = "style"
    """The actor from which PPO starts: style-tuned, or trained on plain source images (original)."""
    final: Select = "last"
    """The iteration whose actor is the result: the last, or the one with the best share of valid masks on
    target validation images."""
    keep_critic: bool = True
    """An iteration goes on with the critic of the one before (original)."""
    shrink_perturb: bool = False
    """Shrink and perturb actor and critic between iterations (release of the original)."""
    shrink: float = Field(default=0.5, ge=0.0, le=1.0)
    """Factor of the weights, biases left out."""
    perturb: float = Field(default=0.01, ge=0.0)
    """Standard deviation of what is added to them."""
    recalibrate_bn: bool = False
    """Measure the statistics of batch norm anew on target images after shrinking."""


class PredictConfig(Block):
    """Defaults of `medrl predict rl4seg`."""

    largest_blob: bool = True
    """Keep only the largest 4-connected blob of foreground, as the evaluation does."""
    tta_axes: tuple[Literal["x", "y"], ...] = ()
    """Axes that ``--tta`` mirrors. Empty: mirroring is not sensible, and ``--tta`` is refused."""


class InputsConfig(Block):
    """Parts made elsewhere: a run folder or checkpoint each; what is given is not trained."""

    source: Path | None = Field(default=None, json_schema_extra=MachineField)
    """The actor trained on source images."""
    style: Path | None = Field(default=None, json_schema_extra=MachineField)
    """The style-tuned actor."""
    corrector: Path | None = Field(default=None, json_schema_extra=MachineField)
    """A trained corrector."""
    reward: Path | None = Field(default=None, json_schema_extra=MachineField)
    """A trained reward net; with it there are no pairs, and every iteration uses it."""
    actor: Path | None = Field(default=None, json_schema_extra=MachineField)
    """One stage alone: the actor that PPO starts from, or that makes pairs."""
    critic: Path | None = Field(default=None, json_schema_extra=MachineField)
    """One stage alone: the critic that PPO starts from."""
    pairs: tuple[Path, ...] = Field(default=(), json_schema_extra=MachineField)
    """One stage alone: folders of pairs for the reward net."""


class Rl4segTrainConfig(TrainConfig):
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


class Rl4segConfig(MethodConfig):
    """Adapt a 2D segmentation network to unlabelled target images by PPO against a learned reward."""

    data: SourceConfig = SourceConfig()
    """Labelled source images."""
    target: TargetConfig = TargetConfig()
    """Unlabelled target images."""
    sample: SampleConfig = SampleConfig()
    """Image to network input."""
    train: Rl4segTrainConfig = Rl4segTrainConfig()
    """Precision, seed, device; defaults of all stages."""
    rules: str = "echo"
    """Anatomical rules: `echo`, `echo_atrium`, or a YAML file."""
    model: ModelConfig = ModelConfig(name="rl4seg.unet")
    """The actor's network, by registry key."""
    critic: ModelConfig = ModelConfig(name="rl4seg.unet")
    """The critic's network, by registry key; used with ppo.baseline `critic`."""
    reward_model: ModelConfig = ModelConfig(name="rl4seg.unet")
    """The reward net's network, by registry key."""
    actor: ActorConfig = ActorConfig()
    """The policy."""
    source: SupervisedConfig = SupervisedConfig()
    """Stage `source`: supervised training on source images."""
    style: StyleConfig = StyleConfig()
    """Stage `style`: supervised training on styled source images."""
    corrector: CorrectorConfig = CorrectorConfig()
    """Stage `corrector`: what makes masks plausible."""
    pairs: PairsConfig = PairsConfig()
    """Stage `pairs`: what the reward net learns from."""
    reward: RewardConfig = RewardConfig()
    """Stage `reward`: the reward net."""
    ppo: PPOConfig = PPOConfig()
    """Stage `ppo`: reinforcement learning on target images."""
    loop: LoopConfig = LoopConfig()
    """Iterations."""
    predict: PredictConfig = PredictConfig()
    """Prediction."""
    inputs: InputsConfig = InputsConfig()
    """Parts made elsewhere."""
    stage: Stage = Field(default="all", json_schema_extra=MachineField)
    """`all`, or one stage of the run folder: the next of its kind that is not done."""
    alone: bool = Field(default=False, json_schema_extra=MachineField)
    """The run folder is that of one stage, not of a loop; the loop and the tools of single stages set it."""
    iteration: int = Field(default=1, ge=1, json_schema_extra=MachineField)
    """Iteration that a stage alone belongs to; decides the schedules of `per_iteration`."""

    @field_validator("rules")
    @classmethod
    def _absolute(cls, value: str) -> str:
        """Let a rule file be found again from any folder."""
        return str(Path(value).expanduser().resolve()) if value.endswith((".yaml", ".yml")) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pairs.kind == "prediction" and self.corrector.kind == "none":
            raise ValueError("pairs.kind `prediction` needs a corrector: implausible masks are judged by it")
        if self.reward.name == "rl4seg.composite" and self.corrector.kind == "none":
            raise ValueError("reward.name `rl4seg.composite` needs a corrector; rl4seg.reward_unet does not")
        if self.reward.name == "rl4seg.composite" and self.reward.head != "class":
            raise ValueError("reward.name `rl4seg.composite` needs reward.head `class`")
        if self.ppo.pseudo_labels and self.pairs.kind != "prediction":
            raise ValueError("ppo.pseudo_labels needs pairs.kind `prediction`")
        return self

    @property
    def learns_reward(self) -> bool:
        """Whether the reward has a network that is trained from pairs."""
        return self.reward.name in ("rl4seg.composite", "rl4seg.reward_unet")

    @property
    def needs_style(self) -> bool:
        """Whether some stage takes the style-tuned actor."""
        learns = self.learns_reward and self.inputs.reward is None
        return self.loop.start == "style" or (
            learns and (self.reward.init == "style" or self.pairs.kind == "synthetic")
        )

    @property
    def needs_corrector(self) -> bool:
        """Whether some stage takes a corrector that is trained."""
        if self.corrector.kind not in ("denoiser", "vae"):
            return False
        learns = self.learns_reward and self.inputs.reward is None
        return self.reward.name == "rl4seg.composite" or (learns and self.pairs.kind == "prediction")
