"""Sets of prepared slices that stay on the disk until they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from medrl.core.errors import DataError

from ..simulate import Simulation, caveats


class Stacked:
    """Rows of several tensors as if they were one tensor ``(N, ...)``; memory-mapped tensors stay mapped.

    Indexing with a number gives a row, with numbers, a mask or a slice a new tensor. Where the first axis of
    rows (coils) differs, missing entries are zero.

    Args:
        sources: Tensors ``(n, ...)``.
        rows: Of each row, number of the source and row in it; None takes all rows of all sources.

    Raises:
        DataError: The sources are of different shape or type, or there is none.
    """

    def __init__(self, sources: Sequence[Tensor], rows: Sequence[tuple[int, int]] | None = None) -> None:
        if not sources:
            raise DataError("slices", why="there is none")
        first = sources[0]
        tails = {tuple(source.shape[2:]) for source in sources}
        heads = {int(source.shape[1]) for source in sources}
        if len(tails) > 1 or len({source.dtype for source in sources}) > 1 or (
            len(heads) > 1 and first.ndim < 4
        ):  # fmt: skip
            raise DataError(
                "scans",
                why=f"slices of shapes {sorted({tuple(source.shape[1:]) for source in sources})} in one set",
                do="set sample.shape",
            )
        self._sources = tuple(sources)
        every = [(number, row) for number, source in enumerate(sources) for row in range(len(source))]
        self._rows = tuple(every if rows is None else rows)
        self.shape = torch.Size((len(self._rows), max(heads), *first.shape[2:]))
        self.dtype = first.dtype
        self.device = first.device

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ndim(self) -> int:
        """Number of axes, the first included."""
        return len(self.shape)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        if isinstance(index, int):
            return self._row(index)
        if isinstance(index, slice):
            chosen = torch.arange(len(self))[index]
        else:
            chosen = torch.as_tensor(index)
            chosen = (
                chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen.to("cpu", torch.int64)
            )
        found = torch.zeros((chosen.numel(), *self.shape[1:]), dtype=self.dtype)
        for place, number in enumerate(chosen.flatten().tolist()):
            row = self._row(number)
            found[place, : row.shape[0]] = row
        return found.view((*chosen.shape, *self.shape[1:]))

    def subset(self, index: Sequence[int]) -> Stacked:
        """Rows with these numbers, in this order; nothing is copied."""
        return Stacked(self._sources, [self._rows[number] for number in index])

    def tensor(self) -> Tensor:
        """All rows as one tensor; without a copy where they are one whole source."""
        first = self._sources[0]
        if self._rows == tuple((0, row) for row in range(len(first))):
            return first
        return self[torch.arange(len(self))]

    def _row(self, number: int) -> Tensor:
        source, row = self._rows[number]
        return self._sources[source][row]


@dataclass(frozen=True, eq=False, kw_only=True)
class SliceSet:
    """N slices, in order of their scans.

    Attributes:
        ids: Name of each slice: its case and its number.
        cases: Case of each slice.
        patients: Patient of each slice.
        frames: ``ED``, ``ES``, ``t07`` and so on; empty where unknown.
        slices: Number within the frame; -1 where unknown.
        spacing_mm: ``(N, 3)`` float64, between rows, columns and slices; NaN where unknown.
        kspace: ``(N, [C], H, W)`` complex64.
        target: ``(N, H, W)`` float32, magnitude from all columns.
        labels: ``(N, H, W)`` uint8; None where they were not asked for, or there are none.
        sensitivities: ``(N, C, H, W)`` complex64, where the scans bring them.
        padding: ``(N, W)`` bool, columns that are never acquired.
        label_names: Label values by name, background 0 first.
        simulation: How k-space was made of images; None where it was measured.
        keys: Of each slice, the key that its content has in the cache.
    """

    ids: tuple[str, ...]
    cases: tuple[str, ...]
    patients: tuple[str, ...]
    frames: tuple[str, ...]
    slices: tuple[int, ...]
    spacing_mm: Tensor
    kspace: Stacked
    target: Stacked
    labels: Stacked | None
    sensitivities: Stacked | None
    padding: Tensor
    label_names: Mapping[str, int]
    simulation: Simulation | None
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        names = (self.ids, self.cases, self.patients, self.frames, self.slices, self.keys)
        arrays = (self.spacing_mm, self.padding, self.kspace, self.target, self.labels, self.sensitivities)
        sizes = {len(part) for part in names} | {len(part) for part in arrays if part is not None}
        if len(sizes) != 1:
            raise DataError("slices", why=f"arrays and names differ in number: {sorted(sizes)}")
        if len(set(self.ids)) != len(self.ids):
            twice = sorted({name for name in self.ids if self.ids.count(name) > 1})
            raise DataError("slices", why=f"{twice[0]} is there twice")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def classes(self) -> int:
        """K, background included."""
        return len(self.label_names)

    @property
    def multi_coil(self) -> bool:
        """Whether axis 1 of `kspace` is coils."""
        return self.kspace.ndim == 4

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return int(self.kspace.shape[-2]), int(self.kspace.shape[-1])

    @property
    def volumetric(self) -> bool:
        """Whether it is known which slices make a volume, and in which order."""
        return all(number >= 0 for number in self.slices)

    @cached_property
    def volumes(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the slices of each volume, one patient and frame, from the first slice to the last.

        Raises:
            DataError: That is not known, or a slice is there twice.
        """
        if not self.volumetric:
            raise DataError(
                "volumes",
                why="frames and slices of these scans are unknown",
                do="give PNG folders a meta.json, or measure slices alone",
            )
        found: dict[tuple[str, str], list[int]] = {}
        for index, key in enumerate(zip(self.patients, self._scans, strict=True)):
            found.setdefault(key, []).append(index)
        volumes = [tuple(sorted(part, key=lambda index: self.slices[index])) for part in found.values()]
        for part in volumes:
            numbers = [self.slices[index] for index in part]
            if len(set(numbers)) < len(numbers):
                raise DataError(self.ids[part[0]], why="a slice of its volume is there twice")
        return tuple(volumes)

    @property
    def _scans(self) -> list[str]:
        """Which scan a slice belongs to: its frame, and its case where the frame has no name."""
        return [frame or case for frame, case in zip(self.frames, self.cases, strict=True)]

    def volume_name(self, volume: Sequence[int]) -> str:
        """Name of a volume: patient and frame, or its case."""
        first = volume[0]
        patient, frame = self.patients[first], self.frames[first]
        return f"{patient}_{frame}" if frame else self.cases[first]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what every slice is made of, in order: names, files and preparation."""
        whole = hashlib.sha256()
        for name, key in zip(self.ids, self.keys, strict=True):
            whole.update(f"{name}\0{key}\n".encode())
        return whole.hexdigest()

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a report must say of this k-space."""
        return caveats(self.simulation)

    def subset(self, index: Sequence[int]) -> SliceSet:
        """The slices with these numbers, in this order; nothing is copied but what is small."""
        at = [int(number) for number in index]
        chosen = torch.as_tensor(at, dtype=torch.int64)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in at),
            cases=tuple(self.cases[i] for i in at),
            patients=tuple(self.patients[i] for i in at),
            frames=tuple(self.frames[i] for i in at),
            slices=tuple(self.slices[i] for i in at),
            keys=tuple(self.keys[i] for i in at),
            spacing_mm=self.spacing_mm[chosen],
            padding=self.padding[chosen],
            kspace=self.kspace.subset(at),
            target=self.target.subset(at),
            labels=None if self.labels is None else self.labels.subset(at),
            sensitivities=None if self.sensitivities is None else self.sensitivities.subset(at),
        )

    def of_patients(self, patients: Sequence[str]) -> SliceSet:
        """The slices of some patients.

        Raises:
            DataError: A patient is unknown.
        """
        unknown = sorted(set(patients) - set(self.patients))
        if unknown:
            raise DataError("patients", why=f"no patient '{unknown[0]}'")
        wanted = set(patients)
        return self.subset([index for index, name in enumerate(self.patients) if name in wanted])

    def without_labels(self) -> SliceSet:
        """The same slices, labels left out."""
        return replace(self, labels=None)
