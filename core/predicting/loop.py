"""The loop over the cases of any prediction: one that fails is recorded, the others go on."""

from __future__ import annotations

import errno
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medrl.core.errors import ConfigError, DataError, MedrlError, RuntimeFault
from medrl.core.types import Case
from medrl.core.volume.write import write_bytes

from .memory import is_out_of_memory, limited_memory, needs, peak_bytes, state
from .outputs import LABELS_NAME
from .parts import part_name
from .planning import case_digest
from .record import (
    REPORT_NAME,
    CaseRecord,
    PredictReport,
    file_digest,
    finished_before,
    json_bytes,
    reason_of,
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


class CaseLoop(ABC):
    """Predicts the cases of one part of a job; a method says how one case is done.

    Args:
        job: Options; its `part` chooses among the cases.
        cases: All cases, in order.
        folder: Output folder.
        outputs: Segmentation of each case.
        names: Label names, for ``labels.json``.
        settings: Hash of model and options; a finished case counts only for the same ones.
        facts: What ``report.json`` says of the whole run.

    Raises:
        ConfigError: The part does not exist.
    """

    def __init__(
        self,
        job: PredictJob,
        *,
        cases: Sequence[Case],
        folder: Path,
        outputs: Mapping[str, Path],
        names: Mapping[str, int],
        settings: str,
        facts: Mapping[str, Any],
    ) -> None:
        check_part(job)
        index, parts = job.part
        self.job = job
        self.cases = list(cases)[index - 1 :: parts]
        self.folder, self.outputs, self.names, self.settings = folder, dict(outputs), names, settings
        self.report = PredictReport(path=job.report or folder / self.named(REPORT_NAME), facts=dict(facts))

    @abstractmethod
    def predict(self, case: Case) -> CaseRecord:
        """Predict one case, write its files and return its record; any exception is a failed case."""

    def is_complete(self, record: CaseRecord) -> bool:
        """Whether an earlier record has everything that is asked for now, files apart."""
        del record
        return True

    def finish(self) -> None:
        """Do what remains after the last case."""
        _log.debug("%d cases of this part are through", len(self.report.cases))

    def run(self) -> PredictOutcome:
        """Predict the cases of this part, with the memory that the job allows.

        Raises:
            ConfigError: A case needs more memory than that.
        """
        self._state_memory()
        with limited_memory(0.0 if self.job.device.startswith("cuda") else self.job.max_memory_gb):
            try:
                return self._run()
            except BaseException:
                # The journal has every case; the first cause matters more than a report that lags behind.
                with suppress(RuntimeFault):
                    self.report.write()
                raise

    def _run(self) -> PredictOutcome:
        before = finished_before(self.folder, self.report.path) if self.job.continue_ else {}
        mine = {case.id for case in self.cases}
        alike = {name: record for name, record in before.items() if record.settings == self.settings}
        self._prepare_folder({name: record for name, record in alike.items() if name in mine})
        skipped: list[str] = []
        for number, case in enumerate(self.cases):
            self._progress(number, case.id)
            earlier = before.get(case.id)
            if earlier is not None and self._is_finished(case, earlier):
                skipped.append(case.id)
                self.report.add(case.id, earlier)
                continue
            record = self._one(case)
            self.report.add(case.id, record)
            if record.status == "done":
                self._notify(case)
        self._progress(len(self.cases), "")
        self.finish()
        self.report.facts["memory"] = {**self.report.facts.get("memory", {}), "peak_bytes": peak_bytes()}
        self.report.finish()
        records = self.report.cases
        return PredictOutcome(
            done=tuple(case for case, record in records.items() if record.status == "done"),
            skipped=tuple(skipped),
            failed={case: reason_of(record) for case, record in records.items() if record.status == "failed"},
            report=self.report.path,
            outputs={case: self.outputs[case] for case in records if records[case].status == "done"},
        )

    def named(self, name: str) -> str:
        """Return a file name that the parts of a run do not share."""
        return part_name(name, self.job.part)

    def relative(self, path: Path) -> str:
        """Return a path of the output folder as the report names it."""
        return path.relative_to(self.folder).as_posix()

    def _one(self, case: Case) -> CaseRecord:
        """Predict one case; whatever goes wrong with it becomes its record."""
        try:
            return self.predict(case)
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
        except Exception as error:  # noqa: BLE001 - one bad case does not stop the others
            failure = error
            told = {
                "what": f"case {case.id}",
                "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                "do": "run this case alone with --debug to see where",
            }
            if is_out_of_memory(error):
                limit = self.job.max_memory_gb
                told["why"] = f"it needs more than {limit:g} GiB" if limit else "there is not enough memory"
                told["do"] = "give it more with --max-memory, or fewer --jobs" if limit else ""
        if self.outputs[case.id].exists():
            told["why"] += f"; {self.outputs[case.id].name} in the output folder is of an earlier run"
        _log.warning("case %s failed: %s", case.id, told["why"] or told["what"])
        _log.debug("case %s", case.id, exc_info=failure)
        return CaseRecord(
            status="failed", settings=self.settings, error={key: text for key, text in told.items() if text}
        )

    def _is_finished(self, case: Case, record: CaseRecord) -> bool:
        """Whether a case was done with this model and these options, and its files are what they were."""
        if record.settings != self.settings or record.output != self.relative(self.outputs[case.id]):
            return False
        if not self.is_complete(record):
            return False
        try:
            if record.inputs != case_digest(case):
                return False
            return bool(record.files) and all(
                file_digest(self.folder / name) == digest for name, digest in record.files.items()
            )
        except (OSError, DataError):
            return False

    def _state_memory(self) -> None:
        """Say how much memory the largest case needs, and refuse those that need more than allowed."""
        job = self.job
        found = needs(
            self.cases,
            classes=max(2, len(self.names)),
            folds=len(job.checkpoints),
            tta=job.tta,
            every=bool(job.max_memory_gb),
        )
        text, facts = state(found, limit_gb=job.max_memory_gb, count=len(self.cases))
        self.report.facts |= {"planned": len(self.cases), "memory": facts}
        if text:
            job.say(text)

    def _prepare_folder(self, earlier: Mapping[str, CaseRecord]) -> None:
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
        self.report.begin(earlier)

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


def check_part(job: PredictJob) -> None:
    """Refuse a part that does not exist.

    Raises:
        ConfigError: It does not.
    """
    index, parts = job.part
    if not 1 <= index <= parts:
        raise ConfigError("--part", why=f"part {index} of {parts} does not exist", do="--part 1/3")


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads; 0 leaves it as it is."""
    before = torch.get_num_threads()
    if count > 0:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._last, 4)
        self._last = now
