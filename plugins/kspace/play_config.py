"""Settings of episodes: what is acquired, how many lines, and what a line is paid."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from medrl.core.config import Block


class AcquisitionConfig(Block):
    """What an episode is (specification §2)."""

    geometry: Literal["slice", "stack", "volume3d"] = "slice"
    """`slice`: each slice its own episode; `stack`: one mask for the slices of a volume; `volume3d`: a
    three-dimensional transform, an action is a ky line across all kz."""
    points: bool = False
    """With `volume3d`: an action is one point (ky, kz)."""
    init_center: int = Field(default=8, ge=0)
    """Middle columns that are there before the first action. Original: 0."""
    sampled_indices: tuple[int, int] | None = None
    """First and last column that may be acquired; null is all. Columns of padding never are."""
    sensitivity_lines: int = Field(default=-1, ge=-1)
    """Several coils: middle columns of which sensitivities are estimated where the scans bring none; -1 takes
    the initial ones, 0 combines coils by their root sum of squares."""
    recon: Literal["zf", "unet", "sense"] = "zf"
    """Zero-filled; a U-Net with data consistency (`recon_model`); or CG-SENSE, for several coils."""


class BudgetConfig(Block):
    """How many columns an episode acquires beyond the initial ones."""

    train: tuple[int, int] = (5, 50)
    """Least and largest budget of an episode in training, both included."""
    eval: tuple[int, ...] = (8, 16, 24, 32, 40, 50)
    """Budgets of validation and evaluation."""
    shared: bool = False
    """All episodes that start together have one budget (original), instead of one each."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 1 <= self.train[0] <= self.train[1]:
            raise ValueError(f"budget.train must rise from at least 1, got {list(self.train)}")
        if not self.eval or min(self.eval) < 1 or sorted(set(self.eval)) != list(self.eval):
            raise ValueError(f"budget.eval must be rising positive numbers, got {list(self.eval)}")
        return self


class RewardConfig(Block):
    """What a column earns (specification §5)."""

    mode: Literal["delta", "asmr", "terminal"] = "delta"
    """`delta`: improvement by each column; `asmr`: h(mean log-probability of the true label) after each
    column (original); `terminal`: the quality at the end."""
    rec: float = Field(default=0.5, ge=0.0)
    """λ1, weight of the reconstruction."""
    seg: float = Field(default=0.5, ge=0.0)
    """λ2, weight of the segmentation."""
    rec_quality: Literal["ssim", "nmse", "psnr"] = "ssim"
    """SSIM, -NMSE or PSNR/40 against the fully sampled image."""
    seg_quality: Literal["soft_dice", "dice", "ce"] = "soft_dice"
    """Mean over the classes in the slice of soft or hard Dice, or -cross-entropy, against the labels."""
    delay_step: int = Field(default=0, ge=0)
    """`asmr`: no reward while at most so many columns were acquired. Original: 7."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rec == 0.0 and self.seg == 0.0 and self.mode != "asmr":
            raise ValueError("reward.rec and reward.seg are both 0: nothing would be learned")
        return self
