"""Prepared volumes that stay on the disk until they are looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from medrl.core.errors import DataError

from .plan import VolumePlan

OpenMask = Callable[[str, VolumePlan, tuple[str, ...] | None], Tensor]
"""Opens the mask of a case on the grid of its prepared volume; names of labels, or None for the target."""


@dataclass(frozen=True, eq=False, kw_only=True)
class VolumeSet:
    """N volumes in order of their identifiers.

    Attributes:
        ids: Identifier of each case.
        patients: Patient of each.
        volumes: ``(X, Y, Z)`` float32 in [0, 1] each, mapped from the cache.
        spacing_mm: ``(N, 3)`` float64, voxel size of the prepared volumes.
        presence: ``(N,)`` int8, whether the object is there; None where it is not known.
        keys: Of each volume, the key of its content and preparation.
        plans: The way back of each.
    """

    ids: tuple[str, ...]
    patients: tuple[str, ...]
    volumes: tuple[Tensor, ...]
    spacing_mm: Tensor
    presence: Tensor | None
    keys: tuple[str, ...]
    plans: tuple[VolumePlan, ...]
    opener: OpenMask | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = (self.ids, self.patients, self.volumes, self.spacing_mm, self.keys, self.plans)
        sizes = {len(part) for part in parts} | ({len(self.presence)} if self.presence is not None else set())
        if len(sizes) != 1:
            raise DataError("volumes", why=f"arrays and names differ in number: {sorted(sizes)}")
        if len(set(self.ids)) != len(self.ids):
            raise DataError("volumes", why="a case is there twice")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what every volume is made of, in order."""
        whole = hashlib.sha256()
        for name, key in zip(self.ids, self.keys, strict=True):
            whole.update(f"{name}\0{key}\n".encode())
        return whole.hexdigest()

    def subset(self, index: Sequence[int]) -> VolumeSet:
        """The volumes with these numbers, in this order; nothing is copied."""
        at = [int(number) for number in index]
        chosen = torch.as_tensor(at, dtype=torch.int64)
        return replace(
            self,
            ids=tuple(self.ids[k] for k in at),
            patients=tuple(self.patients[k] for k in at),
            volumes=tuple(self.volumes[k] for k in at),
            spacing_mm=self.spacing_mm[chosen],
            presence=None if self.presence is None else self.presence[chosen],
            keys=tuple(self.keys[k] for k in at),
            plans=tuple(self.plans[k] for k in at),
        )

    def labels(self) -> list[int]:
        """Labels of the images.

        Raises:
            DataError: They are not known.
        """
        if self.presence is None:
            raise DataError("labels of images", why="there are none for these volumes", do="presence.csv")
        return [int(value) for value in self.presence]

    def open_masks(
        self, ids: Sequence[str] | None = None, *, names: tuple[str, ...] | None = None
    ) -> list[Tensor]:
        """Open voxel masks: for evaluation, and for training only with label_source `crop`.

        Args:
            ids: Cases; all by default.
            names: Labels that are merged; the target by default.

        Returns:
            ``(X, Y, Z)`` bool on the grids of the prepared volumes.

        Raises:
            DataError: A case is unknown or has no mask.
        """
        places = {name: number for number, name in enumerate(self.ids)}
        found = []
        for case in self.ids if ids is None else ids:
            if case not in places or self.opener is None:
                raise DataError(f"case {case}", why="it is not among these volumes, or they have no masks")
            found.append(self.opener(case, self.plans[places[case]], names))
        return found
