"""Loading source and target; the labels of the target are opened only where somebody may look at them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from medrl.core.cache import Cache, cache_root, file_hash, make_key
from medrl.core.dataset import Dataset
from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Case
from medrl.core.volume import grid_difference

from ..data_config import SampleConfig, SourceConfig, TargetConfig
from ..io import prepare, read_sequence
from .plan import SequencePlan, label_on_grid, make_plan
from .sets import Domain, SequenceSet
from .splitting import divided_source, divided_target, open_domain

CODE_VERSION = "rl4seg3d-data-1"
"""Part of every cache key: raised when the preparation of a sequence changes."""

Labels = Literal["none", "test", "train"]

_log = logging.getLogger("medrl.rl4seg3d")


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
        """How a sequence is prepared."""


def load_source(cfg: DataBlocks, *, cache: Cache | None = None) -> Domain:
    """Load the labelled source: training and validation sequences of the fold, labelled test sequences.

    Raises:
        ConfigError: No folder is named, or a setting does not fit the dataset.
        DataError: Files are missing or damaged, or parts overlap.
    """
    dataset = open_domain(cfg.data, "data")
    division = divided_source(cfg.data, dataset)
    plan = make_plan(cfg.sample, dataset.labels)
    store = _Store(dataset, _cache(cfg.data, cache), plan)
    values = dict(plan.values)
    train = store.load(division.train, values)
    val = store.load(division.val, values) if division.val else None
    test = store.load(division.test, values) if division.test else None
    return _sized(Domain(train=train, val=val, test=test, plan=plan), cfg.sample.size)


def load_target(
    cfg: DataBlocks, plan: SequencePlan, *, labels: Labels = "none", cache: Cache | None = None
) -> Domain:
    """Load the target, prepared as the source is.

    With `none` no file of labels is opened, and there are no labels. With `test` the labels of the test
    sequences are read, for scoring; test sequences without labels are left out. With `train` all are read.

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
    division = divided_target(cfg.target, dataset)
    store = _Store(dataset, _cache(cfg.target, cache), plan)
    tests, values = division.test, None
    if labels != "none":
        values = plan.values_of(dataset.declared_labels)
        tests = tuple(case for case in tests if case.label is not None)
    trained = values if labels == "train" else None
    train = store.load(division.train, trained)
    val = store.load(division.val, trained) if division.val else None
    test = store.load(tests, values) if tests else None
    return _sized(Domain(train=train, val=val, test=test, plan=plan), cfg.sample.size)


def _sized(domain: Domain, size: tuple[int, int]) -> Domain:
    """Give the windows of all parts one size: that of the settings, else that of the largest frame."""
    parts = (domain.train, domain.val, domain.test)
    if not all(size):
        extents = [part.largest() for part in parts if part is not None]
        size = max(extent[0] for extent in extents), max(extent[1] for extent in extents)
    train, val, test = (None if part is None else part.resized(size) for part in parts)
    return Domain(train=train or domain.train, val=val, test=test, plan=domain.plan)


def _cache(data: SourceConfig, cache: Cache | None) -> Cache:
    if cache is not None:
        return cache
    root = data.root or Path()
    return Cache(cache_root(root if root.is_dir() else root.parent))


class _Store:
    """Prepares the sequences of one dataset, each once, and keeps them in the cache."""

    def __init__(self, dataset: Dataset, cache: Cache, plan: SequencePlan) -> None:
        self.dataset, self.cache, self.plan = dataset, cache, plan
        meta = plan.to_meta()
        self._params = {name: meta[name] for name in ("spacing_mm", "multiple", "equalise")}

    def load(self, cases: Sequence[Case], values: Mapping[int, int] | None) -> SequenceSet:
        """Prepare sequences; with `values`, their labels too."""
        images: list[Tensor] = []
        labels: list[Tensor] = []
        spacing: list[Tensor] = []
        for case in cases:
            if len(case.images) != 1:
                raise DataError(
                    f"case {case.id}", why=f"{len(case.images)} channels; a sequence has one", case=case.id
                )
            key = make_key(_hash(case, case.images[0]), {"what": "frames", **self._params}, CODE_VERSION)
            entry = self.cache.get_or_create(key, lambda case=case: self._frames(case))  # type: ignore[misc]
            images.append(entry.tensor("frames"))
            spacing.append(entry.tensor("spacing_mm"))
            if values is not None:
                labels.append(self._label(case, values))
        return SequenceSet(
            ids=tuple(case.id for case in cases),
            subjects=tuple(case.patient or case.id for case in cases),
            images=tuple(images),
            labels=tuple(labels) if values is not None else None,
            spacing_mm=torch.stack(spacing),
            label_names=dict(self.plan.label_names),
            size=(int(images[0].shape[1]), int(images[0].shape[2])),
        )

    def _frames(self, case: Case) -> dict[str, Any]:
        _log.info("preparing %s", case.id)
        prepared = prepare(read_sequence(case.images[0]), self.plan.frames)
        return {
            "frames": np.rint(prepared.images * 255.0).astype(np.uint8)[None],
            "spacing_mm": np.asarray(prepared.spacing_mm, dtype=np.float64),
        }

    def _label(self, case: Case, values: Mapping[int, int]) -> Tensor:
        if case.label is None:
            raise DataError(f"case {case.id}", why="it has no reference segmentation", case=case.id)
        path = case.label
        content = _hash(case, case.images[0]) + _hash(case, path)
        asked = {"what": "labels", "values": [list(pair) for pair in sorted(values.items())], **self._params}
        key = make_key(content, asked, CODE_VERSION)
        return self.cache.get_or_create(key, lambda: self._labels(case, path, values)).tensor("labels")

    def _labels(self, case: Case, path: Path, values: Mapping[int, int]) -> dict[str, Any]:
        image, label = read_sequence(case.images[0]), read_sequence(path)
        difference = grid_difference(label.volume, image.volume)
        if difference or label.frames.shape != image.frames.shape:
            raise DataError(
                f"case {case.id}",
                why=f"the segmentation does not lie on its frames: {difference or label.frames.shape}",
                case=case.id,
            )
        found = np.rint(label.frames).astype(np.int64)
        unknown = sorted(set(np.unique(found).tolist()) - set(values))
        if unknown:
            raise DataError(
                f"case {case.id}", why=f"label values {unknown} are unknown", do="name them", case=case.id
            )
        return {"labels": label_on_grid(found, image, prepare(image, self.plan.frames), values)}


def _hash(case: Case, path: Path) -> str:
    try:
        return file_hash(path)
    except OSError as error:
        raise DataError(
            f"case {case.id}", why=f"{path.name} cannot be read ({error.strerror})", case=case.id
        ) from error
