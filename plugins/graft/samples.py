"""Case to sample: normalise, cut the window, add the teachers' features.

Arrays turn from the files' ``(C, X, Y, Z)`` into ``(C, D, H, W)`` = ``(C, Z, Y, X)`` here and nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from medrl.core.cache import Cache, file_hash, make_key
from medrl.core.dataset import Dataset, load_case
from medrl.core.errors import DataError
from medrl.core.types import Case, Volume
from medrl.core.volume import read_volume, same_grid

from .augment import augmented
from .config_data import AugmentConfig
from .features import LOGITS, Expected, TeacherFolder
from .mapped import Stored, by_name, by_value
from .plans import SamplePlan
from .upstream import VALID
from .windows import Size

CODE_VERSION = "graft-data-1"
"""Part of every cache key: raised when the preparation of a case changes."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case ready for cutting: memory-mapped, shared by workers and ranks.

    Attributes:
        image: ``(C, D, H, W)`` float32, normalised.
        label: ``(D, H, W)`` or None.
        mask: ``(D, H, W)`` organ mask or None.
        spacing: Voxel size (X, Y, Z) in mm.
        image_hash: Digest of the image and mask files.
    """

    case_id: str
    image: NDArray[np.float32]
    label: NDArray[Any] | None
    mask: NDArray[Any] | None
    spacing: tuple[float, float, float]
    image_hash: str

    @property
    def shape(self) -> Size:
        """``(D, H, W)`` of the image."""
        depth, height, width = self.image.shape[1:]
        return depth, height, width


class CaseStore:
    """Prepares cases once and keeps them in the cache.

    Args:
        dataset: Gives channel names and labels.
        plan: How a case is normalised.
        cache: Where prepared cases are kept; None keeps nothing.
    """

    def __init__(self, dataset: Dataset, plan: SamplePlan, cache: Cache | None) -> None:
        self.dataset = dataset
        self.plan = plan
        self.cache = cache
        self._hashes: dict[str, tuple[str, str]] = {}

    def get(self, case: Case) -> Prepared:
        """Return a prepared case.

        Raises:
            DataError: A file is missing or damaged, or the organ mask is missing; the case is named.
        """
        image_hash, content = self._hash(case)
        if self.cache is None:
            arrays, meta = self._prepare(case)
            return _prepared(case.id, arrays, meta, image_hash)
        plan = self.plan
        statistics = plan.statistics.get(case.id) or plan.statistics.get("*")
        params = {"normalization": plan.normalization, "mask": plan.mask, "statistics": repr(statistics)}
        key = make_key(content, params, CODE_VERSION)
        found = self.cache.get_or_create(key, lambda: self._prepare(case))
        return _prepared(case.id, found.arrays, found.meta, image_hash)

    def expected(self, prepared: Prepared) -> Expected:
        """What a teacher's feature file of this case must say."""
        return Expected(
            case_id=prepared.case_id,
            window=self.plan.window_of(prepared.shape, prepared.mask),
            shape=prepared.shape,
            spacing=prepared.spacing,
            image_hash=prepared.image_hash,
        )

    def _hash(self, case: Case) -> tuple[str, str]:
        """Digests of what the images say, and of everything that is prepared."""
        if case.id not in self._hashes:
            mask = mask_path(case, self.plan.mask)
            images = [*case.images, *([mask] if mask else [])]
            image_hash = _joined(_content(path, case) for path in images)
            label = _content(case.label, case) if case.label else "none"
            self._hashes[case.id] = (image_hash, _joined([image_hash, label]))
        return self._hashes[case.id]

    def _prepare(self, case: Case) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        image, label = load_case(self.dataset, case, with_label=case.label is not None)
        mask = read_mask(case, self.plan.mask, like=image)
        if mask is None and self.plan.needs_mask:
            raise DataError(
                f"case {case.id}",
                why=f"it has no organ mask '{self.plan.mask}'",
                do=f"give masksTr/{case.id}.nii.gz, or use --set sample.window=centre "
                "--set sample.normalization=volume",
                case=case.id,
            )
        data = to_network(image.data)
        arrays: dict[str, NDArray[Any]] = {"image": self.plan.normalise(data, mask, case.id)}
        if label is not None:
            arrays["label"] = to_network(label.data)[0]
        if mask is not None:
            arrays["mask"] = mask
        return arrays, {"spacing": [float(size) for size in image.spacing]}


def to_network(data: NDArray[Any]) -> NDArray[Any]:
    """Turn ``(C, X, Y, Z)`` into ``(C, D, H, W)``."""
    return np.ascontiguousarray(data.transpose(0, 3, 2, 1))


def from_network(data: NDArray[Any]) -> NDArray[Any]:
    """Turn ``(C, D, H, W)`` back into ``(C, X, Y, Z)``."""
    return np.ascontiguousarray(data.transpose(0, 3, 2, 1))


def mask_path(case: Case, name: str) -> Path | None:
    """The file of a case's organ mask: the one of this name, else its only nameless one."""
    return case.masks.get(name) or case.masks.get("mask")


def read_mask(case: Case, name: str, *, like: Volume) -> NDArray[np.uint8] | None:
    """Read the organ mask ``(D, H, W)`` of a case, or None if it has none.

    Raises:
        DataError: The mask does not lie on the grid of the image.
    """
    path = mask_path(case, name)
    if path is None:
        return None
    mask = read_volume(path, kind="label")
    if not same_grid(mask, like):
        raise DataError(
            f"case {case.id}: {path.name}",
            why="the organ mask does not lie on the grid of its image",
            case=case.id,
        )
    inside: NDArray[np.uint8] = (to_network(mask.data)[0] > 0).astype(np.uint8)
    return inside


class SampleSet(TorchDataset[dict[str, Any]]):
    """Samples of some cases: image, target, masks, and what the teachers say.

    Args:
        store: Prepares the cases.
        cases: Which cases.
        teachers: Feature folders; empty gives samples without teachers.
        taps: Layers to read.
        labelled: Whether labels may be looked at; False gives an empty target.
        augment: Random changes; None for none.
        views: Prepare each case once more, for live teachers that want other intensities.
    """

    def __init__(
        self,
        store: CaseStore,
        cases: Sequence[Case],
        *,
        teachers: Sequence[TeacherFolder] = (),
        taps: Sequence[str] = (),
        labelled: bool = True,
        augment: AugmentConfig | None = None,
        views: Sequence[CaseStore] = (),
    ) -> None:
        self.store = store
        self.cases = tuple(cases)
        self.teachers = tuple(teachers)
        self.taps = tuple(taps)
        self.labelled = labelled
        self.augment = augment
        self.views = tuple(views)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        case = self.cases[index]
        prepared = self.store.get(case)
        expected = self.store.expected(prepared)
        window = expected.window
        label = np.zeros(prepared.shape, dtype=np.uint8)
        if self.labelled and prepared.label is not None:
            label = prepared.label
        mask = prepared.mask if prepared.mask is not None else np.ones(prepared.shape, dtype=np.uint8)
        features: dict[str, list[Tensor]] = {tap: [] for tap in self.taps}
        logits: list[Tensor] = []
        valid: list[Tensor] = []
        for teacher in self.teachers:
            more = (VALID,) if VALID in teacher.channels else ()
            arrays = teacher.read(expected, (*self.taps, LOGITS, *more))
            logits.append(arrays[LOGITS])
            valid.append(arrays.get(VALID, torch.ones(1, 1, 1, 1)))
            for tap in self.taps:
                features[tap].append(arrays[tap])
        others = [store.get(case) for store in self.views]
        images = [torch.from_numpy(window.cut(item.image)) for item in (prepared, *others)]
        seen = torch.from_numpy(window.cut(label).astype(np.int64))
        organ = torch.from_numpy(window.cut(mask))
        if self.augment is not None:
            images, seen, organ = augmented(images, seen, organ, self.augment)
        return {
            "case_id": case.id,
            "image": images[0],
            "views": images[1:],
            "label": seen,
            "mask": organ,
            "labelled": self.labelled and prepared.label is not None,
            "features": features,
            "logits": logits,
            "valid": valid,
        }


@dataclass
class Batch:
    """Some samples together.

    Attributes:
        case_ids: One identifier a sample.
        image: ``(B, C, D, H, W)`` float32.
        label: ``(B, D, H, W)`` int64; zeros where unlabelled.
        mask: ``(B, D, H, W)`` organ mask; ones where there is none.
        labelled: ``(B,)`` bool.
        features: By tap, one ``(B, F, D', H', W')`` for each teacher, in the stored precision.
        logits: One ``(B, K, D, H, W)`` for each teacher.
        valid: Where they count, 1 or 0, for each teacher; ``(B, 1, 1, 1, 1)`` if everywhere.
        views: The image in other normalisations, for live teachers.
    """

    case_ids: tuple[str, ...]
    image: Tensor
    label: Tensor
    mask: Tensor
    labelled: Tensor
    features: dict[str, list[Tensor]]
    logits: list[Tensor]
    valid: list[Tensor]
    views: list[Tensor] = field(default_factory=list)

    def to(self, device: torch.device) -> Batch:
        """Move every tensor."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            self.case_ids,
            move(self.image),
            move(self.label),
            move(self.mask),
            move(self.labelled),
            {tap: [move(item) for item in items] for tap, items in self.features.items()},
            [move(item) for item in self.logits],
            [move(item) for item in self.valid],
            [move(item) for item in self.views],
        )

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """One batch of several."""
        first = batches[0]
        if len(batches) == 1:
            return first
        teachers = range(len(first.logits))
        return Batch(
            tuple(name for batch in batches for name in batch.case_ids),
            torch.cat([batch.image for batch in batches]),
            torch.cat([batch.label for batch in batches]),
            torch.cat([batch.mask for batch in batches]),
            torch.cat([batch.labelled for batch in batches]),
            {
                tap: [torch.cat([batch.features[tap][i] for batch in batches]) for i in teachers]
                for tap in first.features
            },
            [torch.cat([batch.logits[i] for batch in batches]) for i in teachers],
            [torch.cat([batch.valid[i] for batch in batches]) for i in teachers],
            [torch.cat([batch.views[i] for batch in batches]) for i in range(len(first.views))],
        )


def in_files(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a loading process passes on: samples whose teachers' arrays are named by their files."""
    return [
        {
            **sample,
            "features": {tap: [by_name(item) for item in items] for tap, items in sample["features"].items()},
            "logits": [by_name(item) for item in sample["logits"]],
            "valid": [by_name(item) for item in sample["valid"]],
        }
        for sample in samples
    ]


def collate(samples: Sequence[Mapping[str, Any]], device: torch.device | None = None) -> Batch:
    """Stack samples, or what `in_files` made of them, into a `Batch`; a single one is not copied.

    Args:
        samples: Of one batch.
        device: Where to; each array goes there on its own, straight from its file.

    Raises:
        DataError: A teacher's file has gone since it was checked.
    """

    def stack(items: Iterable[Tensor | Stored]) -> Tensor:
        tensors = [_opened(item).to(device or "cpu", non_blocking=True) for item in items]
        return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)

    first = samples[0]
    teachers = range(len(first["logits"]))
    labelled = torch.tensor([bool(sample["labelled"]) for sample in samples])
    return Batch(
        tuple(str(sample["case_id"]) for sample in samples),
        stack(sample["image"] for sample in samples),
        stack(sample["label"] for sample in samples),
        stack(sample["mask"] for sample in samples),
        labelled.to(device or "cpu"),
        {
            tap: [stack(sample["features"][tap][i] for sample in samples) for i in teachers]
            for tap in first["features"]
        },
        [stack(sample["logits"][i] for sample in samples) for i in teachers],
        [stack(sample["valid"][i] for sample in samples) for i in teachers],
        [stack(sample["views"][i] for sample in samples) for i in range(len(first["views"]))],
    )


def _opened(item: Tensor | Stored) -> Tensor:
    try:
        return by_value(item)
    except (OSError, ValueError) as error:
        what = str(item.path) if isinstance(item, Stored) else "sample"
        raise DataError(
            what, why=f"it cannot be read any more ({error})", do="leave the features alone while training"
        ) from error


def _prepared(
    case_id: str, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any], image_hash: str
) -> Prepared:
    x, y, z = (float(size) for size in meta["spacing"])
    return Prepared(case_id, arrays["image"], arrays.get("label"), arrays.get("mask"), (x, y, z), image_hash)


def _content(path: Path, case: Case) -> str:
    """Digest of a file, or of all files of a DICOM folder."""
    try:
        if path.is_dir():
            return _joined(file_hash(item) for item in sorted(path.iterdir()) if item.is_file())
        return file_hash(path)
    except OSError as error:
        raise DataError(
            f"case {case.id}: {path}", why=f"cannot be read: {error.strerror}", case=case.id
        ) from error


def _joined(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
