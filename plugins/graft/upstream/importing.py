"""Upstream feature files turned once into the feature folders that training maps into memory.

The original keeps whole files of every teacher in an LRU cache of 300 cases in each loader process. Here
nothing is cached: what `import_features` writes is mapped, so that workers and ranks share the pages that the
system keeps, and only the student's window is stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from medrl.core.cache import Cache, cache_root
from medrl.core.dataset import Dataset, Split, safe_case_id
from medrl.core.errors import ConfigError, DataError, RuntimeFault
from medrl.core.types import Case
from medrl.plugins.graft.cohorts import is_cohort_file, open_cohorts
from medrl.plugins.graft.config import GraftConfig
from medrl.plugins.graft.duties import open_split
from medrl.plugins.graft.features import Expected, FeatureWriter
from medrl.plugins.graft.planning import divisor_of, resolve_plan
from medrl.plugins.graft.regions import Target
from medrl.plugins.graft.samples import CaseStore

from .features import UpstreamTeacher, find_file, fitted, read_upstream
from .windows import Align

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

SOURCE_FILE = "source.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        folders: The feature folder of each teacher, named after it.
        written: Cases written now, over all teachers.
        kept: Cases that were already there, fit, and whose source file did not change.
        skipped: Cases that at least one teacher lacks; to be left out of training too.
        bytes: Size of all files.
    """

    folders: tuple[Path, ...]
    written: int
    kept: int
    skipped: tuple[str, ...]
    bytes: int


def open_training(cfg: GraftConfig) -> tuple[GraftConfig, Dataset, Split]:
    """Open the dataset of a config, of one cohort or several, and its fold.

    Returns:
        The config with `auto` target and unset statistics as a multi-cohort file gives them, the dataset and
        the fold.

    Raises:
        ConfigError: No dataset is named, or its description is wrong.
        DataError: The dataset is unusable, or training and validation overlap.
    """
    root = cfg.data.root
    if root is None or not is_cohort_file(root):
        return (cfg, *open_split(cfg))
    dataset = open_cohorts(root, exclude=cfg.data.exclude)
    changes: dict[str, Any] = {}
    if cfg.target.kind == "auto":
        changes["target"] = cfg.target.model_copy(update={"kind": dataset.info["target"]})
    if cfg.sample.stats_file is None:
        changes["sample"] = cfg.sample.model_copy(update={"stats_file": dataset.info["statistics"]})
    split = dataset.fold(cfg.data.fold, cfg.data.folds, cfg.data.split_seed, cfg.data.group_by)
    return cfg.model_copy(update=changes), dataset, split


def import_features(
    manager: PluginManager,
    cfg: GraftConfig,
    out: Path,
    *,
    teachers: Sequence[UpstreamTeacher] = (),
    taps: Sequence[str] = ("neg1",),
    dtype: str = "bf16",
    align: Align = "auto",
    min_bytes: int = 0,
    skip_missing: bool = False,
    every_case: bool = False,
    trust: bool = False,
    say: Say = lambda _line: None,
) -> Imported:
    """Write the contents of upstream feature files as feature folders of this toolkit.

    Every file is opened and checked. What is there, fits and comes from an unchanged file is kept, so that
    an interrupted import goes on where it stopped.

    Args:
        manager: Source of models, to know what sizes the student takes.
        cfg: The student's config: dataset, fold, window, target.
        out: Folder of the feature folders, one for each teacher by its name.
        teachers: Where the files lie; those of the multi-cohort file if left out.
        taps: Layers to import beside the logits.
        dtype: Precision of the result: `bf16`, `fp16` or `fp32`.
        align: What part of a case a file shows, see `find_place`.
        min_bytes: Smaller files count as missing.
        skip_missing: Leave out cases that a teacher lacks, as the original does; otherwise they are an error.
        every_case: Also the validation cases, not only those of the student's training fold.
        trust: Accept ``.pt`` files with pickled objects, which are replaced by inert stubs.
        say: Shows a line of progress.

    Raises:
        ConfigError: No teacher is named.
        DataError: Files are missing, damaged, or do not fit the student; file and case are named.
    """
    cfg, dataset, split = open_training(cfg)
    teachers = tuple(teachers) or tuple(getattr(getattr(dataset, "settings", None), "teachers", ()))
    if not teachers:
        raise ConfigError(
            "teachers",
            why="no feature files are named",
            do="--teacher NAME=FOLDER, or teacher_names in the YAML",
        )
    cache = Cache(cache_root(dataset.root))
    plan = resolve_plan(cfg, dataset, split.train, divisor_of(cfg, manager, dataset), cache)
    store = CaseStore(dataset, plan, cache)
    cases = (*split.train, *split.val) if every_case else split.train
    files, skipped = _find_all(teachers, cases, min_bytes, skip_missing)
    chosen = [case for case in cases if case.id not in skipped]
    if not chosen:
        raise DataError(
            "teacher features", why="no case has the files of all teachers", do="check the folders"
        )
    written = kept = 0
    folders = []
    for number, teacher in enumerate(teachers, start=1):
        folder = out / safe_case_id(teacher.name)
        say(f"teacher {number} of {len(teachers)}: {len(chosen)} cases to {folder}")
        source = _Source(teacher, files[teacher.name], plan.target, tuple(taps), align, trust)
        writer = FeatureWriter(
            folder,
            teacher=source.digest(),
            source=", ".join(map(str, teacher.folders)),
            channels=source.channels(store.expected(store.get(chosen[0]))),
            target=plan.target_kind,
            labels=plan.labels,
            dtype=dtype,
        )
        for case in chosen:
            expected = store.expected(store.get(case))
            if source.unchanged(folder, case.id) and writer.has(expected):
                kept += 1
                continue
            arrays = source.read(expected)
            _check_channels(arrays, writer, source.files[case.id], case.id)
            source.remember(writer.write(expected, arrays), case.id)
            written += 1
        folders.append(folder)
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return Imported(tuple(folders), written, kept, tuple(sorted(skipped)), size)


@dataclass(frozen=True)
class _Source:
    """The files of one teacher and how to read them."""

    teacher: UpstreamTeacher
    files: dict[str, Path]
    target: Target
    taps: tuple[str, ...]
    align: Align
    trust: bool

    def digest(self) -> str:
        """What tells one teacher's folder from another's."""
        facts = [self.teacher.name, self.teacher.family, self.align, self.target.kind, *self.taps]
        return hashlib.sha256(json.dumps(["upstream", *facts]).encode()).hexdigest()

    def read(self, expected: Expected) -> dict[str, Tensor]:
        """The arrays of one case on the student's window."""
        path = self.files[expected.case_id]
        arrays = read_upstream(path, self.teacher, expected.case_id, self.taps, trust=self.trust)
        return fitted(arrays, self.teacher, expected, self.target, path, self.align)

    def channels(self, expected: Expected) -> dict[str, int]:
        """Channels of each array, from the first case."""
        return {name: int(array.shape[0]) for name, array in self.read(expected).items()}

    def unchanged(self, folder: Path, case_id: str) -> bool:
        """Whether the file is the one that was imported."""
        try:
            known = json.loads((folder / case_id / SOURCE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(known == self._facts(case_id))

    def remember(self, case_folder: Path, case_id: str) -> None:
        """Write beside the arrays which file they came from."""
        try:
            (case_folder / SOURCE_FILE).write_text(json.dumps(self._facts(case_id)) + "\n", encoding="utf-8")
        except OSError as error:
            raise RuntimeFault(
                str(case_folder), why=f"cannot be written: {error.strerror or error}"
            ) from error

    def _facts(self, case_id: str) -> dict[str, Any]:
        status = self.files[case_id].stat()
        return {"file": str(self.files[case_id]), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _find_all(
    teachers: Sequence[UpstreamTeacher], cases: Sequence[Case], min_bytes: int, skip_missing: bool
) -> tuple[dict[str, dict[str, Path]], set[str]]:
    """The file of each case of each teacher by name, and the cases that a teacher lacks."""
    names = [teacher.name for teacher in teachers]
    if len(set(names)) != len(names):
        raise ConfigError("teachers", why="two have one name", do="give each teacher its own name")
    files: dict[str, dict[str, Path]] = {name: {} for name in names}
    problems: dict[str, DataError] = {}
    for teacher in teachers:
        absent = [folder for folder in teacher.folders if not folder.is_dir()]
        if len(absent) == len(teacher.folders):
            raise DataError(
                f"teacher {teacher.name}",
                why=f"no such folder: {', '.join(map(str, absent)) or 'none is named'}",
            )
        for case in cases:
            try:
                files[teacher.name][case.id] = find_file(teacher, case.id, min_bytes=min_bytes)
            except DataError as error:
                problems.setdefault(case.id, error)
    if problems and not skip_missing:
        first = next(iter(problems.values()))
        more = f" (and {len(problems) - 1} more cases)" if len(problems) > 1 else ""
        raise DataError(first.what, why=first.why + more, do=first.do, case=first.case)
    return files, set(problems)


def _check_channels(arrays: dict[str, Tensor], writer: FeatureWriter, path: Path, case_id: str) -> None:
    known = json.loads((writer.path / "teacher.json").read_text(encoding="utf-8"))["channels"]
    for name, array in arrays.items():
        if int(array.shape[0]) != known[name]:
            raise DataError(
                f"case {case_id}: {path}",
                why=f"{name} has {array.shape[0]} channels, the other cases have {known[name]}",
                do="extract its features again with the same network",
                case=case_id,
            )
