"""Images of one part of a domain, prepared and stacked; and a domain of such parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medrl.core.errors import DataError

from .plan import SamplePlan


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSet:
    """Images as the network sees them, in order of their identifiers.

    Attributes:
        ids: Identifier of each image: its case, with ``_z<slice>`` where a case has several slices.
        subjects: Patient of each image.
        images: ``(N, C, H, W)`` float32 in [0, 1], axes in the order of the files.
        labels: ``(N, H, W)`` uint8, or None where they were not asked for.
        spacing_mm: ``(N, 2)`` float64, size of the pixels of `images`.
        label_names: Label values by name, background 0 first.
    """

    ids: tuple[str, ...]
    subjects: tuple[str, ...]
    images: Tensor
    labels: Tensor | None
    spacing_mm: Tensor
    label_names: Mapping[str, int]

    def __post_init__(self) -> None:
        sizes = {len(self.ids), len(self.subjects), len(self.images), len(self.spacing_mm)}
        if self.labels is not None:
            sizes.add(len(self.labels))
            if self.labels.shape[1:] != self.images.shape[2:]:
                raise DataError(
                    "images",
                    why=f"labels {tuple(self.labels.shape[1:])} on images {tuple(self.images.shape[2:])}",
                )
        if len(sizes) != 1:
            raise DataError("images", why=f"images, labels and names differ in number: {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def classes(self) -> int:
        """K, background included."""
        return len(self.label_names)

    def subset(self, index: Sequence[int]) -> ImageSet:
        """The images with these numbers, in this order."""
        at = list(index)
        chosen = torch.as_tensor(at, dtype=torch.int64)
        return replace(
            self,
            ids=tuple(self.ids[number] for number in at),
            subjects=tuple(self.subjects[number] for number in at),
            images=self.images[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            spacing_mm=self.spacing_mm[chosen],
        )

    def without_labels(self) -> ImageSet:
        """The same images, labels left out."""
        return replace(self, labels=None)


@dataclass(frozen=True, eq=False, kw_only=True)
class Domain:
    """The images of one domain by their duty; no patient has two.

    Attributes:
        train: Trained on.
        val: Watches over training; None if there is no such image.
        test: Only scored; None if there is no such image.
        plan: How the images were prepared.
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    plan: SamplePlan
