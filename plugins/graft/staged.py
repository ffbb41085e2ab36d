"""Teachers, their features and the student as stages of one run folder, each with a record."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medrl.core.cache import file_hash
from medrl.core.config import Layer, resolve
from medrl.core.errors import ConfigError, MedrlError
from medrl.core.staged import run_staged

from . import data, teachers, train
from .config import GraftConfig
from .duties import open_split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medrl.core.config import Resolved
    from medrl.core.jobs import TrainJob
    from medrl.core.runtime import Runtime


def run(job: TrainJob) -> None:
    """Do the stages that the config names: `teachers.train` teachers, their feature files, the student.

    With live teachers there are no files. Without teachers to train the student is the only stage.

    Raises:
        ConfigError: Teachers are to be trained, and others are named too.
    """
    cfg: GraftConfig = job.config
    count, live = cfg.teachers.train, cfg.teachers.source == "live"
    if count and cfg.teachers.features:
        raise ConfigError("teachers.train", why="teachers.features names teachers too", do="leave one out")
    parts = ([] if live else ["features"]) if count else []

    def work(rt: Runtime, kind: str, folders: Mapping[str, Path]) -> None:
        if kind == "teachers":
            teachers.train_teachers(
                job.manager,
                lambda layers: _resolved(job, layers),
                folders[kind],
                count=count,
                command=job.command,
            )
        elif kind == "features":
            _extract(rt, _resolved(job, ()).config, folders)
        else:
            made = [str(folders[parts[-1] if parts else "teachers"])] if count else []
            layer = Layer("stages", {"teachers": {"features": made}})
            own = _resolved(job, [layer] if count else ()).config
            train.fit(rt, own, data.load(rt, own))

    run_staged(
        job,
        [*(["teachers"] if count else []), *parts, "student"],
        work,
        upto=cfg.stage,
        decides={"cases": _digest(cfg), "teachers": count, "given": _given(cfg)},
        outputs_of=lambda kind: (
            [Path(f"teacher_{k}", "checkpoints", "best.pt") for k in range(count)]
            if kind == "teachers"
            else [Path()]
        ),
    )


def _resolved(job: TrainJob, layers: Sequence[Layer]) -> Resolved[Any]:
    """The config without its stages, and layers on top."""
    values = job.resolved.values()
    plain = {**values, "stage": "student", "teachers": {**values["teachers"], "train": 0}}
    return resolve(GraftConfig, [Layer("run", plain), *layers])


def _extract(rt: Runtime, cfg: GraftConfig, folders: Mapping[str, Path]) -> None:
    """Write the features on the main rank; the others wait, as long as ``train.timeout_s`` lets them."""
    failure: MedrlError | None = None
    if rt.is_main:
        try:
            runs = teachers.find_teachers(folders["teachers"])
            teachers.extract(
                rt.job.manager, cfg, runs, folders["features"], taps=cfg.distill.taps, device=rt.device
            )
        except MedrlError as error:
            failure = error
    rt.ranks.raise_together("writing features", failure)


def _digest(cfg: GraftConfig) -> str:
    """SHA-256 of the files of all cases that any duty may read."""
    dataset, _ = open_split(cfg)
    whole = hashlib.sha256()
    cases = [*dataset.cases, *(dataset.test_cases if cfg.split.unlabelled_from_test else ())]
    for case in cases:
        for path in (*case.images, *([case.label] if case.label is not None else []), *case.masks.values()):
            whole.update(f"{case.id}\0{path.name}\0{file_hash(path)}\n".encode())
    return whole.hexdigest()


def _given(cfg: GraftConfig) -> list[Path]:
    """Teachers that were made elsewhere."""
    return [path for path in cfg.teachers.features if path.exists()]
