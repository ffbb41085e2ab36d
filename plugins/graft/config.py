"""Every setting of graft, with its meaning, unit, range and source.

"Upstream" is the published code at commit 16590fff; its file names are given where a value comes from it.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from medrl.core.config import Block, MethodConfig, ModelConfig, TrainConfig
from medrl.core.config.blocks import MachineField

from .config_data import (
    AugmentConfig,
    EpochsConfig,
    SampleConfig,
    SplitConfig,
    TargetConfig,
    TeachersConfig,
    ValidationConfig,
)

Mode = Literal["uniform", "quality", "probe", "fixed", "align", "meta", "legacy", "reinforce"]
Prior = Literal["uniform", "quality", "probe"]


class DistillConfig(Block):
    """What the student takes from the teachers."""

    taps: tuple[Literal["neg1", "neg2"], ...] = ("neg1",)
    """Layers whose raw features are compared: `neg1` last decoder stage, `neg2` one resolution
    lower."""
    feature_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the feature loss. Upstream `--feat-weight`."""
    neg2_weight: float = Field(default=1.0, ge=0.0)
    """Weight of tap neg2 against neg1. Upstream `--neg2-weight`."""
    feature_loss: Literal["cosine", "mse", "kl", "smooth_l1"] = "mse"
    """`mse` and `smooth_l1` compare with the teacher's features standardised by channel; `cosine` =
    2(1 - cos) of whole samples, the loss that upstream really uses; `kl` compares softmaxes over voxels."""
    projection: Literal["linear", "conv", "orthogonal"] = "linear"
    """Map from student to teacher features: 1×1×1 convolution; the same with norm and ReLU; or a truly
    orthogonal map with a learnable scale (upstream `--use-orthogonal`, whose map could not learn)."""
    equal_speed: bool = True
    """Divide each projection's gradient by N·w, so that it learns at one speed at any weight."""
    mask_features: bool = False
    """Compare only where the teacher is right or near its own hits. Upstream `--use-feature-
    masking`."""
    mask_dilation: int = Field(default=3, ge=0, le=32)
    """Radius in voxels of that neighbourhood. Upstream `--mask-dilation-radius`."""
    logit_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the logit loss. Upstream `--kd-weight`."""
    logit_loss: Literal["l1", "kl", "contrastive", "relation", "angular"] = "kl"
    """How probabilities are compared; `l1`, for regions only, is what upstream uses there. Upstream
    `--kd-loss-type`."""
    temperature: float = Field(default=4.0, gt=0.0)
    """Softening T of the logit loss. Upstream `--kd-T`."""


class LossConfig(Block):
    """The supervised loss."""

    weight: float = Field(default=1.0, ge=0.0)
    """Weight of the supervised loss. Upstream `--ce-weight`."""
    name: str = ""
    """Registry key of another supervised loss of logits and targets ``(B, C, D, H, W)``, such as
    `graft.tversky`; empty takes the published one of the target, with the next two settings."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Settings of the loss that `name` chooses."""
    focal: Literal["default", "mild", "sharp", "high_sensitivity"] = "default"
    """Focal and class weights of the region loss. Upstream `--use-mild-focal`, `--use-sharp-focal`,
    `--use-high-sensitivity`."""
    batch_dice: bool = False
    """Dice over the whole batch instead of each sample."""
    deep_supervision: bool = True
    """Also supervise the lower decoder stages, weights 0.5^i, the last one 0."""
    balance: bool = False
    """Divide each part of the loss by its running mean before the weights. Upstream
    `--use-loss-balancing`."""
    balance_momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Memory of those means, which start at 1. Upstream `--loss-balance-momentum`."""
    balance_warmup: int = Field(default=10, ge=0)
    """Batches before the division begins. Upstream `--loss-balance-warmup`."""


class OptimConfig(Block):
    """The student's optimiser; its rate, decay and clipping are in `train`."""

    name: Literal["adamw", "sgd"] = "adamw"
    """`sgd` is Nesterov with the momentum below (upstream)."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum of `sgd`."""
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    """cosine: ½(1 + cos πt/T); multistep: ×0.1 at each milestone."""
    ramp: int = Field(default=20, ge=0)
    """Steps over which the rate rises linearly to its full value."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Where `multistep` falls, as parts of the run. Upstream 150, 180, 210 of 240."""
    init_scope: Literal["encoder", "all"] = "all"
    """What ``--init-from`` fills: the encoder, or every tensor that fits."""


class WeightingConfig(Block):
    """How much each teacher counts."""

    mode: Mode = "probe"
    """`uniform` 1/N; `quality` by the Dice of each teacher's logits on the labelled cases; `probe` by the
    Dice of a linear read-out of its features, leaving one labelled case out; `fixed` the numbers below;
    `align` a residual on the prior by gradient alignment with the reward cases; `meta` by the teachers'
    losses on each batch; `legacy` the published mixture of policy, quality and diversity; `reinforce` a
    learned residual on the prior."""
    prior: Prior = "probe"
    """What `reinforce` and `align` start from."""
    fixed: tuple[float, ...] = ()
    """One number for each teacher, not negative, scaled to sum to one; for weighting `fixed`: single
    teachers, and weights that are known to be right."""
    temperature: float = Field(default=0.1, gt=0.0)
    """Weights are softmax(q/temperature) of the logit quality."""
    probe_temperature: float = Field(default=0.03, gt=0.0)
    """The same for the probe quality, whose differences are smaller."""
    scope: Literal["dataset", "case"] = "dataset"
    """The logit quality is the mean over the labelled training cases, or each case's own (unlabelled
    cases take the mean)."""
    cases: int = Field(default=20, ge=0)
    """At most so many labelled cases measure the quality; 0 = all."""
    align_every: int = Field(default=5, ge=1)
    """`align` measures all teachers at every so many steps."""
    align_epsilon: float = Field(default=0.02, gt=0.0)
    """`align`: length of the step in weight space, in units of the student's weights."""
    align_temperature: float = Field(default=0.25, gt=0.0)
    """`align`: weights are softmax(log prior + S/temperature) of the running score S in [-1, 1]."""
    align_momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """`align`: memory of the score."""
    meta: Literal["standard", "adaptive", "context"] = "adaptive"
    """`meta`: few projected gradient steps on the teachers' losses with fixed or with scheduled settings, or
    a softmax of the likeness of pooled features. Source: upstream meta_teacher_optimizer.py."""
    floor: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Part of the weight that is shared equally, so that no teacher is lost; `reinforce` uses at least
    0.01."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.fixed
        if any(not 0.0 <= value < float("inf") for value in given) or (given and sum(given) == 0.0):
            raise ValueError(f"fixed must be numbers of at least 0, not all 0, got {list(given)}")
        if self.mode == "fixed" and not given:
            raise ValueError("weighting `fixed` needs weighting.fixed, one number for each teacher")
        return self


class AgentConfig(Block):
    """The policy of weighting `reinforce` and its reward; `align` and `legacy` share what fits."""

    policy: Literal["free", "state"] = "free"
    """`free` learns one number for each teacher; `state` is a network that sees the teachers' features,
    likeness, quality and disagreement on each batch (upstream)."""
    kappa: float = Field(default=20.0, gt=0.0)
    """Concentration of the Dirichlet policy around its mean."""
    lr: float = Field(default=0.0, ge=0.0)
    """Learning rate of the policy; 0 = 0.05 with `adam`, 0.001 with `sgd`. Upstream `--agent-lr` 1e-3."""
    optimizer: Literal["auto", "adam", "sgd"] = "auto"
    """Of the policy; `auto` is `sgd` without momentum for weighting `legacy` (upstream), else `adam`."""
    reach: float = Field(default=0.0, ge=0.0)
    """If above 0, the rate is reach / updates of the run instead of `lr`: with Adam, how far a score can go
    if every update points the same way. 15 is the rate 0.05 over 300 updates."""
    interval: int = Field(default=10, ge=1)
    """Measured actions in an episode. Upstream `--agent-update-interval` 50."""
    horizon: int = Field(default=1, ge=1)
    """Steps over which an action is held; its reward is the change over all of them."""
    gamma: float = Field(default=0.0, ge=0.0, le=1.0)
    """Discount of later rewards. Upstream `--reward-gamma` 0.95."""
    terminal: bool = False
    """End an episode with 100·(Dice on the reward split - its running mean). Upstream
    `--use-episode-reward`."""
    entropy: float = Field(default=1e-3, ge=0.0)
    """Weight of the entropy bonus."""
    baseline_momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Memory of the running baseline across episodes."""
    scale: Literal["episode", "running"] = "running"
    """Returns are divided by their deviation within the episode, or by its running mean."""
    clip_norm: float = Field(default=1.0, ge=0.0)
    """Largest gradient norm of the policy; 0 = no limit."""
    reward_alpha: float = Field(default=0.7, ge=0.0, le=1.0)
    """α in α·100·(Dice - ensemble Dice) - (1-α)·CE. Upstream `--reward-alpha`."""
    reward_cases: int = Field(default=2, ge=1)
    """Cases of the reward split on which one episode measures its rewards; the next takes the next ones."""
    reward_every: int = Field(default=1, ge=1)
    """Measure the reward of every so many actions; the others are not learned from."""
    warmup: int = Field(default=0, ge=0)
    """Steps over which the weights pass from the prior to the policy; as many as the run has, or more,
    switch the agent off. Upstream counts epochs."""
    blend: Literal["uniform", "ones"] = "ones"
    """`legacy` starts its warm-up from 1/N, as documented upstream, or from 1 for each teacher, as the code
    there does; with `ones` a warm-up longer than the run goes on to its end."""
    update: Literal["episode", "step"] = "episode"
    """`legacy`: update from returns (upstream `--use-episode-reward`), or from single batches."""
    step_every: int = Field(default=200, ge=1)
    """`legacy` with `step`: steps between updates. Upstream `--agent-step`."""
    gated_diversity: bool = True
    """`legacy`: mix in quality times unlikeness to the student. Upstream
    `--no-accuracy-gated-diversity` leaves it out."""
    dynamic: bool = False
    """`legacy`: learn the three factors of the mixture. Upstream `--dynamic`."""
    disagreement: bool = True
    """Show a `state` policy each teacher's distance from the mean. Upstream
    `--use-disagreement-reward`."""
    random_reward: bool = False
    """Control experiment: the reward is white noise."""


class GraftTrainConfig(TrainConfig):
    """Training; a validation once an epoch unless told otherwise."""

    lr: float = Field(default=3e-3, gt=0)
    """Learning rate of AdamW. Upstream `--init-lr` 1e-3 with SGD."""
    channels_last: bool = True
    """Store feature maps with the channels last: faster under bf16 on CPUs and GPUs with matrix units."""
    validate_every: int = Field(default=0, ge=0)
    """Steps between validations; 0 = once an epoch (as many steps as it takes to see each case once)."""


class GraftConfig(MethodConfig):
    """Distil N frozen teachers into one 3D network."""

    model: ModelConfig = ModelConfig(name="graft.tiny")
    """The student, by registry key."""
    train: GraftTrainConfig = GraftTrainConfig()
    """Steps, batch, rate, precision, seed."""
    sample: SampleConfig = SampleConfig()
    """Case to box of voxels."""
    target: TargetConfig = TargetConfig()
    """Regions or classes."""
    split: SplitConfig = SplitConfig()
    """Labelled, unlabelled and reward cases."""
    teachers: TeachersConfig = TeachersConfig()
    """Feature folders."""
    distill: DistillConfig = DistillConfig()
    """Feature and logit distillation."""
    loss: LossConfig = LossConfig()
    """Supervised loss."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    augment: AugmentConfig = AugmentConfig()
    """Intensity changes."""
    weighting: WeightingConfig = WeightingConfig()
    """Weights of the teachers."""
    agent: AgentConfig = AgentConfig()
    """Policy and reward."""
    validation: ValidationConfig = ValidationConfig()
    """Checks on the validation fold."""
    epochs: EpochsConfig = EpochsConfig()
    """Lengths in epochs, where they are wanted."""
    stage: Literal["student", "features", "teachers"] = Field(
        default="student", json_schema_extra=MachineField
    )
    """With `--by stage`, the stage up to which to go."""

    @model_validator(mode="after")
    def _check_teachers(self) -> Self:
        if self.teachers.features and self.teachers.source == "files" and self.augment.moves:
            raise ValueError(
                "augment.mirror, rotate and zoom need teachers.source=live: "
                "feature files show the image as it is"
            )
        if self.teachers.oof == "flag" and not self._has_state():
            raise ValueError(
                "teachers.oof=flag tells the policy, and this weighting has none that looks; "
                "agent.policy=state with weighting reinforce, or oof=mean, or oof=unseen"
            )
        return self

    def _has_state(self) -> bool:
        mode = self.weighting.mode
        return mode == "legacy" or (mode == "reinforce" and self.agent.policy == "state")
