"""Training of the network that improves zero-filled images."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from . import parts, schedules
from .cases import Cases
from .config import KspaceConfig
from .models import ReconUNet
from .quality import ssim
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


def fit(rt: Runtime, cfg: KspaceConfig, data: Data) -> None:
    """Train the reconstruction U-Net on zero-filled slices under random masks (specification §3).

    The loss is that of the network's output, before data consistency; validation is after it.
    """
    stage = cfg.recon
    network = parts.recon_network(cfg, rt.job.manager)
    if rt.job.init_from is not None:
        parts.load_part(rt.job.init_from, "recon", network, "--init-from")
    rt.prepare(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=stage.lr, weight_decay=stage.weight_decay)
    mean = RunningMean(network, stage.ema) if stage.ema else None
    kept = network if mean is None else cast(ReconUNet, mean.network)
    if mean is None:
        rt.checkpoint.register(recon=network)
    else:
        rt.prepare(mean)
        rt.checkpoint.register(network=network, recon=mean.network, mean=mean)
    rt.checkpoint.register(optimizer=optimizer)
    rt.checkpoint.describe(**data.facts(cfg))

    plain = cfg.model_copy(update={"acquisition": cfg.acquisition.model_copy(update={"recon": "zf"})})
    zero_filled = parts.imaging(plain, None)
    learned = data.cases("train", cfg, rt.device, supervised=True)
    held = data.cases("val", cfg, rt.device, supervised=True)
    steps = steps_of(stage, cfg, len(learned), rt.world_size)
    epoch = per_epoch(stage, cfg, len(learned), rt.world_size)
    every = interval_of(cfg, steps)
    for step in rt.steps(rt.checkpoint.resume(), steps):
        rate = schedules.set_rate(optimizer, rate_of(stage, step, steps, epoch))
        batch = draw_batch(rt, learned, cfg, stage, name="recon", step=step, augment=cfg.seg.augment)
        images = batch.images(zero_filled).abs().float()
        network.train()
        with rt.autocast():
            found = network(images.unsqueeze(1))[:, 0].float()
        loss = distance(found, batch.cases.target.to(rt.device), kind=stage.loss)
        rt.backward(loss, cases=batch.ids)
        done = rt.step(optimizer, clip_norm=stage.clip_norm)
        if mean is not None:
            mean.update(network)
        rt.log(step, loss=loss.detach(), lr=rate, grad_norm=done.grad_norm)

        if step % every == 0 or step == rt.total_steps:
            scores = validate(rt, cfg, kept, held)
            rt.log(step, **scores)
            rt.best(step, scores["val_ssim"], name="val_ssim")


def distance(images: Tensor, target: Tensor, *, kind: str) -> Tensor:
    """Mean absolute error, or 1 - SSIM, of magnitudes ``(B, H, W)``."""
    return (images - target).abs().mean() if kind == "l1" else 1.0 - ssim(images, target).mean()


@torch.no_grad()
def validate(rt: Runtime, cfg: KspaceConfig, network: ReconUNet, held: Cases) -> dict[str, float]:
    """Mean SSIM of slices under fixed masks, after data consistency."""
    # A copy, because what reconstructs is frozen.
    seen = parts.imaging(cfg, None, copy.deepcopy(network))
    own: dict[str, float] = {}
    for batch in held_batches(held, cfg.recon, batch_of(cfg.recon, cfg), rt):
        target = batch.cases.target.to(rt.device)
        found = ssim(batch.images(seen).abs(), target).tolist()
        own |= dict(zip(batch.ids, found, strict=True))
    values = list(rt.gather(own).values())
    return {"val_ssim": sum(values) / len(values)}
