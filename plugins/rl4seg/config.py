"""Every setting of rl4seg, with its meaning, unit, range and source.

"Original" is the published code (arnaudjudge/RL4Seg c718218) with the settings of its pre-release; the
numbers behind it are section numbers of the specification in plugins/rl4seg/README.md.
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

Stage = Literal["all", "source", "style", "corrector", "pairs", "reward", "ppo", "test"]


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


class Rl4segConfig(MethodConfig):
    """Adapt a 2D segmentation network to unlabelled target images by PPO against a learned reward."""

    data: SourceConfig = SourceConfig()
    """Labelled source images."""
    target: TargetConfig = TargetConfig()
    """Unlabelled target images."""
    sample: SampleConfig = SampleConfig()
    """Image to network input."""
    train: StagedTrainConfig = StagedTrainConfig()
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
