"""Supervised training on labelled source images, as they are (`source`) or with other styles (`style`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.core.learned_reward.encoding import cross_entropy as exact_cross_entropy

from . import parts, schedules, watching
from .agent import PixelActor
from .config import Rl4segConfig, StyleConfig, SupervisedConfig
from .domains import Domains, draw
from .stages import batch_of, interval_of, rate_of, steps_of

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


def fit(rt: Runtime, cfg: Rl4segConfig, data: Domains) -> None:
    """Train the actor's network by cross-entropy on source labels (specification §10; findings 1 and 2).

    Stage `style` goes on from the source actor and changes the style of every image: labels stay right. It
    looks at target images, never at their labels.

    Deviation: the original applies the cross-entropy to probabilities, whose least value for three classes is
    0.55; here it gets logits.
    """
    styled = cfg.stage == "style"
    stage: SupervisedConfig = cfg.style if styled else cfg.source
    network = parts.actor_network(cfg, rt.job.manager, channels=data.channels, classes=data.classes)
    if styled:
        parts.load_part(cfg.inputs.source, "actor", network, "inputs.source")
    elif rt.job.init_from is not None:
        parts.load_part(rt.job.init_from, "actor", network, "--init-from")
    rt.prepare(network)
    actor = parts.as_actor(cfg, network, data.classes, bn_mode="batch")
    top = rate_of(stage, cfg)
    optimizer = torch.optim.Adam(network.parameters(), lr=top, weight_decay=stage.weight_decay)
    rt.checkpoint.register(actor=network, optimizer=optimizer)
    rt.checkpoint.describe(**data.facts())

    images = data.source.train
    shift = parts.style_shift(cfg, "style") if isinstance(stage, StyleConfig) else None
    rules = parts.rules_of(cfg, data.label_names)
    size = batch_of(stage, cfg)
    steps = steps_of(stage, cfg, len(images.ids), rt.world_size)
    every = interval_of(stage, cfg, steps)
    for step in rt.steps(rt.checkpoint.resume(), steps):
        rate = schedules.set_rate(optimizer, top * schedules.factor(stage.schedule, step, steps))
        batch = draw(rt, images, cfg, stage=cfg.stage, step=step, size=size)
        seen = batch.images
        if shift is not None:
            seen = shift(seen, [(name, step) for name in batch.ids], data.target.train.images)
        actor.train()
        with rt.autocast():
            loss = cross_entropy(actor, seen, batch.truth(), smoothing=stage.label_smoothing)
        rt.backward(loss, cases=batch.ids)
        done = rt.step(optimizer, clip_norm=stage.clip_norm)
        rt.log(step, loss=loss.detach(), lr=rate, grad_norm=done.grad_norm)

        if step % every == 0 or step == rt.total_steps:
            found = watching.supervised(rt, actor, data, rules)
            rt.log(step, **found)
            if "val_dice" in found:
                rt.best(step, found["val_dice"], name="val_dice")


def cross_entropy(actor: PixelActor, images: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of a policy ``(N, K, *S)`` to labels ``(N, *S)``, in float32.

    Raises:
        ConfigError: Label smoothing is asked for a binary policy.
    """
    logits = actor.logits(images).float()
    if logits.shape[1] == 1:
        if smoothing:
            raise ConfigError("label_smoothing", why="a binary actor takes none", do="set it to 0")
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    # Not torch's, which has no deterministic form on GPUs.
    loss = exact_cross_entropy(logits, labels)
    if smoothing:
        loss = (1.0 - smoothing) * loss - smoothing * logits.log_softmax(dim=1).mean()
    return loss
