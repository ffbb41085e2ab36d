"""Weighting by the teachers' losses on each batch, or by their likeness to the student.

Source: specification §5; meta_teacher_optimizer.py of the original, which no flag reaches there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medrl.plugins.graft.models import StudentOutput
from medrl.plugins.graft.samples import Batch
from medrl.plugins.graft.weighting import (
    MetaSettings,
    adaptive_settings,
    context_weights,
    meta_weights,
    with_floor,
)

from .scene import Steering


class MetaSteering(Steering):
    """A few projected gradient steps from equal weights, again on every batch."""

    def weights(self, step: int, batch: Batch, output: StudentOutput) -> dict[str, Tensor]:
        """Weights of one batch; equal where a loss is not finite."""
        scene, floor = self.scene, self.scene.cfg.weighting.floor
        equal = scene.priors.batch(len(batch.case_ids))
        with torch.no_grad():
            detached = StudentOutput(
                [logits.detach() for logits in output.logits],
                {name: features.detach() for name, features in output.features.items()},
            )
            if scene.cfg.weighting.meta == "context":
                found = self._context(batch, detached)
            else:
                found = self._by_loss(step, batch, detached)
        return {
            kind: with_floor(found[kind], floor).to(start).expand_as(start)
            if bool(torch.isfinite(found[kind]).all())
            else start
            for kind, start in equal.items()
        }

    def _by_loss(self, step: int, batch: Batch, output: StudentOutput) -> dict[str, Tensor]:
        scene = self.scene
        adaptive = scene.cfg.weighting.meta == "adaptive"
        settings = adaptive_settings((step - 1) // scene.epoch) if adaptive else MetaSettings()
        found = {}
        for kind, losses in scene.objective.teacher_losses(output, batch, scene.projections).items():
            mean = scene.rt.reduce(losses.mean(dim=0))
            finite = bool(torch.isfinite(mean).all())
            found[kind] = meta_weights(mean, settings)[None] if finite else mean[None]
        return found

    def _context(self, batch: Batch, output: StudentOutput) -> dict[str, Tensor]:
        """By pooled features at each tap; for logits the mean over taps, or by pooled logits without one."""
        scene, found = self.scene, {}
        for name in scene.data.taps:
            theirs = batch.features[name]
            found[name] = context_weights(scene.projected(name, output, theirs), theirs)
        if found:
            logits = torch.stack(list(found.values())).mean(dim=0)
        else:
            logits = context_weights([output.main] * len(batch.logits), batch.logits)
        return {kind: found.get(kind, logits) for kind in scene.priors.kinds}
