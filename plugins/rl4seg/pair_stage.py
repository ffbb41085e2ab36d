"""Stage `pairs`: what the reward net of an iteration learns from, made with the actors of that time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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
from medrl.core.rng import derive_seed
from medrl.core.validity import is_valid as passes

from . import parts
from .config import Rl4segConfig
from .domains import Domains
from .stages import batch_of, steps_of

if TYPE_CHECKING:
    from medrl.core.jobs import TrainJob

_log = logging.getLogger("medrl.rl4seg")


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
    cfg: Rl4segConfig = job.config
    made = _synthetic if cfg.pairs.kind == "synthetic" else _prediction
    pairs = made(job, data, folder, device, beat)
    if len(pairs) == 0:
        raise DataError(
            "pairs",
            why="no prediction on a target image was plausible, and no correction valid",
            do="start from a better actor (--start style), or --pairs synthetic",
        )
    _log.info("%d pairs: %s", len(pairs), ", ".join(f"{n} {kind}" for kind, n in pairs.counts().items()))
    return pairs


def _synthetic(job: TrainJob, data: Domains, folder: Path, device: torch.device, beat: Beat) -> PairSet:
    """Styled source images with masks of many kinds; the labels judge (findings 4)."""
    cfg: Rl4segConfig = job.config
    images = data.source.train
    if images.labels is None:
        raise DataError("pairs", why="the source images have no labels")
    actors: dict[str, Callable[[Tensor], Any]] = {}
    for name in ("source", "style"):
        actors[name] = asked(_actor(job, data, name, device), beat)
    if cfg.iteration > 1:
        actors["actor"] = asked(_actor(job, data, "actor", device), beat)
    recipe = from_params(SyntheticRecipe, cfg.pairs.params, "pairs.params")
    recipe = replace(recipe, style=parts.style_shift(cfg, "pairs").ranges)
    if cfg.style.spatial:
        recipe = replace(recipe, spatial=AFFINE.scaled(cfg.style.spatial))
    count = cfg.pairs.count
    if cfg.train.max_steps:  # a trial makes no more pairs than its reward net can see
        count = min(count, max(16, steps_of(cfg.reward, cfg, count) * batch_of(cfg.reward, cfg)))
    with _writer(cfg, data, folder, images.subjects) as writer:
        synthetic_pairs(
            writer,
            count=count,
            images=images.images,
            labels=torch.as_tensor(images.labels),
            ids=images.ids,
            subjects=images.subjects,
            actors=actors,
            targets=data.target_images(cfg).images,
            seed=derive_seed(cfg.train.seed, "rl4seg", "pairs"),
            iteration=cfg.iteration,
            recipe=recipe,
            device=device,
        )
    return PairSet(folder)


def _prediction(job: TrainJob, data: Domains, folder: Path, device: torch.device, beat: Beat) -> PairSet:
    """Predictions on target images that no iteration has seen, judged by themselves or the corrector."""
    cfg: Rl4segConfig = job.config
    images = data.new_images(cfg)
    network = _actor(job, data, "actor", device)
    corrector = parts.ready_corrector(cfg, job.manager, data).to(device)
    rules = parts.rules_of(cfg, data.label_names)
    recipe = from_params(
        PredictionRecipe, {"minimum_dice": cfg.pairs.minimum_dice, **cfg.pairs.params}, "pairs.params"
    )

    def valid(masks: Tensor) -> list[bool]:
        beat()
        return [passes(mask, rules) for mask in masks]

    with _writer(cfg, data, folder, data.target.train.subjects) as writer:
        report = prediction_pairs(
            writer,
            network=network,
            images=images.images,
            ids=images.ids,
            subjects=images.subjects,
            valid=valid,
            corrector=corrector,
            seed=derive_seed(cfg.train.seed, "rl4seg", "pairs"),
            iteration=cfg.iteration,
            recipe=recipe,
            device=device,
        )
        pseudo_labels.write(folder, report.pseudo_labels)
    counts = report.counts()
    _log.info("predicted: %s", ", ".join(f"{number} {name}" for name, number in counts.items()))
    share = counts["valid"] / max(1, counts["images"])
    if share < cfg.ppo.alarm_validity:
        _log.warning(
            "only %.0f %% of the predictions on target images are valid: few positive pairs; start from a "
            "better actor (--start style) or take --pairs synthetic",
            100.0 * share,
        )
    return PairSet(folder)


def _actor(job: TrainJob, data: Domains, name: str, device: torch.device) -> nn.Module:
    cfg: Rl4segConfig = job.config
    network = parts.actor_network(cfg, job.manager, channels=data.channels, classes=data.classes)
    parts.load_part(getattr(cfg.inputs, name), "actor", network, f"inputs.{name}")
    return network.to(device).eval()


def _writer(cfg: Rl4segConfig, data: Domains, folder: Path, subjects: Sequence[str]) -> PairWriter:
    return pair_writer(
        folder,
        cfg.pairs,
        cfg.train,
        classes=data.classes,
        subjects=subjects,
        split_seed=cfg.data.split_seed,
        iteration=cfg.iteration,
    )
