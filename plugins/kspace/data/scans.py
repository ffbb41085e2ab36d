"""Scans as files give them, and datasets of scans, split by patient."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medrl.core.dataset import Dataset, Split
from medrl.core.dataset.splits import SPLITS_FILE, regroup
from medrl.core.errors import ConfigError, DataError, did_you_mean
from medrl.core.types import Case, Volume

from .splits import stratified_folds

LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
"""Label values of ACDC."""

UNKNOWN = (float("nan"), float("nan"), float("nan"))

_PHASE = re.compile(r"_(ED|ES)(?:_|$)", re.IGNORECASE)
_FRAME = re.compile(r"_frame(\d+)", re.IGNORECASE)


@dataclass(frozen=True, eq=False, kw_only=True)
class RawScan:
    """N slices as a file holds them: magnitude images, or k-space.

    Rows are y and the readout, columns x and the phase encoding, as slice-first arrays are stored; images of
    NIfTI files ``(X, Y, Z)`` are brought to ``(Z, Y, X)``.

    Attributes:
        names: Name of each slice within its case, such as ``z003``.
        frames: Frame of each slice: ``ED``, ``ES``, ``t07``; empty where unknown.
        slices: Number of each slice within its frame; -1 where unknown.
        spacing_mm: Between rows, columns and slices; NaN where unknown.
        images: ``(N, H, W)`` float32.
        kspace: ``(N, [C], H, W)`` complex64, centred and orthonormal.
        labels: ``(N, H, W)`` uint8, of images only.
        sensitivities: ``(N, C, H, W)`` complex64, of several coils.
        missing: ``(W,)`` bool, columns of k-space that hold no measurement.
        reference: ``(N, h, w)`` float32, a reconstruction that the file brings, as it is.
        shift_k: Columns by which the dataset wants the k-space centre displaced.
        volume: The image file, whose grid results are written on.
    """

    names: tuple[str, ...]
    frames: tuple[str, ...]
    slices: tuple[int, ...]
    spacing_mm: tuple[float, float, float] = UNKNOWN
    images: NDArray[np.float32] | None = None
    kspace: NDArray[np.complex64] | None = None
    labels: NDArray[np.uint8] | None = None
    sensitivities: NDArray[np.complex64] | None = None
    missing: NDArray[np.bool_] | None = None
    reference: NDArray[np.float32] | None = None
    shift_k: float = 0.0
    volume: Volume | None = None

    def __post_init__(self) -> None:
        values = self.images if self.images is not None else self.kspace
        if values is None or (self.images is not None and self.kspace is not None):
            raise DataError("scan", why="it needs either images or k-space")
        counts = {len(self.names), len(self.frames), len(self.slices), len(values)}
        counts |= {len(other) for other in (self.labels, self.sensitivities) if other is not None}
        if len(counts) != 1:
            raise DataError("scan", why=f"slices, names and frames differ in number: {sorted(counts)}")


Reader: TypeAlias = Callable[[Case, bool], RawScan]


class ScanDataset(Dataset):
    """Scans with what their dataset says of them.

    Args:
        root: Folder or file.
        layout: Name of the reader.
        scans: Every case.
        read: Reads a case, with its labels or without opening them.
        apart: Identifiers of the cases set aside for testing.
        parts: Identifiers by ``train`` and ``val``, where the dataset deals them itself.
        groups: Group of a patient by which folds are stratified, such as the diagnosis.
        labels: Label values by name.
        beside: Further files that a case is made of.
        exclude: Identifiers to leave out.

    Attributes:
        scans: Every case, in order.

    Raises:
        ConfigError: A case to leave out does not exist.
        DataError: Two cases have one name, or there is none.
    """

    def __init__(
        self,
        *,
        root: Path,
        layout: str,
        scans: Iterable[Case],
        read: Reader,
        apart: Iterable[str] = (),
        parts: Mapping[str, Iterable[str]] | None = None,
        groups: Mapping[str, str] | None = None,
        labels: Mapping[str, int] | None = None,
        beside: Mapping[str, Sequence[Path]] | None = None,
        exclude: Sequence[str] = (),
        name: str = "",
    ) -> None:
        found = sorted(scans, key=lambda case: case.id)
        names = [case.id for case in found]
        for left_out in exclude:
            if left_out not in names:
                raise ConfigError("exclude", why=f"no case '{left_out}'", do=did_you_mean(left_out, names))
        if len(set(names)) < len(names):
            twice = sorted({one for one in names if names.count(one) > 1})
            raise DataError(str(root), why=f"case {twice[0]} is there twice", do="rename one of its files")
        self.scans = tuple(case for case in found if case.id not in exclude)
        if not self.scans:
            raise DataError(str(root), why=f"no scan of the layout `{layout}` is found here")
        self.apart = frozenset(apart) - frozenset(exclude)
        self.parts = {part: frozenset(ids) for part, ids in (parts or {}).items()}
        self.groups = dict(groups or {})
        self.beside = {case: tuple(paths) for case, paths in (beside or {}).items()}
        self._read = read
        super().__init__(
            root=root if root.is_dir() else root.parent,
            name=name or root.name,
            layout=layout,
            channel_names=("MR",),
            labels=LABELS if labels is None else labels,
            cases=[case for case in self.scans if case.label is not None and case.id not in self.apart],
            test_cases=[case for case in self.scans if case.label is None or case.id in self.apart],
            info={"excluded": sorted(exclude)},
        )

    def read(self, case: Case, *, with_label: bool) -> RawScan:
        """Read a scan; without `with_label` no label is opened.

        Raises:
            DataError: A file is missing, damaged or inconsistent; the case is named.
        """
        try:
            raw = self._read(case, with_label and case.label is not None)
        except DataError as error:
            if error.case:
                raise
            raise DataError(
                f"case {case.id}: {error.what}", why=error.why, do=error.do, case=case.id
            ) from error
        known = set(self.labels.values())
        if raw.labels is not None and not set(np.unique(raw.labels).tolist()) <= known:
            values = sorted(set(np.unique(raw.labels).tolist()) - known)
            raise DataError(
                f"case {case.id}", why=f"label values {values} are unknown; known are {sorted(known)}",
                case=case.id,
            )  # fmt: skip
        return raw

    def files(self, case: Case, *, with_label: bool) -> tuple[Path, ...]:
        """Every file that `read` opens."""
        label = (case.label,) if with_label and case.label is not None else ()
        found: list[Path] = []
        for path in (*case.images, *label, *self.beside.get(case.id, ())):
            found += sorted(item for item in path.iterdir() if item.is_file()) if path.is_dir() else [path]
        return tuple(found)

    def fold(self, k: int, folds: int = 5, seed: int = 0, group_by: str = "patient") -> Split:
        """Return fold `k` of the scans that are not set aside, labelled or not, whole patients only.

        Parts that the dataset deals itself come first, then ``splits_final.json``, then folds stratified by
        group.

        Raises:
            ConfigError: There is no such fold.
            DataError: Training and validation overlap.
        """
        scans = regroup([case for case in self.scans if case.id not in self.apart], group_by)
        if {"train", "val"} <= set(self.parts):
            dealt = {
                part: tuple(case for case in scans if case.id in self.parts[part])
                for part in ("train", "val")
            }
            return Split(train=dealt["train"], val=dealt["val"], grouped=group_by != "case")
        if (self.root / SPLITS_FILE).is_file():
            return super().fold(k, folds, seed, group_by)
        dealt_patients = stratified_folds(
            sorted({case.patient for case in scans}), self.groups, folds=folds, seed=seed
        )
        if not 0 <= k < len(dealt_patients):
            raise ConfigError("data.fold", why=f"fold {k} does not exist, there are {len(dealt_patients)}")
        chosen = set(dealt_patients[k])
        return Split(
            train=tuple(case for case in scans if case.patient not in chosen),
            val=tuple(case for case in scans if case.patient in chosen),
            grouped=group_by != "case",
        )


@dataclass
class Listing:
    """What a reader found so far."""

    scans: list[Case] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    beside: dict[str, tuple[Path, ...]] = field(default_factory=dict)


def frames_of(ids: Iterable[str], known: Mapping[int, str] | None = None) -> dict[str, str]:
    """Name the frame of each case of one patient by its identifier.

    ``…_ED`` and ``…_ES`` say it themselves; ``…_frame12`` is looked up in `known`. Where nothing says more
    and there are exactly two frames, the earlier is taken for end-diastole, the later for end-systole, as it
    is in all but a few patients of ACDC.

    >>> frames_of(["p_frame01", "p_frame12"]), frames_of(["p_ED"])
    ({'p_frame01': 'ED', 'p_frame12': 'ES'}, {'p_ED': 'ED'})
    """
    found: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for case in ids:
        phase, frame = _PHASE.search(case), _FRAME.search(case)
        found[case] = phase.group(1).upper() if phase else ""
        if frame and not phase:
            numbers[case] = int(frame.group(1))
            found[case] = (known or {}).get(numbers[case], f"t{numbers[case]:02d}")
    distinct = sorted(set(numbers.values()))
    if not known and len(distinct) == 2:
        for case, number in numbers.items():
            found[case] = "ED" if number == distinct[0] else "ES"
    return found


def slices_first(data: NDArray[Any]) -> NDArray[Any]:
    """Bring voxels ``(X, Y, Z)`` to slices ``(Z, Y, X)``."""
    return np.ascontiguousarray(data.transpose(2, 1, 0))


def files_below(root: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or the files of a folder with these endings, hidden ones left out.

    Raises:
        DataError: There is nothing of that name.
    """
    if root.is_file():
        return [root] if root.name.lower().endswith(tuple(suffixes)) else []
    if not root.is_dir():
        raise DataError(str(root), why="no such file or folder")
    return sorted(
        path
        for path in root.iterdir()
        if path.is_file() and path.name.lower().endswith(tuple(suffixes)) and not path.name.startswith(".")
    )
