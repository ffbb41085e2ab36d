"""Training of the corrector on source masks: what anatomy looks like, without any image."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import torch

from medrl.core.errors import ConfigError, DataError
from medrl.core.learned_reward import CorrectorModule, LearnedCorrector, corrupt_masks
from medrl.core.learned_reward.correctors import LEARNED, dice_per_image
from medrl.core.rng import derive_seed
from medrl.core.validity import Rules
from medrl.core.validity import is_valid as passes

from . import parts, schedules
from .config import Rl4segConfig
from .domains import Domains, draw
from .stages import batch_of, interval_of, rate_of, steps_of

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

_log = logging.getLogger("medrl.rl4seg")
_HELD = 64
"""Validation masks that are corrupted and corrected."""


def fit(rt: Runtime, cfg: Rl4segConfig, data: Domains) -> None:
    """Train a denoiser or a variational autoencoder on source masks (specification §6; findings 3).

    The denoiser learns to restore masks that were warped, cut, eroded, relabelled; the autoencoder to
    reconstruct true ones. Corruption and jitter depend on seed, case and step alone.

    Raises:
        ConfigError: The config's corrector is none that learns.
    """
    if cfg.corrector.kind not in LEARNED:
        raise ConfigError(
            f"corrector.kind {cfg.corrector.kind}",
            why="this corrector is not trained",
            do=f"--set corrector.kind={LEARNED[0]}",
        )
    made = parts.corrector(cfg, rt.job.manager, classes=data.classes, shape=data.shape)
    learner = cast("LearnedCorrector", made)
    rt.prepare(made)
    stage = cfg.corrector
    top = rate_of(stage, cfg)
    optimizer = torch.optim.Adam(made.parameters(), lr=top, weight_decay=stage.weight_decay)
    rt.checkpoint.register(corrector=made, optimizer=optimizer)
    rt.checkpoint.describe(**data.facts())

    images = data.source.train
    seed = derive_seed(cfg.train.seed, "rl4seg", "corruption")
    rules = parts.rules_of(cfg, data.label_names)
    size = batch_of(stage, cfg)
    steps = steps_of(stage, cfg, len(images.ids), rt.world_size)
    every = interval_of(stage, cfg, steps)
    for step in rt.steps(rt.checkpoint.resume(), steps):
        rate = schedules.set_rate(optimizer, top * schedules.factor(stage.schedule, step, steps))
        batch = draw(rt, images, cfg, stage="corrector", step=step, size=size)
        made.train()
        with rt.autocast():
            losses = learner.loss(batch.truth(), seed=seed, keys=[(name, step) for name in batch.ids])
        rt.backward(losses["loss"], cases=batch.ids)
        done = rt.step(optimizer, clip_norm=stage.clip_norm)
        rt.log(step, **parts.numbers(losses), lr=rate, grad_norm=done.grad_norm)

        if step % every == 0 or step == rt.total_steps:
            found = validate(rt, made, data, rules)
            rt.log(step, **found)
            rt.best(step, found["val_dice"], name="val_dice")
            if step == rt.total_steps and found["val_dice"] < found["corrupted_dice"] and rt.is_main:
                _log.warning(
                    "the corrector makes corrupted masks worse (Dice %.3f, before it %.3f): train it longer "
                    "(corrector.steps), or its reward will mislead",
                    found["val_dice"],
                    found["corrupted_dice"],
                )


@torch.no_grad()
def validate(rt: Runtime, made: CorrectorModule, data: Domains, rules: Rules) -> dict[str, float]:
    """Dice of corrected with true validation masks, and the share of valid ones, before and after.

    Every rank looks at the same masks, which are corrupted in the same way each time.
    """
    images = data.source.val or data.source.train
    if images.labels is None:
        raise DataError("corrector", why="the source images have no labels")
    truth = torch.as_tensor(images.labels[:_HELD]).long().to(rt.device)
    broken = corrupt_masks(truth, data.classes, seed=0, keys=list(images.ids[:_HELD]))
    fixed = made.correct(broken)
    made.train()
    return {
        "val_dice": float(dice_per_image(fixed, truth, data.classes).mean()),
        "corrupted_dice": float(dice_per_image(broken, truth, data.classes).mean()),
        "val_validity": sum(passes(mask, rules) for mask in fixed.cpu()) / len(fixed),
        "corrupted_validity": sum(passes(mask, rules) for mask in broken.cpu()) / len(broken),
    }
