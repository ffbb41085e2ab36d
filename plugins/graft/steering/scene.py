"""What every weighting works with, and the weighting that never changes its mind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.plugins.graft.agent import PolicyState, make_state
from medrl.plugins.graft.config import GraftConfig
from medrl.plugins.graft.data import GraftData
from medrl.plugins.graft.losses import Projections
from medrl.plugins.graft.models import StudentOutput, tap
from medrl.plugins.graft.objective import Objective
from medrl.plugins.graft.priors import Priors, batch_quality, floor_of, out_of_fold
from medrl.plugins.graft.regions import teacher_probabilities
from medrl.plugins.graft.samples import Batch
from medrl.plugins.graft.teachers import unseen_only
from medrl.plugins.graft.weighting import (
    disagreement,
    entropy,
    from_quality,
    similarity,
    warmup_alpha,
    with_floor,
)

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


@dataclass(frozen=True)
class Scene:
    """The run as a weighting sees it; every module is prepared.

    Attributes:
        rt: Ranks, device, checkpoint.
        cfg: Settings.
        data: Teachers and reward cases.
        student: In training mode.
        projections: To the teachers' features; None without feature distillation.
        objective: Gives the loss of every teacher.
        priors: Quality and starting weights.
        optimizer: The student's.
        epoch: Steps in which every case is seen once.
    """

    rt: Runtime
    cfg: GraftConfig
    data: GraftData
    student: nn.Module
    projections: Projections | None
    objective: Objective
    priors: Priors
    optimizer: torch.optim.Optimizer
    epoch: int

    def alpha(self, step: int) -> float:
        """Warm-up factor of a step (from 1): 0 is the starting weights."""
        return warmup_alpha(step - 1, self.cfg.agent.warmup, total=self.cfg.train.max_steps)

    @torch.no_grad()
    def observe(self, batch: Batch, output: StudentOutput) -> PolicyState:
        """What a policy sees of a batch: maps, likeness to the student, quality, disagreement."""
        data, target = self.data, self.data.plan.target
        alike = {}
        for name in data.taps:
            theirs = batch.features[name]
            alike[name] = similarity(self.projected(name, output, theirs), theirs)
        found = [
            teacher_probabilities(logits, target, family)
            for logits, family in zip(batch.logits, data.families, strict=True)
        ]
        features = [{name: batch.features[name][i] for name in alike} for i in range(len(found))]
        return make_state(
            features,
            batch.logits,
            taps=tuple(alike),
            similarity=alike,
            quality=self.quality(batch),
            disagreement=disagreement(found, target.focus) if self.cfg.agent.disagreement else None,
            in_sample=self._in_sample(batch) if self.cfg.teachers.oof == "flag" else None,
        )

    @torch.no_grad()
    def projected(self, name: str, output: StudentOutput, teachers: Sequence[Tensor]) -> list[Tensor]:
        """The student's features at one tap, mapped to each teacher's."""
        if self.projections is None:
            raise ConfigError(f"features '{name}'", why="nothing is distilled from them")
        sizes = [item.shape[2:] for item in teachers]
        found: list[Tensor] = self.projections(name, tap(output, name).detach(), sizes)
        return found

    def quality(self, batch: Batch) -> Tensor:
        """Dice of each teacher on each sample, ``(B, N)``; where unlabelled, its mean over labelled cases.

        Out of fold, also where the teacher was trained on the sample.
        """
        own = batch_quality(batch, self.data)
        measured = batch.labelled[:, None].expand_as(own)
        if out_of_fold(self.cfg):
            measured = measured & ~self._in_sample(batch)
        return torch.where(measured, own, self.priors.quality[None])

    def _in_sample(self, batch: Batch) -> Tensor:
        """Which teachers were trained on which samples, ``(B, N)`` bool."""
        seen = self.data.in_sample(batch.case_ids)
        if seen is None:
            return torch.zeros(len(batch.case_ids), len(self.data.teachers), dtype=torch.bool)
        return seen.to(batch.labelled.device)


class Steering:
    """Says how much each teacher counts. This one keeps the starting weights.

    The loop calls, in this order at every step, `held_out`, `weights` for each micro-batch, `before` and
    `after` around the update of the student, and `validated` after a validation.

    Args:
        scene: The run.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def held_out(self, step: int) -> int | None:
        """Number of the fold of labelled cases that this step must not train on; None for none."""
        del step
        return None

    def weights(self, step: int, batch: Batch, output: StudentOutput) -> dict[str, Tensor]:
        """Weights of the teachers for a batch, constants ``(B, N)`` by kind: taps, and ``logits``."""
        del step, output
        scene, priors = self.scene, self.scene.priors
        start = priors.batch(len(batch.case_ids))
        weighting = scene.cfg.weighting
        if weighting.mode != "quality" or weighting.scope != "case" or not start:
            return start
        own = from_quality(scene.quality(batch), temperature=weighting.temperature)
        return dict.fromkeys(start, with_floor(own, floor_of(scene.cfg)))

    def before(self, step: int, batch: Batch) -> None:
        """Look at the student just before its update; `batch` is the step's last micro-batch."""

    def after(self, step: int, batch: Batch, *, applied: bool) -> dict[str, Any]:
        """Learn from the update; return numbers for the log."""
        del step, batch, applied
        return {}

    def validated(self, step: int, dice: float) -> dict[str, Any]:
        """Learn from a validation; return numbers for the log."""
        del step, dice
        return {}


def in_force(weights: Mapping[str, Tensor], batch: Batch, scene: Scene) -> dict[str, Tensor]:
    """Weights as they apply to a batch: with `teachers.oof: unseen`, none on a teacher's training cases."""
    seen = scene.data.in_sample(batch.case_ids) if scene.cfg.teachers.oof == "unseen" else None
    return dict(weights) if seen is None else unseen_only(weights, seen)


def described(weights: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    """Mean weight of each teacher and their entropy in nats, for the log: ``weights_neg1/teacher_0``."""
    facts: dict[str, Any] = {}
    for kind, values in weights.items():
        mean = values.detach().float().mean(dim=0)
        facts |= by_teacher(f"weights_{kind}", mean.tolist(), names)
        facts[f"entropy_{kind}"] = entropy(mean)
    return facts


def by_teacher(what: str, values: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """One number for each teacher under a key of its own, so that reports draw them in one chart."""
    return {f"{what}/{name}": value for name, value in zip(names, values, strict=True)}
