"""A loop as one Slurm job a stage, or one process a stage on this machine, through submitit.

The program that started the loop stays: it submits the first stage that is not done, waits for it, looks
whether it is done, and goes on. Killed and started again it goes on where the record of the run folder ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medrl.core.adaptation.stages import Stage
from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.stages import Pipeline

from .config import Rl4seg3dConfig, SlurmConfig
from .stages import plan_stages

if TYPE_CHECKING:
    from medrl.core.jobs import TrainJob

FOLDER = "slurm"
"""Where scripts and logs of the jobs go, in the run folder."""
_log = logging.getLogger("medrl.rl4seg3d")


@dataclass(frozen=True)
class StageTask:
    """One stage of a run folder, as a job runs it; all of it is plain so that it can be sent.

    Attributes:
        values: The config of the loop.
        run_dir: Its run folder.
        kind: The stage: the next of this kind that is not done.
        init_from: Weights that the first stage starts from.
    """

    values: Mapping[str, Any]
    run_dir: str
    kind: str
    init_from: str = ""

    def __call__(self) -> str:
        """Do the stage, going on from its last checkpoint."""
        from medrl.core.config import Layer, resolve
        from medrl.core.jobs import TrainJob
        from medrl.core.manager import PluginManager

        from . import loop

        values = {**self.values, "stage": self.kind, "slurm": {**self.values["slurm"], "mode": "off"}}
        job = TrainJob(
            method="rl4seg3d",
            resolved=resolve(Rl4seg3dConfig, [Layer(f"stage {self.kind}", values)]),
            run_dir=Path(self.run_dir),
            manager=PluginManager.create(),
            init_from=Path(self.init_from) if self.init_from else None,
            command=("medrl", "train", "rl4seg3d", "--stage", self.kind),
        )
        loop.run(job)
        return self.kind

    def checkpoint(self) -> Any:
        """Called by submitit before a job is preempted or out of time: the same again goes on from there."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run(job: TrainJob) -> None:
    """Do all stages that are left, each as a job of its own.

    Raises:
        ConfigError: submitit is not installed, or Slurm is not there.
        RuntimeFault: A job failed as often as it may.
    """
    cfg: Rl4seg3dConfig = job.config
    executor_of = _executors(cfg.slurm, job.run_dir / FOLDER)
    for stage in plan_stages(cfg):
        tries = 0
        while not is_done(job.run_dir, stage):
            tries += 1
            _submit(executor_of(stage), job, stage, last=tries > cfg.slurm.retries)
    _log.info("all stages are done")


def is_done(run_dir: Path, stage: Stage) -> bool:
    """Whether the record of the run folder says that a stage is done, and its files are what it wrote."""
    found = Pipeline(run_dir).status().get(stage.name)
    return found is not None and found.state == "done"


def minutes_of(slurm: SlurmConfig, stage: Stage) -> int:
    """Time limit of a stage: with each iteration rewards and PPO get as much again, as in the original."""
    return slurm.minutes * (stage.iteration + 1 if stage.iteration else 1)


def _executors(slurm: SlurmConfig, folder: Path) -> Any:
    """Return what makes the executor of a stage."""
    try:
        import submitit
    except ImportError as error:
        raise ConfigError(
            "slurm.mode", why="the package submitit is not installed", do='pip install "medrl[slurm]"'
        ) from error
    folder.mkdir(parents=True, exist_ok=True)

    def make(stage: Stage) -> Any:
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=slurm.mode)
        except RuntimeError as error:
            raise ConfigError("slurm.mode slurm", why=str(error), do="--slurm local") from error
        executor.update_parameters(
            name=f"medrl-{stage.name}",
            timeout_min=minutes_of(slurm, stage),
            gpus_per_node=slurm.gpus,
            cpus_per_task=slurm.cpus,
            mem_gb=slurm.memory_gb,
        )
        if slurm.mode == "slurm":
            extra = {"slurm_partition": slurm.partition, "slurm_account": slurm.account}
            executor.update_parameters(
                **{name: value for name, value in extra.items() if value},
                **({"slurm_additional_parameters": dict(slurm.options)} if slurm.options else {}),
            )
        return executor

    return make


def _submit(executor: Any, job: TrainJob, stage: Stage, *, last: bool) -> None:
    """Submit a stage, wait for it, and complain if it failed for the last time."""
    task = StageTask(
        values=job.resolved.values(),
        run_dir=str(job.run_dir.resolve()),
        kind=stage.kind,
        init_from=str(job.init_from or ""),
    )
    submitted = executor.submit(task)
    _log.info("stage %s is job %s; its log: %s", stage.name, submitted.job_id, submitted.paths.stdout)
    while not submitted.done():
        time.sleep(job.config.slurm.poll_s)
    failure = submitted.exception()
    if failure is None:
        return
    tail = str(failure).strip().splitlines()
    why = tail[-1] if tail else type(failure).__name__
    if last:
        raise RuntimeFault(
            f"stage {stage.name}",
            why=f"job {submitted.job_id} failed: {why}",
            do=f"see {submitted.paths.stderr}; the same command goes on from here",
        )
    _log.warning("job %s of stage %s failed (%s); it is submitted again", submitted.job_id, stage.name, why)
