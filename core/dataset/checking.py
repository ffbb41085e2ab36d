"""The integrity report: every file of a dataset read once, every problem named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.core.errors import MedrlError
from medrl.core.types import Case, Volume
from medrl.core.volume import grid_difference, present_labels, turn_like

from .layouts import Scan, scan_dataset
from .loading import load_case, read_of_case
from .model import Dataset


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: the case (if one), the file, and why."""

    case: str
    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.case}: {self.path}: {self.why}" if self.case else f"{self.path}: {self.why}"


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What `check_dataset` found.

    Attributes:
        problems: Everything that would stop or falsify training.
        notes: What is unusual but allowed, such as channels on different grids.
        empty: Cases whose reference segmentation is all background: allowed, and counted.
        label_counts: In how many cases each label value occurs.
    """

    root: Path
    layout: str
    cases: int
    test_cases: int
    channel_names: tuple[str, ...]
    labels: dict[str, int]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    label_counts: dict[int, int] | None = None

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "root": str(self.root),
            "layout": self.layout,
            "cases": self.cases,
            "test_cases": self.test_cases,
            "channel_names": list(self.channel_names),
            "labels": self.labels,
            "problems": [{"case": item.case, "path": item.path, "why": item.why} for item in self.problems],
            "notes": list(self.notes),
            "empty": list(self.empty),
            "label_counts": {str(value): count for value, count in (self.label_counts or {}).items()},
            "ok": self.ok,
        }


def check_dataset(
    root: Path | str,
    *,
    layout: str = "auto",
    exclude: Sequence[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> DatasetReport:
    """Read every file of a dataset and report all problems; a damaged case never raises.

    Args:
        root: Dataset folder or manifest.
        layout: As for `open_dataset`.
        exclude: Cases to leave out.
        progress: Called with ``(done, total, case)`` before each case.
    """
    root = Path(root)
    try:
        scan = scan_dataset(root, layout=layout, exclude=exclude)
    except MedrlError as error:
        problem = Problem(case="", path=error.what, why=error.why)
        return DatasetReport(
            root=root, layout=layout, cases=0, test_cases=0, channel_names=(), labels={}, problems=(problem,)
        )
    check = _Check(scan)
    cases = (*scan.dataset.cases, *scan.dataset.test_cases)
    for done, case in enumerate(cases):
        if progress is not None:
            progress(done, len(cases), case.id)
        check.case(case)
    return check.report(root)


class _Check:
    """Collects what reading case after case brings to light."""

    def __init__(self, scan: Scan) -> None:
        self.dataset: Dataset = scan.dataset
        self.problems = [Problem(case=case, path=path, why=why) for case, path, why in scan.problems]
        self.notes: list[str] = []
        self.empty: list[str] = []
        self.counts: dict[int, int] = {}
        self.seen: dict[str, Case] = {}

    def case(self, case: Case) -> None:
        try:
            image, label = load_case(self.dataset, case, with_label=case.label is not None)
            for path in case.masks.values():
                read_of_case(case, path, self.dataset.root, kind="label")
        except MedrlError as error:
            what = error.what.removeprefix(f"case {case.id}").removeprefix(": ")
            self.problems.append(Problem(case=case.id, path=what or case.images[0].name, why=error.why))
            return
        self._grids(case, image)
        self._content(case, image)
        if label is not None:
            found = present_labels(label.data)
            for value in found:
                self.counts[value] = self.counts.get(value, 0) + 1
            if set(found) == {0}:
                self.empty.append(case.id)

    def _grids(self, case: Case, image: Volume) -> None:
        for path in case.images[1:]:
            volume = read_of_case(case, path)
            difference = grid_difference(volume, image)
            if difference and turn_like(volume, image) is None:
                self.notes.append(
                    f"{case.id}: {path.name} is resampled onto the first channel ({difference})"
                )

    def _content(self, case: Case, image: Volume) -> None:
        """Find the same voxels under two names, which would leak between training and validation."""
        if image.data.min() == image.data.max():
            self.problems.append(Problem(case=case.id, path=case.images[0].name, why="all voxels are equal"))
            return
        digest = hashlib.sha256(image.data.tobytes()).hexdigest()
        other = self.seen.setdefault(digest, case)
        if other.id != case.id:
            self.problems.append(
                Problem(case=case.id, path=case.images[0].name, why=f"the same voxels as case {other.id}")
            )

    def report(self, root: Path) -> DatasetReport:
        dataset = self.dataset
        expected = dataset.info.get("numTraining")
        if expected is not None:
            self.problems.append(
                Problem(
                    case="", path="dataset.json", why=f"numTraining is {expected}, found {len(dataset.cases)}"
                )
            )
        if not dataset.cases and not dataset.test_cases and not self.problems:
            self.problems.append(Problem(case="", path=str(root), why="no case was found"))
        labels = dataset.declared_labels
        if labels is None:
            values = sorted({0, *self.counts})
            labels = {"background" if value == 0 else f"label_{value}": value for value in values}
            self.notes.append("dataset.json names no labels; names are made from the values")
        if sorted(labels.values()) != list(range(len(labels))):
            why = f"label values {sorted(labels.values())} have gaps; convert with `medrl data convert`"
            self.problems.append(Problem(case="", path="dataset.json", why=why))
        self.notes += [
            f"label {name} ({value}) occurs in no case"
            for name, value in labels.items()
            if dataset.cases and value not in self.counts and not self.problems
        ]
        return DatasetReport(
            root=root,
            layout=dataset.layout,
            cases=len(dataset.cases),
            test_cases=len(dataset.test_cases),
            channel_names=dataset.channel_names,
            labels=labels,
            problems=tuple(self.problems),
            notes=tuple(self.notes),
            empty=tuple(self.empty),
            label_counts=dict(sorted(self.counts.items())),
        )
