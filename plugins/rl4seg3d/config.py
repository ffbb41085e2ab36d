"""Every setting of rl4seg3d, with its meaning, unit, range and source.

"Original" is the published code (arnaudjudge/RL4Seg3D 148f786).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from medrl.core.adaptation.settings import (
    CorrectorConfig,
    PairsConfig,
    PPOConfig,
    Select,
    StageConfig,
    StagedTrainConfig,
    StyleConfig,
    SupervisedConfig,
)
from medrl.core.config import Block, MethodConfig, ModelConfig
from medrl.core.config.blocks import MachineField

from .data_config import SampleConfig, SourceConfig, TargetConfig
from .predict_config import PredictConfig

Stage = Literal["all", "source", "style", "corrector", "pairs", "anatomical", "landmark", "ppo", "test"]
Net = Literal["anatomical", "landmark"]

LEARNED = "rl4seg3d.learned"
"""Registry key of the reward whose networks a loop trains."""


class ActorConfig(Block):
    """The policy over the labels of each voxel."""

    actions: Literal["sampled", "greedy"] = "sampled"
    """What is rewarded: labels drawn from the policy, or (original) the most probable ones, from which a
    policy gradient learns little."""
    eps_greedy: float = Field(default=0.0, ge=0.0, le=1.0)
    """With this probability a window takes the greedy label map instead of the sampled one. Original:
    `eps_greedy_term` 0."""


class Accumulating(Block):
    """A stage whose batches may be too large for the memory."""

    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are added before a step. Original: 16, of one window each."""


class WindowSupervisedConfig(Accumulating, SupervisedConfig):
    """Supervised training on labelled source windows."""


class WindowStyleConfig(Accumulating, StyleConfig):
    """Further supervised training on source windows whose style is changed; labels stay as they are."""


class WindowCorrectorConfig(Accumulating, CorrectorConfig):
    """What makes a label map anatomically plausible; learned ones see source masks only."""

    kind: Literal["denoiser", "vae", "temporal", "morphology", "atlas", "none"] = "denoiser"  # type: ignore[assignment]
    """`denoiser`: a U-Net from corrupted to true masks; `vae`: a variational autoencoder of masks;
    `temporal`: largest blobs, filled holes and the median of neighbouring frames; `morphology`: the same
    frame by frame; `atlas`: the most similar source mask; `none`. Original: an external autoencoder."""


class WindowPairsConfig(PairsConfig):
    """The windows, masks and true labels from which the reward nets learn."""

    count: int = Field(default=4000, ge=1)
    """Number of synthetic pairs of an iteration."""
    images: int = Field(default=2500, ge=1)
    """`prediction`: new target sequences of an iteration, one window each. Original: 2500."""
    minimum_dice: float = Field(default=0.95, ge=0.0, le=1.0)
    """`prediction`: least Dice of a prediction with its corrected mask for it to count as plausible.
    Original: 0.95."""
    drops: tuple[float, ...] = (0.05, 0.12, 0.22)
    """`prediction`: noise on weights and images, and loss of contrast, are made as strong as lowers the Dice
    of the predictions by so much each. Empty takes the strengths of `params`, else those of the original with
    noise relative to the weights; its absolute noise makes rubbish of any mask."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Further settings of that kind: shares of masks, strengths of noise."""


class RewardConfig(Accumulating, StageConfig):
    """The reward function and the networks behind it; each network is a stage of its own."""

    name: str = LEARNED
    """Registry key of the reward. `rl4seg3d.learned`: the networks of `nets`, made one; the others compare
    with target labels, which only target.allow_labels permits."""
    nets: tuple[Net, ...] = ("anatomical", "landmark")
    """`anatomical`: is the label of a voxel right? `landmark`: are the ends of the mitral annulus where they
    should be?"""
    fusion: Literal["min", "mean", "product"] = "min"
    """How the rewards of several networks become one. Original: `min`, of the first two."""
    stretch: bool = False
    """Stretch the reward of each frame to 0 to 1 (original); it is then no probability any more."""
    weight: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share of the anatomical net itself; the rest is the corrector's view of the label map that the net
    would choose. 1 does without a corrector (original)."""
    temporal: float = Field(default=0.0, ge=0.0, le=1.0)
    """Strength of the penalty on frames in which area or position of a structure jumps; 1 is the original's
    temporal reward."""
    head: Literal["class", "binary"] = "class"
    """The anatomical net tells the class of each voxel, or (original) only whether the label is right."""
    encoding: Literal["onehot", "scalar"] = "onehot"
    """The mask enters as one channel a class, or (original) as one channel of label values."""
    criterion: Literal["nll", "mse"] = "nll"
    """Loss of a binary anatomical head: cross-entropy, or (original) squared error of the probability. The
    landmark net has the latter always."""
    base_moves: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the pairs of the landmark net whose mask is the true one with its base moved."""
    init: Literal["style", "source", "actor", "random"] = "style"
    """Start of the anatomical net; the style, source or present actor with a wider first layer, where the
    networks are of one kind and reward.head is class. Original: `random`."""
    landmark_mm: float = Field(default=4.0, gt=0.0)
    """Distance from which a landmark is wrong, in millimetres. Original: 4."""
    schedule: Literal["one_cycle", "constant", "plateau"] = "one_cycle"
    """`plateau`: a tenth after ten validations without progress (original)."""
    calibrated: bool = False
    """Use the fitted temperatures in PPO too, not only for uncertainty maps. Original: not used."""
    select: Select = "last"
    """Weights that PPO takes: of the last step, or with the least loss on the validation pairs (original)."""


class WindowPPOConfig(PPOConfig):
    """One iteration of reinforcement learning on windows of unlabelled target sequences."""

    inner_steps: int = Field(default=3, ge=1)
    """k, updates on one rollout. Original: 4."""
    per_iteration: Literal["same", "original"] = "same"
    """`original`: in iteration i, c_H/i and β/i."""
    sigma_t: float = Field(default=1.0, ge=0.0)
    """Width in frames over which neighbouring frames are sampled alike, as `sigma_px` in the plane."""
    rewards: Literal["fused", "separate"] = "fused"
    """`separate`: every network rewards for itself, and their gradients are added before a step; costs one
    pass of the actor for each in each of the inner steps."""


class LoopConfig(Block):
    """How the stages follow each other."""

    iterations: int = Field(default=1, ge=1)
    """Rounds of pairs, reward nets and PPO. Original: 4."""
    start: Literal["style", "source"] = "style"
    """The actor from which PPO starts: style-tuned, or trained on plain source sequences (original)."""
    final: Select = "last"
    """The iteration whose actor is the result: the last, or the one with the best share of valid windows on
    target validation sequences."""
    keep_critic: bool = True
    """An iteration goes on with the critic of the one before (original)."""


class TestConfig(Block):
    """Stage `test`: every actor on whole target test sequences."""

    worst_frame_thresholds: tuple[float, ...] = ()
    """For each of these rewards the scores of those sequences alone whose worst frame reaches it, as
    ``validated`` in test.json: what would be left if doubtful sequences were set aside. Original: none."""


class SlurmConfig(Block):
    """A loop as one job a stage, through submitit (the extra `slurm`)."""

    mode: Literal["off", "slurm", "local"] = Field(default="off", json_schema_extra=MachineField)
    """`slurm` submits each stage as a job; `local` runs each in a process of its own on this machine; `off`
    does all stages in one program."""
    minutes: int = Field(default=60, ge=1, json_schema_extra=MachineField)
    """Time limit of a stage before the iterations; those of iteration i get 1 + i times as much (original). A
    job that runs out of time is submitted again and goes on from its last checkpoint."""
    gpus: int = Field(default=1, ge=0, json_schema_extra=MachineField)
    """GPUs of a job."""
    cpus: int = Field(default=4, ge=1, json_schema_extra=MachineField)
    """CPU cores of a job."""
    memory_gb: int = Field(default=16, ge=1, json_schema_extra=MachineField)
    """Memory of a job in GB."""
    partition: str = Field(default="", json_schema_extra=MachineField)
    """Partition; empty for the default one."""
    account: str = Field(default="", json_schema_extra=MachineField)
    """Account; empty for the default one."""
    options: dict[str, str] = Field(default_factory=dict, json_schema_extra=MachineField)
    """Further options of sbatch by name, such as `constraint`."""
    retries: int = Field(default=1, ge=0, json_schema_extra=MachineField)
    """How often a stage that failed is submitted again."""
    poll_s: float = Field(default=5.0, gt=0.0, json_schema_extra=MachineField)
    """Seconds between two looks at a job."""


class InputsConfig(Block):
    """Parts made elsewhere: a run folder or checkpoint each; what is given is not trained."""

    source: Path | None = Field(default=None, json_schema_extra=MachineField)
    """The actor trained on source sequences."""
    style: Path | None = Field(default=None, json_schema_extra=MachineField)
    """The style-tuned actor."""
    corrector: Path | None = Field(default=None, json_schema_extra=MachineField)
    """A trained corrector."""
    anatomical: Path | None = Field(default=None, json_schema_extra=MachineField)
    """A trained anatomical reward net, which every iteration uses."""
    landmark: Path | None = Field(default=None, json_schema_extra=MachineField)
    """A trained landmark reward net, which every iteration uses."""
    actor: Path | None = Field(default=None, json_schema_extra=MachineField)
    """One stage alone: the actor that PPO starts from, or that makes pairs."""
    critic: Path | None = Field(default=None, json_schema_extra=MachineField)
    """One stage alone: the critic that PPO starts from."""
    pairs: tuple[Path, ...] = Field(default=(), json_schema_extra=MachineField)
    """One stage alone: folders of pairs for a reward net."""


class Rl4seg3dConfig(MethodConfig):
    """Adapt a segmentation network for echo sequences to unlabelled target sequences by PPO."""

    data: SourceConfig = SourceConfig()
    """Labelled source sequences."""
    target: TargetConfig = TargetConfig()
    """Unlabelled target sequences."""
    sample: SampleConfig = SampleConfig()
    """File to windows of four frames."""
    train: StagedTrainConfig = StagedTrainConfig(batch_size=4)
    """Precision, seed, device; defaults of all stages."""
    rules: str = "echo"
    """Anatomical rules of a frame: `echo`, `echo_atrium`, or a YAML file."""
    temporal_rules: str = "echo_temporal"
    """Temporal rules of a sequence: `echo_temporal`, or a YAML file."""
    model: ModelConfig = ModelConfig(name="rl4seg3d.unet3d")
    """The actor's network, by registry key."""
    critic: ModelConfig = ModelConfig(name="rl4seg3d.unet3d")
    """The critic's network, by registry key; used with ppo.baseline `critic`."""
    reward_model: ModelConfig = ModelConfig(name="rl4seg3d.unet3d")
    """The network of each reward net, by registry key."""
    actor: ActorConfig = ActorConfig()
    """The policy."""
    source: WindowSupervisedConfig = WindowSupervisedConfig()
    """Stage `source`: supervised training on source windows."""
    style: WindowStyleConfig = WindowStyleConfig()
    """Stage `style`: supervised training on styled source windows."""
    corrector: WindowCorrectorConfig = WindowCorrectorConfig()
    """Stage `corrector`: what makes masks plausible."""
    pairs: WindowPairsConfig = WindowPairsConfig()
    """Stage `pairs`: what the reward nets learn from."""
    reward: RewardConfig = RewardConfig()
    """Stages `anatomical` and `landmark`: the reward nets."""
    ppo: WindowPPOConfig = WindowPPOConfig()
    """Stage `ppo`: reinforcement learning on target windows."""
    loop: LoopConfig = LoopConfig()
    """Iterations."""
    test: TestConfig = TestConfig()
    """Scores on target test sequences."""
    predict: PredictConfig = PredictConfig()
    """Prediction."""
    slurm: SlurmConfig = SlurmConfig()
    """One job a stage."""
    inputs: InputsConfig = InputsConfig()
    """Parts made elsewhere."""
    stage: Stage = Field(default="all", json_schema_extra=MachineField)
    """`all`, or one stage of the run folder: the next of its kind that is not done."""
    alone: bool = Field(default=False, json_schema_extra=MachineField)
    """The run folder is that of one stage, not of a loop; the loop sets it."""
    iteration: int = Field(default=1, ge=1, json_schema_extra=MachineField)
    """Iteration that a stage alone belongs to; decides the schedules of `per_iteration`."""

    @field_validator("rules", "temporal_rules")
    @classmethod
    def _absolute(cls, value: str) -> str:
        """Let a rule file be found again from any folder."""
        return str(Path(value).expanduser().resolve()) if value.endswith((".yaml", ".yml")) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        reward = self.reward
        if self.pairs.kind == "prediction" and self.corrector.kind == "none":
            raise ValueError("pairs.kind `prediction` needs a corrector: implausible masks are judged by it")
        if self.learns_reward and (not reward.nets or len(set(reward.nets)) < len(reward.nets)):
            raise ValueError(f"reward.nets must name one or more different networks; got {list(reward.nets)}")
        if self.mixes_corrector and (self.corrector.kind == "none" or reward.head != "class"):
            raise ValueError(
                "reward.weight below 1 needs a corrector and reward.head `class`; reward.weight=1 does not"
            )
        if reward.head == "class" and reward.criterion == "mse" and "anatomical" in reward.nets:
            raise ValueError("reward.criterion `mse` needs reward.head `binary`")
        if self.target.gt_frac > 0.0 and not self.target.allow_labels:
            raise ValueError("target.gt_frac needs target.allow_labels: it reads true labels of the target")
        if self.ppo.pseudo_labels and self.pairs.kind != "prediction":
            raise ValueError("ppo.pseudo_labels needs pairs.kind `prediction`")
        if self.ppo.rewards == "separate" and self.ppo.algorithm == "pg":
            raise ValueError("ppo.rewards `separate` needs ppo.algorithm `ppo`")
        return self

    @property
    def learns_reward(self) -> bool:
        """Whether the reward has networks that are trained from pairs."""
        return self.reward.name == LEARNED

    @property
    def mixes_corrector(self) -> bool:
        """Whether the reward asks the corrector."""
        return self.learns_reward and "anatomical" in self.reward.nets and self.reward.weight < 1.0

    @property
    def trained_nets(self) -> tuple[Net, ...]:
        """Reward nets that the loop trains."""
        if not self.learns_reward:
            return ()
        return tuple(name for name in self.reward.nets if getattr(self.inputs, name) is None)

    @property
    def needs_style(self) -> bool:
        """Whether some stage takes the style-tuned actor."""
        learns = bool(self.trained_nets)
        inits = self.reward.init == "style" and "anatomical" in self.trained_nets
        return self.loop.start == "style" or (learns and (inits or self.pairs.kind == "synthetic"))

    @property
    def needs_corrector(self) -> bool:
        """Whether some stage takes a corrector that is trained."""
        if self.corrector.kind not in ("denoiser", "vae"):
            return False
        return self.mixes_corrector or (bool(self.trained_nets) and self.pairs.kind == "prediction")
