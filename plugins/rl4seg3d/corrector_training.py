"""Training of the corrector on masks of source windows: what a beating heart looks like, without an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from medrl.core.adaptation import correcting
from medrl.core.adaptation.fitting import Lesson, adam, descend
from medrl.core.adaptation.parts import numbers
from medrl.core.errors import ConfigError
from medrl.core.learned_reward import LearnedCorrector
from medrl.core.learned_reward.correctors import LEARNED
from medrl.core.rng import derive_seed

from . import parts
from .config import Rl4seg3dConfig
from .domains import METHOD, Domains, draw
from .stages import course_of

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

_HELD = 64


def fit(rt: Runtime, cfg: Rl4seg3dConfig, data: Domains) -> None:
    """Train a denoiser or a variational autoencoder on masks of source windows (findings 3).

    It takes the place of the original's external AR-VAE; four frames together teach it how labels move.

    Raises:
        ConfigError: The config's corrector is none that learns.
    """
    if cfg.corrector.kind not in LEARNED:
        raise ConfigError(
            f"corrector.kind {cfg.corrector.kind}",
            why="this corrector is not trained",
            do=f"--set corrector.kind={LEARNED[0]}",
        )
    made = parts.corrector(cfg, rt.job.manager, data)
    learner = cast("LearnedCorrector", made)
    rt.prepare(made)
    sequences = data.source.train
    course = course_of(cfg.corrector, cfg, len(sequences), rt.world_size)
    optimizer = adam(made, course)
    rt.checkpoint.register(corrector=made, optimizer=optimizer)
    rt.checkpoint.describe(**data.facts())
    seed = derive_seed(cfg.train.seed, METHOD, "corruption")
    valid, held = parts.validity(cfg, data.label_names), data.validated(_HELD)
    windows = held if held is not None else sequences.some_windows(_HELD)
    found: dict[str, float] = {}

    def lesson(step: int) -> Lesson:
        batch = draw(rt, sequences, cfg, stage="corrector", step=step, size=course.batch)
        made.train()
        with rt.autocast():
            losses = learner.loss(batch.truth(), seed=seed, keys=[(name, step) for name in batch.ids])
        return Lesson(losses["loss"], batch.ids, numbers(losses))

    def validate() -> dict[str, float]:
        found.update(correcting.validate(rt, made, windows, valid, data.classes))
        return found

    descend(rt, course, optimizer, lesson, validate, best="val_dice")
    if found and rt.is_main:
        correcting.warn_if_harmful(found)
