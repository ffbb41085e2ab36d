"""``report.json`` of a prediction run: what was done, with which model, how long, and what failed.

A record of each case is added at once to a journal beside it, so that a run killed at any instant can be
continued; the report itself is written again now and then, because for thousands of cases that takes longer
than a case. Cases are named by their identifiers; file contents and header texts of the input never go in.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medrl.core.errors import DataError, RuntimeFault
from medrl.core.volume.write import write_bytes

SCHEMA = 1
REPORT_NAME = "report.json"
_SHARE = 20
"""The report is written again when so many times the time has passed that writing it took."""


@dataclass(kw_only=True)
class CaseRecord:
    """One case of the report.

    Attributes:
        status: ``done`` or ``failed``.
        output: The segmentation, relative to the output folder.
        files: SHA-256 of every file written for the case, by path relative to the output folder.
        inputs: SHA-256 of the image files as they were read.
        seconds: Time spent on ``read``, ``predict``, ``write``.
        settings: Hash of model and options; a case counts as finished only for the same ones.
        volumes_ml: Volume of each label, if it was asked for.
        info: Plain values that the method tells.
        error: ``what``, ``why``, ``do`` of the failure.
    """

    status: str
    output: str = ""
    files: dict[str, str] = field(default_factory=dict)
    inputs: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    settings: str = ""
    volumes_ml: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that say something."""
        return {key: value for key, value in asdict(self).items() if value not in ("", {}, [])}


def reason_of(record: CaseRecord) -> str:
    """Return why a case failed, as one line."""
    parts = [record.error.get(key, "") for key in ("what", "why")]
    text = ": ".join(part for part in parts if part)
    return text + (f" ({record.error['do']})" if record.error.get("do") else "")


@dataclass(kw_only=True)
class PredictReport:
    """The content of ``report.json``.

    Attributes:
        facts: Method, versions, command, model, options, label names.
        cases: Records by case identifier.
    """

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, CaseRecord] = field(default_factory=dict)
    _next: float = 0.0

    @property
    def journal(self) -> Path:
        """One record a line, while the run goes on."""
        return self.path.with_suffix(".jsonl")

    def begin(self, earlier: Mapping[str, CaseRecord]) -> None:
        """Write the report without cases, and a journal of those that an earlier run finished.

        Raises:
            RuntimeFault: The folder cannot be written.
        """
        lines = [_line(case, record) for case, record in earlier.items()]
        write_bytes(self.journal, "".join(lines).encode())
        self.write()

    def add(self, case: str, record: CaseRecord) -> None:
        """Record a case at once.

        Raises:
            RuntimeFault: The disk is full.
        """
        self.cases[case] = record
        try:
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(_line(case, record))
        except OSError as error:
            raise RuntimeFault(
                f"{self.journal} cannot be written",
                why=error.strerror or str(error),
                do="free space on that disk and run again with --continue",
            ) from error
        if time.monotonic() >= self._next:
            self.write()

    def finish(self) -> None:
        """Write the whole report; the journal is not needed any more.

        Raises:
            RuntimeFault: The disk is full.
        """
        self.write()
        with contextlib.suppress(OSError):
            self.journal.unlink(missing_ok=True)

    def write(self) -> None:
        """Replace the file at once.

        Raises:
            RuntimeFault: The disk is full or the folder cannot be written.
        """
        counts = {
            status: sum(record.status == status for record in self.cases.values())
            for status in ("done", "failed")
        }
        content = {
            "schema": SCHEMA,
            **self.facts,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "counts": counts,
            "cases": {case: self.cases[case].as_dict() for case in sorted(self.cases)},
        }
        started = time.monotonic()
        write_bytes(self.path, json_bytes(content))
        now = time.monotonic()
        self._next = now + _SHARE * (now - started)


def read_report(path: Path) -> PredictReport:
    """Read a ``report.json``, and what its journal adds if the run has not ended.

    Raises:
        DataError: It is missing, damaged or of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cases = {
            str(case): CaseRecord(**{key: value for key, value in record.items() if key in _FIELDS})
            for case, record in content["cases"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            str(path), why=f"is no report of a prediction: {error}", do="predict without --continue"
        ) from error
    if content.get("schema") != SCHEMA:
        raise DataError(str(path), why=f"its schema is {content.get('schema')}, expected {SCHEMA}")
    facts = {key: value for key, value in content.items() if key not in ("schema", "cases", "counts")}
    cases |= dict(_journal(path.with_suffix(".jsonl")))
    return PredictReport(path=path, facts=facts, cases=cases)


_FIELDS = set(CaseRecord.__dataclass_fields__)


def finished_before(folder: Path, *others: Path) -> dict[str, CaseRecord]:
    """Return the records of cases that any report in an output folder, or one of `others`, calls done."""
    found: dict[str, CaseRecord] = {}
    for path in [*sorted(folder.glob("report*.json")), *others]:
        try:
            report = read_report(path)
        except DataError:
            continue
        found |= {case: record for case, record in report.cases.items() if record.status == "done"}
    return found


def _line(case: str, record: CaseRecord) -> str:
    return json.dumps(plain({"case": case, **record.as_dict()}), ensure_ascii=False, allow_nan=False) + "\n"


def _journal(path: Path) -> Iterator[tuple[str, CaseRecord]]:
    """Yield the records of a journal; a last line cut short by a kill is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            values = json.loads(line)
            yield (
                str(values["case"]),
                CaseRecord(**{key: value for key, value in values.items() if key in _FIELDS}),
            )


def versions() -> dict[str, str]:
    """Return the versions that decide a result."""
    found = {"python": platform.python_version()}
    for name in ("medrl", "torch", "monai", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inputs_digest(images: Iterable[Path]) -> str:
    """Return one SHA-256 over the files of a case; a folder counts with every file in it."""
    digest = hashlib.sha256()
    for image in images:
        files = sorted(item for item in image.rglob("*") if item.is_file()) if image.is_dir() else [image]
        for path in files:
            digest.update(bytes.fromhex(file_digest(path)))
    return digest.hexdigest()


def settings_digest(values: Mapping[str, Any]) -> str:
    """Return a hash of plain values, independent of their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def json_bytes(content: Any) -> bytes:
    """Return JSON text; numbers that are not finite become null."""
    return (json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def plain(value: Any) -> Any:
    """Return a value as JSON types: paths become text, arrays lists, numbers that are not finite None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    to_list = getattr(value, "tolist", None)
    return plain(to_list()) if callable(to_list) else str(value)
