"""Labels of whole images: ``presence.csv``."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from medrl.core.dataset.model import some
from medrl.core.errors import DataError, did_you_mean

NAME = "presence.csv"
HEADER = ("case_id", "label")
_LABELS = {"0": 0, "1": 1}
_ADVICE = "write one row for each case, such as `case_001,1`"


def read_presence(path: Path) -> dict[str, int]:
    """Read the labels of images: case identifier to 0 or 1.

    The file has the header ``case_id,label``; further columns and empty rows are ignored.

    Raises:
        DataError: There is no such file, a column is missing, a label is neither 0 nor 1, or a case is there
            twice; the line is named.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(
            str(path),
            why="no such file; labels of images are what spars learns from",
            do=f"{_ADVICE}, under the header case_id,label; or name the file with data.presence",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), why=f"cannot be read as text ({error})") from error
    rows = csv.DictReader(text.splitlines())
    names = [str(name).strip() for name in rows.fieldnames or ()]
    missing = [name for name in HEADER if name not in names]
    if missing:
        found = ", ".join(names) or "nothing"
        raise DataError(
            str(path), why=f"no column {missing[0]}; the header is {found}", do="begin with case_id,label"
        )
    rows.fieldnames = names
    labels: dict[str, int] = {}
    for row in rows:
        case, label = ((row.get(name) or "").strip() for name in HEADER)
        if not case and not label:
            continue
        where = f"{path}, line {rows.line_num}"
        if not case:
            raise DataError(where, why="the case has no name", do=_ADVICE)
        if label not in _LABELS:
            raise DataError(where, why=f"label {label!r} of {case} is neither 0 nor 1", do=_ADVICE, case=case)
        if case in labels:
            raise DataError(where, why=f"{case} is there twice", do="keep one row", case=case)
        labels[case] = _LABELS[label]
    if not labels:
        raise DataError(str(path), why="it holds no case", do=_ADVICE)
    return labels


def check_presence(labels: Mapping[str, int], cases: Iterable[str], path: Path) -> None:
    """Refuse labels that lack a training case.

    Raises:
        DataError: They do; the cases are named.
    """
    missing = sorted(set(cases) - set(labels))
    if missing:
        raise DataError(
            str(path),
            why=f"{len(missing)} training cases have no label: {some(missing)}; "
            f"{did_you_mean(missing[0], labels)}",
            do=f"{_ADVICE}, or leave cases out with --exclude",
            case=missing[0],
        )
