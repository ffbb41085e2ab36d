"""Images of both domains as the stages see them: who learns from which, and in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from medrl.core.errors import DataError
from medrl.core.learned_reward import draw as draw_numbers

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSet:
    """Images as the network sees them, in order of their identifiers.

    Attributes:
        ids: Identifier of each image.
        subjects: Patient of each image.
        images: ``(N, C, *S)`` float32 in [0, 1], axes in the order of the files.
        labels: ``(N, *S)`` uint8, or None where they were not asked for.
        spacing_mm: ``(N, 2)`` float64, size of the pixels of `images` in the plane.
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

    @property
    def channels(self) -> int:
        """C."""
        return int(self.images.shape[1])

    def subset(self, index: Sequence[int]) -> Self:
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

    def without_labels(self) -> Self:
        """The same images, labels left out."""
        return replace(self, labels=None)

    def digest(self) -> str:
        """SHA-256 of names, images and labels."""
        whole = hashlib.sha256("\0".join([*self.ids, *self.subjects]).encode())
        for start in range(0, len(self.ids), 64):
            whole.update(self.images[start : start + 64].contiguous().numpy().tobytes())
            if self.labels is not None:
                whole.update(self.labels[start : start + 64].contiguous().numpy().tobytes())
        return whole.hexdigest()


class Plan(Protocol):
    """How images were prepared."""

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the channels."""

    def to_meta(self) -> dict[str, Any]:
        """The plan as plain values, for a checkpoint."""


class CaseSet(Protocol):
    """What a domain asks of the images of one duty: `ImageSet` has it, and so have sets of sequences."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Identifiers."""

    @property
    def label_names(self) -> Mapping[str, int]:
        """Label values by name, background 0 first."""

    @property
    def spacing_mm(self) -> Tensor:
        """``(N, 2)``."""

    @property
    def channels(self) -> int:
        """C."""

    def digest(self) -> str:
        """SHA-256 of names, images and labels."""


SetT = TypeVar("SetT", bound=CaseSet)
ImageSetT = TypeVar("ImageSetT", bound=ImageSet)
PlanT = TypeVar("PlanT", bound=Plan)


@dataclass(frozen=True, eq=False, kw_only=True)
class Domain(Generic[SetT, PlanT]):
    """The images of one domain by their duty; no patient has two.

    Attributes:
        train: Trained on.
        val: Watches over training; None if there is no such image.
        test: Only scored; None if there is no such image.
        plan: How the images were prepared.
    """

    train: SetT
    val: SetT | None
    test: SetT | None
    plan: PlanT


@dataclass(frozen=True, eq=False)
class Domains(Generic[SetT, PlanT]):
    """Labelled source images, and target images; labels of the latter are there only for an oracle.

    Attributes:
        unlabelled: The target; None where a stage that needs none is done without it.
    """

    source: Domain[SetT, PlanT]
    unlabelled: Domain[SetT, PlanT] | None

    @property
    def plan(self) -> PlanT:
        """How an image becomes what the network sees; `medrl predict` does the same."""
        return self.source.plan

    @property
    def target(self) -> Domain[SetT, PlanT]:
        """The target.

        Raises:
            DataError: There is none.
        """
        if self.unlabelled is None:
            raise DataError("target.root", why="no target images are named", do="--target DIR")
        return self.unlabelled

    @property
    def label_names(self) -> Mapping[str, int]:
        """Label values by name, background 0 first."""
        return self.source.train.label_names

    @property
    def classes(self) -> int:
        """K, background included."""
        return len(self.label_names)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.source.train.channels

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the images: names of labels and channels, spacing, plan."""
        return {
            "label_names": dict(self.label_names),
            "channel_names": list(self.plan.channel_names),
            "spacing": self.source.train.spacing_mm.median(dim=0).values.tolist(),
            "plan": self.plan.to_meta(),
        }

    def digest(self) -> str:
        """SHA-256 of everything that training reads: source images and labels, target images."""
        whole = hashlib.sha256()
        sets = [self.source.train, self.source.val]
        sets += [] if self.unlabelled is None else [self.unlabelled.train, self.unlabelled.val]
        for images in sets:
            if images is not None:
                whole.update(images.digest().encode())
        return whole.hexdigest()

    def watching(self) -> SetT:
        """Target images that watch over training: validation ones, else the training ones."""
        target = self.target
        return target.val if target.val is not None and target.val.ids else target.train

    def check_channels(self) -> None:
        """Refuse domains of different channels.

        Raises:
            DataError: They differ.
        """
        own, other = self.channels, self.target.train.channels
        if own != other:
            raise DataError("target.root", why=f"its images have {other} channels, those of the source {own}")


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images of a set.

    Attributes:
        ids: Identifiers.
        index: Their numbers in the set.
        images: ``(N, C, *S)`` float32 on the device.
        labels: ``(N, *S)`` int64 on the device, if the set has labels.
    """

    ids: list[str]
    index: list[int]
    images: Tensor
    labels: Tensor | None

    def truth(self) -> Tensor:
        """The labels.

        Raises:
            DataError: The set has none.
        """
        if self.labels is None:
            raise DataError("training", why="these images have no labels")
        return self.labels


def draw_index(rt: Runtime, count: int, *, seed: int, step: int, size: int) -> list[int]:
    """Draw this rank's numbers of a step (from 1) out of `count`: passes over all, each in its own order.

    The draw depends on seed and step alone, so that a resumed run goes on as it would have; two ranks with n
    images draw together what one rank draws with 2n.
    """
    numbers = np.arange(count, dtype=np.int64)
    chosen = draw_numbers(numbers, size, seed=seed, step=step - 1, rank=rt.rank, world=rt.world_size)
    found: list[int] = chosen.tolist()
    return found


def take(images: ImageSet, index: Sequence[int], device: torch.device) -> Batch:
    """Return the images with these numbers."""
    at = list(index)
    labels = None if images.labels is None else images.labels[at].long().to(device)
    seen = images.images[at].to(device, torch.float32)
    return Batch([images.ids[number] for number in at], at, seen, labels)


def pieces(images: ImageSet, size: int) -> Iterator[Tensor]:
    """Yield all images in their order, some at a time ``(n, C, *S)``."""
    for start in range(0, len(images.ids), size):
        yield images.images[start : start + size].to(torch.float32)


def subset(images: ImageSetT, index: Sequence[int]) -> ImageSetT:
    """Return the set of the images with these numbers."""
    at = list(index)
    if at == list(range(len(images.ids))):
        return images
    return images.subset(at)
