"""Loading source and target; the labels of the target are opened only where somebody may look at them."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.adaptation.dividing import PartedDataset
from medrl.core.cache import Cache, cache_root, file_hash, make_key
from medrl.core.dataset import Dataset, load_case
from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Case, Volume

from ..data_config import SampleConfig, SourceConfig, TargetConfig
from .dividing import Division, divide_source, divide_target, open_domain
from .plan import FALLBACK, SamplePlan, Size, make_plan, place, prepare_labels, prepare_volume, slice_axis
from .sets import Domain, ImageSet

CODE_VERSION = "rl4seg-data-1"
"""Part of every cache key: raised when the preparation of an image changes."""

Labels = Literal["none", "test", "train"]

_log = logging.getLogger("medrl.rl4seg")


class DataBlocks(Protocol):
    """A config with the blocks of the data."""

    @property
    def data(self) -> SourceConfig:
        """The source."""

    @property
    def target(self) -> TargetConfig:
        """The target."""

    @property
    def sample(self) -> SampleConfig:
        """How an image is prepared."""


def load_source(cfg: DataBlocks, *, cache: Cache | None = None) -> Domain:
    """Load the labelled source: training and validation images of the fold, and labelled test images.

    Args:
        cfg: The config.
        cache: Where prepared images are kept; None takes the usual place.

    Raises:
        ConfigError: No folder is named, or a setting does not fit the dataset.
        DataError: Files are missing or damaged, or parts overlap.
    """
    dataset = open_domain(cfg.data, "data")
    division = divide_source(cfg.data, dataset)
    store = _Store(dataset, _cache(cfg.data, cache))
    plan = _plan(cfg, dataset, division, store)
    values = dict(plan.values)
    return Domain(
        train=store.load(division.train, plan, values),
        val=store.load(division.val, plan, values) if division.val else None,
        test=store.load(division.test, plan, values) if division.test else None,
        plan=plan,
    )


def load_target(
    cfg: DataBlocks, *, labels: Labels = "none", plan: SamplePlan | None = None, cache: Cache | None = None
) -> Domain:
    """Load the target, prepared as the source is.

    With `none` no file of labels is opened, and there are no labels. With `test` the labels of the test
    images are read, for scoring; test images without labels are left out. With `train` all labels are read.

    Args:
        cfg: The config.
        labels: Whose labels are read.
        plan: How images are prepared; None resolves it from the source, as `load_source` does.
        cache: Where prepared images are kept; None takes the usual place.

    Raises:
        ConfigError: `train` without ``target.allow_labels``; or no folder is named.
        DataError: Files are missing or damaged, parts overlap, or labels that were asked for are missing.
    """
    if labels == "train" and not cfg.target.allow_labels:
        raise ConfigError(
            "target labels",
            why="training would read the labels of the target",
            do="--set target.allow_labels=true, for an oracle or an upper bound alone",
        )
    dataset = open_domain(cfg.target, "target", with_labels=False)
    division = divide_target(cfg.target, dataset)
    plan = plan or plan_of(None, cfg, cache=cache)
    store = _Store(dataset, _cache(cfg.target, cache))
    tests = division.test
    values: dict[int, int] | None = None
    if labels != "none":
        values = plan.values_of(dataset.declared_labels)
        tests = tuple(case for case in tests if case.label is not None)
    if labels == "train":
        bare = [case.id for case in (*division.train, *division.val) if case.label is None]
        if bare:
            raise DataError(
                f"case {bare[0]}", why=f"{len(bare)} target training images have no label", case=bare[0]
            )
    trained = values if labels == "train" else None
    return Domain(
        train=store.load(division.train, plan, trained),
        val=store.load(division.val, plan, trained) if division.val else None,
        test=store.load(tests, plan, values) if tests else None,
        plan=plan,
    )


def plan_of(source: Domain | None, cfg: DataBlocks, *, cache: Cache | None = None) -> SamplePlan:
    """How images are prepared: as the source is, if it is loaded; else resolved from its files.

    Raises:
        ConfigError: No source is named, or labels cannot be joined as asked for.
        DataError: The source cannot be used.
    """
    if source is not None:
        return source.plan
    dataset = open_domain(cfg.data, "data")
    division = divide_source(cfg.data, dataset)
    return _plan(cfg, dataset, division, _Store(dataset, _cache(cfg.data, cache)))


def _plan(cfg: DataBlocks, dataset: Dataset, division: Division, store: _Store) -> SamplePlan:
    size = cfg.sample.size
    if not all(size):
        size = store.common_size((*division.train, *division.val))
    return make_plan(cfg.sample, labels=dataset.labels, channel_names=_channel_names(dataset), size=size)


def _channel_names(dataset: Dataset) -> tuple[str, ...]:
    return dataset.channel_names or ("image",)


def _cache(data: SourceConfig, cache: Cache | None) -> Cache:
    if cache is not None:
        return cache
    root = data.root or Path()
    return Cache(cache_root(root if root.is_dir() else root.parent))


class _Store:
    """Prepares the images of one dataset once for each set, and keeps them in the cache."""

    def __init__(self, dataset: Dataset, cache: Cache) -> None:
        self.dataset = dataset
        self.cache = cache
        self._hashes: dict[Path, str] = {}

    def load(self, cases: Sequence[Case], plan: SamplePlan, values: Mapping[int, int] | None) -> ImageSet:
        """Stack the cases; with `values`, their labels too."""
        content = self._content(cases, labels=False)
        params = {
            key: value
            for key, value in plan.to_meta().items()
            if key not in ("merge", "values", "label_names")
        }
        entry = self.cache.get_or_create(
            make_key(content, {"what": "images", **params}, CODE_VERSION), lambda: self._images(cases, plan)
        )
        labels = None
        if values is not None:
            asked = {"what": "labels", "values": [list(pair) for pair in sorted(values.items())], **params}
            key = make_key(content + self._content(cases, labels=True), asked, CODE_VERSION)
            labels = self.cache.get_or_create(key, lambda: self._labels(cases, plan, values)).tensor("labels")
        ids: list[str] = []
        subjects: list[str] = []
        for case, count in zip(cases, entry["counts"].tolist(), strict=True):
            ids += [case.id] if count == 1 else [f"{case.id}_z{number:03d}" for number in range(count)]
            subjects += [case.patient or case.id] * count
        return ImageSet(
            ids=tuple(ids),
            subjects=tuple(subjects),
            images=entry.tensor("images"),
            labels=labels,
            spacing_mm=entry.tensor("spacing_mm"),
            label_names=dict(plan.label_names),
        )

    def common_size(self, cases: Sequence[Case]) -> Size:
        """The size of the slices where all agree, else `FALLBACK`."""

        def measure() -> dict[str, NDArray[Any]]:
            shapes = [self._read(case, with_label=False)[0].data.shape[1:] for case in cases]
            return {"shapes": np.asarray(shapes, dtype=np.int64)}

        key = make_key(self._content(cases, labels=False), {"what": "shapes"}, CODE_VERSION)
        found: Counter[Size] = Counter()
        for x, y, z in self.cache.get_or_create(key, measure)["shapes"].tolist():
            axis = slice_axis((x, y, z))
            first, second = (extent for number, extent in enumerate((x, y, z)) if number != axis)
            found[(first, second)] += 1
        if len(found) == 1:
            return next(iter(found))
        _log.info("the images have %d sizes; all are brought to %d × %d", len(found), *FALLBACK)
        return FALLBACK

    def _images(self, cases: Sequence[Case], plan: SamplePlan) -> dict[str, Any]:
        _log.info("preparing %d images of %s", len(cases), self.dataset.name)
        placed = [prepare_volume(self._read(case, with_label=False)[0], plan) for case in cases]
        counts = [len(item.images) for item in placed]
        spacing = [item.spacing_mm for item, count in zip(placed, counts, strict=True) for _ in range(count)]
        return {
            "images": torch.cat([item.images for item in placed]),
            "counts": np.asarray(counts, dtype=np.int64),
            "spacing_mm": np.asarray(spacing, dtype=np.float64),
        }

    def _labels(self, cases: Sequence[Case], plan: SamplePlan, values: Mapping[int, int]) -> dict[str, Any]:
        found = []
        for case in cases:
            image, label = self._read(case, with_label=True)
            if label is None:
                raise DataError(f"case {case.id}", why="it has no reference segmentation", case=case.id)
            found.append(prepare_labels(label, place(image, plan), values, case.id))
        return {"labels": np.concatenate(found)}

    def _read(self, case: Case, *, with_label: bool) -> tuple[Volume, Volume | None]:
        if isinstance(self.dataset, PartedDataset):
            return self.dataset.read(case, with_label=with_label)
        return load_case(self.dataset, case, with_label=with_label)

    def _content(self, cases: Sequence[Case], *, labels: bool) -> str:
        """Digest of names and files: of the images, or of the labels."""
        digest = hashlib.sha256()
        for case in cases:
            digest.update(f"{case.id}\0".encode())
            for path in [case.label] if labels else case.images:
                digest.update(self._hash(case, path).encode())
        return digest.hexdigest()

    def _hash(self, case: Case, path: Path | None) -> str:
        if path is None:
            return ""
        if path not in self._hashes:
            try:
                self._hashes[path] = file_hash(path)
            except OSError as error:
                raise DataError(
                    f"case {case.id}", why=f"{path.name} cannot be read ({error.strerror})", case=case.id
                ) from error
        return self._hashes[path]
