"""What self-play needs first: the classifier, trained here or made elsewhere.

A classifier that is trained here is an ordinary run in ``stages/classifier`` of the run folder: it saves,
stops and resumes by itself, bit for bit.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medrl.core import rng
from medrl.core.config import Layer, resolve
from medrl.core.jobs import TrainJob

from . import classifier, thresholds
from .config import SparsConfig

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

    from .data import Loaded

_log = logging.getLogger("medrl.spars")


def obtain(rt: Runtime, cfg: SparsConfig, data: Loaded) -> Path:
    """Train the classifier where it is missing; return its run or checkpoint. All ranks take part."""
    if cfg.inputs.classifier is not None:
        return cfg.inputs.classifier
    folder = rt.run.dir / "stages" / "classifier"
    train_in(rt, cfg, data, folder)
    return folder


def train_in(rt: Runtime, cfg: SparsConfig, data: Loaded, folder: Path) -> None:
    """Train the classifier of self-play in a run folder of its own."""
    job = stage_job(rt.job, folder)
    _log.info("stage classifier: %s", folder)
    seed = rng.derive_seed(cfg.train.seed, "spars", "stage", "classifier")
    with rng.isolated(seed), job.runtime() as inner:
        train_classifier(inner, job.config, data)


def train_classifier(rt: Runtime, cfg: SparsConfig, data: Loaded) -> None:
    """Train the classifier of a run, then choose the threshold of its maps on validation volumes."""
    classifier.fit(rt, cfg, data)
    thresholds.describe(rt, cfg, data)


def stage_job(job: TrainJob, folder: Path) -> TrainJob:
    """Return the job of the classifier: the same config, in a run folder of its own."""
    values = {**job.resolved.values(), "stage": "classifier"}
    return replace(
        job,
        resolved=resolve(SparsConfig, [Layer("stage classifier", values)]),
        run_dir=folder,
        resume="auto",
        init_from=None,
        extra={},
    )
