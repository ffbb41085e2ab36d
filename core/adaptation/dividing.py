"""Which cases of a dataset do what: train, watch over training, test. No image and no label is opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medrl.core.dataset import Dataset, Split, load_case
from medrl.core.dataset.listing import channel_groups, folder_entries
from medrl.core.dataset.parts import channel_names_of, labels_of, make_case, patients_of, read_json
from medrl.core.dataset.splits import regroup
from medrl.core.errors import ConfigError, DataError, did_you_mean
from medrl.core.rng import numpy_generator
from medrl.core.types import Case, Volume
from medrl.core.volume import image_suffix

PARTS = ("train", "val", "test", "pred")


class SplitSettings(Protocol):
    """Settings of a split, as `DataConfig` has them."""

    @property
    def fold(self) -> int:
        """Validation fold."""

    @property
    def folds(self) -> int:
        """Number of folds."""

    @property
    def split_seed(self) -> int:
        """Seed of the folds."""

    @property
    def group_by(self) -> str:
        """What never falls on both sides of a split."""


class TargetSettings(SplitSettings, Protocol):
    """Settings of the split of a target."""

    @property
    def val_fraction(self) -> float:
        """Share of the patients that watch over training."""

    @property
    def max_images(self) -> int:
        """Training images taken; 0 takes all."""


@dataclass(frozen=True)
class Division:
    """Cases by duty; no case and, with grouping, no patient has two."""

    train: tuple[Case, ...]
    val: tuple[Case, ...]
    test: tuple[Case, ...]


class PartedDataset(Dataset):
    """Cases with or without labels, and the parts that the dataset itself deals them to.

    Attributes:
        images: Every case.
        parts: Names of the cases of ``train``, ``val``, ``test`` and ``pred``, as a CSV column, a list of the
            dataset or an HDF5 file says; empty where nothing does.
    """

    def __init__(
        self,
        *,
        root: Path,
        layout: str,
        cases: Iterable[Case],
        parts: Mapping[str, Sequence[str]] | None = None,
        labels: Mapping[str, int] | None = None,
        channel_names: Sequence[str] = (),
        excluded: Sequence[str] = (),
        name: str = "",
    ) -> None:
        self.images = tuple(sorted(cases, key=lambda case: case.id))
        self.parts = {part: frozenset(names) for part, names in (parts or {}).items() if names}
        apart = self.parts.get("test", frozenset())
        super().__init__(
            root=root,
            name=name,
            layout=layout,
            channel_names=channel_names,
            labels=labels,
            cases=[case for case in self.images if case.label is not None and case.id not in apart],
            test_cases=[case for case in self.images if case.label is None or case.id in apart],
            info={"excluded": sorted(excluded)},
        )

    def fold(self, k: int, folds: int = 5, seed: int = 0, group_by: str = "patient") -> Split:
        """Return the dataset's own training and validation part, else fold `k` by patient.

        Raises:
            DataError: Parts overlap by case or, with grouping, by patient.
        """
        if not {"train", "val"} <= set(self.parts):
            return super().fold(k, folds, seed, group_by)
        dealt = self.dealt(self.cases, group_by)
        return Split(train=dealt["train"], val=dealt["val"], grouped=group_by != "case")

    def dealt(self, cases: Iterable[Case], group_by: str) -> dict[str, tuple[Case, ...]]:
        """The cases of each part."""
        known = regroup(sorted(cases, key=lambda case: case.id), group_by)
        return {part: tuple(case for case in known if case.id in self.parts.get(part, ())) for part in PARTS}

    def read(self, case: Case, *, with_label: bool) -> tuple[Volume, Volume | None]:
        """Read a case; without `with_label` no label is opened.

        Raises:
            DataError: A file is missing or damaged.
        """
        return load_case(self, case, with_label=with_label)


def divide_source(data: SplitSettings, dataset: Dataset) -> Division:
    """Training and validation cases of the fold; labelled test cases.

    Raises:
        ConfigError: There is no such fold.
        DataError: Parts overlap, or there is no labelled case.
    """
    if not dataset.cases:
        raise DataError(f"dataset {dataset.name}", why="no case has a label", do="the source needs labels")
    split = dataset.fold(data.fold, data.folds, data.split_seed, data.group_by)
    tests = tuple(case for case in dataset.test_cases if case.label is not None)
    if isinstance(dataset, PartedDataset) and dataset.parts:
        tests = dataset.dealt(tests, data.group_by)["test"]
    division = Division(split.train, split.val, tuple(regroup(tests, data.group_by)))
    _check_apart(division, "data")
    return division


def divide_target(target: TargetSettings, dataset: Dataset, *, method: str) -> Division:
    """Cases of the target by duty, whether they have labels or not.

    Where the dataset itself deals them (a split column, lists, test images in ``imagesTs``), that is taken.
    Else, where some have labels, those test and the others train; where all have, one fold tests; where none
    has, all train. Part of the patients that would train watch over training, and `max_images` limits the
    rest.

    Raises:
        ConfigError: There is no such fold.
        DataError: Parts overlap, or nothing is left to train on.
    """
    pool: Sequence[Case]
    tests: Sequence[Case]
    val: tuple[Case, ...] = ()
    if isinstance(dataset, PartedDataset) and {"train", "pred"} & set(dataset.parts):
        dealt = dataset.dealt(dataset.images, target.group_by)
        pool, val, tests = (*dealt["train"], *dealt["pred"]), dealt["val"], dealt["test"]
    else:
        pool, tests = _pools(target, dataset)
    train = tuple(pool)
    if not val:
        train, val = _watching(train, target, method)
    if target.max_images and len(train) > target.max_images:
        order = numpy_generator(target.split_seed, method, "target images").permutation(len(train))
        train = tuple(train[index] for index in sorted(order[: target.max_images].tolist()))
    if not train:
        raise DataError(f"dataset {dataset.name}", why="no target image is left to train on")
    Split(train=train, val=val)
    division = Division(train, val, tuple(tests))
    _check_apart(division, "target")
    return division


def _pools(target: TargetSettings, dataset: Dataset) -> tuple[Sequence[Case], Sequence[Case]]:
    """Cases to train on and to test on."""
    everything = (
        dataset.images if isinstance(dataset, PartedDataset) else (*dataset.cases, *dataset.test_cases)
    )
    labelled = [case for case in everything if case.label is not None]
    bare = [case for case in everything if case.label is None]
    if dataset.layout in ("nnunet", "msd", "manifest") and dataset.cases and dataset.test_cases:
        return regroup(dataset.cases, target.group_by), regroup(dataset.test_cases, target.group_by)
    if bare:
        return regroup(bare, target.group_by), regroup(labelled, target.group_by)
    split = dataset.fold(target.fold, target.folds, target.split_seed, target.group_by)
    return split.train, split.val


def _watching(
    cases: tuple[Case, ...], target: TargetSettings, method: str
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Part of the patients watches, at least one if there are several."""
    patients = sorted({case.patient or case.id for case in cases})
    if target.val_fraction == 0 or len(patients) < 2:
        return cases, ()
    count = min(max(1, round(target.val_fraction * len(patients))), len(patients) - 1)
    order = numpy_generator(target.split_seed, method, "target validation").permutation(len(patients))
    apart = {patients[index] for index in order[:count]}
    return (
        tuple(case for case in cases if (case.patient or case.id) not in apart),
        tuple(case for case in cases if (case.patient or case.id) in apart),
    )


def _check_apart(division: Division, name: str) -> None:
    """No patient (a case, where cases are not grouped) is in the test part and in another.

    Raises:
        DataError: Some are.
    """
    tests, others = (
        {case.patient or case.id for case in cases}
        for cases in (division.test, (*division.train, *division.val))
    )
    both = sorted(tests & others)
    if both:
        raise DataError(
            f"{name}.root",
            why=f"{len(both)} patients are in the test part and in another: {', '.join(both[:5])}",
            do=f"mend the split, or {name}.group_by=case if these are different patients",
        )


def is_nnunet(root: Path) -> bool:
    """Whether a folder holds an nnU-Net dataset."""
    if not (root / "dataset.json").is_file() or not (root / "imagesTr").is_dir():
        return False
    meta = read_json(root / "dataset.json")
    return not isinstance(meta.get("training"), list) and "dataset" not in meta


def nnunet_images(root: Path, exclude: Sequence[str]) -> PartedDataset:
    """The images of an nnU-Net dataset, whether they have labels or not; labels need not be declared."""
    meta = read_json(root / "dataset.json")
    channels = channel_names_of(meta.get("channel_names", meta.get("modality")), root / "dataset.json")
    labels = labels_of(meta["labels"], root / "dataset.json")[0] if "labels" in meta else None
    ending, patients = str(meta.get("file_ending", ".nii.gz")), patients_of(meta)
    cases: list[Case] = []
    # Training images are those to adapt to, as the rows `pred` of the original's CSV are.
    parts: dict[str, list[str]] = {"pred": [], "test": []}
    for suffix, part in (("Tr", "pred"), ("Ts", "test")):
        folder = root / f"images{suffix}"
        entries = (
            [e for e in folder_entries(folder) if image_suffix(e.path) == ending] if folder.is_dir() else []
        )
        groups, wrong = channel_groups(root, entries)
        for case_id, files in groups.items():
            if sorted(files) != list(range(len(channels))):
                wrong.append((case_id, folder.name, f"channels {sorted(files)} of {len(channels)}"))
            label = root / f"labels{suffix}" / f"{case_id}{ending}"
            images = [files[number] for number in sorted(files)]
            cases.append(make_case(root, case_id, images, label if label.is_file() else None, patients))
            parts[part].append(case_id)
        wrong = [item for item in wrong if item[0] not in exclude]
        if wrong:
            raise DataError(f"case {wrong[0][0]}: {wrong[0][1]}", why=wrong[0][2], case=wrong[0][0])
    names = [case.id for case in cases]
    unknown = [name for name in exclude if name not in names]
    if unknown:
        raise ConfigError("target.exclude", why=f"no case '{unknown[0]}'", do=did_you_mean(unknown[0], names))
    kept = [case for case in cases if case.id not in exclude]
    if not kept:
        raise DataError(str(root / "imagesTr"), why="no image is found here")
    return PartedDataset(
        root=root,
        layout="nnunet",
        name=str(meta.get("name", "")),
        cases=kept,
        parts=parts if parts["test"] else {},
        labels=labels,
        channel_names=channels,
        excluded=exclude,
    )
