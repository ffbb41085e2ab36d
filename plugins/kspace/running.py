"""A run: one stage in one run folder; and the small tools that read a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from medrl.core.checkpoint import find_checkpoint
from medrl.core.staged import is_staged, run_staged

from . import crossing, domain, sampler, stages, train
from .config import KspaceConfig
from .data import export_png, named_scans

if TYPE_CHECKING:
    from medrl.core.jobs import TrainJob
    from medrl.core.manager import PluginManager
    from medrl.core.runtime import Runtime


def run(job: TrainJob) -> None:
    """Do the stage of a config: the policy with everything that it needs, or one part alone.

    Raises:
        ConfigError: No dataset is named, or a run of a reward model has no crossed ones that are asked for.
        DataError: There is no such dataset.
        CheckpointError: A part that is named is not there.
    """
    cfg: KspaceConfig = job.config
    # Wrong paths are found before a run folder is made.
    named_scans(cfg.data)
    for part in (cfg.inputs.reward, cfg.inputs.recon) if cfg.stage == "policy" else ():
        if part is not None:
            find_checkpoint(part, "last")
    if cfg.stage == "policy" and cfg.inputs.reward is not None:
        for part_left_out in range(cfg.seg.crossed):
            crossing.run_of(cfg.inputs.reward, part_left_out)
    if is_staged(job):
        run_parts(job, cfg)
        return
    fit = train.fit if cfg.stage == "policy" else stages.FITS[cfg.stage]
    with job.runtime() as rt:
        fit(rt, cfg, domain.load(cfg))


def run_parts(job: TrainJob, cfg: KspaceConfig) -> None:
    """Do the parts that `inputs` does not bring, and the policy, each as a stage with a record."""
    data = domain.load(cfg)
    given = {name: path for name in stages.FITS if (path := getattr(cfg.inputs, name)) is not None}
    read = {name: find_checkpoint(path, "last") for name, path in given.items()}

    def work(rt: Runtime, kind: str, folders: Mapping[str, Path]) -> None:
        found = {**given, **folders}
        if kind == "policy":
            inputs = cfg.inputs.model_copy(update=found)
            train.fit(rt, cfg.model_copy(update={"inputs": inputs}), data)
        else:
            stages.train_part(rt, cfg, data, kind, found)

    kinds = [kind for kind in stages.needed(cfg, data) if kind not in given]
    run_staged(
        job,
        [*kinds, "policy"],
        work,
        upto=cfg.stage,
        decides={"slices": data.digest(), "sampler": cfg.inputs.sampler, **read},
    )


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
