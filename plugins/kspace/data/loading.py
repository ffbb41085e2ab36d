"""Scans to sets of prepared slices, through the cache: each scan is prepared once for each plan."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medrl.core.cache import Cache, cache_root, file_hash, make_key
from medrl.core.cache_entry import CachedArrays, plain_arrays
from medrl.core.dataset.splits import regroup
from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Case

from ..data_config import SampleConfig, ScanConfig
from .plan import SamplePlan, make_plan, prepare
from .reading import open_scans
from .scans import RawScan, ScanDataset
from .sets import SliceSet, Stacked

CODE_VERSION = "kspace-scan-1"
"""Changed with whatever changes what a scan becomes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
    """The slices of a dataset by their duty; no patient has two.

    Attributes:
        train: Trained on.
        val: Watches over training; None if there is none.
        test: Only scored; None if there is none.
        plan: How scans were prepared.
        dataset: The scans.
    """

    train: SliceSet
    val: SliceSet | None
    test: SliceSet | None
    plan: SamplePlan
    dataset: ScanDataset


def load_data(data: ScanConfig, sample: SampleConfig, *, labels: bool = True) -> Parts:
    """Read what a config names, through the cache of its folder.

    Raises:
        ConfigError: No folder is named.
        DataError: Scans cannot be used.
    """
    dataset = named_scans(data)
    return load_parts(
        dataset,
        make_plan(sample, dataset.labels),
        fold=data.fold,
        folds=data.folds,
        seed=data.split_seed,
        group_by=data.group_by,
        test_fold=data.test_fold,
        cache=Cache(cache_root(dataset.root)),
        labels=labels,
    )


def named_scans(data: ScanConfig) -> ScanDataset:
    """The scans that a config names.

    Raises:
        ConfigError: No folder is named.
        DataError: There is no such dataset.
    """
    if data.root is None:
        raise ConfigError("data.root", why="no scans are named", do="--data DIR")
    return open_scans(
        data.root,
        reader=data.reader,
        layout=data.layout,
        frames=data.frames,
        spacing_mm=data.spacing_mm,
        exclude=data.exclude,
    )


def load_parts(
    dataset: ScanDataset,
    plan: SamplePlan,
    *,
    fold: int = 0,
    folds: int = 5,
    seed: int = 0,
    group_by: str = "patient",
    test_fold: int = -1,
    cache: Cache | None = None,
    labels: bool = True,
) -> Parts:
    """Split by patient and prepare.

    Args:
        dataset: The scans.
        plan: How.
        fold: The fold that watches over training.
        folds: Number of folds.
        seed: Of the folds.
        group_by: As `medrl.core.dataset.Dataset.fold` takes it.
        test_fold: The fold that is tested on where the dataset sets no patient aside; -1 for none.
        cache: Keeps prepared scans; None keeps them in memory.
        labels: Read labels where a whole part has them.

    Raises:
        ConfigError: A fold does not exist, or nothing is left to train on.
        DataError: Scans cannot be used, or only some of a part have labels.
    """
    split = dataset.fold(fold, folds, seed, group_by)
    apart = regroup([case for case in dataset.scans if case.id in dataset.apart], group_by)
    train, test = list(split.train), apart
    if test_fold >= 0:
        if apart:
            raise ConfigError(
                "data.test_fold",
                why="the dataset sets its own test patients aside",
                do="--set data.test_fold=-1",
            )
        if test_fold == fold:
            raise ConfigError("data.test_fold", why=f"fold {fold} already watches over training")
        test = list(dataset.fold(test_fold, folds, seed, group_by).val)
        tested = {case.id for case in test}
        train = [case for case in train if case.id not in tested]
    both = {case.patient for case in test} & {case.patient for case in (*train, *split.val)}
    if both and group_by != "case":
        raise DataError("the split", why=f"patient {min(both)} is in training and in testing")

    found = [
        load_set(dataset, cases, plan, cache=cache, labels=labels) if cases else None
        for cases in (train, split.val, test)
    ]
    if found[0] is None:
        raise ConfigError("data.fold", why="no scan is left to train on")
    return Parts(train=found[0], val=found[1], test=found[2], plan=plan, dataset=dataset)


def load_set(
    dataset: ScanDataset,
    cases: Sequence[Case],
    plan: SamplePlan,
    *,
    cache: Cache | None = None,
    labels: bool = True,
) -> SliceSet:
    """Prepare some scans; what the cache holds is not read again.

    Labels are there if every scan has them; where none has, or they are not asked for, no label is opened.

    Raises:
        DataError: A scan cannot be used, some scans have labels and some have none, or images and measured
            k-space are mixed.
    """
    known = {case.label is not None for case in cases}
    if labels and len(known) > 1:
        bare = next(case.id for case in cases if case.label is None)
        raise DataError(
            f"case {bare}", why="it has no reference segmentation, others have one", do=f"--exclude {bare}",
            case=bare,
        )  # fmt: skip
    wanted = labels and known == {True}
    entries = [_entry(dataset, case, plan, cache, wanted) for case in cases]
    measured = {bool(entry.meta["measured"]) for _, entry in entries}
    if len(measured) > 1:
        raise DataError(dataset.name, why="it holds images and measured k-space")

    def stack(name: str) -> Stacked:
        return Stacked([entry.tensor(name) for _, entry in entries])

    def each(name: str) -> list[str]:
        return [str(value) for _, entry in entries for value in entry.meta[name]]

    counts = [len(entry.meta["names"]) for _, entry in entries]
    owners = [
        (case, key)
        for case, (key, _), count in zip(cases, entries, counts, strict=True)
        for _ in range(count)
    ]
    sensed = {"sensitivities" in entry.arrays for _, entry in entries}
    return SliceSet(
        ids=tuple(f"{case.id}_{name}" for (case, _), name in zip(owners, each("names"), strict=True)),
        cases=tuple(case.id for case, _ in owners),
        patients=tuple(case.patient or case.id for case, _ in owners),
        frames=tuple(each("frames")),
        slices=tuple(int(number) for number in each("slices")),
        spacing_mm=_repeated([entry.tensor("spacing_mm") for _, entry in entries], counts),
        kspace=stack("kspace"),
        target=stack("target"),
        labels=stack("labels") if wanted else None,
        sensitivities=stack("sensitivities") if sensed == {True} else None,
        padding=_repeated([entry.tensor("padding") for _, entry in entries], counts).bool(),
        label_names=plan.label_names,
        simulation=None if measured == {True} else plan.simulation,
        keys=tuple(key for _, key in owners),
    )


def scan_key(dataset: ScanDataset, case: Case, plan: SamplePlan, *, labels: bool) -> str:
    """Key of a prepared scan in the cache: a hash of its files, its name and the plan."""
    whole = hashlib.sha256()
    for path in dict.fromkeys(dataset.files(case, with_label=labels)):
        whole.update(f"{path.name}\0{file_hash(path)}\n".encode())
    params = {"case": case.id, "reader": dataset.layout, "labels": labels, "plan": plan.to_meta()}
    return make_key(whole.hexdigest(), params, CODE_VERSION)


def _entry(
    dataset: ScanDataset, case: Case, plan: SamplePlan, cache: Cache | None, labels: bool
) -> tuple[str, CachedArrays]:
    key = scan_key(dataset, case, plan, labels=labels)
    if cache is None:
        arrays, meta = _make(dataset, case, plan, labels)
        ready, types = plain_arrays(arrays)
        return key, CachedArrays(arrays=ready, meta=meta, types=types, _writable=ready)
    return key, cache.get_or_create(key, lambda: _make(dataset, case, plan, labels))


def _make(
    dataset: ScanDataset, case: Case, plan: SamplePlan, labels: bool
) -> tuple[dict[str, Tensor], dict[str, object]]:
    raw: RawScan = dataset.read(case, with_label=labels)
    found = prepare(raw, plan, case.id)
    arrays = {
        "kspace": found.kspace,
        "target": found.target,
        "padding": found.padding,
        "spacing_mm": torch.tensor(found.spacing_mm, dtype=torch.float64),
    }
    if labels:
        if found.labels is None:
            raise DataError(f"case {case.id}", why="it has no reference segmentation", case=case.id)
        arrays["labels"] = found.labels
    if found.sensitivities is not None:
        arrays["sensitivities"] = found.sensitivities
    meta = {
        "names": list(raw.names),
        "frames": list(raw.frames),
        "slices": list(raw.slices),
        "measured": raw.kspace is not None,
    }
    return arrays, meta


def _repeated(rows: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """One row a scan to one row a slice."""
    widths = {tuple(row.shape) for row in rows}
    if len(widths) > 1:
        raise DataError("scans", why="k-space of different width", do="set sample.shape")
    return torch.stack([row.clone() for row in rows]).repeat_interleave(torch.tensor(counts), dim=0)
