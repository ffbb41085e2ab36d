"""All stages one after the other in one run folder, on all ranks, each once.

A stage is done when the record says so and its files are what it wrote (`medrl.core.stages`). A trained stage
is an ordinary run in ``stages/``: it saves, stops and resumes by itself, bit for bit. The run folder itself
holds a checkpoint after each stage, so that `medrl predict` and `medrl resume` know it at any time.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from medrl.core import rng
from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.runlog import RunFolder
from medrl.core.staged import RankedPipeline

from .stages import Files, Stage, folder_of, stage_job

if TYPE_CHECKING:
    from medrl.core.jobs import TrainJob
    from medrl.core.runtime import Runtime

Beat = Callable[[], None]
"""Called by work on the main rank every now and then; it raises to stop."""

_BEAT_S = 20.0
_SHOWN = ("val_", "start_", "alarm_", "corrupted_")
"""Beginnings of the numbers of a stage that the log of the loop repeats."""
_log = logging.getLogger("medrl.adaptation")


class Loop(ABC):
    """The loop over the stages of one run folder; a method says what its stages read, write and do.

    Args:
        rt: Runtime of the run folder; each stage opens its own inside.
        job: The job with what the command line gave; its config has the fields `stage`, `alone`,
            `iteration` and the block `inputs`.
        stages: All stages in their order.
    """

    def __init__(self, rt: Runtime, job: TrainJob, stages: Sequence[Stage]) -> None:
        self.rt, self.job, self.stages = rt, job, list(stages)
        self.root = rt.run.dir
        self.pipeline = RankedPipeline(rt)

    # -- what a method says ------------------------------------------------------------------------

    @abstractmethod
    def inputs_of(self, stage: Stage) -> Files:
        """The files that a stage reads, by their names in the block `inputs`."""

    @abstractmethod
    def outputs_of(self, stage: Stage) -> list[Path]:
        """What a stage writes, relative to the run folder."""

    @abstractmethod
    def decides(self) -> dict[str, Any]:
        """Everything else that decides what stages write: images, rule files."""

    @abstractmethod
    def work(self, stage: Stage, job: TrainJob) -> None:
        """Do a stage; every rank comes here. What only the main rank does goes through `alone`."""

    @abstractmethod
    def record(self, stage: Stage) -> None:
        """Note that a stage is done, and fill what the checkpoint of the run folder holds."""

    @abstractmethod
    def facts(self, stage: Stage) -> dict[str, Any]:
        """Numbers of a stage that was done, for the log of the loop; every rank gets the same."""

    @abstractmethod
    def describe(self, step: int) -> None:
        """Say in the meta of the checkpoint what is in it after so many stages."""

    # -- the loop ----------------------------------------------------------------------------------

    def run(self, product: Mapping[str, nn.Module]) -> bool:
        """Do what is left to do; return whether all stages are done.

        Args:
            product: What the checkpoint of the run folder holds, by name.
        """
        rt = self.rt
        rt.prepare(*product.values())
        rt.checkpoint.register(**product)
        done_before = rt.checkpoint.resume()
        self.describe(0)
        if not done_before:
            rt.checkpoint.save(0)
        last = self._last_stage()
        for step in rt.steps(0, last.number):
            stage = self.stages[step - 1]
            started = time.monotonic()
            with rng.isolated(rng.derive_seed(self.job.config.train.seed, "stage", stage.name)):
                ran = self._do(stage)
            self.record(stage)
            facts = self.facts(stage)
            if ran or step > done_before:
                self.describe(step)
                rt.log(step, stage=stage.name, seconds=round(time.monotonic() - started, 1), **facts)
                rt.checkpoint.save(step)
        return last is self.stages[-1]

    def alone(self, work: Callable[[Beat], object]) -> None:
        """Let rank 0 work while the others wait, however long it takes.

        Raises:
            Interrupted: A signal arrived; the work begins anew when the run is resumed.
        """
        rt = self.rt
        if rt.is_main:
            news = self._work_and_tell(work)
        else:
            news = "working"
            while news == "working":
                news = rt.ranks.exchange("waiting", "stop" if rt.stop_requested else "")[0]
        if news == "stop":
            rt.obey_stop()
        if news != "done":
            raise RuntimeFault("the main rank", why="it could not finish its part", do="its message says why")

    def numbers_of(self, stage: Stage) -> dict[str, Any]:
        """The last validation of a trained stage, from its log."""
        facts: dict[str, Any] = {}
        for record in RunFolder.open(self.root / folder_of(stage), lock=False).records():
            facts |= {key: value for key, value in record.items() if key.startswith(_SHOWN)}
        return facts

    # -- which stages ------------------------------------------------------------------------------

    def _last_stage(self) -> Stage:
        """The stage up to which to go: the last, or the first of the kind asked for that is not done.

        Raises:
            ConfigError: The loop has no such stage, or one before it is not done.
        """
        kind = self.job.config.stage
        if kind == "all":
            return self.stages[-1]
        wanted = [stage for stage in self.stages if stage.kind == kind]
        if not wanted:
            names = ", ".join(dict.fromkeys(stage.kind for stage in self.stages))
            raise ConfigError(f"--stage {kind}", why=f"this config has no such stage, only {names}")
        done = self.pipeline.done()
        open_ones = [stage for stage in wanted if stage.name not in done]
        if not open_ones:
            _log.info("stage %s is done in every iteration", kind)
        chosen = open_ones[0] if open_ones else wanted[-1]
        missing = [stage for stage in self.stages[: chosen.number - 1] if stage.name not in done]
        if missing:
            raise ConfigError(
                f"--stage {kind}",
                why=f"{chosen.name} needs {missing[0].name}, which is not done",
                do=f"--stage {missing[0].kind} first, or --stage all",
            )
        return chosen

    # -- one stage ---------------------------------------------------------------------------------

    def _do(self, stage: Stage) -> bool:
        """Do a stage on all ranks unless it is done; rank 0 decides and keeps the record."""
        inputs = self.inputs_of(stage)
        folder = self.root / folder_of(stage)
        return self.pipeline.stage(
            stage.name,
            settings={"config": self.job.resolved.hash},
            decides=self.decides(),
            files=inputs,
            outputs=self.outputs_of(stage),
            folder=folder,
            run=lambda: self.work(stage, stage_job(self.job, stage, inputs, folder)),
        )

    def _work_and_tell(self, work: Callable[[Beat], object]) -> str:
        """Work on rank 0, and tell the others every now and then that it goes on."""
        ranks, last = self.rt.ranks, time.monotonic()

        def beat() -> None:
            nonlocal last
            stop = self.rt.stop_requested
            if ranks.world_size > 1 and time.monotonic() - last > _BEAT_S:
                last = time.monotonic()
                stop = "stop" in ranks.exchange("waiting", "working")[1:] or stop
            if stop:
                raise _Stop

        news = "failed"
        try:
            work(beat)
            news = "done"
        except _Stop:
            news = "stop"
        finally:
            ranks.exchange("waiting", news)
        return news


class _Stop(Exception):
    """A signal arrived while rank 0 was at work."""
