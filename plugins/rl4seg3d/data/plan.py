"""How a sequence becomes what the network sees, resolved for one source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from medrl.core.adaptation.labels import join_labels, values_by_name

from ..data_config import SampleConfig
from ..io import EchoSequence, Plan, Prepared


@dataclass(frozen=True, kw_only=True)
class SequencePlan:
    """How sequences are prepared; a checkpoint holds it, so that prediction does the same.

    Attributes:
        spacing_mm: Pixel size after resampling; None keeps that of the file.
        multiple: Frames are filled up to a multiple of this.
        equalise: CLAHE: ``auto``, ``on`` or ``off``.
        merge: Labels that are joined, by name.
        label_names: Values of the labels that are left, background 0 first.
        values: Value in the files of the source to value in `label_names`.
        channel_names: Channels of the images.
    """

    spacing_mm: tuple[float, float] | None
    multiple: int
    equalise: Literal["auto", "on", "off"]
    merge: Mapping[str, str]
    label_names: Mapping[str, int]
    values: Mapping[int, int]
    channel_names: tuple[str, ...] = ("echo",)

    @property
    def frames(self) -> Plan:
        """The part that prepares frames."""
        return Plan(spacing_mm=self.spacing_mm, multiple=self.multiple, equalise=self.equalise)

    def values_of(self, declared: Mapping[str, int] | None) -> dict[int, int]:
        """Values in the files of another dataset to values in `label_names`, matched by name."""
        return values_by_name(declared, merge=self.merge, label_names=self.label_names, values=self.values)

    def to_meta(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "spacing_mm": None if self.spacing_mm is None else list(self.spacing_mm),
            "multiple": self.multiple,
            "equalise": self.equalise,
            "merge": dict(self.merge),
            "label_names": dict(self.label_names),
            "values": [[old, new] for old, new in sorted(self.values.items())],
            "channel_names": list(self.channel_names),
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> SequencePlan:
        """Rebuild what `to_meta` gave."""
        spacing = meta["spacing_mm"]
        return cls(
            spacing_mm=None if spacing is None else (float(spacing[0]), float(spacing[1])),
            multiple=int(meta["multiple"]),
            equalise=cast("Literal['auto', 'on', 'off']", str(meta["equalise"])),
            merge={str(name): str(other) for name, other in meta["merge"].items()},
            label_names={str(name): int(value) for name, value in meta["label_names"].items()},
            values={int(old): int(new) for old, new in meta["values"]},
            channel_names=tuple(str(name) for name in meta["channel_names"]),
        )


def make_plan(sample: SampleConfig, labels: Mapping[str, int]) -> SequencePlan:
    """Resolve the settings for a source with these labels.

    Raises:
        ConfigError: Labels cannot be joined as asked for.
    """
    merge, names, values = join_labels(labels, sample.merge)
    return SequencePlan(
        spacing_mm=sample.spacing_mm if all(sample.spacing_mm) else None,
        multiple=sample.multiple,
        equalise=sample.equalise,
        merge=merge,
        label_names=names,
        values=values,
    )


def label_on_grid(
    labels: NDArray[Any], sequence: EchoSequence, prepared: Prepared, values: Mapping[int, int]
) -> NDArray[np.uint8]:
    """Bring labels of a file to the grid of its prepared frames: nearest pixel, filled up with background.

    Args:
        labels: ``(X, Y, T)`` of the file.
        sequence: The frames of the file.
        prepared: What became of them.
        values: Value in the file to value that training sees.

    Returns:
        ``(X', Y', T)``.
    """
    table = np.zeros(max(int(labels.max()), *values) + 1, dtype=np.uint8)
    for old, new in values.items():
        table[old] = new
    picks = []
    for axis in (0, 1):
        size, room = labels.shape[axis], prepared.inner[axis]
        count = room.stop - room.start
        step = prepared.spacing_mm[axis] / sequence.spacing_mm[axis]
        place = (np.arange(count) - (count - 1) / 2) * step + (size - 1) / 2
        picks.append(np.clip(np.round(place), 0, size - 1).astype(np.int64))
    found = np.zeros(prepared.images.shape, dtype=np.uint8)
    found[prepared.inner] = table[labels.astype(np.int64)][picks[0]][:, picks[1]]
    return found
