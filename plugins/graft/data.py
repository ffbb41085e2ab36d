"""The cases of one run by their duty: labelled, unlabelled, reward, validation; and the teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medrl.core.cache import Cache, cache_root
from medrl.core.dataset import Dataset
from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Case

from .config import AugmentConfig, GraftConfig
from .duties import labelled_cases, open_split, reward_cases, reward_folds
from .features import TeacherFolder, open_teachers
from .planning import divisor_of, resolve_plan
from .plans import SamplePlan
from .samples import CaseStore, SampleSet
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
    labelled, unlabelled = labelled_cases(cfg, split.train, store)
    reward: tuple[Case, ...] = ()
    folds: tuple[tuple[Case, ...], ...] = ()
    # The published weighting has no reward cases: it takes the batch, and the validation Dice.
    measured = bool(teachers) and agent_acts(cfg) and cfg.weighting.mode != "legacy"
    if measured and cfg.split.reward_mode == "crossfit":
        folds = reward_folds(cfg, labelled, store)
    elif measured and cfg.split.reward_mode == "split" and cfg.split.reward > 0:
        labelled, reward = reward_cases(cfg, labelled, store)
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
