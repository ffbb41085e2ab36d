"""Settings of the data of kspace: which scans, and how a scan becomes k-space, target and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from medrl.core.config import Block, DataConfig


class ScanConfig(DataConfig):
    """The scans and how they are split; whole patients only."""

    root: Path | None = None
    """Dataset folder, or one file of measured k-space; relative paths are taken from the config file."""
    reader: Literal["auto", "core", "acdc-nifti", "acdc-png", "acdc-h5", "fastmri", "ismrmrd", "bart"] = (
        "auto"
    )
    """`core` takes one of the layouts; the others read ACDC and measured k-space; `auto` recognises which."""
    frames: Literal["gt", "all"] = "gt"
    """ACDC as NIfTI: the labelled frames, or all frames of the sequence, which have no labels and serve
    rewards of reconstruction alone."""
    spacing_mm: tuple[float, ...] = ()
    """ACDC as HDF5, which stores no voxel size: between rows, columns and slices. Empty: unknown, and nothing
    is measured in mm."""
    test_fold: int = Field(default=-1, ge=-1)
    """For datasets that set no test patients aside: the fold that is tested on, unlike `fold`, which watches
    over training; -1 tests on none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.spacing_mm) not in (0, 3) or any(size <= 0 for size in self.spacing_mm):
            raise ValueError(
                f"spacing_mm must be empty or three positive numbers, got {list(self.spacing_mm)}"
            )
        if self.test_fold >= self.folds:
            raise ValueError(f"test_fold {self.test_fold} does not exist, there are {self.folds}")
        if self.test_fold == self.fold:
            raise ValueError(f"fold and test_fold are both {self.fold}; one fold cannot do both")
        return self


class SampleConfig(Block):
    """How a scan becomes k-space, target image and labels."""

    shape: tuple[int, int] = (256, 256)
    """Rows (readout) and columns (phase encoding) of k-space and images; 0 and 0 keep the measured size.
    Images are padded with zeros and cropped about their centre. Measured k-space: rows likewise in the image,
    columns are cropped, or filled up with columns that are never acquired. Original: `image_shape` and
    `kspace_shape`, 256 each."""
    spacing: tuple[float, float] | None = None
    """Resample images to this distance of rows and columns in mm before that; None leaves them."""
    downsample: int = Field(default=1, ge=1)
    """Take the mean of so many rows and columns of the images; `shape` is what is left."""
    norm: Literal["slice", "volume_p99"] = "slice"
    """`slice` maps the minimum and maximum of each slice to 0 and 1; `volume_p99` divides all slices of a
    frame by their 99th percentile. Measured k-space, where nothing may be subtracted, is divided by the
    maximum or the percentile of its reconstruction."""
    phase: Literal["none", "smooth"] = "smooth"
    """Phase of images: none, or a random quadratic one. Without phase k-space is Hermitian, which flatters
    results."""
    phase_amplitude: float = Field(default=1.5, ge=0)
    """Largest phase in radians."""
    phase_scope: Literal["slice", "scan"] = "slice"
    """Whether each slice has a phase of its own; geometry `volume3d` needs `scan`."""
    noise_std: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise, in real and imaginary part each; images are in [0, 1]."""
    shift_k: float = Field(default=0.0, ge=0)
    """Columns up to which the k-space centre of each scan is displaced to either side."""
    seed: int = Field(default=0, ge=0)
    """Of phase, noise and displacement; a scan looks the same in every run with this seed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(extent < 0 for extent in self.shape) or (0 in self.shape and any(self.shape)):
            raise ValueError(f"shape must be two positive numbers, or 0 and 0; got {list(self.shape)}")
        if self.spacing is not None and min(self.spacing) <= 0:
            raise ValueError(f"spacing must be positive, got {list(self.spacing)}")
        return self
