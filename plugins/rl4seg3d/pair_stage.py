"""Stage `pairs`: what the reward nets of an iteration learn from, made with the actors of that time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medrl.core.adaptation import pseudo_labels
from medrl.core.adaptation.loop import Beat
from medrl.core.adaptation.pairing import asked, pair_writer
from medrl.core.errors import DataError
from medrl.core.learned_reward import (
    AFFINE,
    PairSet,
    PairWriter,
    PredictionRecipe,
    SyntheticRecipe,
    from_params,
    prediction_pairs,
    synthetic_pairs,
)
from medrl.core.rng import derive_seed, numpy_generator

from . import parts
from .config import Rl4seg3dConfig
from .data import FRAMES, SequenceSet
from .domains import METHOD, Domains, ImageSet
from .perturb import calibrated_recipe
from .stages import course_of

if TYPE_CHECKING:
    from medrl.core.jobs import TrainJob

_CALIBRATED = 8
"""Windows on which the strengths of noise are set."""
_BORROWED = 256
"""Target windows whose style may be borrowed."""
PREDICTION = PredictionRecipe(
    weight_noise=(0.05, 0.12, 0.22), noise_scale="relative", contrast=(0.4, 0.05), image_noise=(0.3, 0.6)
)
"""Contrast and noise of the original; noise on weights relative to them, as its later versions have it."""
_log = logging.getLogger("medrl.rl4seg3d")


def write(job: TrainJob, data: Domains, folder: Path, device: torch.device, beat: Beat) -> PairSet:
    """Write the pairs of an iteration to a folder; a rerun gives the same bytes.

    Args:
        job: The job of this stage, whose `inputs` name the actors.
        data: Both domains.
        folder: Where they go.
        device: Where networks compute.
        beat: Called every now and then; it raises to stop.

    Raises:
        DataError: No pair could be made.
    """
    cfg: Rl4seg3dConfig = job.config
    made = _synthetic if cfg.pairs.kind == "synthetic" else _prediction
    pairs = made(job, data, folder, device, beat)
    if len(pairs) == 0:
        raise DataError(
            "pairs",
            why="no prediction on a target window was plausible, and no correction valid",
            do="start from a better actor (--start style), or --pairs synthetic",
        )
    _log.info("%d pairs: %s", len(pairs), ", ".join(f"{n} {kind}" for kind, n in pairs.counts().items()))
    return pairs


def _synthetic(job: TrainJob, data: Domains, folder: Path, device: torch.device, beat: Beat) -> PairSet:
    """Styled source windows with masks of many kinds; the labels judge (findings 4)."""
    cfg: Rl4seg3dConfig = job.config
    windows = random_windows(data.source.train, cfg, "source")
    if windows.labels is None:
        raise DataError("pairs", why="the source sequences have no labels")
    names = ["source", "style", *(["actor"] if cfg.iteration > 1 else [])]
    actors = {name: asked(_actor(job, data, name, device), beat) for name in names}
    recipe = from_params(SyntheticRecipe, cfg.pairs.params, "pairs.params")
    recipe = replace(recipe, style=parts.style_shift(cfg, "pairs").ranges)
    if cfg.style.spatial:
        recipe = replace(recipe, spatial=AFFINE.scaled(cfg.style.spatial))
    count = cfg.pairs.count
    if cfg.train.max_steps:  # a trial makes no more pairs than its reward nets can see
        course = course_of(cfg.reward, cfg, count)
        count = min(count, max(16, course.steps * course.batch))
    with _writer(cfg, data, folder, windows.subjects) as writer:
        synthetic_pairs(
            writer,
            count=count,
            images=windows.images,
            labels=windows.labels,
            ids=windows.ids,
            subjects=windows.subjects,
            actors=actors,
            targets=data.target.train.some_windows(_BORROWED).images,
            seed=derive_seed(cfg.train.seed, METHOD, "pairs"),
            iteration=cfg.iteration,
            recipe=recipe,
            batch=16,
            device=device,
        )
    return PairSet(folder)


def _prediction(job: TrainJob, data: Domains, folder: Path, device: torch.device, beat: Beat) -> PairSet:
    """Predictions on target windows that no iteration has seen, judged by themselves or the corrector."""
    cfg: Rl4seg3dConfig = job.config
    windows = random_windows(data.new_sequences(cfg), cfg, "target", each=1)
    network = _actor(job, data, "actor", device)
    corrector = parts.ready_corrector(cfg, job.manager, data).to(device)
    plausible = parts.validity(cfg, data.label_names)
    recipe = from_params(
        PredictionRecipe,
        {**_plain(PREDICTION), "minimum_dice": cfg.pairs.minimum_dice, **cfg.pairs.params},
        "pairs.params",
    )
    if cfg.pairs.drops:
        recipe, found = calibrated_recipe(
            network,
            windows.images[:_CALIBRATED].to(device),
            classes=data.classes,
            drops=cfg.pairs.drops,
            seed=derive_seed(cfg.train.seed, METHOD, "calibration", cfg.iteration),
            base=recipe,
        )
        for item in found:
            _log.info("%s %.4f costs %.3f of the Dice", item.kind, item.strength, item.drop)

    def valid(masks: Tensor) -> list[bool]:
        beat()
        return [plausible(mask) for mask in masks]

    with _writer(cfg, data, folder, data.target.train.subjects) as writer:
        report = prediction_pairs(
            writer,
            network=network,
            images=windows.images,
            ids=windows.ids,
            subjects=windows.subjects,
            valid=valid,
            corrector=corrector,
            seed=derive_seed(cfg.train.seed, METHOD, "pairs"),
            iteration=cfg.iteration,
            recipe=recipe,
            batch=8,
            device=device,
        )
        pseudo_labels.write(folder, report.pseudo_labels)
    counts = report.counts()
    _log.info("predicted: %s", ", ".join(f"{number} {name}" for name, number in counts.items()))
    return PairSet(folder)


def random_windows(sequences: SequenceSet, cfg: Rl4seg3dConfig, name: str, *, each: int = 0) -> ImageSet:
    """Cut windows that begin anywhere: `each` of a sequence, by default as many as fit into it."""
    windows = []
    for number, sequence in enumerate(sequences.ids):
        frames = sequences.frames(number)
        room = max(1, frames - FRAMES + 1)
        generator = numpy_generator(cfg.train.seed, METHOD, "pair windows", name, cfg.iteration, sequence)
        count = min(each or max(1, frames // FRAMES), room)
        for first in sorted(generator.choice(room, count, replace=False).tolist()):
            windows.append((number, tuple(min(first + k, frames - 1) for k in range(FRAMES))))
    return sequences.windows(windows)


def _plain(recipe: PredictionRecipe) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(recipe).items()
        if name in ("weight_noise", "noise_scale", "contrast", "image_noise")
    }


def _actor(job: TrainJob, data: Domains, name: str, device: torch.device) -> nn.Module:
    cfg: Rl4seg3dConfig = job.config
    network = parts.actor_network(cfg, job.manager, channels=data.channels, classes=data.classes)
    parts.load_part(getattr(cfg.inputs, name), "actor", network, f"inputs.{name}")
    return network.to(device).eval()


def _writer(cfg: Rl4seg3dConfig, data: Domains, folder: Path, subjects: Sequence[str]) -> PairWriter:
    return pair_writer(
        folder,
        cfg.pairs,
        cfg.train,
        classes=data.classes,
        subjects=subjects,
        split_seed=cfg.data.split_seed,
        iteration=cfg.iteration,
    )
