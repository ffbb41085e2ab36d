"""A run: one stage in one run folder; and the small tools that read a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from medrl.core.checkpoint import find_checkpoint

from . import domain, recon_training, reward_training, sampler, train
from .config import KspaceConfig
from .data import export_png, named_scans

if TYPE_CHECKING:
    from medrl.core.jobs import TrainJob
    from medrl.core.manager import PluginManager


def run(job: TrainJob) -> None:
    """Do the stage of a config: the policy with everything that it needs, or one part alone.

    Raises:
        ConfigError: No dataset is named.
        DataError: There is no such dataset.
        CheckpointError: A part that is named is not there.
    """
    cfg: KspaceConfig = job.config
    # Wrong paths are found before a run folder is made.
    named_scans(cfg.data)
    for part in (cfg.inputs.reward, cfg.inputs.recon) if cfg.stage == "policy" else ():
        if part is not None:
            find_checkpoint(part, "last")
    fit = {"policy": train.fit, "reward": reward_training.fit, "recon": recon_training.fit}[cfg.stage]
    with job.runtime() as rt:
        fit(rt, cfg, domain.load(cfg))


def write_sampler(manager: PluginManager, cfg: KspaceConfig, path: Path) -> sampler.Weights:
    """Write the weights of the training cases of a config."""
    del manager
    cases = domain.load(cfg).cases("train", cfg, torch.device("cpu"))
    found = sampler.make_weights(cases)
    found.write(path)
    return found


def write_png(cfg: KspaceConfig, folder: Path) -> int:
    """Write the scans of a config as PNG; return the number of slices.

    Raises:
        ConfigError: No dataset is named.
    """
    export_png(named_scans(cfg.data), folder)
    return sum(1 for _ in folder.glob("*/images/*.png"))
