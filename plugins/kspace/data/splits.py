"""Folds by patient, stratified by group. No slice of a patient ever lies on both sides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from medrl.core.errors import ConfigError

_ACDC_GROUPS = ("DCM", "HCM", "MINF", "NOR", "RV")
_NUMBER = re.compile(r"patient(\d{3})$")

PUBLIC = 100
"""Patients of the public training set of ACDC; the others are its test set."""


def stratified_folds(
    patients: Sequence[str], groups: Mapping[str, str], *, folds: int = 5, seed: int = 0
) -> tuple[tuple[str, ...], ...]:
    """Deal patients to validation parts so that each part has every group in nearly equal number.

    The patients of a group are shuffled and dealt one after the other; the next group goes on where the last
    one ended, so that the parts differ in size by one at most.

    Args:
        patients: Their names.
        groups: Group by patient; those without one are a group.
        folds: Number of parts.
        seed: Of the shuffling.

    Raises:
        ConfigError: Fewer than two folds, or fewer patients than folds.
    """
    if folds < 2 or folds > len(patients):
        raise ConfigError(
            "data.folds",
            why=f"{folds} folds of {len(patients)} patients",
            do=f"choose 2 to {len(patients)} folds" if len(patients) > 1 else "add patients",
        )
    rng = np.random.default_rng(seed)
    parts: list[list[str]] = [[] for _ in range(folds)]
    turn = 0
    for group in sorted({groups.get(name, "") for name in patients}):
        members = sorted(name for name in patients if groups.get(name, "") == group)
        for index in rng.permutation(len(members)):
            parts[turn % folds].append(members[index])
            turn += 1
    return tuple(tuple(sorted(part)) for part in parts)


def acdc_number(patient: str) -> int | None:
    """Number of a patient of ACDC by its name, ``patient012``; None for other names."""
    match = _NUMBER.fullmatch(patient)
    return int(match.group(1)) if match else None


def acdc_group(patient: str) -> str:
    """Diagnosis of a patient of the public training set, which is numbered in blocks of twenty; else empty.

    >>> acdc_group("patient001"), acdc_group("patient062"), acdc_group("patient120")
    ('DCM', 'NOR', '')
    """
    number = acdc_number(patient)
    return _ACDC_GROUPS[(number - 1) // 20] if number is not None and 1 <= number <= PUBLIC else ""
