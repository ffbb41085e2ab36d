"""Datasets to sets of prepared volumes; masks stay closed until they are asked for."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medrl.core.cache import Cache, cache_root, make_key
from medrl.core.dataset import Dataset, Split, list_inputs, load_case, open_dataset, stack_channels
from medrl.core.dataset.layouts import scan_dataset
from medrl.core.dataset.model import some
from medrl.core.dataset.splits import SPLITS_FILE, regroup
from medrl.core.errors import ConfigError, DataError, did_you_mean
from medrl.core.stages import path_hash
from medrl.core.types import Case
from medrl.core.volume.write import write_bytes

from ..data_config import HuntDataConfig, SampleConfig
from .plan import VolumePlan, prepare_mask, prepare_volume
from .presence import NAME, check_presence, read_presence
from .sets import VolumeSet

if TYPE_CHECKING:
    from ..config import SparsConfig

CODE_VERSION = "spars-volume-1"
"""Changed with whatever changes what a file becomes."""
SPLIT_FILE = "split.json"

_UNMASKED = {"the reference segmentation is missing", "no such file"}
_log = logging.getLogger("medrl.spars")


@dataclass(eq=False)
class Masks:
    """Opens masks, and counts them.

    Attributes:
        dataset: Whose.
        target: Labels that are merged where no others are named.
        opened: Cases whose mask was opened so far.
    """

    dataset: Dataset
    target: tuple[str, ...]
    opened: set[str] = field(default_factory=set)

    def __call__(self, case_id: str, plan: VolumePlan, names: tuple[str, ...] | None = None) -> Tensor:
        """Open the mask of a case on the grid of its prepared volume; see `VolumeSet.open_masks`."""
        case = self.dataset.case(case_id)
        self.opened.add(case_id)
        image, label = load_case(self.dataset, case, with_label=True)
        if label is None:
            raise DataError(f"case {case_id}", why="it has no mask", case=case_id)
        values = self._values(names or self.target)
        return prepare_mask(np.isin(label.data[0], values), image.affine, plan)

    def _values(self, names: Sequence[str]) -> list[int]:
        known = self.dataset.labels
        found = []
        for name in names:
            if name not in known and not name.isdigit():
                raise DataError("labels", why=f"no label '{name}'", do=did_you_mean(name, known))
            found.append(known[name] if name in known else int(name))
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Loaded:
    """The volumes of a dataset by their duty; no patient has two.

    Attributes:
        train: Learned from.
        val: Watches over training; may be empty.
        test: Only scored; may be empty.
        dataset: The files.
        target: What is looked for.
        masks: Opens masks, and knows which were opened.
    """

    train: VolumeSet
    val: VolumeSet
    test: VolumeSet
    dataset: Dataset
    target: str
    masks: Masks

    @property
    def label_names(self) -> dict[str, int]:
        """``{"background": 0, <what is looked for>: <its value in the dataset>}``; 1 where it has none there.

        Masks that are predicted can so be laid beside those of the dataset.
        """
        return {"background": 0, self.target: self.dataset.labels.get(self.target, 1)}

    def digest(self) -> str:
        """SHA-256 of what training reads: volumes and labels of images of training and validation."""
        parts = [
            (part.digest, None if part.presence is None else part.labels()) for part in (self.train, self.val)
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def split(self) -> dict[str, list[str]]:
        """Cases by duty."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: list(part.ids) for name, part in parts.items()}

    def write_split(self, folder: Path) -> Path:
        """Write ``split.json``."""
        path = folder / SPLIT_FILE
        write_bytes(path, json.dumps(self.split(), indent=2).encode() + b"\n")
        return path

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the data."""
        spacing = self.train.spacing_mm.median(dim=0).values
        return {
            "label_names": self.label_names,
            "channel_names": list(self.dataset.channel_names) or ["image"],
            "spacing": [float(value) for value in spacing],
            "split": self.split(),
            "patients": {
                "train": sorted(set(self.train.patients)),
                "val": sorted(set(self.val.patients)),
            },
        }


def load(cfg: SparsConfig) -> Loaded:
    """Read what a config names, through the cache of its folder.

    Raises:
        ConfigError: No folder is named, or nothing is left to train on.
        DataError: Volumes or labels of images cannot be used.
    """
    return load_volumes(cfg.data, cfg.sample, label_source=cfg.classifier.label_source)


def load_volumes(
    data: HuntDataConfig,
    sample: SampleConfig,
    *,
    label_source: str = "image",
    cache: Cache | None = None,
) -> Loaded:
    """Split by patient, and prepare.

    Labels of images come from ``presence.csv``. With `label_source` ``crop`` and without such a file they
    come from the masks of training and validation cases; with ``image`` no mask is opened.

    Args:
        data: Folder, split, labels.
        sample: How files become volumes.
        label_source: What is learned from, ``image`` or ``crop``.
        cache: Keeps prepared volumes; by default that of the folder.

    Raises:
        ConfigError: No folder is named, or nothing is left to train on.
        DataError: Volumes or labels of images cannot be used.
    """
    if data.root is None:
        raise ConfigError("data.root", why="no dataset is named", do="--data DIR")
    dataset = open_volumes(data.root, layout=data.layout, exclude=data.exclude)
    target = find_target(dataset, data.target)
    masks = Masks(dataset, (target,))
    path = data.presence or _folder(dataset) / NAME
    labels: dict[str, int] | None = None
    if path.is_file() or data.presence is not None or label_source == "image":
        labels = read_presence(path)
        dataset = _by_presence(dataset, labels)
        masks.dataset = dataset
        check_presence(labels, (case.id for case in dataset.cases), path)
    cache = cache or Cache(cache_root(_folder(dataset)))

    def prepared(cases: Sequence[Case], known: Mapping[str, int] | None) -> VolumeSet:
        return load_set(dataset, cases, sample, presence=known, cache=cache, masks=masks)

    if labels is None:
        pool = prepared(dataset.cases, None)
        labels = {case: int(mask.any()) for case, mask in zip(pool.ids, pool.open_masks(), strict=True)}
        _log.warning("there is no %s: labels of images are taken from masks (label_source crop)", path.name)
    split, test = divide(dataset, data, labels)
    both = {case.patient for case in test} & {case.patient for case in (*split.train, *split.val)}
    if both and data.group_by != "case":
        raise DataError("the split", why=f"patient {min(both)} is in training and in testing")
    if not split.train:
        raise ConfigError("data.fold", why="no case is left to train on")
    return Loaded(
        train=prepared(split.train, labels),
        val=prepared(split.val, labels),
        test=prepared(test, labels if all(case.id in labels for case in test) else None),
        dataset=dataset,
        target=target,
        masks=masks,
    )


def open_volumes(root: Path | str, *, layout: str = "auto", exclude: Sequence[str] = ()) -> Dataset:
    """List the volumes of a dataset, those without a mask too.

    Raises:
        ConfigError: Unknown layout or excluded case.
        DataError: Files are missing, misplaced or ambiguous.
    """
    scan = scan_dataset(Path(root), layout=layout, exclude=exclude)
    unmasked = {case for case, where, why in scan.problems if why in _UNMASKED and where.startswith("labels")}
    if any(case not in unmasked for case, _, _ in scan.problems):
        return open_dataset(root, layout=layout, exclude=exclude)  # tells the first problem
    if not unmasked:
        return scan.dataset
    found = scan.dataset
    images = _folder(found) / "imagesTr"
    more = [case for case in list_inputs(images, found.channel_names) if case.id in unmasked]
    return _dataset_like(found, [*found.cases, *more], found.test_cases)


def load_set(
    dataset: Dataset,
    cases: Sequence[Case],
    sample: SampleConfig,
    *,
    presence: Mapping[str, int] | None,
    cache: Cache,
    masks: Masks | None = None,
) -> VolumeSet:
    """Prepare some cases, in order of their identifiers; what the cache holds is not read again.

    Raises:
        DataError: A file is damaged, or has several channels.
    """
    ordered = sorted(cases, key=lambda case: case.id)
    volumes, plans, keys = [], [], []
    for case in ordered:
        key = _key(case, sample)
        entry = cache.get_or_create(key, lambda case=case: _prepared(dataset, case, sample))  # type: ignore[misc]
        volumes.append(entry.tensor("volume"))
        plans.append(VolumePlan.from_meta(entry.meta))
        keys.append(key)
    return VolumeSet(
        ids=tuple(case.id for case in ordered),
        patients=tuple(case.patient or case.id for case in ordered),
        volumes=tuple(volumes),
        spacing_mm=torch.tensor([plan.spacing_mm for plan in plans], dtype=torch.float64).view(-1, 3),
        presence=None
        if presence is None
        else torch.tensor([presence[case.id] for case in ordered], dtype=torch.int8),
        keys=tuple(keys),
        plans=tuple(plans),
        opener=masks,
    )


def divide(
    dataset: Dataset, data: HuntDataConfig, labels: Mapping[str, int]
) -> tuple[Split, tuple[Case, ...]]:
    """Training and validation cases of the fold, and test cases; whole patients only.

    The dataset's own ``splits_final.json`` and test cases count first. Otherwise patients with and without
    the object are dealt apart, so that every fold has both.

    Raises:
        ConfigError: There is no such fold, or there are fewer patients than folds.
    """
    pool, test = list(dataset.cases), list(dataset.test_cases)
    grouped = regroup(pool, data.group_by)
    if not test and data.test_share > 0:
        aside = _aside(grouped, labels, data.test_share, data.split_seed)
        test = [case for case in grouped if case.patient in aside]
        grouped = [case for case in grouped if case.patient not in aside]
    if (_folder(dataset) / SPLITS_FILE).is_file():
        rest = _dataset_like(dataset, grouped, ())
        return rest.fold(data.fold, data.folds, data.split_seed, data.group_by), tuple(test)
    names = sorted({case.patient for case in grouped})
    if not 2 <= data.folds <= len(names):
        raise ConfigError(
            "data.folds",
            why=f"{data.folds} folds of {len(names)} patients",
            do=f"choose 2 to {len(names)} folds" if len(names) > 1 else "add cases",
        )
    if data.fold >= data.folds:
        raise ConfigError(
            "data.fold", why=f"fold {data.fold} of {data.folds}", do=f"choose 0 to {data.folds - 1}"
        )
    held = set(_dealt(grouped, labels, data.split_seed)[data.fold :: data.folds])
    return (
        Split(
            train=tuple(case for case in grouped if case.patient not in held),
            val=tuple(case for case in grouped if case.patient in held),
            grouped=data.group_by != "case",
        ),
        tuple(regroup(test, data.group_by)),
    )


def find_target(dataset: Dataset, names: Sequence[str]) -> str:
    """The first of the names that the dataset declares, or the first number; else the first name.

    Label files are not opened for this.
    """
    known = dataset.declared_labels or {}
    for name in names:
        if name in known:
            return name
        if name.isdigit():
            value = int(name)
            return next((label for label, number in known.items() if number == value), name)
    return names[0] if names else "target"


# -- private -----------------------------------------------------------------------------------------


def _prepared(dataset: Dataset, case: Case, sample: SampleConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    image = stack_channels(case, dataset.channel_names, dataset.root)
    if image.data.shape[0] != 1:
        raise DataError(
            f"case {case.id}",
            why=f"{image.data.shape[0]} channels; spars looks at one",
            do="give a dataset of one channel",
            case=case.id,
        )
    volume, plan = prepare_volume(image, sample)
    return {"volume": volume}, plan.to_meta()


def _key(case: Case, sample: SampleConfig) -> str:
    content = "\n".join(path_hash(path) for path in case.images)
    return make_key(content, sample.model_dump(mode="json"), CODE_VERSION)


def _by_presence(dataset: Dataset, labels: Mapping[str, int]) -> Dataset:
    """In plain folders cases without a mask count as test cases; those with a label of the image do not."""
    if dataset.layout != "folder":
        return dataset
    moved = [case for case in dataset.test_cases if case.id in labels]
    if not moved:
        return dataset
    rest = [case for case in dataset.test_cases if case.id not in labels]
    return _dataset_like(dataset, [*dataset.cases, *moved], rest)


def _dataset_like(dataset: Dataset, cases: Sequence[Case], tests: Sequence[Case]) -> Dataset:
    return Dataset(
        root=dataset.root,
        name=dataset.name,
        layout=dataset.layout,
        channel_names=dataset.channel_names,
        labels=dataset.declared_labels,
        cases=cases,
        test_cases=tests,
        info=dataset.info,
    )


def _dealt(cases: Sequence[Case], labels: Mapping[str, int], seed: int) -> list[str]:
    """Patients in random order, those with the object first: every n-th of them is a fold."""
    positive = {case.patient for case in cases if labels.get(case.id)}
    groups = [sorted(positive), sorted({case.patient for case in cases} - positive)]
    rng = np.random.default_rng(seed)
    return [group[index] for group in groups for index in rng.permutation(len(group))]


def _aside(cases: Sequence[Case], labels: Mapping[str, int], share: float, seed: int) -> set[str]:
    """Patients for the test: the same share of those with and without the object."""
    order = _dealt(cases, labels, seed)
    count = max(1, round(share * len(order)))
    if len(order) - count < 2:
        raise ConfigError("data.test_share", why=f"it leaves {len(order) - count} patients to train on")
    places = np.floor((np.arange(count) + 0.5) * len(order) / count).astype(int)
    found = {order[place] for place in places}
    _log.info("test patients: %s", some(sorted(found)))
    return found


def _folder(dataset: Dataset) -> Path:
    return dataset.root if dataset.root.is_dir() else dataset.root.parent
