"""The stages of a loop: which there are, in which order, and what each reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medrl.core.adaptation import stages
from medrl.core.adaptation.parts import given_checkpoint
from medrl.core.adaptation.settings import Select, StageConfig
from medrl.core.adaptation.stages import Course, Files, Stage, all_there, numbered, steps_for

from .config import Rl4segConfig


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
    return numbered(kinds)


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


def outputs_of(stage: Stage, cfg: Rl4segConfig) -> list[Path]:
    """Return what a stage writes, relative to the run folder; the first is what other stages read."""
    return stages.outputs_of(stage, selected(stage.kind, cfg))


def selected(kind: str, cfg: Rl4segConfig) -> Select:
    """Which checkpoint of a trained stage the next ones take."""
    block = getattr(cfg, kind, None)
    found: Select = getattr(block, "select", "last")
    return found


def inputs_of(stage: Stage, results: Results, cfg: Rl4segConfig) -> Files:
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
    found = all_there(stage.kind, wanted)
    if stage.kind == "reward" or (stage.kind == "ppo" and cfg.ppo.pseudo_labels):
        found["pairs"] = tuple(results.pairs if cfg.pairs.keep else results.pairs[-1:])
    return found


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
    return steps_for(
        images,
        steps=stage.steps,
        epochs=stage.epochs,
        width=batch_of(stage, cfg) * world_size,
        limit=cfg.train.max_steps,
    )


def interval_of(stage: StageConfig, cfg: Rl4segConfig, steps: int) -> int:
    """Steps between validations of a stage with so many steps."""
    return cfg.train.validate_every or max(1, steps // (4 if stage.steps else stage.epochs))


def course_of(stage: StageConfig, cfg: Rl4segConfig, images: int, world_size: int = 1) -> Course:
    """How long and how fast a stage trains on so many images."""
    steps = steps_of(stage, cfg, images, world_size)
    return Course(
        steps=steps,
        every=interval_of(stage, cfg, steps),
        batch=batch_of(stage, cfg),
        lr=rate_of(stage, cfg),
        schedule=getattr(stage, "schedule", "constant"),
        weight_decay=stage.weight_decay,
        clip_norm=stage.clip_norm,
    )
