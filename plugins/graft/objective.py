"""The loss of one batch: labels, teachers' features, teachers' logits, each with its weight.

Source: specification §4: total = ce·L_sup + kd·L_kd + feat·L_feat.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medrl.core.errors import ConfigError

from . import losses
from .config import GraftConfig
from .features import LOGITS
from .losses import Projections
from .losses.supervised import Loss
from .models import StudentOutput, tap
from .regions import Target, teacher_probabilities, teacher_threshold
from .samples import Batch
from .weighting import hard_dice

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager
    from medrl.core.runtime import Runtime

Balance = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Objective:
    """The distillation loss, with the settings of one run.

    Attributes:
        cfg: The run's config.
        target: What the network's channels mean.
        taps: Layers whose features are compared.
        families: Convention of each teacher's logits; nnU-Net's if empty.
        loss: Against labels, in place of the published one of the target.
        balance: Rescales the parts of the loss, given their values; None leaves them alone.
    """

    cfg: GraftConfig
    target: Target
    taps: tuple[str, ...]
    families: tuple[str, ...] = ()
    loss: Loss | None = None
    balance: Balance | None = None

    def __call__(
        self,
        output: StudentOutput,
        batch: Batch,
        projections: Projections | None,
        weights: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to go back through and its parts for the log.

        Args:
            output: The student on the batch.
            batch: Images, labels and what the teachers say.
            projections: Maps to the teachers' features; None without feature distillation.
            weights: ``(B, N)`` of the teachers, constants, for each tap and for ``logits``; empty without
                teachers.
        """
        cfg = self.cfg
        supervised = self.supervised(output, batch)
        # What to go back through, its value for the log (not the same under equal speed), and its factor.
        parts = {"supervised": (supervised, supervised.detach(), cfg.loss.weight)}
        if projections is not None and self.taps:
            for_student, reported = self.features(output, batch, projections, weights)
            parts["features"] = (for_student, reported.detach(), cfg.distill.feature_weight)
        if LOGITS in weights:
            logits = losses.weighted_sum(self.logit_losses(output, batch), weights[LOGITS])
            parts["logits"] = (logits, logits.detach(), cfg.distill.logit_weight)
        values = {name: value for name, (_, value, _) in parts.items()}
        back = {name: part for name, (part, _, _) in parts.items()}
        if self.balance is not None:
            back = self.balance(back, values)
        total = torch.stack([factor * back[name].float() for name, (_, _, factor) in parts.items()]).sum()
        value = torch.stack([factor * value.float() for _, value, factor in parts.values()]).sum()
        facts = {"loss": value} | {f"loss_{name}": value for name, value in values.items()}
        return total, facts | self.overlap(output, batch)

    def supervised(self, output: StudentOutput, batch: Batch) -> Tensor:
        """The loss against the labels of the labelled samples; a zero with a graph if there is none."""
        chosen = batch.labelled
        if not bool(chosen.any()):
            return output.main.sum() * 0.0
        loss = self.loss or losses.supervised_loss(
            self.target, profile=self.cfg.loss.focal, batch_dice=self.cfg.loss.batch_dice
        )
        truth = self.target.encode(batch.label[chosen])
        return losses.deep_supervised(loss, [logits[chosen] for logits in output.logits], truth)

    @torch.no_grad()
    def overlap(self, output: StudentOutput, batch: Batch) -> dict[str, Tensor]:
        """Mean Dice of the labelled samples as ``train_dice``; nothing where none is labelled."""
        chosen = batch.labelled
        if not bool(chosen.any()):
            return {}
        target, structures = self.target, list(self.target.structures)
        hard = target.decide(target.probabilities(output.main[chosen]))[:, structures]
        truth = target.encode(batch.label[chosen])[:, structures]
        return {"train_dice": hard_dice(hard, truth).mean()}

    def features(
        self,
        output: StudentOutput,
        batch: Batch,
        projections: Projections,
        weights: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The weighted feature loss over taps: what to go back through, and its value."""
        distill = self.cfg.distill
        total = reported = output.main.new_zeros((), dtype=torch.float32)
        masks = self.masks(batch)
        for name in self.taps:
            scaled = weights[name] if distill.equal_speed else None
            each = self.feature_losses(name, output, batch, projections, masks, scaled)
            if distill.equal_speed:
                loss, value = losses.equal_speed_loss(each, weights[name])
            else:
                loss = value = losses.weighted_sum(each, weights[name])
            factor = distill.neg2_weight if name == "neg2" else 1.0
            total, reported = total + factor * loss, reported + factor * value
        return total, reported

    def feature_losses(
        self,
        name: str,
        output: StudentOutput,
        batch: Batch,
        projections: Projections,
        masks: Sequence[Tensor] | None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Distance of the student's features at one tap to each teacher's, ``(B, N)``.

        Args:
            name: The tap.
            output: The student on the batch.
            batch: What the teachers say.
            projections: Maps to their features.
            masks: Where each teacher may be trusted; everywhere if None.
            weights: Scale the student's gradients (see `Projections.forward`).
        """
        distance = losses.feature_loss(self.cfg.distill.feature_loss)
        teachers = batch.features[name]
        projected = projections(
            name, tap(output, name), [tuple(item.shape[2:]) for item in teachers], weights
        )
        return torch.stack(
            [
                distance(mine, theirs, None if masks is None else masks[i])
                for i, (mine, theirs) in enumerate(zip(projected, teachers, strict=True))
            ],
            dim=1,
        )

    def teacher_losses(
        self, output: StudentOutput, batch: Batch, projections: Projections | None
    ) -> dict[str, Tensor]:
        """The loss of every teacher ``(B, N)`` by kind, without weights: each tap, and ``logits``."""
        found = {}
        if projections is not None:
            masks = self.masks(batch)
            for name in self.taps:
                found[name] = self.feature_losses(name, output, batch, projections, masks)
        if self.cfg.distill.logit_weight > 0:
            found[LOGITS] = self.logit_losses(output, batch)
        return found

    def logit_losses(self, output: StudentOutput, batch: Batch) -> Tensor:
        """Distance of the student's logits to each teacher's, ``(B, N)``."""
        distill = self.cfg.distill
        distance = losses.logit_loss(
            distill.logit_loss, softmax=self.target.softmax, temperature=distill.temperature
        )
        found = []
        for i, logits in enumerate(batch.logits):
            teacher = self.teacher_logits(i, logits)
            if _has_blanks(batch.valid[i]):
                teacher = torch.where(batch.valid[i] > 0.5, teacher.float(), output.main.detach().float())
            found.append(distance(output.main, teacher))
        return torch.stack(found, dim=1)

    def teacher_logits(self, number: int, logits: Tensor) -> Tensor:
        """Logits of a teacher in the student's channels."""
        family = self.families[number] if self.families else "nnunet"
        if family == "nnunet":
            return logits
        p = teacher_probabilities(logits, self.target, family).clamp(1e-4, 1.0 - 1e-4)
        return p.log() if self.target.softmax else torch.logit(p)

    def masks(self, batch: Batch) -> list[Tensor] | None:
        """Where each teacher counts, ``(B, 1, D, H, W)``; None where all count everywhere.

        A teacher counts where its file shows something and, with feature masking, where it may be trusted;
        unlabelled samples are trusted everywhere.
        """
        trusted = self.trusted(batch) if self.cfg.distill.mask_features else None
        if not any(_has_blanks(valid) for valid in batch.valid):
            return trusted
        shown = [valid.amax(dim=1, keepdim=True).float() for valid in batch.valid]
        everywhere = torch.ones_like(batch.mask[:, None], dtype=torch.float32)
        return [mask * part for mask, part in zip(trusted or [everywhere] * len(shown), shown, strict=True)]

    def trusted(self, batch: Batch) -> list[Tensor]:
        """Where each teacher is right or near its own hits, ``(B, 1, D, H, W)``."""
        truth = self.target.encode(batch.label)[:, list(self.target.focus)]
        unlabelled = (~batch.labelled).view(-1, 1, 1, 1, 1)
        found = []
        for i, logits in enumerate(batch.logits):
            family = self.families[i] if self.families else "nnunet"
            p = teacher_probabilities(logits, self.target, family)
            hard = self.target.decide(p) if self.target.softmax else p > teacher_threshold(family)
            hard = hard[:, list(self.target.focus)]
            mask = losses.correctness_mask(hard, truth, radius=self.cfg.distill.mask_dilation)
            found.append(torch.where(unlabelled, torch.ones_like(mask), mask))
        return found


def _has_blanks(valid: Tensor) -> bool:
    """Whether a teacher's file leaves out a part of the window; ``(B, 1, 1, 1, 1)`` stands for everywhere."""
    return valid.shape[1:].numel() > 1


def named_loss(cfg: GraftConfig, manager: PluginManager) -> Loss | None:
    """The supervised loss that the config names, or None for the published one of the target.

    A class is built with `loss.params`, a function gets them as keywords at every call.

    Raises:
        ConfigError: Unknown key or parameters, or parameters without a key.
    """
    name, params = cfg.loss.name, dict(cfg.loss.params)
    if not name:
        if params:
            raise ConfigError("loss.params", why="loss.name is empty", do="--set loss.name=graft.tversky")
        return None
    registry = manager.registry("losses")
    target = registry.get(name)
    made = registry.build(name, **params) if inspect.isclass(target) else functools.partial(target, **params)

    def checked(logits: Tensor, truth: Tensor) -> Tensor:
        try:
            found = made(logits, truth)
        except TypeError as error:
            raise ConfigError(f"loss '{name}'", why=f"does not take logits and targets: {error}") from error
        if not isinstance(found, Tensor) or found.dim():
            raise ConfigError(f"loss '{name}'", why="gives no scalar, so it is no supervised loss")
        return found

    return checked


def balancing(rt: Runtime, cfg: GraftConfig) -> Balance | None:
    """Division of each part of the loss by its running mean over all ranks; None if it is not asked for.

    Its state is registered in the checkpoint.
    """
    if not cfg.loss.balance:
        return None
    balancer = losses.LossBalancer(cfg.loss.balance_momentum, cfg.loss.balance_warmup)
    rt.checkpoint.register(loss_balancer=balancer)

    def balance(parts: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        agreed = rt.reduce(torch.stack([value.float() for value in values.values()]))
        return balancer(parts, dict(zip(values, agreed.tolist(), strict=True)))

    return balance
