"""The cases of one run by their duty: labelled, unlabelled, reward, validation; and the teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from medrl.core.cache import Cache, cache_root
from medrl.core.dataset import Dataset, Split, open_dataset
from medrl.core.errors import ConfigError, DataError
from medrl.core.rng import numpy_generator
from medrl.core.types import Case

from .cohorts import is_cohort_file, open_cohorts
from .config import AugmentConfig, GraftConfig
from .features import TeacherFolder, open_teachers
from .plans import SamplePlan, read_statistics
from .samples import CaseStore, SampleSet, mask_path
from .weighting import agent_is_off
from .windows import MASK_DEPTH, Size, rounded_up

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager
    from medrl.core.runtime import Runtime

MAX_WINDOW_VOXELS = 16_000_000
"""A window larger than this that nobody asked for by numbers is refused."""


@dataclass(frozen=True, eq=False)
class GraftData:
    """The cases of one run by their duty; no case has two.

    Attributes:
        labelled: Trained on with their labels.
        unlabelled: Trained on through the teachers alone.
        reward: Measure the agent's reward; never trained on.
        val: Select the best checkpoint.
        folds: Parts of `labelled` that take turns in measuring the reward; empty without cross-fitting.
    """

    dataset: Dataset
    plan: SamplePlan
    store: CaseStore
    teachers: tuple[TeacherFolder, ...]
    taps: tuple[str, ...]
    labelled: tuple[Case, ...]
    unlabelled: tuple[Case, ...]
    reward: tuple[Case, ...]
    val: tuple[Case, ...]
    folds: tuple[tuple[Case, ...], ...] = ()

    @property
    def families(self) -> tuple[str, ...]:
        """Convention of each teacher's logits; what an import wrote follows nnU-Net's."""
        return tuple(teacher.family for teacher in self.teachers)

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return len(self.plan.channel_names)

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """A short name for each teacher, unlike the others."""
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) == len(names):
            return tuple(names)
        return tuple(f"{number}_{name}" for number, name in enumerate(names))

    def samples(
        self,
        cases: Sequence[Case],
        *,
        teachers: bool,
        labelled: bool = True,
        augment: AugmentConfig | None = None,
    ) -> SampleSet:
        """Samples of some cases, with or without what the teachers say."""
        return SampleSet(
            self.store,
            cases,
            teachers=self.teachers if teachers else (),
            taps=self.taps if teachers else (),
            labelled=labelled,
            augment=augment,
        )

    def check_features(self) -> None:
        """Compare the metadata of every feature file that training will read; all problems at once.

        Raises:
            DataError: Files are missing or do not fit; the first ones are named.
        """
        problems: list[str] = []
        for case in (*self.labelled, *self.unlabelled, *self.reward):
            if not self.teachers:
                return
            expected = self.store.expected(self.store.get(case))
            for teacher in self.teachers:
                try:
                    teacher.check(expected)
                except DataError as error:
                    problems.append(str(error))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise DataError(
                "teacher features",
                why=problems[0] + more,
                do="medrl graft extract-features with the config of this student",
            )


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


def load(rt: Runtime, cfg: GraftConfig) -> GraftData:
    """Open everything that a training run reads, and check that it fits together."""
    root = cfg.data.root
    data = gather_data(cfg, rt.job.manager, Cache(cache_root(root)) if root else None)
    data.check_features()
    return data


def gather_data(cfg: GraftConfig, manager: PluginManager, cache: Cache | None) -> GraftData:
    """Split the cases by duty and open the teachers.

    Raises:
        ConfigError: The split leaves nothing to train on.
        DataError: Cases or feature files do not fit.
    """
    dataset, split = open_split(cfg)
    plan = resolve_plan(cfg, dataset, split.train, divisor_of(cfg, manager, dataset), cache)
    store = CaseStore(dataset, plan, cache)
    teachers = open_teachers(
        cfg.teachers.features,
        taps=cfg.distill.taps,
        target=plan.target_kind,
        labels=plan.labels,
        verify=cfg.teachers.verify,
    )
    labelled, unlabelled = _labelled(cfg, split.train, store)
    reward: tuple[Case, ...] = ()
    folds: tuple[tuple[Case, ...], ...] = ()
    # The published weighting has no reward cases: it takes the batch, and the validation Dice.
    measured = bool(teachers) and agent_acts(cfg) and cfg.weighting.mode != "legacy"
    if measured and cfg.split.reward_mode == "crossfit":
        folds = _reward_folds(cfg, labelled, store)
    elif measured and cfg.split.reward_mode == "split" and cfg.split.reward > 0:
        labelled, reward = _reward_cases(cfg, labelled, store)
    if not teachers:
        unlabelled = ()
    elif unlabelled and cfg.train.batch_size < 2:
        raise ConfigError(
            "train.batch_size",
            why="a batch holds labelled and unlabelled cases, so it needs at least 2",
            do="--set train.batch_size=2",
        )
    return GraftData(
        dataset=dataset,
        plan=plan,
        store=store,
        teachers=teachers,
        taps=cfg.distill.taps if cfg.distill.feature_weight > 0 else (),
        labelled=labelled,
        unlabelled=unlabelled,
        reward=reward,
        val=split.val,
        folds=folds,
    )


def agent_acts(cfg: GraftConfig) -> bool:
    """Whether something is learned about the teachers while training, from a reward.

    That is weighting `reinforce`, `align` and `legacy` with a warm-up shorter than the run; the published
    warm-up from ones never ends, however long it is.
    """
    mode = cfg.weighting.mode
    if mode == "legacy" and cfg.agent.blend == "ones":
        return True
    acts = mode in ("align", "legacy", "reinforce")
    return acts and not agent_is_off(cfg.agent.warmup, cfg.train.max_steps)


def resolve_plan(
    cfg: GraftConfig, dataset: Dataset, cases: Sequence[Case], divisor: Size, cache: Cache | None
) -> SamplePlan:
    """Turn every `auto` of the config into what this dataset needs.

    Raises:
        DataError: The images are too large for a window of their size.
    """
    sample = cfg.sample
    masked = all(mask_path(case, sample.mask) is not None for case in cases)
    stats_file = sample.stats_file or dataset.info.get("statistics")
    statistics = read_statistics(stats_file, dataset.channel_names) if stats_file else {}
    normalization: str = sample.normalization
    if normalization == "auto":
        normalization = "stats" if statistics else "mask" if masked else "volume"
    window: str = sample.window
    if window == "auto":
        window = "mask" if masked else "centre"
    target: str = cfg.target.kind
    if target == "auto":
        target = dataset.info.get("target", "auto")
    if target == "auto":
        prostate = masked and sorted(dataset.labels.values()) == [0, 1, 2, 3]
        target = "binary" if prostate else "classes"
    if target in ("binary", "3class") and max(dataset.labels.values()) > 3:
        raise ConfigError(
            "target.kind",
            why=f"`{target}` is for prostate labels 0 to 3, this dataset has {dict(dataset.labels)}",
            do="--set target.kind=classes",
        )
    draft = SamplePlan(
        window=window,
        size=sample.size,
        mask=sample.mask,
        normalization=normalization,
        statistics=statistics,
        target_kind=target,
        labels=dataset.labels,
        channel_names=dataset.channel_names,
    )
    store = CaseStore(dataset, draft, cache)
    size = sample.size
    prepared = [store.get(case) for case in cases]
    if 0 in size:
        largest = np.max([item.shape for item in prepared], axis=0)
        if window == "mask":
            largest[0] = MASK_DEPTH
        size = rounded_up([given or int(found) for given, found in zip(size, largest, strict=True)], divisor)
        if np.prod(size) > MAX_WINDOW_VOXELS:
            raise DataError(
                f"dataset {dataset.name}",
                why=f"its largest image would need a window of {size} voxels",
                do="give one, for example --set sample.size=[32,128,128]",
            )
    elif size != rounded_up(size, divisor):
        raise ConfigError(
            "sample.size",
            why=f"{list(size)} must be multiples of {list(divisor)} for model {cfg.model.name}",
            do=f"--set sample.size={list(rounded_up(size, divisor))}".replace(" ", ""),
        )
    x, y, z = (float(value) for value in np.median([item.spacing for item in prepared], axis=0))
    return replace(draft, size=size, spacing=(x, y, z))


def divisor_of(cfg: GraftConfig, manager: PluginManager, dataset: Dataset) -> Size:
    """Multiples that the student needs in depth, height and width; nothing is allocated."""
    with torch.device("meta"):
        network = build_network(cfg, manager, len(dataset.channel_names), 2)
    depth, height, width = getattr(network, "divisor", (1, 1, 1))
    return int(depth), int(height), int(width)


def build_network(cfg: GraftConfig, manager: PluginManager, in_channels: int, out_channels: int) -> nn.Module:
    """Build the student, or a teacher, by its registry key.

    Raises:
        ConfigError: Unknown key or parameters, or parameters that the data decide.
    """
    params = cfg.model.params
    for name in ("in_channels", "out_channels"):
        if name in params:
            raise ConfigError(f"model.{name}", why="the dataset decides it", do=f"leave out model.{name}")
    if cfg.model.name.startswith("graft.") and "deep_supervision" not in params:
        params["deep_supervision"] = cfg.loss.deep_supervision
    network: nn.Module = manager.registry("models").build(
        cfg.model.name, in_channels=in_channels, out_channels=out_channels, **params
    )
    return network


def _labelled(
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


def _reward_cases(
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


def _reward_folds(
    cfg: GraftConfig, cases: tuple[Case, ...], store: CaseStore
) -> tuple[tuple[Case, ...], ...]:
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
