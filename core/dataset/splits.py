"""Folds grouped by patient, and nnU-Net's ``splits_final.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Case
from medrl.core.volume.write import write_bytes

from .model import Dataset, Split, some
from .names import safe_case_id

SPLITS_FILE = "splits_final.json"
JSON_LIMIT = 64 * 2**20


def make_splits(
    dataset: Dataset, folds: int = 5, seed: int = 0, group_by: str = "patient"
) -> tuple[Split, ...]:
    """Divide the cases into `folds` validation parts of nearly equal size, whole patients only.

    Patients are shuffled with `seed`, then dealt out, those with most cases first, each to the fold
    with the fewest cases. The result depends on identifiers, `folds` and `seed` alone.

    Raises:
        ConfigError: Fewer than two folds, or fewer patients than folds.
    """
    groups: dict[str, list[Case]] = {}
    for case in regroup(dataset.cases, group_by):
        groups.setdefault(case.patient or case.id, []).append(case)
    if folds < 2 or folds > len(groups):
        raise ConfigError(
            "data.folds",
            why=f"{folds} folds of {len(groups)} patients ({len(dataset.cases)} cases)",
            do=f"choose 2 to {len(groups)} folds" if len(groups) > 1 else "add labelled cases",
        )
    names = sorted(groups)
    shuffled = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    parts: list[list[Case]] = [[] for _ in range(folds)]
    for name in sorted(shuffled, key=lambda name: -len(groups[name])):
        min(parts, key=len).extend(groups[name])
    return tuple(
        Split(
            train=_in_order(case for j, part in enumerate(parts) if j != k for case in part),
            val=_in_order(parts[k]),
            grouped=group_by != "case",
        )
        for k in range(folds)
    )


def regroup(cases: Sequence[Case], group_by: str) -> list[Case]:
    """Return the cases with `patient` set by the rule `group_by`.

    Raises:
        ConfigError: The rule is no regular expression with one group, or does not match a case.
    """
    if group_by == "patient":
        return list(cases)
    if group_by in {"case", "none", ""}:
        return [replace(case, patient=case.id) for case in cases]
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise ConfigError("data.group_by", why=f"'{group_by}' is no regular expression ({error})") from error
    if pattern.groups < 1:
        raise ConfigError(
            "data.group_by",
            why=f"'{group_by}' is neither patient nor case, and has no group in parentheses",
            do="write patient, case, or a pattern such as (patient\\d+)",
        )
    found = []
    for case in cases:
        match = pattern.search(case.id)
        if match is None or match.group(1) is None:
            raise ConfigError("data.group_by", why=f"'{group_by}' does not match case {case.id}")
        found.append(replace(case, patient=match.group(1)))
    return found


def write_splits(path: Path, splits: Sequence[Split]) -> Path:
    """Write ``splits_final.json`` into a folder (or to the given file), as nnU-Net reads it."""
    target = path / SPLITS_FILE if path.is_dir() else path
    content = [
        {"train": [case.id for case in split.train], "val": [case.id for case in split.val]}
        for split in splits
    ]
    write_bytes(target, json.dumps(content, indent=2).encode() + b"\n")
    return target


def read_splits(path: Path, dataset: Dataset, group_by: str = "patient") -> tuple[Split, ...]:
    """Read ``splits_final.json`` and find its cases in the dataset.

    Cases left out of the dataset with `exclude` are left out here too; other unknown cases are errors.

    Raises:
        DataError: The file is damaged, names unknown cases, or training and validation overlap.
    """
    known = {case.id: case for case in regroup(dataset.cases, group_by)}
    excluded = set(dataset.info.get("excluded", ()))
    splits = []
    for number, entry in enumerate(_entries(path)):
        parts: dict[str, tuple[Case, ...]] = {}
        for part in ("train", "val"):
            names = [safe_case_id(name) for name in entry[part] if name not in excluded]
            unknown = [name for name in names if name not in known]
            if unknown:
                raise DataError(
                    str(path),
                    why=f"fold {number} names cases that the dataset does not have: {some(unknown)}",
                    do="write new splits with `medrl data split`",
                )
            parts[part] = tuple(known[name] for name in names)
        if not parts["train"]:
            raise DataError(str(path), why=f"fold {number} has no training case")
        splits.append(
            Split(train=parts["train"], val=parts["val"], grouped=group_by not in {"case", "none", ""})
        )
    return tuple(splits)


def _entries(path: Path) -> list[dict[str, list[str]]]:
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise DataError(str(path), why="larger than 64 MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(str(path), why=f"cannot be read as JSON ({error})") from error
    entries = content if isinstance(content, list) else []
    for entry in entries:
        good = isinstance(entry, dict) and all(
            isinstance(entry.get(part), list) and all(isinstance(name, str) for name in entry[part])
            for part in ("train", "val")
        )
        if not good:
            entries = []
            break
    if not entries:
        raise DataError(str(path), why='expected a list of {"train": [case, …], "val": [case, …]}')
    return entries


def _in_order(cases: Iterable[Case]) -> tuple[Case, ...]:
    return tuple(sorted(cases, key=lambda case: case.id))
