"""The blocks that every method's config is made of; a method adds its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

MachineField: dict[str, JsonValue] = {"machine": True}
"""Marks a value that belongs to the machine and not to the experiment; resume may change it."""


class Block(BaseModel):
    """Base of every config block: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(BaseModel):
    """A registered part by key; every further key is a parameter of its constructor."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str
    """Registry key, ``<plugin>.<name>``."""

    @property
    def params(self) -> dict[str, Any]:
        """Constructor parameters: every key except `name`."""
        return dict(self.model_extra or {})


class DataConfig(Block):
    """Where the cases are and how they are split."""

    root: Path | None = None
    """Dataset folder; relative paths are taken from the config file."""
    layout: Literal["auto", "nnunet", "msd", "folder", "manifest"] = "auto"
    """Folder layout; `auto` recognises it."""
    fold: int = Field(default=0, ge=0)
    """Validation fold."""
    folds: int = Field(default=5, ge=2)
    """Number of folds made when the dataset brings no splits_final.json."""
    split_seed: int = 0
    """Seed of the folds; independent of the training seed."""
    group_by: str = "patient"
    """`patient`: cases of one patient never fall on both sides of a split; `case`; or a regular expression
    whose first group names the patient in a case identifier."""
    exclude: tuple[str, ...] = ()
    """Case identifiers to leave out."""


class TrainConfig(Block):
    """The machine-independent part of training, then the part that belongs to the machine."""

    max_steps: int = Field(default=1000, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=2, ge=1)
    """Samples a rank and micro-batch."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the optimiser."""
    clip_norm: float = Field(default=12.0, ge=0)
    """Gradient norm limit; 0 switches clipping off (nnU-Net: 12)."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches a step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision; fp16 uses a gradient scaler."""
    seed: int = Field(default=1, ge=0, lt=2**32)
    """Seed of initialisation, sampling and augmentation."""
    deterministic: bool = False
    """Only deterministic algorithms; slower on a GPU."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    validate_every: int = Field(default=250, ge=1)
    """Steps between validations."""
    keep_last: int = Field(default=2, ge=2, json_schema_extra=MachineField)
    """Checkpoints kept besides the best; at least two, so that one damaged file loses nothing."""
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", json_schema_extra=MachineField
    )
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int = Field(default=1, ge=0, json_schema_extra=MachineField)
    """CPU threads of torch; 0 leaves torch's choice."""
    workers: int = Field(default=0, ge=0, json_schema_extra=MachineField)
    """Data-loader processes."""
    log: tuple[Literal["jsonl", "tensorboard"], ...] = Field(
        default=("jsonl",), json_schema_extra=MachineField
    )
    """Where metrics go; jsonl is always written."""
    timeout_s: float = Field(default=600.0, gt=0, json_schema_extra=MachineField)
    """A rank that does not answer for so long ends the run, in seconds."""


class MethodConfig(Block):
    """Base of every method's config; a method adds its own blocks."""

    medrl: Literal[1] = 1
    """Version of the config schema."""
    method: str
    """Method name."""
    data: DataConfig = DataConfig()
    """Dataset and split."""
    train: TrainConfig = TrainConfig()
    """Training."""
