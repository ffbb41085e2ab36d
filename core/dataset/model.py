"""A dataset and a split of it into training and validation cases."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medrl.core.errors import ConfigError, DataError, did_you_mean
from medrl.core.types import Case


@dataclass(frozen=True)
class Split:
    """Training and validation cases of one fold.

    Raises:
        DataError: A case, or with `grouped` a patient, lies in both parts.
    """

    train: tuple[Case, ...]
    val: tuple[Case, ...]
    grouped: bool = True

    def __post_init__(self) -> None:
        both = sorted({case.id for case in self.train} & {case.id for case in self.val})
        if both:
            raise DataError(
                "the split",
                why=f"{len(both)} cases are in training and validation: {some(both)}",
                do="list each case once",
            )
        if not self.grouped:
            return
        patients = sorted(
            {case.patient or case.id for case in self.train} & {case.patient or case.id for case in self.val}
        )
        if patients:
            raise DataError(
                "the split",
                why=f"{len(patients)} patients have cases in training and validation: {some(patients)}",
                do="write new splits with `medrl data split`, or set data.group_by to case "
                "if these are different patients",
            )


class Dataset:
    """Cases of one dataset with the names of their channels and labels.

    Args:
        root: Folder of the dataset.
        labels: Label values by name, background 0 first; None where the layout does not tell, then
            `labels` reads the label files once, at first use.

    Attributes:
        cases: Cases with a reference segmentation, in order of their identifiers.
        test_cases: Cases set aside for testing or without reference segmentation.
        info: What else the dataset says about itself.
    """

    def __init__(
        self,
        *,
        root: Path,
        name: str = "",
        layout: str = "",
        channel_names: Iterable[str] = (),
        labels: Mapping[str, int] | None = None,
        cases: Iterable[Case] = (),
        test_cases: Iterable[Case] = (),
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.root = root
        self.name = name or root.name
        self.layout = layout
        self.channel_names = tuple(channel_names)
        self.declared_labels = dict(labels) if labels is not None else None
        self.cases = tuple(sorted(cases, key=lambda case: case.id))
        self.test_cases = tuple(sorted(test_cases, key=lambda case: case.id))
        self.info = dict(info or {})

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self.cases)} cases, {len(self.test_cases)} for testing)"

    @cached_property
    def labels(self) -> dict[str, int]:
        """Label values by name: ``{"background": 0, "liver": 1, …}``, without gaps.

        Raises:
            DataError: The values are not 0, 1, 2, … or a label file cannot be read.
        """
        labels = self.declared_labels if self.declared_labels is not None else self._found_labels()
        if sorted(labels.values()) != list(range(len(labels))):
            source = "msd" if self.layout == "msd" else "folder"
            raise DataError(
                f"dataset {self.name}",
                why=f"label values are {sorted(labels.values())}, expected 0, 1, 2, … without gaps",
                do=f"medrl data convert {self.root} NEW_FOLDER --from {source}",
            )
        return dict(sorted(labels.items(), key=lambda item: item[1]))

    def _found_labels(self) -> dict[str, int]:
        from .loading import find_labels

        return find_labels(self.cases)

    def case(self, case_id: str) -> Case:
        """Return a case by its identifier, training or test.

        Raises:
            DataError: There is no such case; near matches are named.
        """
        known = {case.id: case for case in (*self.test_cases, *self.cases)}
        if case_id not in known:
            raise DataError(
                f"dataset {self.name}", why=f"no case '{case_id}'", do=did_you_mean(case_id, known)
            )
        return known[case_id]

    def fold(self, k: int, folds: int = 5, seed: int = 0, group_by: str = "patient") -> Split:
        """Return fold `k`: from ``splits_final.json`` of the dataset, else made from `seed`.

        Args:
            k: Fold number from 0.
            folds: Number of folds, ignored where ``splits_final.json`` is present.
            seed: The same seed and cases give the same folds on every machine.
            group_by: ``patient``, ``case`` (no grouping), or a regular expression whose first group
                names the patient in a case identifier.

        Raises:
            ConfigError: There is no such fold.
            DataError: Training and validation overlap.
        """
        from .splits import SPLITS_FILE, make_splits, read_splits

        path = self.root / SPLITS_FILE
        splits = (
            read_splits(path, self, group_by) if path.is_file() else make_splits(self, folds, seed, group_by)
        )
        if not 0 <= k < len(splits):
            raise ConfigError(
                "data.fold",
                why=f"fold {k} does not exist, there are {len(splits)}",
                do=f"choose 0 to {len(splits) - 1}",
            )
        return splits[k]

    def signature(self) -> str:
        """Return a hash of identifiers, file names and sizes: cheap, changes when files come or go."""
        digest = hashlib.sha256()
        for case in (*self.cases, *self.test_cases):
            for path in (*case.images, *([case.label] if case.label else [])):
                size = path.stat().st_size if path.is_file() else 0
                digest.update(f"{case.id}\0{path.name}\0{size}\n".encode())
        return digest.hexdigest()


def some(names: Iterable[str], limit: int = 5) -> str:
    """Return the first names and how many more there are."""
    items = list(names)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
