"""Sequences of one part of a domain, and windows of four frames cut from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.adaptation import sets
from medrl.core.adaptation.sets import ImageSet
from medrl.core.errors import DataError

from ..windows import chunks
from .plan import SequencePlan

Window = tuple[int, tuple[int, ...]]
"""Number of a sequence, and the frames of it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SequenceSet:
    """Sequences as the network sees them, of any length, in order of their identifiers.

    Attributes:
        ids: Identifier of each sequence.
        subjects: Patient of each sequence.
        images: ``(C, X, Y, T)`` uint8 each, where 255 is 1.
        labels: ``(X, Y, T)`` uint8 each, or None where they were not asked for.
        spacing_mm: ``(N, 2)`` float64, size of the pixels.
        label_names: Label values by name, background 0 first.
        size: Pixels of a window along x and y; frames are filled up or cut about their centre.
    """

    ids: tuple[str, ...]
    subjects: tuple[str, ...]
    images: tuple[Tensor, ...]
    labels: tuple[Tensor, ...] | None
    spacing_mm: Tensor
    label_names: Mapping[str, int]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        sizes = {len(self.ids), len(self.subjects), len(self.images), len(self.spacing_mm)}
        if self.labels is not None:
            sizes.add(len(self.labels))
            for name, image, label in zip(self.ids, self.images, self.labels, strict=False):
                if label.shape != image.shape[1:]:
                    raise DataError(
                        f"case {name}",
                        why=f"labels {tuple(label.shape)} on frames {tuple(image.shape[1:])}",
                        case=name,
                    )
        if len(sizes) != 1:
            raise DataError("sequences", why=f"frames, labels and names differ in number: {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def classes(self) -> int:
        """K, background included."""
        return len(self.label_names)

    @property
    def channels(self) -> int:
        """Channels of the frames."""
        return int(self.images[0].shape[0])

    def frames(self, number: int) -> int:
        """Frames of a sequence."""
        return int(self.images[number].shape[-1])

    def subset(self, index: Sequence[int]) -> SequenceSet:
        """The sequences with these numbers, in this order."""
        at = list(index)
        return replace(
            self,
            ids=tuple(self.ids[number] for number in at),
            subjects=tuple(self.subjects[number] for number in at),
            images=tuple(self.images[number] for number in at),
            labels=None if self.labels is None else tuple(self.labels[number] for number in at),
            spacing_mm=self.spacing_mm[torch.as_tensor(at, dtype=torch.int64)],
        )

    def resized(self, size: tuple[int, int]) -> SequenceSet:
        """The same sequences, with windows of another size."""
        return replace(self, size=size)

    def largest(self) -> tuple[int, int]:
        """The largest extent of a frame along x and y."""
        return max(int(image.shape[1]) for image in self.images), max(
            int(image.shape[2]) for image in self.images
        )

    def digest(self) -> str:
        """SHA-256 of names, size of the windows, frames and labels."""
        whole = hashlib.sha256("\0".join([*self.ids, *self.subjects, str(self.size)]).encode())
        for group in (self.images, self.labels or ()):
            for item in group:
                whole.update(str(tuple(item.shape)).encode() + item.contiguous().numpy().tobytes())
        return whole.hexdigest()

    def windows(self, chosen: Iterable[Window]) -> ImageSet:
        """Cut windows of frames; each is named after its sequence and its first frame."""
        picked = list(chosen)
        numbers = [number for number, _ in picked]
        images = [self._cut(self.images[number], frames) for number, frames in picked]
        labels = None
        if self.labels is not None:
            labels = torch.stack([self._cut(self.labels[number], frames) for number, frames in picked])
        return ImageSet(
            ids=tuple(f"{self.ids[number]}_t{frames[0]:03d}" for number, frames in picked),
            subjects=tuple(self.subjects[number] for number in numbers),
            images=torch.stack(images).to(torch.float32).div_(255.0),
            labels=labels,
            spacing_mm=self.spacing_mm[torch.as_tensor(numbers, dtype=torch.int64)],
            label_names=self.label_names,
        )

    def all_windows(self) -> list[Window]:
        """Windows without overlap that cover every sequence; the last of each ends with it."""
        return [
            (number, tuple(frames))
            for number in range(len(self.ids))
            for frames in chunks(self.frames(number))
        ]

    def some_windows(self, limit: int) -> ImageSet:
        """At most so many of `all_windows`, spread evenly; all if `limit` is 0.

        Raises:
            DataError: There is no sequence.
        """
        every = self.all_windows()
        if not every:
            raise DataError("sequences", why="there is none")
        count = min(limit, len(every)) if limit else len(every)
        return self.windows(every[k * len(every) // count] for k in range(count))

    def _cut(self, frames: Tensor, which: tuple[int, ...]) -> Tensor:
        """Take frames of ``(…, X, Y, T)``, and fill up or cut to the size of the windows."""
        picked = frames[..., list(which)]
        pads: list[int] = [0, 0]
        for axis in (-2, -3):
            missing = self.size[axis + 3] - picked.shape[axis]
            before = missing // 2
            pads += [before, missing - before]
        return F.pad(picked, pads) if any(pads) else picked


class Domain(sets.Domain[SequenceSet, SequencePlan]):
    """The sequences of one domain by their duty; no patient has two."""
