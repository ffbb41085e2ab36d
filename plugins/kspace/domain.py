"""The data as the stages see it: cases of each part, what their slices are, what checkpoints say of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from medrl.core.errors import DataError

from .cases import Cases, Geometry
from .config import KspaceConfig
from .data import Parts, SliceSet, as_cases, load_data

Part = Literal["train", "val", "test"]
IN_MEMORY = 2**30
"""Bytes of k-space of a part up to which it is held in memory."""


@dataclass(frozen=True)
class SliceInfo:
    """What a slice of a case is.

    Attributes:
        slice: Number within its frame; -1 where unknown.
        spacing_mm: Between rows, columns and slices; NaN where unknown.
    """

    id: str
    patient: str
    frame: str
    slice: int
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Data:
    """A dataset, divided by patient.

    Attributes:
        parts: The slices by duty.
    """

    parts: Parts
    _made: dict[tuple[object, ...], Cases] = field(default_factory=dict)

    @property
    def label_names(self) -> Mapping[str, int]:
        """Label values by name, background 0 first."""
        return self.parts.plan.label_names

    @property
    def classes(self) -> int:
        """K, background included; 0 where the training slices have no labels."""
        return len(self.label_names) if self.parts.train.labels is not None else 0

    def has(self, part: Part) -> bool:
        """Whether there are slices of a part."""
        return getattr(self.parts, part) is not None

    def slices(self, part: Part) -> SliceSet:
        """The slices of a part.

        Raises:
            DataError: There are none.
        """
        found: SliceSet | None = getattr(self.parts, part)
        if found is None:
            do = "--set data.test_fold=1" if part == "test" else "more patients, or fewer data.folds"
            raise DataError(f"{part} cases", why="there are none", do=do)
        return found

    def cases(
        self, part: Part, cfg: KspaceConfig, device: torch.device, *, supervised: bool = False
    ) -> Cases:
        """The cases of a part in the geometry of the config.

        Args:
            part: Which.
            cfg: Geometry, initial lines and lines that may be acquired.
            device: Where results are wanted.
            supervised: For training of networks: slices of stacks one by one, and all columns.
        """
        key = (part, supervised, cfg.acquisition)
        if key not in self._made:
            self._made[key] = cases_of(self.slices(part), cfg, supervised=supervised)
        return replace(self._made[key], device=device)

    def info(self, part: Part, cfg: KspaceConfig) -> list[list[SliceInfo]]:
        """What the slices of each case are, in the order of `cases`."""
        return info_of(self.slices(part), cfg)

    def digest(self) -> str:
        """SHA-256 of what training reads: slices and labels of training and validation."""
        return hashlib.sha256(
            "\n".join(self.slices(part).digest for part in ("train", "val")).encode()
        ).hexdigest()

    def facts(self, cfg: KspaceConfig) -> dict[str, Any]:
        """What a checkpoint says of the data."""
        train = self.parts.train
        spacing = [float(value) for value in train.spacing_mm.nanmedian(dim=0).values]
        return {
            "label_names": dict(self.label_names),
            "channel_names": list(self.parts.dataset.channel_names),
            "spacing": [value if math.isfinite(value) else None for value in spacing],
            "plan": self.parts.plan.to_meta(),
            "classes": self.classes,
            "matrix": list(train.shape),
            "depth": self._depth(cfg),
            "caveats": list(train.caveats),
            "patients": {
                part: sorted(set(self.slices(part).patients)) for part in ("train", "val") if self.has(part)
            },
        }

    def _depth(self, cfg: KspaceConfig) -> int:
        if cfg.acquisition.geometry == "slice":
            return 1
        return max(len(volume) for volume in self.parts.train.volumes)


def load(cfg: KspaceConfig) -> Data:
    """Read what a config names; labels are opened only where they are needed.

    Raises:
        ConfigError: No dataset is named, or nothing is left to train on.
        DataError: Scans cannot be used, or there are no validation cases.
    """
    data = Data(load_data(cfg.data, cfg.sample))
    data.slices("val")
    return data


def cases_of(slices: SliceSet, cfg: KspaceConfig, *, supervised: bool = False) -> Cases:
    """Make cases of slices; arguments as in `Data.cases`."""
    play = cfg.acquisition
    geometry: Geometry = "slice" if supervised and play.geometry == "stack" else play.geometry
    lines = play.init_center if play.sensitivity_lines < 0 else play.sensitivity_lines
    size = len(slices) * math.prod(slices.kspace.shape[1:]) * 8
    return as_cases(
        slices,
        geometry=geometry,
        initial=play.init_center,
        indices=None if supervised else play.sampled_indices,
        points=play.points,
        sensitivity_lines=lines,
        mapped=size > IN_MEMORY,
    )


def info_of(slices: SliceSet, cfg: KspaceConfig) -> list[list[SliceInfo]]:
    """What the slices of each case are; see `Data.info`."""
    one_by_one = cfg.acquisition.geometry == "slice"
    groups: Sequence[Sequence[int]] = (
        [[index] for index in range(len(slices))] if one_by_one else slices.volumes
    )
    return [[_info(slices, index) for index in group] for group in groups]


def _info(slices: SliceSet, index: int) -> SliceInfo:
    rows, columns, between = slices.spacing_mm[index].tolist()
    return SliceInfo(
        id=slices.ids[index],
        patient=slices.patients[index],
        frame=slices.frames[index],
        slice=slices.slices[index],
        spacing_mm=(rows, columns, between),
    )
