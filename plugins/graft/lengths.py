"""Epochs in steps: what the config counts in epochs, by the number of steps that this run's epoch has."""

from __future__ import annotations

import math

from .config import GraftConfig


def steps_per_epoch(cfg: GraftConfig, labelled: int, unlabelled: int, world_size: int = 1) -> int:
    """Steps in which every case is seen once, at most as many as `epochs.batches` allows.

    With labelled and unlabelled cases, half of each batch is labelled and half is not.

    Args:
        cfg: Batch size and accumulation.
        labelled: Labelled training cases.
        unlabelled: Unlabelled training cases.
        world_size: Number of ranks.
    """
    counts = zip((labelled, unlabelled), shares(cfg, labelled, unlabelled), strict=True)
    batches = max(math.ceil(count / (share * world_size)) if share else 0 for count, share in counts)
    if cfg.epochs.batches is not None:
        batches = min(batches, cfg.epochs.batches)
    return max(1, math.ceil(batches / cfg.train.accumulate))


def shares(cfg: GraftConfig, labelled: int, unlabelled: int) -> tuple[int, int]:
    """Labelled and unlabelled samples in the batch of a rank."""
    size = cfg.train.batch_size
    if labelled and unlabelled:
        return size // 2, size - size // 2
    return (size, 0) if labelled else (0, size)


def in_steps(cfg: GraftConfig, per_epoch: int) -> GraftConfig:
    """The config with every length that is given in epochs turned into steps.

    Milestones become parts of the run, as `optim.milestones` has them.

    Args:
        cfg: The run's config.
        per_epoch: Steps of an epoch.
    """
    epochs = cfg.epochs
    changes: dict[str, object] = {}
    if epochs.total is not None:
        changes["train"] = cfg.train.model_copy(update={"max_steps": epochs.total * per_epoch})
    optim: dict[str, object] = {}
    if epochs.ramp is not None:
        optim["ramp"] = epochs.ramp * per_epoch
    if epochs.milestones and epochs.total is not None:
        optim["milestones"] = tuple(epoch / epochs.total for epoch in epochs.milestones)
    if optim:
        changes["optim"] = cfg.optim.model_copy(update=optim)
    if epochs.agent_warmup is not None:
        changes["agent"] = cfg.agent.model_copy(update={"warmup": epochs.agent_warmup * per_epoch})
    return cfg.model_copy(update=changes) if changes else cfg
