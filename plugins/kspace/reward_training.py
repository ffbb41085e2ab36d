"""Training of the reward model: segmentation of slices from which lines of k-space are missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import DataError

from . import parts, schedules
from .cases import Cases
from .config import KspaceConfig
from .imaging import Imaging
from .models import deep_supervision_weights
from .rewards import label_quality
from .supervised import (
    RunningMean,
    batch_of,
    draw_batch,
    held_batches,
    interval_of,
    per_epoch,
    rate_of,
    steps_of,
)

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

    from .domain import Data

EPS = 1e-6


def fit(rt: Runtime, cfg: KspaceConfig, data: Data) -> None:
    """Train the segmentation network under random masks (specification §4).

    The loss is cross-entropy and 1 - mean soft Dice; networks that predict the fully sampled image too are
    also taught that. Weights are kept as a running mean; the best are those with the highest Dice on
    validation slices whose masks never change.

    Raises:
        DataError: The dataset has no labels.
    """
    if data.classes < 2:
        raise DataError("reward model", why="the dataset has no labels", do="--data with labels")
    stage = cfg.seg
    network = parts.segmenter(cfg, rt.job.manager, classes=data.classes)
    if rt.job.init_from is not None:
        parts.load_part(rt.job.init_from, "segmenter", network, "--init-from")
    rt.prepare(network)
    if data.cases("train", cfg, rt.device, supervised=True).geometry != "volume3d":
        # Faster for two-dimensional convolutions on many CPUs and GPUs.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=stage.lr, weight_decay=stage.weight_decay)
    mean = RunningMean(network, stage.ema) if stage.ema else None
    kept = network if mean is None else mean.network
    if mean is None:
        rt.checkpoint.register(segmenter=network)
    else:
        rt.prepare(mean)
        rt.checkpoint.register(network=network, segmenter=mean.network, mean=mean)
    rt.checkpoint.register(optimizer=optimizer)
    rt.checkpoint.describe(**data.facts(cfg))

    learned = data.cases("train", cfg, rt.device, supervised=True)
    held = data.cases("val", cfg, rt.device, supervised=True)
    seen = _imaging(rt, cfg)
    steps = steps_of(stage, cfg, len(learned), rt.world_size)
    epoch = per_epoch(stage, cfg, len(learned), rt.world_size)
    every = interval_of(cfg, steps)
    for step in rt.steps(rt.checkpoint.resume(), steps):
        rate = schedules.set_rate(optimizer, rate_of(stage, step, steps, epoch))
        batch = draw_batch(rt, learned, cfg, stage, name="reward", step=step, augment=stage.augment)
        images = batch.images(seen).abs()
        network.train()
        with rt.autocast():
            found, predicted = run(network, images)
        loss = segmentation_loss(cfg, found, labels_of(batch.cases))
        if predicted is not None and stage.image:
            loss = loss + stage.image * (predicted.float() - batch.cases.target.to(rt.device)).abs().mean()
        rt.backward(loss, cases=batch.ids)
        done = rt.step(optimizer, clip_norm=stage.clip_norm)
        if mean is not None:
            mean.update(network)
        rt.log(step, loss=loss.detach(), lr=rate, grad_norm=done.grad_norm)

        if step % every == 0 or step == rt.total_steps:
            scores = validate(rt, cfg, kept, held, seen)
            rt.log(step, **scores)
            rt.best(step, scores["val_dice"], name="val_dice")


def run(network: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Logits of every output, the full one first, and the predicted image of networks that give one.

    Args:
        network: Takes ``(n, 1, *S)``.
        images: ``(B, [D], H, W)`` magnitudes; slices of a stack are taken one by one by two-dimensional
            networks.

    Returns:
        Logits ``(B, K, *S)``; image ``(B, *S)`` or None.
    """
    given = images.unsqueeze(1).float()
    both = getattr(network, "both", None)
    if both is not None:
        logits, predicted, _ = both(given)
        return [logits], None if predicted is None else predicted[:, 0]
    result = network(given)
    found: Sequence[Tensor] = [result] if isinstance(result, Tensor) else list(result)
    return list(found), None


def segmentation_loss(cfg: KspaceConfig, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy and 1 - mean soft Dice, in float32; further outputs count less and less.

    Args:
        cfg: The weight of the Dice, and whether it counts the background.
        outputs: Logits ``(B, K, *S)``.
        labels: ``(B, *S)`` int64.
    """
    total = torch.zeros((), device=labels.device)
    for weight, logits in zip(deep_supervision_weights(len(outputs)), outputs, strict=True):
        full = logits.float()
        loss = F.cross_entropy(full, labels)
        if cfg.seg.dice:
            loss = loss + cfg.seg.dice * (1.0 - soft_dice(full, labels, background=cfg.seg.background))
        total = total + weight * loss
    return total


def soft_dice(logits: Tensor, labels: Tensor, *, background: bool = False) -> Tensor:
    """Mean over classes of the soft Dice of a whole batch, ε = 1e-6; a class that is nowhere gives 1 at best.

    Source: milesial/Pytorch-UNet, ``multiclass_dice_coeff`` of a batch.
    """
    classes = int(logits.shape[1])
    given = torch.softmax(logits, dim=1)
    truth = F.one_hot(labels, classes).movedim(-1, 1).to(given.dtype)
    axes = [0, *range(2, given.ndim)]
    shared, size = (given * truth).sum(dim=axes), given.sum(dim=axes) + truth.sum(dim=axes)
    first = 0 if background else 1
    return ((2.0 * shared + EPS) / (size + EPS))[first:].mean()


@torch.no_grad()
def validate(
    rt: Runtime, cfg: KspaceConfig, network: nn.Module, held: Cases, seen: Imaging
) -> dict[str, float]:
    """Mean foreground Dice of slices with foreground under fixed masks, in all and by acceleration."""
    network.eval()
    own: dict[str, float] = {}
    for batch in held_batches(held, cfg.seg, batch_of(cfg.seg, cfg), rt):
        images = batch.images(seen).abs()
        with rt.autocast():
            logits = run(network, images)[0][0]
        labels = labels_of(batch.cases)
        dice = label_quality(logits, labels, kind="dice").tolist()
        there = (labels > 0).flatten(1).any(dim=1).tolist()
        own |= {case: value for case, value, good in zip(batch.ids, dice, there, strict=True) if good}
    found = rt.gather(own)
    scores = {"val_dice": _mean(list(found.values()))}
    speeds = cfg.seg.accelerations
    for number, speed in enumerate(speeds):
        part = [found[case] for case in held.ids[number :: len(speeds)] if case in found]
        if part:
            scores[f"val_dice_r{speed:g}"] = _mean(part)
    return scores


def labels_of(cases: Cases) -> Tensor:
    """Labels ``(B, *S)`` int64 on the device."""
    if cases.labels is None:
        raise DataError("reward model", why="a case has no label")
    return cases.labels.to(cases.device, torch.int64)


def _imaging(rt: Runtime, cfg: KspaceConfig) -> Imaging:
    """The reconstruction that the network sees: with `unet`, a trained one."""
    recon = None
    if cfg.acquisition.recon == "unet":
        recon = parts.trained_recon(cfg, rt.job.manager).to(rt.device)
    return parts.imaging(cfg, None, recon)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
