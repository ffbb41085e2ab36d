"""The cases of one run by their duty: labelled, unlabelled, reward, validation; and the teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medrl.core.cache import Cache, cache_root
from medrl.core.dataset import Dataset
from medrl.core.errors import CheckpointError, ConfigError, DataError
from medrl.core.types import Case

from .config import GraftConfig
from .config_data import AugmentConfig
from .duties import labelled_cases, open_split, reward_cases, reward_folds, training_cases
from .features import TeacherFolder, open_teachers
from .lengths import in_steps, steps_per_epoch
from .planning import divisor_of, resolve_plan
from .plans import SamplePlan
from .samples import Batch, CaseStore, SampleSet
from .teachers import TrainedOn, seen_cases
from .teachers.live import LiveTeacher, LiveTeachers, open_live
from .weighting import agent_is_off

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager
    from medrl.core.runtime import Runtime


@dataclass(frozen=True, eq=False)
class GraftData:
    """The cases of one run by their duty; no case has two.

    Attributes:
        labelled: Trained on with their labels.
        unlabelled: Trained on through the teachers alone.
        reward: Measure the agent's reward; never trained on.
        val: Select the best checkpoint.
        folds: Parts of `labelled` that take turns in measuring the reward; empty without cross-fitting.
        live: The teachers' networks, where they are asked and not read.
        views: Prepare cases as live teachers want them.
        seen: By case, which teachers were trained on it; empty where that does not matter.
    """

    dataset: Dataset
    plan: SamplePlan
    store: CaseStore
    teachers: tuple[TeacherFolder | LiveTeacher, ...]
    taps: tuple[str, ...]
    labelled: tuple[Case, ...]
    unlabelled: tuple[Case, ...]
    reward: tuple[Case, ...]
    val: tuple[Case, ...]
    folds: tuple[tuple[Case, ...], ...] = ()
    live: LiveTeachers | None = None
    views: tuple[CaseStore, ...] = ()
    seen: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)

    @property
    def families(self) -> tuple[str, ...]:
        """Convention of each teacher's logits; what an import wrote follows nnU-Net's."""
        return tuple(teacher.family for teacher in self.teachers)

    @property
    def device(self) -> torch.device:
        """Where live teachers run; the CPU where there is none."""
        return torch.device("cpu") if self.live is None else self.live.device

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
        taps: Sequence[str] | None = None,
        labelled: bool = True,
        augment: AugmentConfig | None = None,
    ) -> SampleSet:
        """Samples of some cases, with or without what the teachers say, or will say in `complete`."""
        files = [teacher for teacher in self.teachers if isinstance(teacher, TeacherFolder)]
        return SampleSet(
            self.store,
            cases,
            teachers=files if teachers else (),
            taps=(self.taps if taps is None else taps) if teachers and files else (),
            labelled=labelled,
            augment=augment,
            views=self.views if teachers else (),
        )

    def complete(self, batch: Batch, taps: Sequence[str] | None = None) -> Batch:
        """Ask live teachers about a batch; what files say is already in it."""
        return batch if self.live is None else self.live.answer(batch, self.taps if taps is None else taps)

    def in_sample(self, case_ids: Sequence[str]) -> Tensor | None:
        """Which teachers were trained on which samples, ``(B, N)`` bool; None where that does not matter."""
        if not self.seen:
            return None
        nobody = (False,) * len(self.teachers)
        return torch.tensor([self.seen.get(case_id, nobody) for case_id in case_ids])

    def description(self) -> dict[str, Any]:
        """What a checkpoint says about its network, its data and its teachers."""
        trained = (*self.labelled, *self.unlabelled, *self.reward)
        images = frozenset(self.store.get(case).image_hash for case in trained)
        return {
            "label_names": dict(self.plan.labels),
            "channel_names": list(self.plan.channel_names),
            "spacing": list(self.plan.spacing),
            "plan": self.plan.to_meta(),
            "teachers": [teacher.teacher for teacher in self.teachers],
            "trained_on": TrainedOn(images=images).to_record(),
        }

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
                except (CheckpointError, DataError) as error:
                    problems.append(str(error))
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise DataError(
                "teachers" if self.live else "teacher features",
                why=problems[0] + more,
                do="" if self.live else "medrl graft extract-features with the config of this student",
            )


def load(rt: Runtime, cfg: GraftConfig) -> GraftData:
    """Open everything that a training run reads, and check that it fits together."""
    root = cfg.data.root
    data = gather_data(
        cfg,
        rt.job.manager,
        Cache(cache_root(root)) if root else None,
        device=rt.device,
    )
    data.check_features()
    if cfg.split.unlabelled_from_test and rt.is_main:
        listed = {case.id for case in data.dataset.test_cases}
        rt.run.note(no_test_cases=sorted(case.id for case in data.unlabelled if case.id in listed))
    return data


def gather_data(
    cfg: GraftConfig,
    manager: PluginManager,
    cache: Cache | None,
    *,
    device: torch.device | None = None,
) -> GraftData:
    """Split the cases by duty and open the teachers.

    Args:
        cfg: The run's config.
        manager: Source of models.
        cache: Of prepared cases; None keeps none.
        device: Where live teachers run; the CPU if left out.

    Raises:
        CheckpointError: A live teacher cannot be loaded or does not fit.
        ConfigError: The split leaves nothing to train on.
        DataError: Cases or feature files do not fit.
    """
    dataset, split = open_split(cfg)
    plan = resolve_plan(cfg, dataset, split.train, divisor_of(cfg, manager, dataset), cache)
    store = CaseStore(dataset, plan, cache)
    live: LiveTeachers | None = None
    teachers: tuple[TeacherFolder | LiveTeacher, ...]
    if cfg.teachers.source == "live":
        live = open_live(cfg, manager, plan, device or torch.device("cpu"))
        teachers = live.teachers if live is not None else ()
    else:
        teachers = open_teachers(
            cfg.teachers.features,
            taps=cfg.distill.taps,
            target=plan.target_kind,
            labels=plan.labels,
            verify=cfg.teachers.verify,
        )
    trained = training_cases(cfg, dataset, split)
    labelled, unlabelled = labelled_cases(cfg, trained, store)
    reward: tuple[Case, ...] = ()
    folds: tuple[tuple[Case, ...], ...] = ()
    # The published weighting has no reward cases: it takes the batch, and the validation Dice.
    timed = in_steps(cfg, steps_per_epoch(cfg, len(labelled), len(unlabelled)))
    measured = bool(teachers) and agent_acts(timed) and cfg.weighting.mode != "legacy"
    if measured and cfg.split.reward_mode == "crossfit":
        folds = reward_folds(cfg, labelled, store)
    elif measured and cfg.split.reward_mode == "split" and cfg.split.reward > 0:
        labelled, reward = reward_cases(cfg, labelled, store)
    if not teachers and cfg.split.unlabelled_from_test:
        raise ConfigError(
            "split.unlabelled_from_test",
            why="images without labels learn from teachers, and there is none",
            do="--teachers FOLDER, or leave it out",
        )
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
        live=live,
        views=tuple(CaseStore(dataset, view, cache) for view in live.views) if live else (),
        seen=_seen(cfg, dataset, store, teachers, trained),
    )


def _seen(
    cfg: GraftConfig,
    dataset: Dataset,
    store: CaseStore,
    teachers: Sequence[TeacherFolder | LiveTeacher],
    cases: Sequence[Case],
) -> dict[str, tuple[bool, ...]]:
    """Which teachers were trained on which cases, if `teachers.oof` asks."""
    if cfg.teachers.oof == "off" or not teachers:
        return {}
    data = cfg.data
    return seen_cases(
        [teacher.name for teacher in teachers],
        [TrainedOn.from_record(teacher.trained_on) for teacher in teachers],
        cfg.teachers.folds,
        cases,
        image_hash=lambda case: store.get(case).image_hash,
        fold=lambda k: dataset.fold(k, data.folds, data.split_seed, data.group_by),
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
