"""The multi-cohort YAML of the original: every key read, all problems reported at once.

Relative paths are taken from the folder of the YAML file. Keys that only steered the original's programs
are accepted and reported as without effect.

Source: upstream dataset/pimed_dataset_configs_local_region_5fold_binary_201.yaml and
dataset/pimedloader_3d_with_features.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medrl.core.config import load_yaml
from medrl.core.errors import ConfigError, did_you_mean
from medrl.plugins.graft.upstream import FORMATS, UpstreamTeacher, family_of

CHANNELS = ("T2", "ADC", "DWI")
SUFFIXES = (".yaml", ".yml")
_FOLDS, _TEST, _KEYS, _TRAIN, _PATHS = "_fold_json", "_test_json", "_fold_keys", "train_", "_paths"
_WITHOUT_EFFECT = {
    "gpu_device": "use --device",
    "load_checkpoint": "use --init-from",
    "load_cp_no": "use --init-from",
    "model_weights_path": "use --init-from",
}
_PLAIN = (
    "stats_per_case_file", "pred_type", "region_based", "teacher_names", "features_format", "image_dirs",
    "fold_num", "remove_cases", "dynamic_case_loading", *(f"use_{name}" for name in CHANNELS),
    *_WITHOUT_EFFECT,
)  # fmt: skip
_DIRS = ("T2_dir", "ADC_dir", "DWI_dir", "mask_dir", "lesions_dir")


@dataclass(frozen=True)
class Folders:
    """Where the files of a cohort lie.

    Attributes:
        images: One folder for each channel of `CohortSettings.channels`; often the same one.
        labels: Lesion labels 0 to 3.
        mask: Prostate masks; None if there are none.
    """

    images: tuple[Path, ...]
    labels: Path
    mask: Path | None = None


@dataclass(frozen=True)
class Cohort:
    """One cohort that takes part.

    Attributes:
        name: Such as ``picai``.
        folds: JSON file of its folds.
        folders: Its files.
        test: JSON file of its test cases, if any.
        keys: Names of the training and validation lists in `folds`; empty: found by `read_folds`.
    """

    name: str
    folds: Path
    folders: Folders
    test: Path | None = None
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class CohortSettings:
    """What the YAML says.

    Attributes:
        path: The YAML file.
        cohorts: Cohorts that take part, in the order of the file.
        channels: Image channels that are used, in the order T2, ADC, DWI.
        numbers: File number of each channel (`_0000`, `_0001`, `_0002`).
        pred_type: ``binary`` or ``3class``.
        region_based: Nested regions instead of exclusive classes.
        fold_num: Fold that the file asks for; -1 makes each training part of the other folds' validation
            lists; None leaves the choice to ``data.fold``.
        stats: JSON with the mean and standard deviation of each case.
        removed: Cases to leave out.
        teachers: Names, folders and formats of the teachers' feature files.
        without_effect: Keys that change nothing here, with what to use instead.
    """

    path: Path
    cohorts: tuple[Cohort, ...]
    channels: tuple[str, ...] = CHANNELS
    numbers: tuple[int, ...] = (0, 1, 2)
    pred_type: str = "3class"
    region_based: bool = False
    fold_num: int | None = None
    stats: Path | None = None
    removed: tuple[str, ...] = ()
    teachers: tuple[UpstreamTeacher, ...] = ()
    without_effect: Mapping[str, str] = field(default_factory=dict)

    @property
    def target_kind(self) -> str:
        """Kind of target (`regions.make_target`) that `pred_type` and `region_based` ask for."""
        if self.region_based:
            return self.pred_type
        return "binary_classes" if self.pred_type == "binary" else "classes"


def is_cohort_file(path: Path) -> bool:
    """Whether a dataset path names such a YAML file."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def read_settings(path: Path) -> CohortSettings:
    """Read the YAML file of a multi-cohort dataset.

    Raises:
        ConfigError: It cannot be read, or keys are unknown, missing, of a wrong kind or still placeholders;
            all problems are listed.
    """
    values = load_yaml(path)
    reader = _Reader(path, values)
    settings = reader.settings()
    if reader.problems:
        raise ConfigError(
            f"dataset file {path}",
            why=f"{len(reader.problems)} problem{'s' if len(reader.problems) > 1 else ''}",
            do="correct the file",
            problems=reader.problems,
        )
    return settings


class _Reader:
    """Reads one file and collects what is wrong with it."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values
        self.problems: list[str] = []

    def settings(self) -> CohortSettings:
        """What the file says, as far as it could be understood."""
        names = [
            str(key)[: -len(_FOLDS)] for key in self.values if str(key).endswith(_FOLDS) and key != _FOLDS
        ]
        self._check_keys(names)
        channels = [name for name in CHANNELS if self._flag(f"use_{name}", True)]
        if not channels:
            self.problems.append("use_T2, use_ADC, use_DWI: all are false, no channel is left")
        if self._flag("dynamic_case_loading", False):
            self.problems.append(
                "dynamic_case_loading: its module was never published; list the cases in fold files"
            )
        cohorts = [self._cohort(name, channels) for name in names if self._flag(_TRAIN + name, True)]
        if not cohorts:
            self.problems.append("no cohort takes part: give <cohort>_fold_json, and train_<cohort>: true")
        pred_type = self.values.get("pred_type", "3class")
        if pred_type not in ("binary", "3class"):
            self.problems.append(f"pred_type: {pred_type!r} is neither binary nor 3class")
        stats = self.values.get("stats_per_case_file")
        return CohortSettings(
            path=self.path,
            cohorts=tuple(cohort for cohort in cohorts if cohort is not None),
            channels=tuple(channels),
            numbers=tuple(CHANNELS.index(name) for name in channels),
            pred_type=str(pred_type),
            region_based=self._flag("region_based", False),
            fold_num=self._fold_num(),
            stats=None if stats is None else self._path("stats_per_case_file", stats),
            removed=self._names("remove_cases"),
            teachers=self._teachers(),
            without_effect={key: _WITHOUT_EFFECT[key] for key in self.values if key in _WITHOUT_EFFECT},
        )

    def _check_keys(self, names: Sequence[str]) -> None:
        known = [*_PLAIN]
        for name in names:
            known += [name + _FOLDS, name + _TEST, name + _KEYS, _TRAIN + name]
        for key in map(str, self.values):
            if key in known:
                continue
            off = key.startswith(_TRAIN) and self.values[key] is False
            if off or (key.endswith(_TEST) and self.values.get(_TRAIN + key[: -len(_TEST)]) is False):
                continue  # a cohort that is switched off needs no fold file
            if key.startswith(_TRAIN) and self.values[key] is True:
                self.problems.append(f"{key}: there is no {key.removeprefix(_TRAIN)}{_FOLDS}")
                continue
            self.problems.append(f"{key}: unknown key, {did_you_mean(key, known)}")
        dirs = self._mapping("image_dirs")
        places = ["file_paths", "teachers_features_paths", *(name + _PATHS for name in names)]
        for key in map(str, dirs):
            if key not in places:
                self.problems.append(f"image_dirs.{key}: unknown key, {did_you_mean(key, places)}")

    def _cohort(self, name: str, channels: Sequence[str]) -> Cohort | None:
        folds = self._path(name + _FOLDS, self.values[name + _FOLDS])
        test = self.values.get(name + _TEST)
        test_path = None if test is None else self._path(name + _TEST, test)
        keys = self._names(name + _KEYS)
        if len(keys) not in (0, 2):
            self.problems.append(f"{name}{_KEYS}: expected [training key, validation key]")
        folders = self._folders(name, channels)
        if folds is None or folders is None:
            return None
        return Cohort(name, folds, folders, test_path, keys)

    def _folders(self, name: str, channels: Sequence[str]) -> Folders | None:
        """Folders of a cohort: its own if the file names them, else those of all cohorts."""
        dirs = self._mapping("image_dirs")
        key = name + _PATHS if name + _PATHS in dirs else "file_paths"
        found = dirs.get(key)
        if not isinstance(found, Mapping):
            message = f"image_dirs.{key}: expected the folders {', '.join(_DIRS)}"
            if message not in self.problems:
                self.problems.append(message)
            return None
        known = set(_DIRS)
        paths = {}
        for item, value in found.items():
            if str(item) not in known:
                self._once(f"image_dirs.{key}.{item}: unknown key, {did_you_mean(str(item), known)}")
            elif value is not None:
                paths[str(item)] = self._path(f"image_dirs.{key}.{item}", value)
        needed = [*(f"{channel}_dir" for channel in channels), "lesions_dir"]
        for item in needed:
            if item not in paths:
                self._once(f"image_dirs.{key}.{item}: missing")
        if any(paths.get(item) is None for item in needed):
            return None
        images = [path for channel in channels if (path := paths[f"{channel}_dir"]) is not None]
        labels = paths["lesions_dir"]
        return None if labels is None else Folders(tuple(images), labels, paths.get("mask_dir"))

    def _teachers(self) -> tuple[UpstreamTeacher, ...]:
        names = self._names("teacher_names")
        places = self._mapping("image_dirs").get("teachers_features_paths")
        formats = self.values.get("features_format", "npz")
        if not names:
            return ()
        found = []
        for name in names:
            where = f"image_dirs.teachers_features_paths.{name}"
            folders = self._teacher_folders(places, name, where)
            kind = formats.get(name, "npz") if isinstance(formats, Mapping) else formats
            if kind not in FORMATS:
                self._once(f"features_format: {kind!r} is neither pt nor npz")
                kind = "npz"
            found.append(UpstreamTeacher(name, folders, family_of(name), str(kind)))
        return tuple(found)

    def _teacher_folders(self, places: Any, name: str, where: str) -> tuple[Path, ...]:
        """Folders of a teacher: a text, a list, or a sub-folder of the root that stands for all."""
        if isinstance(places, str):
            root = self._path("image_dirs.teachers_features_paths", places)
            return () if root is None else (root / name,)
        entry = places.get(name) if isinstance(places, Mapping) else None
        if entry is None:
            self.problems.append(f"{where}: missing, but teacher_names lists it")
            return ()
        items = entry if isinstance(entry, list) else [entry]
        if not items:
            self.problems.append(f"{where}: an empty list")
        paths = [self._path(where, item) for item in items]
        return tuple(path for path in paths if path is not None)

    def _fold_num(self) -> int | None:
        value = self.values.get("fold_num")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < -1:
            self.problems.append(f"fold_num: {value!r} is no fold number; -1 or 0, 1, …")
            return None
        return value

    def _flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self._once(f"{key}: {value!r} is neither true nor false")
            return default
        return value

    def _names(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key)
        if value is None:
            return ()
        good = isinstance(value, list) and all(
            isinstance(item, (str, int)) and not isinstance(item, bool) for item in value
        )
        if not good:
            self._once(f"{key}: expected a list of names")
            return ()
        names = tuple(str(item) for item in value)
        if len(set(names)) != len(names):
            self._once(f"{key}: a name is listed twice")
        return names

    def _mapping(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key)
        if isinstance(value, Mapping):
            return value
        self._once(f"{key}: " + ("missing" if value is None else "expected keys and values"))
        return {}

    def _path(self, key: str, value: Any) -> Path | None:
        if not isinstance(value, str) or not value.strip():
            self._once(f"{key}: {value!r} is no path")
            return None
        if "<PATH_TO" in value:
            self._once(f"{key}: still the placeholder {value}")
            return None
        return (self.path.parent / Path(value).expanduser()).absolute()

    def _once(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
