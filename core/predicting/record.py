"""``report.json`` of a prediction run: what was done, with which model, how long, and what failed.

It is written again after every case, so that a run killed at any instant can be continued. Cases are
named by their identifiers; file contents and header texts of the input never go in.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medrl.core.errors import DataError
from medrl.core.volume.write import write_bytes

SCHEMA = 1
REPORT_NAME = "report.json"


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
        write_bytes(self.path, json_bytes(content))


def read_report(path: Path) -> PredictReport:
    """Read a ``report.json``.

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
