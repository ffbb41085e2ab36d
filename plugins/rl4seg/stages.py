"""The stages of a loop: which there are, in which order, where each lies, and what each reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medrl.core.checkpoint import find_checkpoint
from medrl.core.config import Layer, resolve
from medrl.core.errors import CheckpointError, ConfigError
from medrl.core.jobs import TrainJob

from .config import Rl4segConfig, Select, StageConfig

if TYPE_CHECKING:
    from medrl.core.config import Resolved

TRAINED = ("source", "style", "corrector", "reward", "ppo")
"""Kinds of stages that train a network in a run folder of their own."""


@dataclass(frozen=True)
class Stage:
    """One stage of a loop.

    Attributes:
        number: Place in the loop, from 1.
        kind: ``source``, ``style``, ``corrector``, ``pairs``, ``reward``, ``ppo`` or ``test``.
        iteration: From 1; 0 for what comes before the first and for the test.
    """

    number: int
    kind: str
    iteration: int = 0

    @property
    def name(self) -> str:
        """Name of its folder, such as ``05_reward_1``."""
        return f"{self.number:02d}_{self.kind}" + (f"_{self.iteration}" if self.iteration else "")


def plan_stages(cfg: Rl4segConfig) -> list[Stage]:
    """Return the stages of a loop in their order; what `inputs` brings is left out."""
    kinds: list[tuple[str, int]] = []
    if cfg.inputs.source is None:
        kinds.append(("source", 0))
    if cfg.needs_style and cfg.inputs.style is None:
        kinds.append(("style", 0))
    if cfg.needs_corrector and cfg.inputs.corrector is None:
        kinds.append(("corrector", 0))
    for iteration in range(1, cfg.loop.iterations + 1):
        if cfg.learns_reward and cfg.inputs.reward is None:
            kinds += [("pairs", iteration), ("reward", iteration)]
        kinds.append(("ppo", iteration))
    kinds.append(("test", 0))
    return [Stage(number, kind, iteration) for number, (kind, iteration) in enumerate(kinds, start=1)]


@dataclass
class Results:
    """What the stages so far have made, as files and folders of the run folder or of `inputs`.

    Attributes:
        actors: Actor of each iteration; 0 is the one that PPO starts from.
    """

    source: Path | None = None
    style: Path | None = None
    corrector: Path | None = None
    reward: Path | None = None
    critic: Path | None = None
    pairs: list[Path] = field(default_factory=list)
    actors: dict[int, Path] = field(default_factory=dict)

    @classmethod
    def given(cls, cfg: Rl4segConfig) -> Results:
        """Return what `inputs` brings, as checkpoint files.

        Raises:
            ConfigError: A path does not exist.
            CheckpointError: A run folder has no checkpoint.
        """
        found = cls()
        for kind in ("source", "style", "corrector", "reward"):
            path: Path | None = getattr(cfg.inputs, kind)
            if path is not None:
                setattr(found, kind, given_checkpoint(path, f"inputs.{kind}"))
        found._start(cfg)
        return found

    def add(self, stage: Stage, outputs: Sequence[Path], cfg: Rl4segConfig) -> None:
        """Record what a stage has made."""
        place = outputs[0] if outputs else Path()
        if stage.kind in ("source", "style", "corrector", "reward"):
            setattr(self, stage.kind, place)
        elif stage.kind == "pairs":
            self.pairs.append(place)
        elif stage.kind == "ppo":
            self.actors[stage.iteration] = place
            self.critic = place if cfg.ppo.uses_critic else None
        self._start(cfg)

    def actor_before(self, iteration: int) -> Path | None:
        """The actor that an iteration starts from."""
        return self.actors.get(iteration - 1)

    def _start(self, cfg: Rl4segConfig) -> None:
        start = self.style if cfg.loop.start == "style" else self.source
        if start is not None:
            self.actors[0] = start


def given_checkpoint(path: Path, what: str) -> Path:
    """Return the checkpoint file of a run folder or file that a setting names.

    Raises:
        ConfigError: It does not exist.
        CheckpointError: The folder has no checkpoint.
    """
    if not path.exists():
        raise ConfigError(what, why=f"{path} does not exist", do="name a run folder or a checkpoint")
    return find_checkpoint(path, "last")


def outputs_of(stage: Stage, cfg: Rl4segConfig) -> list[Path]:
    """Return what a stage writes, relative to the run folder; the first is what other stages read."""
    folder = Path("stages") / stage.name
    if stage.kind == "pairs":
        return [folder]
    if stage.kind == "test":
        return [Path("test.json")]
    return [folder / "checkpoints" / f"{selected(stage.kind, cfg)}.pt"]


def selected(kind: str, cfg: Rl4segConfig) -> Select:
    """Which checkpoint of a trained stage the next ones take."""
    block = getattr(cfg, kind)
    found: Select = getattr(block, "select", "last")
    return found


def inputs_of(stage: Stage, results: Results, cfg: Rl4segConfig) -> dict[str, Path | tuple[Path, ...]]:
    """Return the files that a stage reads, by their names in `InputsConfig`.

    Raises:
        CheckpointError: A stage before has not made one.
    """
    wanted: dict[str, Path | None] = {}
    if stage.kind == "style":
        wanted["source"] = results.source
    elif stage.kind == "pairs":
        wanted["actor"] = results.actor_before(stage.iteration)
        if cfg.pairs.kind == "synthetic":
            wanted |= {"source": results.source, "style": results.style}
        elif cfg.corrector.kind in ("denoiser", "vae"):
            wanted["corrector"] = results.corrector
    elif stage.kind == "reward":
        if cfg.reward.init != "random":
            init = cfg.reward.init
            wanted[init] = (
                results.actor_before(stage.iteration) if init == "actor" else getattr(results, init)
            )
    elif stage.kind == "ppo":
        wanted["actor"] = results.actor_before(stage.iteration)
        if cfg.ppo.reference == "source":
            wanted["source"] = results.source
        elif cfg.ppo.reference == "start":
            wanted[cfg.loop.start] = getattr(results, cfg.loop.start)
        if cfg.learns_reward:
            wanted["reward"] = results.reward
        if cfg.reward.name == "rl4seg.composite" and cfg.corrector.kind in ("denoiser", "vae"):
            wanted["corrector"] = results.corrector
        if stage.iteration > 1 and cfg.ppo.uses_critic and cfg.loop.keep_critic:
            wanted["critic"] = results.critic
    missing = [name for name, path in wanted.items() if path is None]
    if missing:
        raise CheckpointError(
            f"stage {stage.kind}",
            why=f"there is no {', no '.join(missing)} to start from",
            do=f"do the stages before it first, or name one: --set inputs.{missing[0]}=RUN",
        )
    found: dict[str, Path | tuple[Path, ...]] = {
        name: path for name, path in wanted.items() if path is not None
    }
    if stage.kind == "reward" or (stage.kind == "ppo" and cfg.ppo.pseudo_labels):
        found["pairs"] = tuple(results.pairs if cfg.pairs.keep else results.pairs[-1:])
    return found


def stage_job(
    job: TrainJob, stage: Stage, inputs: Mapping[str, Path | tuple[Path, ...]], run_dir: Path
) -> TrainJob:
    """Return the job of one stage: the same config with what the stage reads, in a run folder of its own."""
    empty = dict.fromkeys(type(job.config.inputs).model_fields) | {"pairs": []}
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
    resolved: Resolved[Any] = resolve(Rl4segConfig, [Layer(f"stage {stage.name}", values)])
    return replace(
        job,
        resolved=resolved,
        run_dir=run_dir,
        resume="auto",
        init_from=job.init_from if stage.kind == "source" else None,
        fast_dev_run=False,
    )


def batch_of(stage: StageConfig, cfg: Rl4segConfig) -> int:
    """Images a rank and step of a stage; in iteration i of the original's schedule, i times as many."""
    size = stage.batch or cfg.train.batch_size
    grows = stage is cfg.ppo and cfg.ppo.per_iteration == "original"
    return size * cfg.iteration if grows else size


def rate_of(stage: StageConfig, cfg: Rl4segConfig) -> float:
    """Largest learning rate of a stage."""
    return stage.lr or cfg.train.lr


def steps_of(stage: StageConfig, cfg: Rl4segConfig, images: int, world_size: int = 1) -> int:
    """Optimiser steps (PPO: rollouts) of a stage over so many images."""
    width = batch_of(stage, cfg) * world_size
    steps = stage.steps or math.ceil(images / width) * stage.epochs
    return min(steps, cfg.train.max_steps) if cfg.train.max_steps else steps


def interval_of(stage: StageConfig, cfg: Rl4segConfig, steps: int) -> int:
    """Steps between validations of a stage with so many steps."""
    return cfg.train.validate_every or max(1, steps // (4 if stage.steps else stage.epochs))
