"""Which case does what in a run: labelled, unlabelled, reward, validation. No case has two duties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medrl.core.dataset import Dataset, Split, open_dataset
from medrl.core.errors import ConfigError
from medrl.core.rng import numpy_generator
from medrl.core.types import Case

from .cohorts import is_cohort_file, open_cohorts
from .config import GraftConfig
from .samples import CaseStore


def open_split(cfg: GraftConfig) -> tuple[Dataset, Split]:
    """Open the dataset of a config and its fold.

    Raises:
        ConfigError: No dataset is named.
        DataError: The dataset is unusable, or training and validation overlap.
    """
    data = cfg.data
    if data.root is None:
        raise ConfigError("data.root", why="no dataset is named", do="medrl train graft --data DIR")
    if is_cohort_file(data.root):
        dataset: Dataset = open_cohorts(data.root, exclude=data.exclude)
    else:
        dataset = open_dataset(data.root, layout=data.layout, exclude=data.exclude)
    return dataset, dataset.fold(data.fold, data.folds, data.split_seed, data.group_by)


def labelled_cases(
    cfg: GraftConfig, cases: Sequence[Case], store: CaseStore
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Choose which training cases show their labels."""
    known = [case for case in cases if case.label is not None]
    rest = [case for case in cases if case.label is None]
    count = cfg.split.labelled
    if count == 0 or count >= len(known):
        if count > len(known):
            raise ConfigError("split.labelled", why=f"{count} of {len(known)} labelled training cases")
        return tuple(known), tuple(rest)
    chosen = stratified(known, count, cfg.train.seed, "labelled", store)
    names = {case.id for case in chosen}
    return chosen, tuple(case for case in cases if case.id not in names)


def reward_cases(
    cfg: GraftConfig, cases: tuple[Case, ...], store: CaseStore
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Set some labelled cases apart for the reward; at least one, and at least one stays."""
    count = max(1, round(cfg.split.reward * len(cases)))
    if count >= len(cases):
        raise ConfigError(
            "split.reward",
            why=f"{count} of {len(cases)} labelled cases would leave none to train on",
            do="--set split.reward=0 measures the reward on the batch",
        )
    chosen = stratified(cases, count, cfg.train.seed, "reward", store)
    names = {case.id for case in chosen}
    return tuple(case for case in cases if case.id not in names), chosen


def reward_folds(cfg: GraftConfig, cases: tuple[Case, ...], store: CaseStore) -> tuple[tuple[Case, ...], ...]:
    """Deal the labelled cases into folds, each with its share of every combination of labels."""
    count = min(cfg.split.reward_folds, len(cases))
    if count < 2:
        raise ConfigError(
            "split.reward_mode",
            why=f"{len(cases)} labelled case cannot be dealt into folds",
            do="--set split.reward_mode=batch",
        )
    rest, folds = cases, []
    for left in range(count, 0, -1):
        chosen = stratified(rest, len(rest) // left, cfg.train.seed, "reward folds", store)
        names = {case.id for case in chosen}
        rest = tuple(case for case in rest if case.id not in names)
        folds.append(chosen)
    return tuple(folds)


def stratified(cases: Sequence[Case], count: int, seed: int, name: str, store: CaseStore) -> tuple[Case, ...]:
    """Draw `count` cases so that each combination of present labels keeps its share.

    Cases are shuffled and dealt into groups by their labels; each time the group that lags most behind its
    share gives its next case.
    """
    order = numpy_generator(seed, "graft", name).permutation(len(cases))
    groups: dict[tuple[int, ...], list[Case]] = {}
    for index in order:
        label = store.get(cases[index]).label
        present = tuple(int(value) for value in np.unique(label)) if label is not None else ()
        groups.setdefault(present, []).append(cases[index])
    chosen: list[Case] = []
    taken = dict.fromkeys(groups, 0)
    for _ in range(min(count, len(cases))):
        lag = {
            key: len(items) * (len(chosen) + 1) / len(cases) - taken[key]
            for key, items in groups.items()
            if taken[key] < len(items)
        }
        key = max(lag, key=lambda item: (lag[item], len(groups[item]), item))
        chosen.append(groups[key][taken[key]])
        taken[key] += 1
    return tuple(sorted(chosen, key=lambda case: case.id))
