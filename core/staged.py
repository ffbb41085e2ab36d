"""Stages of one run folder on all ranks; and runs whose parts are stages, such as a reward model.

A part works in ``stages/`` of the run folder, and the last stage is the run itself. The record of
`medrl.core.stages` says what is done; what a stage wrote from other inputs is removed before it runs again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from medrl.core.adaptation.stages import Files, numbered
from medrl.core.config import Layer, resolve
from medrl.core.errors import ConfigError, MedrlError
from medrl.core.executors.stages import run_stages
from medrl.core.stages import RECORD, Input, Pipeline, input_hash, path_hash

if TYPE_CHECKING:
    from medrl.core.jobs import TrainJob
    from medrl.core.runtime import Runtime

Work: TypeAlias = "Callable[[Runtime, str, Mapping[str, Path]], object]"
"""Does a stage: runtime of the run folder, kind of the stage, folders of the parts up to this stage."""

_LAST = (Path("checkpoints") / "last.pt",)
_log = logging.getLogger("medrl.stages")


class RankedPipeline:
    """The pipeline of a run folder on all ranks; rank 0 decides and keeps the record.

    Args:
        rt: Runtime of the run folder.
    """

    def __init__(self, rt: Runtime) -> None:
        self.rt = rt
        self.pipeline = Pipeline(rt.run.dir) if rt.is_main else None

    def done(self) -> set[str]:
        """Names of the stages whose files are what the record says."""
        found = set()
        if self.pipeline is not None:
            found = {name for name, status in self.pipeline.status().items() if status.state == "done"}
        return set(self.rt.ranks.exchange("stages done", found)[0])

    def stage(
        self,
        name: str,
        *,
        settings: Mapping[str, Input],
        decides: Mapping[str, Input],
        files: Files,
        outputs: Sequence[Path],
        folder: Path,
        run: Callable[[], object],
        note: Path | None = None,
    ) -> bool:
        """Do a stage on all ranks unless it is done; return whether it ran.

        Args:
            name: Names it in the record.
            settings: What a run checks by itself before it goes on, such as the hash of its config.
            decides: Everything else that decides the outputs but is no work of another stage: images, rules.
            files: What it reads of other stages.
            outputs: What it writes, relative to the run folder.
            folder: Where it works; what was made there from other inputs is removed.
            run: Does the work, on every rank.
            note: Where its inputs are noted; beside `folder` if left out.

        Raises:
            MedrlError: As `Pipeline.stage`, on all ranks.
        """
        ranks = self.rt.ranks

        def begin() -> None:
            self._clear_if_stale(folder, note or folder.with_suffix(".inputs.json"), decides, files)
            run()

        if self.pipeline is None:
            answer = ranks.exchange("stage", None)[0]
            if isinstance(answer, MedrlError):
                raise answer
            if answer:
                begin()
            return bool(answer)
        told = False

        def go() -> None:
            nonlocal told
            told = True
            ranks.exchange("stage", True)
            begin()

        read = {key: list(path) if isinstance(path, tuple) else path for key, path in files.items()}
        try:
            ran = self.pipeline.stage(
                name, inputs={**settings, **decides, **read}, outputs=list(outputs), run=go
            )
        except MedrlError as error:
            if not told:
                ranks.exchange("stage", error)
            raise
        if not told:
            ranks.exchange("stage", False)
        return ran

    def _clear_if_stale(self, folder: Path, note: Path, decides: Mapping[str, Input], files: Files) -> None:
        """Remove what a stage wrote from other inputs; what it wrote from these is continued."""
        failure: MedrlError | None = None
        if self.rt.is_main:
            try:
                read = {
                    name: [path_hash(item) for item in (path if isinstance(path, tuple) else (path,))]
                    for name, path in sorted(files.items())
                }
                wanted = {**{name: input_hash(value, name) for name, value in decides.items()}, **read}
                known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
                if folder.is_dir() and any(folder.iterdir()) and not _same(known, wanted, read):
                    _log.info("%s was made from other inputs; it is made again", folder.name)
                    shutil.rmtree(folder)
                    if folder == self.rt.run.checkpoints_dir:
                        folder.mkdir()
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            except MedrlError as error:
                failure = error
        self.rt.ranks.raise_together("preparing the stage", failure)


def _same(known: object, wanted: Mapping[str, object], read: Mapping[str, object]) -> bool:
    """Whether a note tells these inputs; notes of before told those of other stages alone."""
    if not isinstance(known, dict) or not set(read) <= set(known) <= set(wanted):
        return False
    return all(value == wanted[name] for name, value in known.items())


# -- runs with parts -----------------------------------------------------------------------------------


def is_staged(job: TrainJob) -> bool:
    """Whether the stages of a job are to be recorded: it was asked for, now or when the folder was made."""
    return job.stage_executor is not None or (job.run_dir / RECORD).is_file()


def run_staged(
    job: TrainJob,
    kinds: Sequence[str],
    work: Work,
    *,
    upto: str,
    decides: Mapping[str, Input],
    outputs_of: Callable[[str], Sequence[Path]] = lambda _kind: _LAST,
) -> None:
    """Do the stages of a run with a record, each once: its parts first, then the run itself.

    With an executor each stage is a task, which calls this with its own kind as `upto`.

    Args:
        job: The job; its config has a field `stage` that is no part of the experiment.
        kinds: The stages in their order. The last is the run itself; each other works in ``stages/KIND`` of
            the run folder.
        work: Does a stage, on every rank.
        upto: The kind up to which to go.
        decides: What decides the outputs of all stages beside the config, such as a digest of the images.
        outputs_of: What a part writes, relative to its folder; by default its last checkpoint.

    Raises:
        ConfigError: There is no such stage, or the folder holds a run without a record.
        RuntimeFault: A task failed.
    """
    if upto not in kinds:
        raise ConfigError(f"stage {upto}", why=f"this run has no such stage, only {', '.join(kinds)}")
    stages = numbered((kind, 0) for kind in kinds)
    if job.stage_executor is not None and upto == kinds[-1]:
        _begin(job.run_dir)
        run_stages(job, stages, job.stage_executor)
        return
    values = {**job.resolved.values(), "stage": kinds[-1]}
    job = replace(job, resolved=resolve(type(job.config), [Layer("stages", values)]))
    with job.runtime() as rt:
        pipeline, root = RankedPipeline(rt), rt.run.dir.resolve()
        folders: dict[str, Path] = {}
        files: dict[str, tuple[Path, ...]] = {}
        rt.completed = int(rt.run.manifest.get("step", 0))  # until the run itself goes on
        for stage in stages[: kinds.index(upto) + 1]:
            own, folder = stage is stages[-1], root / "stages" / stage.kind
            folders |= {} if own else {stage.kind: folder}
            where, places = (root, _LAST) if own else (folder, outputs_of(stage.kind))
            made = [where / place for place in places]
            pipeline.stage(
                stage.name,
                settings={"config": job.resolved.hash},
                decides=decides,
                files=dict(files),
                outputs=made,
                folder=rt.run.checkpoints_dir if own else folder,
                note=folder.with_suffix(".inputs.json"),
                run=partial(_do, rt, partial(work, rt, stage.kind, dict(folders)), own=own),
            )
            files[stage.kind] = tuple(made)
        if stages[-1].name not in pipeline.done():
            rt.outcome = "interrupted"


def _begin(run_dir: Path) -> None:
    """Write the record of a new run folder.

    Raises:
        ConfigError: A run is there without a record.
    """
    if (run_dir / "manifest.json").is_file() and not (run_dir / RECORD).is_file():
        raise ConfigError(
            f"{run_dir} holds a run whose stages were not recorded",
            why="what its stages were made from is not known",
            do=f"medrl resume {run_dir}, or choose another folder with -o",
        )
    Pipeline(run_dir).begin()


def _do(rt: Runtime, work: Callable[[], object], *, own: bool) -> None:
    """Do the work of a stage; the last state of the run itself is saved before its file is hashed."""
    if own:
        rt.completed = 0
    work()
    if own:
        rt.finish()
