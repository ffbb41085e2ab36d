"""Supervised training on labelled source images, as they are (`source`) or with other styles (`style`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medrl.core.adaptation.fitting import Lesson, adam, descend
from medrl.core.adaptation.settings import StyleConfig, SupervisedConfig
from medrl.core.adaptation.supervised import cross_entropy
from medrl.core.learned_reward import AFFINE, jitter_images
from medrl.core.rng import derive_seed

from . import parts, watching
from .config import Rl4segConfig
from .domains import Domains, draw
from .stages import course_of

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
    images = data.source.train
    course = course_of(stage, cfg, len(images.ids), rt.world_size)
    optimizer = adam(network, course)
    rt.checkpoint.register(actor=network, optimizer=optimizer)
    rt.checkpoint.describe(**data.facts())
    shift = parts.style_shift(cfg, "style") if isinstance(stage, StyleConfig) else None
    rules = parts.rules_of(cfg, data.label_names)
    moving = derive_seed(cfg.train.seed, "spatial", cfg.stage)

    def lesson(step: int) -> Lesson:
        batch = draw(rt, images, cfg, stage=cfg.stage, step=step, size=course.batch)
        seen, truth = batch.images, batch.truth()
        keys = [(name, step) for name in batch.ids]
        if stage.spatial:
            ranges = AFFINE.scaled(stage.spatial)
            seen, truth = jitter_images(seen, truth, seed=moving, keys=keys, ranges=ranges)
        if shift is not None:
            seen = shift(seen, keys, data.target.train.images)
        actor.train()
        with rt.autocast():
            loss = cross_entropy(actor, seen, truth, smoothing=stage.label_smoothing)
        return Lesson(loss, batch.ids)

    descend(
        rt, course, optimizer, lesson, lambda: watching.supervised(rt, actor, data, rules), best="val_dice"
    )
