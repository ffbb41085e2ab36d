"""Fold and test lists of a cohort: JSON files with any pair of training and validation keys.

A fold file is a list with one object for each fold, such as nnU-Net's ``splits_final.json``; its lists are
named ``train`` and ``val`` (Stanford), ``inner_train`` and ``inner_val`` (PI-CAI, UCLA), or by any other
pair. A test file is a list of cases, or ``{"bx_test": [{"Anon_ID": case}, …]}`` (Stanford).

Source: upstream dataset/pimedloader_3d_with_features.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.core.dataset import safe_case_id
from medrl.core.errors import DataError

JSON_LIMIT = 64 * 2**20
CASE_KEYS = ("Anon_ID", "case_id", "case", "id", "name")
"""Where an entry of a list that is an object names its case."""
_INNER, _OUTER = ("inner_train", "inner_val"), ("train", "val")


@dataclass(frozen=True)
class Fold:
    """The case identifiers of one fold."""

    train: tuple[str, ...]
    val: tuple[str, ...]


def read_folds(path: Path, *, cohort: str, keys: Sequence[str] = ()) -> tuple[Fold, ...]:
    """Read a fold file.

    Args:
        path: The JSON file.
        cohort: Decides which pair counts where a file has both: ``train``/``val`` for ``stanford``, else
            ``inner_train``/``inner_val``, as the original reads them.
        keys: Names of the training and validation lists; found by themselves if left out.

    Raises:
        DataError: The file is damaged, has no or several pairs, or a fold lists a case twice, in both parts
            or under a name that is not safe; the fold is named.
    """
    content = _read(path)
    if isinstance(content, Mapping):  # {"fold_0": {...}, "fold_1": {...}} or {"0": {...}}
        content = [content[key] for key in sorted(content, key=_number)]
    if not isinstance(content, list) or not content or not all(isinstance(item, Mapping) for item in content):
        raise DataError(
            str(path), why='expected a list of folds such as {"train": [case, …], "val": [case, …]}'
        )
    pair = _pair(path, content[0], cohort, keys)
    folds = []
    for number, entry in enumerate(content):
        parts = []
        for key in pair:
            if not isinstance(entry.get(key), list):
                raise DataError(str(path), why=f"fold {number} has no list '{key}'")
            parts.append(_cases(path, f"fold {number}, {key}", entry[key]))
        both = sorted(set(parts[0]) & set(parts[1]))
        if both:
            raise DataError(
                str(path),
                why=f"fold {number}: {len(both)} cases are in {pair[0]} and {pair[1]}: {_some(both)}",
                do="list each case once",
            )
        folds.append(Fold(parts[0], parts[1]))
    return tuple(folds)


def read_test(path: Path) -> tuple[str, ...]:
    """Read the test cases of a cohort.

    Raises:
        DataError: The file is damaged or holds no list of cases.
    """
    content = _read(path)
    if isinstance(content, Mapping):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        chosen = [key for key in ("bx_test", "test") if key in lists] or list(lists)
        if len(chosen) != 1 and "bx_test" not in chosen:
            raise DataError(str(path), why=f"expected one list of test cases, found {sorted(lists)}")
        content = lists[chosen[0]]
    if not isinstance(content, list):
        raise DataError(str(path), why='expected a list of cases, or {"bx_test": [{"Anon_ID": case}, …]}')
    return _cases(path, "test list", content)


def other_validation_lists(folds: Sequence[Fold], k: int) -> Fold:
    """The rule of ``fold_num: -1``: validation is fold `k`, training the validation lists of all others.

    So each case is trained on once and none of the validation fold, whatever the training lists say.
    """
    train = dict.fromkeys(case for number, fold in enumerate(folds) if number != k for case in fold.val)
    return Fold(tuple(train), folds[k].val)


def _pair(path: Path, entry: Mapping[str, Any], cohort: str, keys: Sequence[str]) -> tuple[str, str]:
    lists = [str(key) for key, value in entry.items() if isinstance(value, list)]
    if keys:
        missing = [key for key in keys if key not in lists]
        if missing:
            raise DataError(str(path), why=f"no list '{missing[0]}', there are {sorted(lists)}")
        return keys[0], keys[1]
    outer, inner = set(_OUTER) <= set(lists), set(_INNER) <= set(lists)
    if outer and (not inner or cohort == "stanford"):
        return _OUTER
    if inner and (not outer or cohort in ("picai", "ucla")):
        return _INNER
    pairs = [
        (train, val)
        for train in lists
        for val in lists
        if "train" in train.casefold() and "val" in val.casefold() and train != val
    ]
    if len(pairs) != 1:
        raise DataError(
            str(path),
            why=f"{'several pairs' if pairs else 'no pair'} of training and validation lists among "
            f"{sorted(lists)}",
            do=f"name them in the dataset file: {cohort}_fold_keys: [training key, validation key]",
        )
    return pairs[0]


def _cases(path: Path, where: str, items: Sequence[Any]) -> tuple[str, ...]:
    names = []
    for item in items:
        if isinstance(item, Mapping):
            item = next((item[key] for key in CASE_KEYS if key in item), None)
        if isinstance(item, bool) or not isinstance(item, (str, int)):
            raise DataError(str(path), why=f"{where}: {item!r} is no case identifier")
        names.append(safe_case_id(str(item)))
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise DataError(str(path), why=f"{where} lists cases twice: {_some(twice)}", do="list each case once")
    return tuple(names)


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise DataError(str(path), why="larger than 64 MiB")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(str(path), why="no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(str(path), why=f"cannot be read as JSON ({error})") from error


def _number(key: str) -> tuple[int, str]:
    digits = "".join(char for char in str(key) if char.isdigit())
    return (int(digits) if digits else -1, str(key))


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
