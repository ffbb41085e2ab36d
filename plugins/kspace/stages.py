"""What the policy needs first: reward model and reconstruction network, trained here or made elsewhere.

A part that is trained here is an ordinary run in ``stages/`` of the run folder: it saves, stops and resumes
by itself, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medrl.core import rng
from medrl.core.config import Layer, resolve
from medrl.core.jobs import TrainJob

from . import recon_training, reward_training
from .config import KspaceConfig
from .domain import Data

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

FITS: Mapping[str, Callable[[Any, KspaceConfig, Data], None]] = {
    "recon": recon_training.fit,
    "reward": reward_training.fit,
}
_log = logging.getLogger("medrl.kspace")


def obtain(rt: Runtime, cfg: KspaceConfig, data: Data) -> dict[str, Path]:
    """Train what is missing, in runs below the run folder; return the run or checkpoint of each part.

    All ranks take part. A part whose run is finished is not trained again.
    """
    found: dict[str, Path] = {}
    for kind in needed(cfg, data):
        given: Path | None = getattr(cfg.inputs, kind)
        if given is not None:
            found[kind] = given
            continue
        found[kind] = rt.run.dir / "stages" / kind
        train_part(rt, cfg, data, kind, found)
    return found


def train_part(rt: Runtime, cfg: KspaceConfig, data: Data, kind: str, found: Mapping[str, Path]) -> None:
    """Train a part in its folder.

    Args:
        rt: Runtime of the policy.
        cfg: Config of the policy.
        data: The slices.
        kind: `reward` or `recon`.
        found: Run or checkpoint of each part so far, and the folder of this one.
    """
    others = {name: path for name, path in found.items() if name != kind}
    job = stage_job(rt.job, kind, others, found[kind])
    _log.info("stage %s: %s", kind, found[kind])
    with rng.isolated(rng.derive_seed(cfg.train.seed, "kspace", "stage", kind)), job.runtime() as inner:
        FITS[kind](inner, job.config, data)


def needed(cfg: KspaceConfig, data: Data) -> list[str]:
    """The parts of a policy, in the order of their training."""
    kinds = ["recon"] if cfg.acquisition.recon == "unet" else []
    return kinds + (["reward"] if data.classes > 1 else [])


def stage_job(job: TrainJob, kind: str, inputs: Mapping[str, Path], folder: Path) -> TrainJob:
    """Return the job of a part: the same config, in a run folder of its own."""
    given = {name: str(path) for name, path in inputs.items()}
    old = job.resolved.values()
    values = {**old, "stage": kind, "inputs": {**old["inputs"], **given}}
    return replace(
        job,
        resolved=resolve(KspaceConfig, [Layer(f"stage {kind}", values)]),
        run_dir=folder,
        resume="auto",
        init_from=None,
        extra={},
    )
