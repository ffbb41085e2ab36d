"""The loop over cases: read, predict with every fold, decode, write, read back, record."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.checkpoint import Checkpoint, load_checkpoint
from medrl.core.dataset import list_inputs, stack_channels
from medrl.core.errors import ConfigError, DataError, MedrlError, RuntimeFault
from medrl.core.types import Case, Prediction, Predictor, Volume
from medrl.core.volume.write import write_bytes

from .outputs import (
    LABELS_NAME,
    STATISTICS_NAME,
    entropy,
    label_volumes_ml,
    write_case,
    write_statistics,
)
from .planning import case_digest, common_names, plan_files
from .record import (
    REPORT_NAME,
    CaseRecord,
    PredictReport,
    file_digest,
    finished_before,
    json_bytes,
    plain,
    settings_digest,
    versions,
)

if TYPE_CHECKING:
    from medrl.core.jobs import PredictJob

_log = logging.getLogger("medrl.predicting")


@dataclass(frozen=True, kw_only=True)
class PredictOutcome:
    """What became of the cases; the command line exits with 3 if any failed.

    Attributes:
        done: Cases whose verified segmentation lies in the output folder, skipped ones included.
        skipped: Those of `done` that an earlier run had finished.
        failed: Reason by case.
        report: Path of ``report.json``.
        outputs: Segmentation by case.
    """

    done: tuple[str, ...]
    failed: dict[str, str]
    report: Path
    skipped: tuple[str, ...] = ()
    outputs: dict[str, Path] = field(default_factory=dict)


def run(job: PredictJob, load: Callable[[Checkpoint], Predictor]) -> PredictOutcome:
    """Predict every case of a job; a case that fails is recorded and the others go on.

    Everything that can be refused is refused before the first case: damaged or foreign checkpoints, folds
    that do not fit each other, inputs that cannot be listed, two cases with one output name, an output
    that would overwrite an input.

    Args:
        job: Inputs, output, checkpoints and options.
        load: Makes a predictor of a checkpoint; several are averaged on their probabilities.

    Raises:
        CheckpointError: A checkpoint is damaged, of another method, or its labels differ from the first.
        ConfigError: The job contradicts itself.
        DataError: The inputs cannot be listed or the outputs cannot be planned.
        RuntimeFault: The disk is full; what is finished stays and `--continue` goes on from there.
    """
    with _threads(job.threads):
        return _Run(job, load).all()


class _Run:
    """The state of one prediction run."""

    def __init__(self, job: PredictJob, load: Callable[[Checkpoint], Predictor]) -> None:
        self.job = job
        index, parts = job.part
        if not 1 <= index <= parts:
            raise ConfigError("--part", why=f"part {index} of {parts} does not exist", do="--part 1/3")
        if not job.checkpoints:
            raise ConfigError("nothing to predict with", why="no checkpoint was given")
        checkpoints = [load_checkpoint(path, method=job.method) for path in job.checkpoints]
        self.predictors = [load(checkpoint) for checkpoint in checkpoints]
        self.names = common_names(self.predictors, job.checkpoints)
        cases = sorted(
            list_inputs(job.inputs, tuple(self.predictors[0].channel_names)), key=lambda case: case.id
        )
        self.folder, self.outputs = plan_files(job.output, cases)
        self.cases = cases[index - 1 :: parts]
        self.settings = settings_digest(
            {
                "method": job.method,
                "checkpoints": [checkpoint.digest for checkpoint in checkpoints],
                "tta": job.tta,
                "overlap": job.overlap,
                "precision": job.precision,
                "extra": plain(job.extra),
            }
        )
        self.report = PredictReport(path=self._report_path(), facts=self._facts(checkpoints))

    def all(self) -> PredictOutcome:
        """Predict the cases of this part."""
        before = finished_before(self.folder, self.report.path) if self.job.continue_ else {}
        self._prepare_folder()
        skipped: list[str] = []
        for number, case in enumerate(self.cases):
            self._progress(number, case.id)
            earlier = before.get(case.id)
            if earlier is not None and self._is_finished(case, earlier):
                skipped.append(case.id)
                self.report.cases[case.id] = earlier
                self.report.write()
                continue
            record = self._one(case)
            self.report.cases[case.id] = record
            self.report.write()
            if record.status == "done":
                self._notify(case)
        self._progress(len(self.cases), "")
        records = self.report.cases
        if self.job.statistics:
            volumes = {case: record.volumes_ml for case, record in records.items() if record.status == "done"}
            write_statistics(self.folder / self._named(STATISTICS_NAME), volumes)
        return PredictOutcome(
            done=tuple(case for case, record in records.items() if record.status == "done"),
            skipped=tuple(skipped),
            failed={case: _reason(record) for case, record in records.items() if record.status == "failed"},
            report=self.report.path,
            outputs={case: self.outputs[case] for case in records if records[case].status == "done"},
        )

    def _one(self, case: Case) -> CaseRecord:
        """Predict one case; whatever goes wrong with it becomes its record."""
        try:
            return self._predict(case)
        except MedrlError as error:
            self._stop_if_disk_is_full(error)
            failure: Exception = error
            told = {"what": error.what, "why": error.why, "do": error.do}
        except torch.OutOfMemoryError as error:
            failure = error
            told = {
                "what": f"case {case.id}",
                "why": "the accelerator has not enough memory",
                "do": "try --device cpu, or --precision bf16",
            }
        except MemoryError as error:
            failure = error
            told = {"what": f"case {case.id}", "why": "this machine has not enough memory", "do": ""}
        except Exception as error:  # noqa: BLE001 - one bad case does not stop the others
            failure = error
            told = {
                "what": f"case {case.id}",
                "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                "do": "run this case alone with --debug to see where",
            }
        if self.outputs[case.id].exists():
            told["why"] += f"; {self.outputs[case.id].name} in the output folder is of an earlier run"
        _log.warning("case %s failed: %s", case.id, told["why"] or told["what"])
        _log.debug("case %s", case.id, exc_info=failure)
        return CaseRecord(
            status="failed", settings=self.settings, error={key: text for key, text in told.items() if text}
        )

    def _predict(self, case: Case) -> CaseRecord:
        clock = _Clock()
        inputs = case_digest(case)
        volume = stack_channels(case, tuple(self.predictors[0].channel_names))
        clock.lap("read")
        probabilities = self._probabilities(case, volume)
        prediction = self._decode(case, volume, probabilities)
        clock.lap("predict")
        del probabilities
        target = self.outputs[case.id]
        files = write_case(prediction, target, self.folder, volume, self.names, preview=self.job.preview)
        record = CaseRecord(
            status="done",
            output=self._relative(target),
            files={self._relative(path): file_digest(path) for path in files},
            inputs=inputs,
            settings=self.settings,
            info=plain(prediction.info),
        )
        if self.job.statistics:
            record.volumes_ml = label_volumes_ml(prediction.labels, self.names, volume)
        clock.lap("write")
        record.seconds = clock.seconds
        return record

    def _probabilities(self, case: Case, volume: Volume) -> NDArray[np.float32]:
        """Return the mean over folds `(K, X, Y, Z)`, summed in place."""
        mean: NDArray[np.float32] | None = None
        for number, predictor in enumerate(self.predictors, start=1):
            found = predictor.probabilities(volume, tta=self.job.tta, overlap=self.job.overlap)
            if found.ndim != 4 or found.shape[1:] != volume.data.shape[1:]:
                raise RuntimeFault(
                    f"case {case.id}",
                    why=f"the method returned probabilities of shape {found.shape} for an image of "
                    f"{volume.data.shape[1:]}",
                )
            if not bool(np.isfinite(found).all()):
                raise RuntimeFault(
                    f"case {case.id}",
                    why="the network gives NaN or infinite values",
                    do="try --precision fp32",
                )
            if mean is None:
                mean = np.array(found, dtype=np.float32)
            elif mean.shape != found.shape:
                raise RuntimeFault(
                    f"case {case.id}",
                    why=f"folds differ in their number of channels: {mean.shape[0]} and {found.shape[0]}",
                )
            else:
                mean += (found - mean) / np.float32(number)
            del found
        if mean is None:
            raise ConfigError("nothing to predict with", why="no checkpoint was given")
        return mean

    def _decode(self, case: Case, volume: Volume, probabilities: NDArray[np.float32]) -> Prediction:
        labels = np.asarray(self.predictors[0].decode(probabilities))
        if labels.shape != volume.data.shape[1:]:
            raise RuntimeFault(
                f"case {case.id}",
                why=f"the method decoded labels of shape {labels.shape} for an image of "
                f"{volume.data.shape[1:]}",
            )
        unknown = sorted({int(value) for value in np.unique(labels)} - {0, *self.names.values()})
        if unknown:
            raise RuntimeFault(
                f"case {case.id}", why=f"the method decoded label values without a name: {unknown}"
            )
        return Prediction(
            case_id=case.id,
            labels=labels,
            probabilities=probabilities if self.job.save_probabilities else None,
            uncertainty=self._uncertainty(case, volume, labels, probabilities)
            if self.job.save_uncertainty
            else None,
        )

    def _uncertainty(
        self, case: Case, volume: Volume, labels: NDArray[Any], probabilities: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return what the folds say of the labels, as a mean; the entropy for methods that say nothing."""
        own = [getattr(predictor, "uncertainty", None) for predictor in self.predictors]
        if not all(callable(tell) for tell in own):
            return entropy(probabilities)
        maps = [np.asarray(tell(volume, labels), dtype=np.float32) for tell in own if callable(tell)]
        if any(found.shape != labels.shape for found in maps):
            raise RuntimeFault(
                f"case {case.id}",
                why=f"the method returned uncertainty {maps[0].shape} for labels {labels.shape}",
            )
        return np.asarray(np.mean(maps, axis=0), dtype=np.float32)

    def _is_finished(self, case: Case, record: CaseRecord) -> bool:
        """Whether a case was done with this model and these options, and its files are what they were."""
        if record.settings != self.settings or record.output != self._relative(self.outputs[case.id]):
            return False
        wanted = {
            "probabilities": self.job.save_probabilities,
            "uncertainty": self.job.save_uncertainty,
            "previews": self.job.preview,
        }
        folders = {Path(name).parent.as_posix() for name in record.files}
        if any(asked and folder not in folders for folder, asked in wanted.items()):
            return False
        if self.job.statistics and not record.volumes_ml:
            return False
        try:
            if record.inputs != case_digest(case):
                return False
            return bool(record.files) and all(
                file_digest(self.folder / name) == digest for name, digest in record.files.items()
            )
        except (OSError, DataError):
            return False

    def _prepare_folder(self) -> None:
        """Write the label names and an empty report, so that an unwritable folder is known at once."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RuntimeFault(
                f"output folder {self.folder}",
                why=f"cannot be made: {error.strerror or error}",
                do="choose another folder with -o",
            ) from error
        write_bytes(self.folder / LABELS_NAME, json_bytes({"labels": dict(self.names)}))
        self.report.write()

    def _facts(self, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
        job = self.job
        return {
            "method": job.method,
            "versions": versions(),
            "command": list(job.command),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "checkpoints": [
                {
                    "file": str(path),
                    "sha256": checkpoint.digest,
                    "step": checkpoint.meta.get("step"),
                    "plugin_version": checkpoint.meta.get("plugin_version"),
                }
                for path, checkpoint in zip(job.checkpoints, checkpoints, strict=True)
            ],
            "options": {
                "tta": job.tta,
                "overlap": job.overlap,
                "device": job.device,
                "precision": job.precision,
                "part": list(job.part),
                "extra": plain(job.extra),
            },
            "labels": dict(self.names),
            "channels": list(self.predictors[0].channel_names),
        }

    def _report_path(self) -> Path:
        return self.job.report or self.folder / self._named(REPORT_NAME)

    def _named(self, name: str) -> str:
        """Return a file name that the parts of a run do not share."""
        index, parts = self.job.part
        stem, dot, suffix = name.partition(".")
        return name if parts == 1 else f"{stem}_part{index}of{parts}{dot}{suffix}"

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _progress(self, done: int, case: str) -> None:
        if self.job.progress is not None:
            self.job.progress(done, len(self.cases), case)

    def _notify(self, case: Case) -> None:
        self.job.manager.notify("medrl_case_predicted", run=None, case=case.id, path=self.outputs[case.id])

    def _stop_if_disk_is_full(self, error: MedrlError) -> None:
        """End the run where every further case would fail in the same way after its whole prediction."""
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise RuntimeFault(
                error.what, why=error.why, do="free space on that disk and run again with --continue"
            ) from error


def _reason(record: CaseRecord) -> str:
    parts = [record.error.get(key, "") for key in ("what", "why")]
    text = ": ".join(part for part in parts if part)
    return text + (f" ({record.error['do']})" if record.error.get("do") else "")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use so many threads; 0 leaves it as it is."""
    before = torch.get_num_threads()
    if count > 0:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 4)
        self._last = now
