"""Weighting by gradient alignment: trust the teachers whose loss falls where the reward cases' loss falls.

Every few steps, d_i = (ℓ_i(θ + εv) − ℓ_i(θ − εv))/2ε is measured for every teacher on the last batch, where v
is the unit gradient of the supervised loss on reward cases, divided by the root of Adam's second moments.
Weights are softmax(log prior + S/τ) with S = EMA(d)/√EMA(d²).

Source: experiments recorded beside the specification; not part of the original.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medrl.core.rng import torch_generator
from medrl.plugins.graft.agent import Agreement
from medrl.plugins.graft.models import StudentOutput, as_output
from medrl.plugins.graft.priors import floor_of
from medrl.plugins.graft.rewards import RewardMeter
from medrl.plugins.graft.samples import Batch
from medrl.plugins.graft.weighting import (
    AlignmentScores,
    alignment,
    descent_direction,
    warmup_blend,
    with_floor,
)

from .scene import Scene, Steering, by_teacher


class AlignedSteering(Steering):
    """A residual on the prior from gradient alignment."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        weighting = scene.cfg.weighting
        self.scores = {
            kind: AlignmentScores(
                len(scene.data.teachers),
                momentum=weighting.align_momentum,
                temperature=weighting.align_temperature,
            )
            for kind in scene.priors.kinds
        }
        self.meter = RewardMeter(scene.cfg, scene.data, scene.rt.device)
        self.noise = torch_generator(scene.cfg.train.seed, "graft", "random reward")
        self.parameters = [p for p in scene.student.parameters() if p.requires_grad]
        self.agreement = {kind: Agreement(len(scene.data.teachers)) for kind in self.scores}
        self._given: dict[str, Tensor] = {}
        scene.rt.checkpoint.register(
            reward_noise=self.noise,
            **{f"alignment_{kind}": scores for kind, scores in self.scores.items()},
            **{f"agreement_{kind}": found for kind, found in self.agreement.items()},
        )

    def held_out(self, step: int) -> int | None:
        """The fold on which the coming measurement takes its gradient."""
        return self.meter.fold(self._measurement(step))

    def weights(self, step: int, batch: Batch, output: StudentOutput) -> dict[str, Tensor]:
        """Prior and scores, blended from the prior while warming up."""
        del output
        size, alpha, floor = len(batch.case_ids), self.scene.alpha(step), floor_of(self.scene.cfg)
        found = {}
        for kind, prior in self.scene.priors.batch(1).items():
            scored = with_floor(self.scores[kind].weights(prior[0]), floor).to(prior)
            found[kind] = warmup_blend(scored[None], alpha, start=prior).expand(size, -1)
        self._given = {kind: weights[0].detach().cpu() for kind, weights in found.items()}
        return found

    def after(self, step: int, batch: Batch, *, applied: bool) -> dict[str, Any]:
        """Every so many steps measure all teachers on the batch that was just learned from.

        Logged are the scores, and how each teacher's weight and its measurements went together so far.
        """
        if not applied or step % self.scene.cfg.weighting.align_every:
            return {}
        measured = self.meter.batch(self._measurement(step), batch)
        loss, direction = self._direction(measured)
        facts: dict[str, Any] = {"reward_loss": loss}
        if not any(bool(part.any()) for part in direction):
            return facts
        kinds = list(self.scores)

        def losses() -> Tensor:
            found = self._teacher_losses(batch)
            return torch.cat([found[kind].mean(dim=0) for kind in kinds])

        differences = alignment(
            losses, self.parameters, direction, epsilon=self.scene.cfg.weighting.align_epsilon
        )
        differences = self.scene.rt.reduce(differences)
        if self.scene.cfg.agent.random_reward:
            differences = torch.randn(differences.shape, generator=self.noise)
        for kind, found in zip(kinds, differences.chunk(len(kinds)), strict=True):
            self.scores[kind].update(found)
            self.agreement[kind].update(self._given[kind], found)
            names = self.scene.data.teacher_names
            facts |= by_teacher(f"alignment_{kind}", self.scores[kind].scores.tolist(), names)
            facts |= by_teacher(f"correlation_{kind}", self.agreement[kind].values, names)
        return facts

    def _measurement(self, step: int) -> int:
        return (step - 1) // self.scene.cfg.weighting.align_every

    def _direction(self, measured: Batch) -> tuple[float, list[Tensor]]:
        """Loss of the student on the reward cases, and the way up, equal on all ranks."""
        scene = self.scene
        with torch.autocast(scene.rt.device.type, enabled=False):
            loss = scene.objective.supervised(as_output(scene.student(measured.image)), measured)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        value = scene.rt.reduce(float(loss.detach()))
        gradients = [
            torch.zeros_like(p) if g is None else g.contiguous()
            for p, g in zip(self.parameters, found, strict=True)
        ]
        scene.rt.ranks.average(gradients)
        try:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            return value, descent_direction(self.parameters, scene.optimizer)
        finally:
            for parameter in self.parameters:
                parameter.grad = None

    @torch.no_grad()
    def _teacher_losses(self, batch: Batch) -> dict[str, Tensor]:
        scene = self.scene
        with torch.autocast(scene.rt.device.type, enabled=False):
            output = as_output(scene.student(batch.image))
            return scene.objective.teacher_losses(output, batch, scene.projections)
