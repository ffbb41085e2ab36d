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

from . import crossing, recon_training, reward_training
from .config import KspaceConfig
from .domain import Data

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

_log = logging.getLogger("medrl.kspace")


def fit_reward(rt: Runtime, cfg: KspaceConfig, data: Data) -> None:
    """Train the reward model; before it the crossed ones, each in a run of its own below this one."""
    if cfg.seg.part >= 0:
        reward_training.fit(rt, cfg, crossing.without_part(data, cfg))
        return
    for part in range(cfg.seg.crossed):
        folder = rt.run.dir / crossing.FOLDER / str(part)
        job = stage_job(rt.job, "reward", {}, folder, {"seg": {"part": part}})
        _log.info("crossed reward model %d of %d: %s", part + 1, cfg.seg.crossed, folder)
        seed = rng.derive_seed(cfg.train.seed, "kspace", "crossed", part)
        with rng.isolated(seed), job.runtime() as inner:
            fit_reward(inner, job.config, data)
    reward_training.fit(rt, cfg, data)


FITS: Mapping[str, Callable[[Any, KspaceConfig, Data], None]] = {
    "recon": recon_training.fit,
    "reward": fit_reward,
}


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


def stage_job(
    job: TrainJob,
    kind: str,
    inputs: Mapping[str, Path],
    folder: Path,
    other: Mapping[str, Mapping[str, Any]] | None = None,
) -> TrainJob:
    """Return the job of a part: the same config but for `inputs` and `other`, in a run folder of its own."""
    given = {name: str(path) for name, path in inputs.items()}
    old = job.resolved.values()
    values = {**old, "stage": kind, "inputs": {**old["inputs"], **given}}
    layers = [Layer(f"stage {kind}", values), *([Layer("part", other)] if other else [])]
    return replace(
        job,
        resolved=resolve(KspaceConfig, layers),
        run_dir=folder,
        resume="auto",
        init_from=None,
        extra={},
    )
