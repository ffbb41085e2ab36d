"""The stages of a loop: their names, their jobs, and how long each trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from medrl.core.config import Layer, resolve
from medrl.core.errors import CheckpointError

if TYPE_CHECKING:
    from medrl.core.config import Resolved
    from medrl.core.jobs import TrainJob

Files: TypeAlias = "Mapping[str, Path | tuple[Path, ...]]"
"""What a stage reads, by the names of the settings in the block `inputs`."""


@dataclass(frozen=True)
class Stage:
    """One stage of a loop.

    Attributes:
        number: Place in the loop, from 1.
        kind: Such as ``source``, ``pairs`` or ``ppo``.
        iteration: From 1; 0 for what comes before the first and for the test.
    """

    number: int
    kind: str
    iteration: int = 0

    @property
    def name(self) -> str:
        """Name of its folder, such as ``05_reward_1``."""
        return f"{self.number:02d}_{self.kind}" + (f"_{self.iteration}" if self.iteration else "")


def numbered(kinds: Iterable[tuple[str, int]]) -> list[Stage]:
    """Return stages of kinds and iterations in their order."""
    return [Stage(number, kind, iteration) for number, (kind, iteration) in enumerate(kinds, start=1)]


def folder_of(stage: Stage) -> Path:
    """Folder of a stage, relative to the run folder."""
    return Path("stages") / stage.name


def outputs_of(stage: Stage, selected: str = "last") -> list[Path]:
    """Return what a stage writes, relative to the run folder; the first is what other stages read.

    Args:
        stage: The stage. That of kind ``pairs`` writes a folder, that of kind ``test`` a file of numbers,
            every other a run with checkpoints.
        selected: Which of its checkpoints the next stages take.
    """
    if stage.kind == "pairs":
        return [folder_of(stage)]
    if stage.kind == "test":
        return [Path("test.json")]
    return [folder_of(stage) / "checkpoints" / f"{selected}.pt"]


def all_there(kind: str, wanted: Mapping[str, Path | None]) -> dict[str, Path | tuple[Path, ...]]:
    """Return what a stage reads, if all of it is there.

    Raises:
        CheckpointError: A stage before has not made one.
    """
    missing = [name for name, path in wanted.items() if path is None]
    if missing:
        raise CheckpointError(
            f"stage {kind}",
            why=f"there is no {', no '.join(missing)} to start from",
            do=f"do the stages before it first, or name one: --set inputs.{missing[0]}=RUN",
        )
    return {name: path for name, path in wanted.items() if path is not None}


def stage_job(job: TrainJob, stage: Stage, inputs: Files, run_dir: Path) -> TrainJob:
    """Return the job of one stage: the same config with what the stage reads, in a run folder of its own.

    The config has the fields `stage`, `alone` and `iteration` and the block `inputs`.
    """
    empty: dict[str, Any] = {
        name: [] if field.default == () else None
        for name, field in type(job.config.inputs).model_fields.items()
    }
    given = {
        name: [str(item) for item in path] if isinstance(path, tuple) else str(path)
        for name, path in inputs.items()
    }
    values = {
        **job.resolved.values(),
        "stage": stage.kind,
        "alone": True,
        "iteration": max(1, stage.iteration),
        "inputs": {**empty, **given},
    }
    resolved: Resolved[Any] = resolve(type(job.config), [Layer(f"stage {stage.name}", values)])
    return replace(
        job,
        resolved=resolved,
        run_dir=run_dir,
        resume="auto",
        init_from=job.init_from if stage.kind == "source" else None,
        fast_dev_run=False,
    )


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long and how fast a stage trains.

    Attributes:
        steps: Optimiser steps, or rollouts.
        every: Steps between validations.
        batch: Images a rank and step.
        lr: Largest learning rate.
        schedule: ``one_cycle``, ``constant`` or ``plateau``.
        weight_decay: Of Adam.
        clip_norm: Largest gradient norm; 0 = no limit.
        accumulate: Batches whose gradients are added before a step.
    """

    steps: int
    every: int
    batch: int
    lr: float
    schedule: str = "constant"
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    accumulate: int = 1


def steps_for(images: int, *, steps: int, epochs: int, width: int, limit: int = 0) -> int:
    """Steps of a stage: as many as it says, or as `epochs` passes need with `width` images a step.

    >>> steps_for(20, steps=0, epochs=3, width=8)
    9
    """
    found = steps or math.ceil(images / width) * epochs
    return min(found, limit) if limit else found
