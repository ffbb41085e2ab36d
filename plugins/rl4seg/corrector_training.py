"""Training of the corrector on source masks: what anatomy looks like, without any image."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from medrl.core.adaptation import correcting
from medrl.core.adaptation.fitting import Lesson, adam, descend
from medrl.core.errors import ConfigError
from medrl.core.learned_reward import LearnedCorrector
from medrl.core.learned_reward.correctors import LEARNED
from medrl.core.rng import derive_seed
from medrl.core.validity import is_valid as passes

from . import parts
from .config import Rl4segConfig
from .domains import Domains, draw
from .stages import course_of

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


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
    images, held = data.source.train, data.source.val or data.source.train
    course = course_of(cfg.corrector, cfg, len(images.ids), rt.world_size)
    optimizer = adam(made, course)
    rt.checkpoint.register(corrector=made, optimizer=optimizer)
    rt.checkpoint.describe(**data.facts())
    seed = derive_seed(cfg.train.seed, "rl4seg", "corruption")
    rules = parts.rules_of(cfg, data.label_names)
    found: dict[str, float] = {}

    def lesson(step: int) -> Lesson:
        batch = draw(rt, images, cfg, stage="corrector", step=step, size=course.batch)
        made.train()
        with rt.autocast():
            losses = learner.loss(batch.truth(), seed=seed, keys=[(name, step) for name in batch.ids])
        return Lesson(losses["loss"], batch.ids, parts.numbers(losses))

    def validate() -> dict[str, float]:
        found.update(correcting.validate(rt, made, held, lambda mask: passes(mask, rules), data.classes))
        return found

    descend(rt, course, optimizer, lesson, validate, best="val_dice")
    if found and rt.is_main:
        correcting.warn_if_harmful(found)
