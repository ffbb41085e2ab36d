"""The parts of one prediction, done by several processes, as one report again."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medrl.core.errors import DataError
from medrl.core.volume.write import write_bytes

from .outputs import STATISTICS_NAME
from .record import REPORT_NAME, CaseRecord, PredictReport, read_report, reason_of


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What all parts together did.

    Attributes:
        report: Path of the merged ``report.json``.
        done: Cases with a segmentation.
        failed: Reason by case.
        missing: Cases that a part did not come to, by part; None for a part without a report.
    """

    report: Path
    done: tuple[str, ...]
    failed: dict[str, str]
    missing: dict[int, int | None]


def part_name(name: str, part: tuple[int, int]) -> str:
    """Return a file name that the parts of a run do not share."""
    index, parts = part
    stem, dot, suffix = name.partition(".")
    return name if parts == 1 else f"{stem}_part{index}of{parts}{dot}{suffix}"


def merge_parts(folder: Path, parts: int, report: Path | None = None) -> Merged:
    """Put the reports and tables of parts together; those of complete parts are removed then.

    Args:
        folder: Output folder.
        parts: Number of parts.
        report: Where the merged report goes; in the folder if left out.

    Raises:
        DataError: Two parts did the same case.
        RuntimeFault: The disk is full.
    """
    records: dict[str, CaseRecord] = {}
    facts: dict[str, object] = {}
    missing: dict[int, int | None] = {}
    complete: list[Path] = []
    for index in range(1, parts + 1):
        path = folder / part_name(REPORT_NAME, (index, parts))
        try:
            found = read_report(path)
        except DataError:
            missing[index] = None
            continue
        twice = sorted(set(records) & set(found.cases))
        if twice:
            raise DataError(f"case {twice[0]}", why="two parts did it", case=twice[0])
        records |= found.cases
        planned = found.facts.get("planned")
        left = max(0, int(planned) - len(found.cases)) if isinstance(planned, int) else 0
        if left:
            missing[index] = left
        else:
            complete.append(path)
        facts = facts or dict(found.facts)
    if "options" in facts and isinstance(facts["options"], Mapping):
        facts["options"] = {**facts["options"], "part": [1, 1], "parts": parts}
    facts["planned"] = len(records) + sum(left or 0 for left in missing.values())
    merged = PredictReport(path=report or folder / REPORT_NAME, facts=facts, cases=records)
    merged.write()
    tables = [folder / part_name(STATISTICS_NAME, (index, parts)) for index in range(1, parts + 1)]
    _merge_tables(tables, folder / STATISTICS_NAME)
    if not missing and parts > 1:
        for path in [*complete, *tables]:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return Merged(
        report=merged.path,
        done=tuple(case for case, record in sorted(records.items()) if record.status == "done"),
        failed={
            case: reason_of(record) for case, record in sorted(records.items()) if record.status == "failed"
        },
        missing=missing,
    )


def _merge_tables(tables: list[Path], target: Path) -> None:
    """Write the rows of all tables that are there, by case."""
    rows: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {"case": None}
    for path in tables:
        if not path.is_file():
            continue
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                columns.update(dict.fromkeys(row))
                rows[row["case"]] = row
    if not rows:
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), restval="0.0000", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[case] for case in sorted(rows))
    write_bytes(target, text.getvalue().encode())
