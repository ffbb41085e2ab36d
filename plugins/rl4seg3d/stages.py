"""The stages of a loop: which there are, in which order, and what each reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medrl.core.adaptation import stages
from medrl.core.adaptation.parts import given_checkpoint
from medrl.core.adaptation.settings import StageConfig
from medrl.core.adaptation.stages import Course, Files, Stage, all_there, numbered, steps_for
from medrl.core.learned_reward.correctors import LEARNED

from .config import Rl4seg3dConfig

KEPT = ("source", "style", "corrector", "anatomical", "landmark")
"""Stages whose result is kept by their name."""
NETS = ("anatomical", "landmark")


def plan_stages(cfg: Rl4seg3dConfig) -> list[Stage]:
    """Return the stages of a loop in their order; what `inputs` brings is left out."""
    kinds: list[tuple[str, int]] = []
    if cfg.inputs.source is None:
        kinds.append(("source", 0))
    if cfg.needs_style and cfg.inputs.style is None:
        kinds.append(("style", 0))
    if cfg.needs_corrector and cfg.inputs.corrector is None:
        kinds.append(("corrector", 0))
    for iteration in range(1, cfg.loop.iterations + 1):
        if cfg.trained_nets:
            kinds.append(("pairs", iteration))
            kinds += [(name, iteration) for name in cfg.trained_nets]
        kinds.append(("ppo", iteration))
    kinds.append(("test", 0))
    return numbered(kinds)


@dataclass
class Results:
    """What the stages so far have made, as files and folders of the run folder or of `inputs`.

    Attributes:
        made: Results of the stages in `KEPT`, by name.
        actors: Actor of each iteration; 0 is the one that PPO starts from.
    """

    made: dict[str, Path] = field(default_factory=dict)
    critic: Path | None = None
    pairs: list[Path] = field(default_factory=list)
    actors: dict[int, Path] = field(default_factory=dict)

    @classmethod
    def given(cls, cfg: Rl4seg3dConfig) -> Results:
        """Return what `inputs` brings, as checkpoint files.

        Raises:
            ConfigError: A path does not exist.
            CheckpointError: A run folder has no checkpoint.
        """
        found = cls()
        for kind in KEPT:
            path: Path | None = getattr(cfg.inputs, kind)
            if path is not None:
                found.made[kind] = given_checkpoint(path, f"inputs.{kind}")
        found._start(cfg)
        return found

    def add(self, stage: Stage, outputs: Sequence[Path], cfg: Rl4seg3dConfig) -> None:
        """Record what a stage has made."""
        if stage.kind in KEPT:
            self.made[stage.kind] = outputs[0]
        elif stage.kind == "pairs":
            self.pairs.append(outputs[0])
        elif stage.kind == "ppo":
            self.actors[stage.iteration] = outputs[0]
            self.critic = outputs[0] if cfg.ppo.uses_critic else None
        self._start(cfg)

    def trained(self) -> dict[int, Path]:
        """Actors of the iterations that are done, in their order."""
        return {number: path for number, path in sorted(self.actors.items()) if number > 0}

    def _start(self, cfg: Rl4seg3dConfig) -> None:
        start = self.made.get(cfg.loop.start)
        if start is not None:
            self.actors[0] = start


def outputs_of(stage: Stage, cfg: Rl4seg3dConfig) -> list[Path]:
    """Return what a stage writes, relative to the run folder; the first is what other stages read."""
    block = cfg.reward if stage.kind in NETS else getattr(cfg, stage.kind, None)
    return stages.outputs_of(stage, getattr(block, "select", "last"))


def inputs_of(stage: Stage, results: Results, cfg: Rl4seg3dConfig) -> Files:
    """Return the files that a stage reads, by their names in `InputsConfig`.

    Raises:
        CheckpointError: A stage before has not made one.
    """
    wanted: dict[str, Path | None] = {}
    made, before = results.made.get, results.actors.get(stage.iteration - 1)
    if stage.kind == "style":
        wanted["source"] = made("source")
    elif stage.kind == "pairs":
        wanted["actor"] = before
        if cfg.pairs.kind == "synthetic":
            wanted |= {"source": made("source"), "style": made("style")}
        elif cfg.corrector.kind in LEARNED:
            wanted["corrector"] = made("corrector")
    elif stage.kind == "anatomical" and cfg.reward.init != "random":
        init = cfg.reward.init
        wanted[init] = before if init == "actor" else made(init)
    elif stage.kind == "ppo":
        wanted["actor"] = before
        if cfg.ppo.reference == "source":
            wanted["source"] = made("source")
        elif cfg.ppo.reference == "start":
            wanted[cfg.loop.start] = made(cfg.loop.start)
        if cfg.learns_reward:
            wanted |= {name: made(name) for name in cfg.reward.nets}
        if cfg.mixes_corrector and cfg.corrector.kind in LEARNED:
            wanted["corrector"] = made("corrector")
        if stage.iteration > 1 and cfg.ppo.uses_critic and cfg.loop.keep_critic:
            wanted["critic"] = results.critic
    found = all_there(stage.kind, wanted)
    if stage.kind in NETS or (stage.kind == "ppo" and cfg.ppo.pseudo_labels):
        found["pairs"] = tuple(results.pairs if cfg.pairs.keep else results.pairs[-1:])
    return found


def course_of(stage: StageConfig, cfg: Rl4seg3dConfig, cases: int, world_size: int = 1) -> Course:
    """How long and how fast a stage trains on so many sequences or pairs."""
    batch, accumulate = stage.batch or cfg.train.batch_size, getattr(stage, "accumulate", 1)
    steps = steps_for(
        cases,
        steps=stage.steps,
        epochs=stage.epochs,
        width=batch * accumulate * world_size,
        limit=cfg.train.max_steps,
    )
    return Course(
        steps=steps,
        every=cfg.train.validate_every or max(1, steps // (4 if stage.steps else stage.epochs)),
        batch=batch,
        lr=stage.lr or cfg.train.lr,
        schedule=getattr(stage, "schedule", "constant"),
        weight_decay=stage.weight_decay,
        clip_norm=stage.clip_norm,
        accumulate=accumulate,
    )
