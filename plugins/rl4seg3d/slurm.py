"""A loop as one Slurm job a stage, or one process a stage on this machine, by what the config says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medrl.core.adaptation.stages import Stage
from medrl.core.executors import Resources, SubmititExecutor
from medrl.core.executors.stages import run_stages

from .config import Rl4seg3dConfig, SlurmConfig
from .stages import plan_stages

if TYPE_CHECKING:
    from medrl.core.jobs import TrainJob


def run(job: TrainJob) -> None:
    """Do all stages that are left, each as a job of its own.

    The command line may bring another executor; the time limits of the config hold for it too.

    Raises:
        ConfigError: submitit is not installed, or Slurm is not there.
        RuntimeFault: A job failed as often as it may.
    """
    cfg: Rl4seg3dConfig = job.config
    executor = job.stage_executor or SubmititExecutor(
        resources_of(cfg.slurm),
        cluster="local" if cfg.slurm.mode == "local" else "slurm",
        poll_s=cfg.slurm.poll_s,
    )
    run_stages(
        job,
        plan_stages(cfg),
        executor,
        settings=["slurm.mode=off"],
        minutes_of=lambda stage: minutes_of(cfg.slurm, stage),
        retries=cfg.slurm.retries,
    )


def resources_of(slurm: SlurmConfig) -> Resources:
    """Return what a job asks for."""
    return Resources(
        minutes=slurm.minutes,
        gpus=slurm.gpus,
        cpus=slurm.cpus,
        memory_gb=slurm.memory_gb,
        partition=slurm.partition,
        account=slurm.account,
        options=slurm.options,
    )


def minutes_of(slurm: SlurmConfig, stage: Stage) -> int:
    """Time limit of a stage: with each iteration rewards and PPO get as much again, as in the original."""
    return slurm.minutes * (stage.iteration + 1 if stage.iteration else 1)
