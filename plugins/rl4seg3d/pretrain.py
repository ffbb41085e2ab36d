"""Supervised training on source windows, as they are (`source`) or with other styles (`style`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medrl.core.adaptation import watching
from medrl.core.adaptation.fitting import Lesson, adam, descend
from medrl.core.adaptation.settings import StyleConfig, SupervisedConfig
from medrl.core.adaptation.supervised import cross_entropy
from medrl.core.learned_reward import AFFINE, jitter_images
from medrl.core.rng import derive_seed

from . import parts
from .config import Rl4seg3dConfig
from .domains import Domains, draw
from .stages import course_of

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

_BORROWED = 256
"""Target windows whose style may be borrowed."""


def fit(rt: Runtime, cfg: Rl4seg3dConfig, data: Domains) -> None:
    """Train the actor's network by cross-entropy on the labels of source windows (specification §8).

    Stage `style` goes on from the source actor and changes the style of every window, all frames alike:
    labels stay right. It looks at target windows, never at their labels.

    Deviation: the original applies the cross-entropy to probabilities; here it gets logits.
    """
    styled = cfg.stage == "style"
    stage: SupervisedConfig = cfg.style if styled else cfg.source
    network = parts.actor_network(cfg, rt.job.manager, channels=data.channels, classes=data.classes)
    if styled:
        parts.load_part(cfg.inputs.source, "actor", network, "inputs.source")
    elif rt.job.init_from is not None:
        parts.load_part(rt.job.init_from, "actor", network, "--init-from")
    rt.prepare(network)
    actor = parts.as_actor(network, data.classes)
    sequences = data.source.train
    course = course_of(stage, cfg, len(sequences), rt.world_size)
    optimizer = adam(network, course)
    rt.checkpoint.register(actor=network, optimizer=optimizer)
    rt.checkpoint.describe(**data.facts())
    shift = parts.style_shift(cfg, "style") if isinstance(stage, StyleConfig) else None
    borrowed = data.target.train.some_windows(_BORROWED).images if shift is not None else None
    valid, held = parts.validity(cfg, data.label_names), data.validated()
    moving = derive_seed(cfg.train.seed, "spatial", cfg.stage)
    watched = data.watched() if data.unlabelled is not None else None

    def lesson(step: int) -> Lesson:
        batch = draw(rt, sequences, cfg, stage=cfg.stage, step=step, size=course.batch)
        seen, truth = batch.images, batch.truth()
        keys = [(name, step) for name in batch.ids]
        if stage.spatial:
            ranges = AFFINE.scaled(stage.spatial)
            seen, truth = jitter_images(seen, truth, seed=moving, keys=keys, ranges=ranges)
        if shift is not None:
            seen = shift(seen, keys, borrowed)
        actor.train()
        with rt.autocast():
            loss = cross_entropy(actor, seen, truth, smoothing=stage.label_smoothing)
        return Lesson(loss, batch.ids)

    descend(
        rt,
        course,
        optimizer,
        lesson,
        lambda: watching.supervised(rt, actor, held, watched, valid),
        best="val_dice",
    )
