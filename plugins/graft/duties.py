"""Which case does what in a run: labelled, unlabelled, reward, validation. No case has two duties."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medrl.core.dataset import Dataset, Split, open_dataset
from medrl.core.dataset.model import some
from medrl.core.errors import ConfigError, DataError, did_you_mean
from medrl.core.rng import numpy_generator
from medrl.core.types import Case

from .cohorts import is_cohort_file, open_cohorts
from .config import GraftConfig
from .samples import CaseStore

_log = logging.getLogger("medrl.graft")


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


def training_cases(cfg: GraftConfig, dataset: Dataset, split: Split) -> tuple[Case, ...]:
    """The cases that a run trains on, in any duty: its fold, or what the config makes of it.

    With `split.unlabelled_from_test` that includes the images without labels that are listed for testing.

    Raises:
        ConfigError: None is left, or a selected case is not in the fold.
        DataError: A test image shows a patient of the validation.
    """
    chosen = split.train
    if cfg.split.unlabelled_from_test:
        chosen = (*chosen, *_from_test(dataset, split))
    if cfg.split.selected_cases is not None:
        chosen = _selected(cfg.split.selected_cases, chosen)
    if cfg.split.overfit_batches > 0:
        chosen = chosen[: cfg.split.overfit_batches * cfg.train.batch_size]
    return chosen


def _from_test(dataset: Dataset, split: Split) -> tuple[Case, ...]:
    """Test images without labels; said loudly, because a result on them is no longer one on unseen images."""
    found = tuple(case for case in dataset.test_cases if case.label is None)
    if not found:
        raise ConfigError(
            "split.unlabelled_from_test",
            why=f"dataset {dataset.name} lists no test image without label",
            do="leave it out",
        )
    validated = {case.patient or case.id for case in split.val} if split.grouped else set()
    both = sorted(case.id for case in found if (case.patient or case.id) in validated)
    if both:
        raise DataError(
            f"case {both[0]}",
            why=f"{len(both)} test images show patients of the validation cases",
            do="leave them out with --exclude, or set data.group_by=case if these are different patients",
            case=both[0],
        )
    _log.warning(
        "%d images that the dataset lists for TESTING now train this student, through the teachers alone: "
        "they are NOT test cases of this run, and no result on them is one on unseen images (%s)",
        len(found),
        some(case.id for case in found),
    )
    return found


def _selected(path: Path, cases: Sequence[Case]) -> tuple[Case, ...]:
    """The cases that a JSON file names."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"split.selected_cases {path}", why=f"cannot be read as JSON ({error})") from error
    names = content.get("case_ids") if isinstance(content, dict) else content
    if not isinstance(names, list) or not names:
        raise ConfigError(
            f"split.selected_cases {path}", why='expected a list of cases, or {"case_ids": [case, …]}'
        )
    known = {case.id: case for case in cases}
    wanted = list(dict.fromkeys(str(name) for name in names))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(
            f"split.selected_cases {path}",
            why=f"{len(unknown)} cases are not in the training fold: {some(unknown)}",
            do=did_you_mean(unknown[0], known),
        )
    return tuple(case for case in cases if case.id in set(wanted))


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
