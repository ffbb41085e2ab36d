"""How the cases of one dataset become samples: every `auto` resolved, kept in the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError

from .regions import Target, make_target
from .windows import Size, Window, centre_window, mask_window


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """Everything that turns a case into a sample; resolved once, stored in the checkpoint.

    Attributes:
        window: `mask` or `centre`.
        size: ``(D, H, W)`` of the box.
        mask: Name of the organ mask.
        normalization: `stats`, `mask` or `volume`.
        statistics: Mean and standard deviation of each channel by case; the key ``*`` is for all others.
        target_kind: What the network's channels mean, see `regions.make_target`.
        labels: Label values by name, background first.
        channel_names: Channels of the images.
        spacing: Median voxel size (X, Y, Z) of the training cases in mm.
    """

    window: str
    size: Size
    mask: str
    normalization: str
    target_kind: str
    labels: Mapping[str, int]
    channel_names: tuple[str, ...]
    spacing: tuple[float, float, float] = (0.0, 0.0, 0.0)
    statistics: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)

    @property
    def target(self) -> Target:
        """The channels of the network and how they become labels."""
        return make_target(self.target_kind, self.labels)

    @property
    def needs_mask(self) -> bool:
        """Whether a case without organ mask cannot be prepared."""
        return "mask" in (self.window, self.normalization)

    def window_of(self, shape: Sequence[int], mask: NDArray[Any] | None) -> Window:
        """The box of a case with image shape ``(D, H, W)``."""
        if self.window == "mask" and mask is not None:
            return mask_window(mask, self.size)
        return centre_window(shape, self.size)

    def normalise(self, image: NDArray[Any], mask: NDArray[Any] | None, case_id: str) -> NDArray[np.float32]:
        """z-score each channel of ``(C, D, H, W)``; a standard deviation of 0 counts as 1.

        Raises:
            DataError: The statistics of this case are missing or of another number of channels.
        """
        if self.normalization == "stats":
            mean, std = self._statistics_of(case_id, image.shape[0])
        else:
            inside = image.reshape(image.shape[0], -1)
            if self.normalization == "mask" and mask is not None and mask.any():
                inside = image[:, mask > 0]
            mean = inside.mean(axis=1, dtype=np.float64)
            std = inside.std(axis=1, dtype=np.float64)
        std = np.where(std > 0, std, 1.0)
        scaled = (image - mean[:, None, None, None]) / std[:, None, None, None]
        return np.ascontiguousarray(scaled, dtype=np.float32)

    def _statistics_of(self, case_id: str, channels: int) -> tuple[NDArray[Any], NDArray[Any]]:
        entry = self.statistics.get(case_id) or self.statistics.get("*")
        if entry is None:
            raise DataError(
                f"case {case_id}",
                why="the statistics file has no entry for it",
                do="add it, or use --set sample.normalization=mask",
                case=case_id,
            )
        if len(entry[0]) != channels:
            raise DataError(
                f"case {case_id}",
                why=f"the statistics file gives {len(entry[0])} channels, the image has {channels}",
                case=case_id,
            )
        return np.asarray(entry[0], dtype=np.float64), np.asarray(entry[1], dtype=np.float64)

    def to_meta(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "window": self.window,
            "size": list(self.size),
            "mask": self.mask,
            "normalization": self.normalization,
            "target": self.target_kind,
            "labels": dict(self.labels),
            "channel_names": list(self.channel_names),
            "spacing": list(self.spacing),
            "statistics": {key: [list(mean), list(std)] for key, (mean, std) in self.statistics.items()},
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> SamplePlan:
        """Rebuild what `to_meta` gave."""
        depth, height, width = (int(extent) for extent in meta["size"])
        x, y, z = (float(extent) for extent in meta["spacing"])
        return cls(
            window=str(meta["window"]),
            size=(depth, height, width),
            mask=str(meta["mask"]),
            normalization=str(meta["normalization"]),
            target_kind=str(meta["target"]),
            labels={str(name): int(value) for name, value in meta["labels"].items()},
            channel_names=tuple(str(name) for name in meta["channel_names"]),
            spacing=(x, y, z),
            statistics={
                str(key): (tuple(map(float, mean)), tuple(map(float, std)))
                for key, (mean, std) in meta["statistics"].items()
            },
        )


def read_statistics(
    path: Path, channel_names: Sequence[str]
) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Read means and standard deviations by case, or for all cases (key ``*``).

    An entry is ``{"mean": …, "std": …}`` with numbers or lists, ``[mean, std, mean, std, …]`` by channel, or
    ``{"t2": {"mean": …, "std": …}, …}`` by channel name. The file is one entry, or maps cases to entries.

    Raises:
        DataError: The file is damaged or an entry has none of these forms.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(path), why=f"cannot be read as JSON ({error})") from error
    single = _statistics_entry(content, channel_names)
    if single is not None:
        return {"*": single}
    found = {}
    for case_id, entry in content.items() if isinstance(content, dict) else ():
        parsed = _statistics_entry(entry, channel_names)
        if parsed is None:
            raise DataError(
                str(path),
                why=f"the entry of case {case_id} has none of the known forms",
                do="see README of graft",
            )
        found[str(case_id)] = parsed
    if not found:
        raise DataError(str(path), why="it names no case")
    return found


def _statistics_entry(
    entry: Any, channel_names: Sequence[str]
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    count = len(channel_names)
    try:
        if isinstance(entry, list) and len(entry) == 2 * count:
            return tuple(float(item) for item in entry[0::2]), tuple(float(item) for item in entry[1::2])
        if not isinstance(entry, dict):
            return None
        if set(entry) >= {"mean", "std"}:
            mean, std = (
                np.broadcast_to(np.asarray(entry[key], dtype=float), count) for key in ("mean", "std")
            )
            return tuple(map(float, mean)), tuple(map(float, std))
        folded = {str(name).casefold(): value for name, value in entry.items()}
        values = [folded[name.casefold()] for name in channel_names]
        return tuple(float(item["mean"]) for item in values), tuple(float(item["std"]) for item in values)
    except (KeyError, TypeError, ValueError):
        return None
