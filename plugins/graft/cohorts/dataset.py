"""Datasets of several cohorts, described by the YAML file of the original.

``medrl train graft --data cohorts.yaml`` trains on it. Each case is looked up by its exact name, each folder
is listed once; the original's search by prefix takes the files of case ``100`` for case ``10``.

Deviations from the original: a training case without label file is unlabelled, not all background; a
validation case without one is an error; so is every overlap of training, validation and test.

Source: specification §1; upstream dataset/pimedloader_3d_with_features.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medrl.core.dataset import Dataset, Split, patient_of, safe_case_id
from medrl.core.dataset.splits import regroup
from medrl.core.errors import ConfigError, DataError, did_you_mean
from medrl.core.types import Case
from medrl.core.volume import image_stem, is_image_file

from .folds import Fold, other_validation_lists, read_folds, read_test
from .settings import Cohort, CohortSettings, read_settings

_log = logging.getLogger("medrl.graft")

LABELS = {"background": 0, "prostate": 1, "PCa": 2, "csPCa": 3}
"""Label values of every cohort (specification §1)."""

_CHANNEL_WORDS = {"T2": ("t2", "t2w"), "ADC": ("adc",), "DWI": ("dwi", "hbv")}
_MASK_WORDS = ("mask", "prostate", "prostate_mask", "gland")
_LABEL_WORDS = ("label", "lesion", "lesions", "cancer", "seg")


class CohortDataset(Dataset):
    """The cases of all cohorts that take part, and their folds.

    Attributes:
        settings: What the YAML file says.
        cohort_of: Cohort of each case, test cases included.
        unlabelled: Cases of the fold lists without a label file; they train through the teachers alone.
        info: Among other things ``target`` and ``statistics``: what ``target.kind: auto`` and an unset
            ``sample.stats_file`` mean for this dataset.
    """

    def __init__(
        self,
        settings: CohortSettings,
        *,
        cases: Iterable[Case],
        test_cases: Iterable[Case],
        folds: Mapping[str, Sequence[Fold]],
        cohort_of: Mapping[str, str],
        excluded: Sequence[str],
    ) -> None:
        listed = tuple(cases)
        super().__init__(
            root=settings.path,
            name=settings.path.stem,
            layout="graft.cohorts",
            channel_names=settings.channels,
            labels=LABELS,
            cases=[case for case in listed if case.label is not None],
            test_cases=test_cases,
            info={
                "cohorts": dict(cohort_of),
                "excluded": sorted(excluded),
                "target": settings.target_kind,
                "statistics": settings.stats,
            },
        )
        self.settings = settings
        self.cohort_of = dict(cohort_of)
        self.unlabelled = tuple(
            sorted((case for case in listed if case.label is None), key=lambda case: case.id)
        )
        self._folds = {name: tuple(items) for name, items in folds.items()}
        self._excluded = set(excluded)

    def case(self, case_id: str) -> Case:
        """Return a case by its identifier, training, test or unlabelled."""
        found = [case for case in self.unlabelled if case.id == case_id]
        return found[0] if found else super().case(case_id)

    def fold(self, k: int, folds: int = 5, seed: int = 0, group_by: str = "patient") -> Split:
        """Return fold `k` of the cohorts' fold files; `folds` and `seed` have no part in it.

        With ``fold_num: -1`` the training part is made of the other folds' validation lists. Where the file
        names a fold, `k` must be that one.

        Raises:
            ConfigError: There is no such fold, or the file names another one.
            DataError: Training, validation or test overlap by case or, with grouping, by patient; or a
                validation case has no label.
        """
        asked = self.settings.fold_num
        if asked is not None and asked >= 0 and asked != k:
            raise ConfigError(
                "data.fold",
                why=f"the run asks for fold {k}, {self.root.name} for fold_num: {asked}",
                do=f"--fold {asked}, or leave fold_num out of the file",
            )
        train: list[str] = []
        val: list[str] = []
        for name, items in self._folds.items():
            if not 0 <= k < len(items):
                raise ConfigError(
                    "data.fold",
                    why=f"fold {k} does not exist, cohort {name} has {len(items)}",
                    do=f"choose 0 to {min(map(len, self._folds.values())) - 1}",
                )
            fold = other_validation_lists(items, k) if asked == -1 else items[k]
            train += fold.train
            val += fold.val
        known = {case.id: case for case in regroup((*self.cases, *self.unlabelled), group_by)}
        grouped = group_by not in {"case", "none", ""}
        split = Split(train=self._chosen(train, known), val=self._chosen(val, known), grouped=grouped)
        if not split.train or not split.val:
            part = "validation" if split.train else "training"
            raise DataError(str(self.root), why=f"fold {k} leaves no {part} case")
        self._check_test(split, regroup(self.test_cases, group_by), grouped)
        bare = [case.id for case in split.val if case.label is None]
        if bare:
            raise DataError(
                f"case {bare[0]}",
                why=f"{len(bare)} validation cases have no label file: {_some(bare)}",
                do=f"give their labels, or leave them out with remove_cases in {self.root.name}",
                case=bare[0],
            )
        return split

    def _chosen(self, names: Iterable[str], known: Mapping[str, Case]) -> tuple[Case, ...]:
        chosen = {name: known[name] for name in names if name not in self._excluded}
        return tuple(chosen[name] for name in sorted(chosen))

    def _check_test(self, split: Split, tests: Sequence[Case], grouped: bool) -> None:
        """No case, and with grouping no patient, is in the test list and in the fold."""
        for part, cases in (("training", split.train), ("validation", split.val)):
            both = sorted({case.id for case in cases} & {case.id for case in tests})
            if not both and grouped:
                both = sorted({_patient(case) for case in cases} & {_patient(case) for case in tests})
            if both:
                raise DataError(
                    str(self.root),
                    why=f"{len(both)} cases or patients are in the test list and in {part}: {_some(both)}",
                    do="list each once; data.group_by=case if these are different patients",
                )


def open_cohorts(path: Path | str, *, exclude: Sequence[str] = ()) -> CohortDataset:
    """Open the dataset that a YAML file of the original describes; no image is read.

    Args:
        path: The YAML file.
        exclude: Cases to leave out, beside its ``remove_cases``.

    Raises:
        ConfigError: The file is wrong, or an excluded case does not exist.
        DataError: A fold file is wrong, a case belongs to two cohorts, or files are missing; all are counted
            and the first ones named.
    """
    path = Path(path)
    settings = read_settings(path)
    for key, advice in settings.without_effect.items():
        _log.info("%s: %s has no effect here; %s", path.name, key, advice)
    excluded = {*exclude, *settings.removed}
    folds: dict[str, tuple[Fold, ...]] = {}
    cohort_of: dict[str, str] = {}
    listed: dict[str, list[str]] = {"cases": [], "test": []}
    for cohort in settings.cohorts:
        folds[cohort.name] = read_folds(cohort.folds, cohort=cohort.name, keys=cohort.keys)
        names = sorted({case for fold in folds[cohort.name] for case in (*fold.train, *fold.val)})
        tests = read_test(cohort.test) if cohort.test is not None else ()
        for part, items in (("cases", names), ("test", tests)):
            for name in items:
                other = cohort_of.setdefault(name, cohort.name)
                if other != cohort.name:
                    raise DataError(
                        f"case {name}",
                        why=f"it is listed in the cohorts {other} and {cohort.name}",
                        do="give it another name in one of them",
                        case=name,
                    )
                listed[part].append(name)
    _check_exclude(exclude, cohort_of)
    finder = _Finder(settings)
    made = {
        part: [
            case
            for name in items
            if name not in excluded and (case := finder.case(name, cohort_of[name])) is not None
        ]
        for part, items in listed.items()
    }
    finder.finish()
    return CohortDataset(
        settings,
        cases=made["cases"],
        test_cases=made["test"],
        folds=folds,
        cohort_of={name: cohort for name, cohort in cohort_of.items() if name not in excluded},
        excluded=sorted(excluded),
    )


class _Finder:
    """Finds the files of a case by exact names; lists each folder once."""

    def __init__(self, settings: CohortSettings) -> None:
        self.settings = settings
        self.cohorts = {cohort.name: cohort for cohort in settings.cohorts}
        self.problems: list[str] = []
        self._listings: dict[Path, dict[str, list[Path]]] = {}

    def case(self, name: str, cohort_name: str) -> Case | None:
        """The case, or None if a file is missing or ambiguous (recorded)."""
        cohort = self.cohorts[cohort_name]
        images = [
            self._one(name, folder, stems, channel)
            for channel, folder, stems in self._image_stems(name, cohort)
        ]
        folder = cohort.folders.mask
        mask = None
        if folder is not None:
            mask = self._one(name, folder, _stems(name, _MASK_WORDS), "prostate mask")
        label = self._one(name, cohort.folders.labels, _stems(name, _LABEL_WORDS), "label", needed=False)
        if any(path is None for path in images) or (folder is not None and mask is None):
            return None
        return Case(
            id=safe_case_id(name),
            images=tuple(path for path in images if path is not None),
            label=label,
            patient=patient_of(name),
            masks={} if mask is None else {"prostate": mask},
        )

    def finish(self) -> None:
        """Raise if anything was wrong."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more problems)" if len(self.problems) > 1 else ""
            what, _, why = self.problems[0].partition(": ")
            raise DataError(
                what,
                why=why + more,
                do=f"complete the folders, or leave cases out with remove_cases in {self.settings.path.name}",
                case=what.removeprefix("case "),
            )

    def _image_stems(self, name: str, cohort: Cohort) -> list[tuple[str, Path, list[str]]]:
        """For each channel its folder and the names that its file may have.

        ``<case>_0000`` or ``<case>_t2``; the bare case only where each channel has a folder of its own.
        """
        folders = cohort.folders.images
        apart = len(set(folders)) == len(folders)
        found = []
        for channel, number, folder in zip(
            self.settings.channels, self.settings.numbers, folders, strict=True
        ):
            stems = [f"{name}_{number:04d}", *_stems(name, _CHANNEL_WORDS[channel])[1:]]
            found.append((channel, folder, [*stems, name] if apart else stems))
        return found

    def _one(
        self, case: str, folder: Path, stems: Sequence[str], what: str, *, needed: bool = True
    ) -> Path | None:
        """The only file with one of these names."""
        files = self._listing(folder)
        found = [path for stem in stems for path in files.get(stem, ())]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
            self.problems.append(f"case {case}: several files for its {what} in {folder}: {names}")
        elif needed:
            near = [path.name for stem, paths in files.items() if stem.startswith(case) for path in paths]
            hint = f"; similar there: {_some(near, 3)}" if near else ""
            self.problems.append(f"case {case}: no {what} {stems[0]}.nii.gz in {folder}{hint}")
        return None

    def _listing(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._listings:
            if not folder.is_dir():
                raise DataError(str(folder), why=f"no such folder, named in {self.settings.path.name}")
            files: dict[str, list[Path]] = {}
            for path in sorted(folder.iterdir()):
                if is_image_file(path):
                    files.setdefault(image_stem(path), []).append(path)
            self._listings[folder] = files
        return self._listings[folder]


def _stems(name: str, words: Sequence[str]) -> list[str]:
    """The bare name, then the name with each word, as written and in upper case."""
    return [name, *(f"{name}_{form}" for word in words for form in dict.fromkeys((word, word.upper())))]


def _check_exclude(exclude: Sequence[str], known: Mapping[str, Any]) -> None:
    unknown = [name for name in exclude if name not in known]
    if unknown:
        raise ConfigError(
            "data.exclude", why=f"no such case: {_some(unknown)}", do=did_you_mean(unknown[0], known)
        )


def _patient(case: Case) -> str:
    return case.patient or case.id


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
