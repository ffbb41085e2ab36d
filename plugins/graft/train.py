"""The training loop of graft: one student, its projections, and the agent that weighs the teachers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medrl.core.checkpoint import load_checkpoint, load_into
from medrl.core.errors import CheckpointError, ConfigError

from .batches import Batches
from .config import GraftConfig
from .data import GraftData
from .init_from import apply_weights, init_student
from .journal import Journal
from .lengths import in_steps, steps_per_epoch
from .losses import Projections
from .models import PlainConvUNet, as_output
from .objective import Objective, balancing, named_loss
from .planning import build_network
from .priors import measure
from .steering import Scene, build_policy, described, in_force, steer, weighed_kinds
from .validation import EarlyStopping, Validator, write_summary

if TYPE_CHECKING:
    from pathlib import Path

    from medrl.core.runtime import Runtime

_log = logging.getLogger("medrl.graft")


def fit(rt: Runtime, cfg: GraftConfig, data: GraftData) -> None:
    """Distil the teachers of `data` into one student (specification §4 to §6).

    Without teachers the same loop trains on labels alone, which is how teachers and baselines are made.

    One step: the student sees a batch; the weights of the teachers come from their quality or from the agent;
    the student learns from labels, teachers' features and teachers' logits; if there is an agent, the change
    of the reward that this update caused is what its action earned, and at the end of an episode it learns.
    """
    cfg = in_steps(cfg, steps_per_epoch(cfg, len(data.labelled), len(data.unlabelled), rt.world_size))
    student = start_student(rt, cfg, data)
    projections = build_projections(cfg, data, student)
    taps = data.taps if projections is not None else ()
    supervised, balance = named_loss(cfg, rt.job.manager), balancing(rt, cfg)
    objective = Objective(cfg, data.plan.target, taps, data.families, supervised, balance)
    kinds = weighed_kinds(cfg, data)
    priors = measure(cfg, data, kinds)
    policy = build_policy(cfg, data, kinds)
    rt.prepare(*(module for module in (student, projections, priors, policy) if module is not None))
    layout = torch.channels_last_3d if cfg.train.channels_last else torch.contiguous_format
    student.to(memory_format=layout)  # type: ignore[call-overload]

    optimizer = build_optimizer(cfg, student, projections)
    rt.checkpoint.register(student=student, priors=priors, optimizer=optimizer)
    if projections is not None:
        rt.checkpoint.register(projections=projections)
    if data.live is not None:
        rt.checkpoint.register(live_teachers=data.live)
    rt.checkpoint.describe(**data.description())
    batches = Batches(rt, cfg, data)
    scene = Scene(rt, cfg, data, student, projections, objective, priors, optimizer, batches.steps_per_epoch)
    steering = steer(scene, policy)
    validate, stopping = Validator(rt, cfg, data, objective), EarlyStopping(cfg)
    rt.checkpoint.register(early_stopping=stopping)
    journal = Journal(rt, cfg, data, batches.steps_per_epoch)
    every = cfg.train.validate_every or batches.steps_per_epoch

    for step in rt.steps(rt.checkpoint.resume(), cfg.train.max_steps):
        if stopping.over:
            break
        rate = set_rate(optimizer, cfg, step)
        facts: dict[str, Any] = {}
        for _ in rt.micro_batches():
            batch = batches.draw(steering.held_out(step))
            with rt.autocast():
                output = as_output(student(batch.image.contiguous(memory_format=layout)))
                weights = in_force(steering.weights(step, batch, output), batch, scene)
                loss, facts = objective(output, batch, projections, weights)
            rt.backward(loss, cases=batch.case_ids)
            facts |= described(weights, data.teacher_names)
        steering.before(step, batch)
        done = rt.step(optimizer, clip_norm=cfg.train.clip_norm)
        facts |= steering.after(step, batch, applied=done.applied)
        rt.log(step, **facts, lr=rate, grad_norm=done.grad_norm)

        if step % every == 0 or step == rt.total_steps:
            result = validate(student)
            found = result.metrics()
            learned = steering.validated(step, found["val_dice"])
            rt.log(step, epoch=step / batches.steps_per_epoch, **found, **learned)
            if rt.best(step, found["val_dice"]):
                write_summary(rt, step, result)
            journal.write(step, student)
            stopping.update(result.focus_dice())


def start_student(rt: Runtime, cfg: GraftConfig, data: GraftData) -> nn.Module:
    """Build the student and, if asked for, start it from a checkpoint of medrl or of nnU-Net."""
    student = build_network(cfg, rt.job.manager, data.in_channels, data.plan.target.channels)
    ranks = {parameter.dim() for parameter in student.parameters()}
    if 4 in ranks and 5 not in ranks:
        raise ConfigError(
            f"model.name {cfg.model.name}",
            why="it takes flat images, and graft trains on volumes",
            do="choose a network for volumes, for example --set model.name=graft.tiny",
        )
    path = rt.job.init_from
    if path is not None:
        load_start(
            student, path, cfg, trust=rt.job.trust_checkpoint, regions=data.plan.target_kind == "binary"
        )
    return student


def load_start(student: nn.Module, path: Path, cfg: GraftConfig, *, trust: bool, regions: bool) -> None:
    """Copy weights into a student that begins.

    Raises:
        CheckpointError: The weights do not fit.
    """
    scope = cfg.optim.init_scope
    try:
        weights: Mapping[str, Tensor] = load_checkpoint(path, method="graft").states["student"]
    except CheckpointError as error:
        if "is no checkpoint of medrl" not in error.what and "footer" not in error.why:
            raise
        report = init_student(student, path, scope=scope, trust=trust, regions=regions)
    else:
        if not isinstance(student, PlainConvUNet):
            load_into(student, dict(weights))
            return
        report = apply_weights(student, weights, scope=scope, regions=regions, what=str(path))
    _log.info("start from %s: %s", path, report.summary)


def build_projections(cfg: GraftConfig, data: GraftData, student: nn.Module) -> Projections | None:
    """The maps to the teachers' features, or None without feature distillation.

    Raises:
        ConfigError: The student has no such taps.
    """
    if not data.teachers or not data.taps:
        return None
    known: Mapping[str, int] = getattr(student, "feature_channels", {})
    if not known:
        raise ConfigError(
            f"model {cfg.model.name}",
            why="it offers no features to distil",
            do="choose a model of graft, or --feat-weight 0 --kd-weight 1",
        )
    channels = [teacher.channels for teacher in data.teachers]
    return Projections(known, channels, taps=data.taps, kind=cfg.distill.projection)


def build_optimizer(
    cfg: GraftConfig, student: nn.Module, projections: Projections | None
) -> torch.optim.Optimizer:
    """One optimiser over student and projections."""
    modules = [module for module in (student, projections) if module is not None]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if cfg.optim.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=cfg.train.lr,
            momentum=cfg.optim.momentum,
            nesterov=cfg.optim.momentum > 0,
            weight_decay=cfg.train.weight_decay,
        )
    return torch.optim.AdamW(parameters, lr=cfg.train.lr, weight_decay=cfg.train.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, cfg: GraftConfig, step: int) -> float:
    """Set and return the learning rate of a step (from 1)."""
    rate = cfg.train.lr * schedule(cfg, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def schedule(cfg: GraftConfig, step: int) -> float:
    """Factor of the learning rate at a step (from 1): a linear ramp on cosine, steps, or constant.

    Source: specification §6; the original counts epochs.
    """
    total, done = cfg.train.max_steps, step - 1
    factor = 1.0
    if cfg.optim.schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * done / total))
    elif cfg.optim.schedule == "multistep":
        factor = 0.1 ** sum(done >= part * total for part in cfg.optim.milestones)
    if done < cfg.optim.ramp:
        factor *= 0.1 + 0.9 * done / cfg.optim.ramp
    return factor
