"""Every setting of spars, with its meaning, unit, range and source.

"Original" is the published code (catalinatan/SPARS). Section numbers are those of the specification, findings
are small experiments on phantoms; see plugins/spars/README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from medrl.core.config import Block, MethodConfig, ModelConfig, TrainConfig
from medrl.core.config.blocks import MachineField

from .data_config import ClassifierConfig, HuntDataConfig, SampleConfig
from .play_config import (
    EnvConfig,
    MapConfig,
    OpponentConfig,
    PpoConfig,
    ScoreConfig,
    ValidationConfig,
    WarmConfig,
)

Stage = Literal["all", "classifier", "play"]


class InputsConfig(Block):
    """Parts made elsewhere; what is given is not trained."""

    classifier: Path | None = Field(default=None, json_schema_extra=MachineField)
    """Run or checkpoint of `medrl spars train-classifier`."""


class SparsTrainConfig(TrainConfig):
    """What all stages share; steps and rates are in the block of each stage."""

    max_steps: int = Field(default=0, ge=0)
    """Largest number of steps of any stage, for trials; 0 = no limit."""
    batch_size: int = Field(default=1, ge=1)
    """Not used: each stage has a batch of its own."""
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
    """Steps between validations; 0 = five in each stage."""


class SparsConfig(MethodConfig):
    """Windows compete for what a classifier of whole images has learned to see; their paths segment it."""

    data: HuntDataConfig = HuntDataConfig()
    """Dataset, image labels, split."""
    sample: SampleConfig = SampleConfig()
    """Volume to numbers."""
    train: SparsTrainConfig = SparsTrainConfig()
    """Precision, seed, device; defaults of all stages."""
    classifier: ClassifierConfig = ClassifierConfig()
    """Stage `classifier`."""
    model: ModelConfig = ModelConfig(name="spars.compact")
    """The network of classifiers `compact` and `faithful`, by registry key."""
    score: ScoreConfig = ScoreConfig()
    """Windows."""
    env: EnvConfig = EnvConfig()
    """Episodes."""
    agent: ModelConfig = ModelConfig(name="spars.compact")
    """The network of the policy, by registry key."""
    warm: WarmConfig = WarmConfig()
    """Stage `play`: warm start."""
    ppo: PpoConfig = PpoConfig()
    """Stage `play`: reinforcement learning."""
    opponents: OpponentConfig = OpponentConfig()
    """Stage `play`: opponents."""
    map: MapConfig = MapConfig()
    """Masks."""
    validation: ValidationConfig = ValidationConfig()
    """How self-play is watched."""
    inputs: InputsConfig = InputsConfig()
    """Parts made elsewhere."""
    stage: Stage = Field(default="all", json_schema_extra=MachineField)
    """`all` and `play` train the classifier first where `inputs` does not bring it; `classifier` trains that
    alone."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.map.paint != "coarse" and not self.dense:
            raise ValueError(
                f"map.paint {self.map.paint} needs a map of every voxel; classifier.kind "
                f"{self.classifier.kind} scores windows: use coarse"
            )
        if self.map.paint == "nested" and any(
            fine > size for fine, size in zip(self.map.fine, self.score.window, strict=True)
        ):
            raise ValueError(
                f"map.fine {list(self.map.fine)} exceeds score.window {list(self.score.window)}: nothing "
                "would be painted; give a finer window"
            )
        if self.warm.kind == "none" and self.ppo.updates == 0:
            raise ValueError("without a warm start and without PPO nothing is learned")
        return self

    @property
    def dense(self) -> bool:
        """Whether the classifier scores every voxel."""
        return self.classifier.kind in ("fraction", "presence")
