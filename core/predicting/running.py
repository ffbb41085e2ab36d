"""Prediction with predictors: read, predict with every fold, decode, write, read back, record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.checkpoint import Checkpoint, load_checkpoint
from medrl.core.dataset import list_inputs, stack_channels
from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.types import Case, Prediction, Predictor, Volume

from .loop import CaseLoop, Clock, PredictOutcome, check_part, limited_threads
from .outputs import STATISTICS_NAME, entropy, label_volumes_ml, write_case, write_statistics
from .planning import case_digest, common_names, plan_files
from .record import CaseRecord, file_digest, plain, settings_digest, versions

if TYPE_CHECKING:
    from medrl.core.jobs import PredictJob


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
    with limited_threads(job.threads):
        return _Run(job, load).run()


class _Run(CaseLoop):
    """One prediction run with predictors."""

    def __init__(self, job: PredictJob, load: Callable[[Checkpoint], Predictor]) -> None:
        check_part(job)
        if not job.checkpoints:
            raise ConfigError("nothing to predict with", why="no checkpoint was given")
        checkpoints = [load_checkpoint(path, method=job.method) for path in job.checkpoints]
        self.predictors = [load(checkpoint) for checkpoint in checkpoints]
        names = common_names(self.predictors, job.checkpoints)
        cases = sorted(
            list_inputs(job.inputs, tuple(self.predictors[0].channel_names)), key=lambda case: case.id
        )
        folder, outputs = plan_files(job.output, cases)
        settings = settings_digest(
            {
                "method": job.method,
                "checkpoints": [checkpoint.digest for checkpoint in checkpoints],
                "tta": job.tta,
                "overlap": job.overlap,
                "precision": job.precision,
                "extra": plain(job.extra),
            }
        )
        super().__init__(
            job,
            cases=cases,
            folder=folder,
            outputs=outputs,
            names=names,
            settings=settings,
            facts=_facts(job, checkpoints, names, self.predictors[0].channel_names),
        )

    def predict(self, case: Case) -> CaseRecord:
        """Predict one case with every fold."""
        clock = Clock()
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
            output=self.relative(target),
            files={self.relative(path): file_digest(path) for path in files},
            inputs=inputs,
            settings=self.settings,
            info=plain(prediction.info),
        )
        if self.job.statistics:
            record.volumes_ml = label_volumes_ml(prediction.labels, self.names, volume)
        clock.lap("write")
        record.seconds = clock.seconds
        return record

    def is_complete(self, record: CaseRecord) -> bool:
        """Whether the side outputs that are asked for now were written."""
        wanted = {
            "probabilities": self.job.save_probabilities,
            "uncertainty": self.job.save_uncertainty,
            "previews": self.job.preview,
        }
        folders = {Path(name).parent.as_posix() for name in record.files}
        if any(asked and folder not in folders for folder, asked in wanted.items()):
            return False
        return bool(record.volumes_ml) or not self.job.statistics

    def finish(self) -> None:
        """Write the table of volumes."""
        if not self.job.statistics:
            return
        volumes = {
            case: record.volumes_ml for case, record in self.report.cases.items() if record.status == "done"
        }
        write_statistics(self.folder / self.named(STATISTICS_NAME), volumes)

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


def _facts(
    job: PredictJob, checkpoints: Sequence[Checkpoint], names: Mapping[str, int], channels: Sequence[str]
) -> dict[str, Any]:
    """Return what the report says of the whole run."""
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
        "labels": dict(names),
        "channels": list(channels),
    }
