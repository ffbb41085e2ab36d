"""The datasets of the original: CAMUS, and ES/ED frames listed in a CSV file. Nothing is written to them.

``camus`` reads the folders of CAMUS (``patient0001/patient0001_4CH_ED.nii.gz`` with ``…_gt.nii.gz``), plain
``images/`` and ``labels/`` with such names, and the original's ``img/``, ``gt/`` and CSV with column ``id``.
``esed`` reads the original's target: ``img/<study>/<view>/<dicom_uuid>_<instant>.nii.gz`` and a CSV.

Source: upstream datamodules/camus_datamodule.py, ES_ED_datamodule.py, utils/file_utils.py.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medrl.core.adaptation.dividing import PARTS, PartedDataset
from medrl.core.dataset import open_dataset, patient_of, safe_case_id, safe_path
from medrl.core.errors import ConfigError, DataError, did_you_mean
from medrl.core.types import Case

LABELS = {"background": 0, "LV": 1, "MYO": 2, "LA": 3}
"""Label values of CAMUS; the target frames of the original have the first three."""

_SUBGROUPS = {"training": "train", "validation": "val", "testing": "test"}
_CAMUS_NAME = re.compile(r"(patient\d+)_([24]CH)_(ED|ES)", re.IGNORECASE)
_SUFFIXES = (".nii.gz", ".nii")
_ESED_COLUMNS = ("study", "view", "dicom_uuid", "instant")


class EchoDataset(PartedDataset):
    """Echo images with or without labels, and the parts that the dataset itself deals them to."""

    def __init__(
        self,
        *,
        root: Path,
        layout: str,
        cases: Iterable[Case],
        parts: Mapping[str, Sequence[str]] | None = None,
        labels: Mapping[str, int] | None = LABELS,
        channel_names: Sequence[str] = ("echo",),
        excluded: Sequence[str] = (),
        name: str = "",
    ) -> None:
        super().__init__(
            root=root,
            layout=layout,
            cases=cases,
            parts=parts,
            labels=labels,
            channel_names=channel_names,
            excluded=excluded,
            name=name,
        )


@dataclass
class _Found:
    """Cases as far as they were found, and what was missing."""

    cases: list[Case] = field(default_factory=list)
    parts: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def dataset(self, root: Path, layout: str, exclude: Sequence[str]) -> EchoDataset:
        """Leave cases out and check the rest.

        Raises:
            ConfigError: A case to leave out does not exist.
            DataError: Files are missing, two cases have one name, or there is none.
        """
        names = [case.id for case in self.cases]
        unknown = [name for name in exclude if name not in names]
        if unknown:
            raise ConfigError("exclude", why=f"no case '{unknown[0]}'", do=did_you_mean(unknown[0], names))
        doubled = (
            sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        )
        if doubled:
            self.problems.append(f"case {doubled[0]} is there twice")
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise DataError(str(root), why=self.problems[0] + more, do="complete the files, or the list")
        kept = [case for case in self.cases if case.id not in exclude]
        if not kept:
            raise DataError(str(root), why=f"no image of the layout `{layout}` is found here")
        folder = root if root.is_dir() else root.parent
        return EchoDataset(root=folder, layout=layout, cases=kept, parts=self.parts, excluded=exclude)


def open_camus(
    root: Path | str, *, exclude: Sequence[str] = (), split_column: str = "", fold: int = 0
) -> EchoDataset:
    """Open CAMUS: its own folders, plain ``images/`` and ``labels/``, or the original's CSV.

    The lists ``subgroup_training.txt``, ``…_validation.txt`` and ``…_testing.txt``, or a split column, deal
    the cases to parts where they are there.

    Args:
        root: Folder, or the CSV file.
        exclude: Cases to leave out.
        split_column: Column of the CSV; empty for ``split_<fold>``, else ``split_0``.
        fold: Number of the column.

    Raises:
        ConfigError: A case to leave out, or the column, does not exist.
        DataError: Files are missing.
    """
    root = Path(root)
    table = find_csv(root)
    if table is not None:
        return _open_csv(table, "camus", exclude, split_column, fold)
    found = _Found()
    base = root / "database_nifti" if (root / "database_nifti").is_dir() else root
    if (root / "images").is_dir():
        plain = open_dataset(root, layout="folder")
        for case in (*plain.cases, *plain.test_cases):
            match = _CAMUS_NAME.match(case.id)
            patient = match.group(1) if match else case.patient
            found.cases.append(Case(id=case.id, images=case.images, label=case.label, patient=patient))
    else:
        for folder in sorted(item for item in base.iterdir() if item.is_dir()):
            for path in sorted(folder.iterdir()):
                stem = path.name.removesuffix(".gz").removesuffix(".nii")
                match = _CAMUS_NAME.fullmatch(stem)
                if match is None or not path.name.endswith(_SUFFIXES):
                    continue
                label = _existing(folder, f"{stem}_gt")
                found.cases.append(Case(id=stem, images=(path,), label=label, patient=match.group(1)))
    found.parts = _subgroups(root, found.cases)
    return found.dataset(root, "camus", exclude)


def open_esed(
    root: Path | str, *, exclude: Sequence[str] = (), split_column: str = "", fold: int = 0
) -> EchoDataset:
    """Open the ES and ED frames that a CSV file lists, as the original's target.

    Args:
        root: The CSV file, or the folder that holds it beside ``img/`` and ``gt/``.
        exclude: Cases to leave out.
        split_column: Column that says train, val, test or pred; empty for ``split_<fold>``, else ``split_0``.
        fold: Number of the column.

    Raises:
        ConfigError: A case to leave out, or the column, does not exist.
        DataError: The CSV lacks columns, or files are missing.
    """
    table = find_csv(Path(root))
    if table is None:
        raise DataError(str(root), why="no single CSV file beside a folder img/", do="name the CSV file")
    return _open_csv(table, "esed", exclude, split_column, fold)


def find_csv(root: Path) -> Path | None:
    """The CSV file that a path names or, beside ``img/``, the only one of a folder."""
    if root.is_file():
        return root if root.suffix.lower() == ".csv" else None
    tables = sorted(root.glob("*.csv")) if (root / "img").is_dir() else []
    return tables[0] if len(tables) == 1 else None


def csv_reader(table: Path) -> str:
    """Which reader a CSV file is for: ``camus`` if its rows have an ``id``."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    return "camus" if "id" in header else "esed"


def looks_like_camus(root: Path) -> bool:
    """Whether a folder holds images that are named as those of CAMUS."""
    if (root / "database_nifti").is_dir():
        return True
    folder = root / "images"
    if folder.is_dir():
        names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        return bool(names) and all(_CAMUS_NAME.match(name) for name in names)
    patients = [
        item for item in sorted(root.iterdir()) if item.is_dir() and re.fullmatch(r"patient\d+", item.name)
    ]
    return bool(patients) and any(_CAMUS_NAME.match(path.name) for path in patients[0].iterdir())


def _open_csv(table: Path, kind: str, exclude: Sequence[str], split_column: str, fold: int) -> EchoDataset:
    """Find the files of each row; the first column is an index, as pandas writes it."""
    root = table.parent
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(str(table), why=f"cannot be read as CSV ({error})") from error
    header = list(rows[0]) if rows else []
    needed = ("id",) if kind == "camus" and "id" in header else _ESED_COLUMNS
    missing = [name for name in needed if name not in header]
    if missing:
        raise DataError(str(table), why=f"no column {', '.join(missing)}; it has {', '.join(header)}")
    column = _split_column(table, header, split_column, fold)
    found = _Found()
    for row in rows:
        place, name, patient = _row(row, kind)
        try:
            image = _existing(safe_path(root, f"img/{place}").parent, Path(place).name)
            label = _existing(safe_path(root, f"gt/{place}").parent, Path(place).name)
            case = safe_case_id(name)
        except DataError as error:
            found.problems.append(f"{name}: {error.why}")
            continue
        if image is None:
            found.problems.append(f"{name}: no image img/{place}.nii.gz")
            continue
        found.cases.append(Case(id=case, images=(image,), label=label, patient=patient))
        part = (row.get(column) or "").strip() if column else ""
        if part:
            if part not in PARTS:
                found.problems.append(f"{name}: column {column} says '{part}', expected {', '.join(PARTS)}")
            found.parts.setdefault(part, []).append(case)
    return found.dataset(table, kind, exclude)


def _row(row: Mapping[str, str], kind: str) -> tuple[str, str, str]:
    """Path below ``img/``, name and patient of a row."""
    if kind == "camus" and row.get("id"):
        place = row["id"]
        name = place.rsplit("/", 1)[-1]
        match = _CAMUS_NAME.match(name)
        patient = row.get("patient") or row.get("study") or (match.group(1) if match else patient_of(name))
        return place, name, patient
    uuid = f"{row['dicom_uuid']}_{row['instant']}"
    return f"{row['study']}/{row['view'].lower()}/{uuid}", uuid, row.get("patient") or row["study"]


def _split_column(table: Path, header: Sequence[str], asked: str, fold: int) -> str:
    if asked and asked not in header:
        raise ConfigError(
            "split_column", why=f"{table.name} has no column '{asked}'", do=did_you_mean(asked, header)
        )
    return next((name for name in (asked, f"split_{fold}", "split_0") if name and name in header), "")


def _subgroups(root: Path, cases: Sequence[Case]) -> dict[str, list[str]]:
    """Read CAMUS' lists of patients, if they are there."""
    for folder in (root, root / "database_split", root.parent / "database_split"):
        lists = {part: folder / f"subgroup_{name}.txt" for name, part in _SUBGROUPS.items()}
        if not all(path.is_file() for path in lists.values()):
            continue
        patients = {part: set(path.read_text(encoding="utf-8").split()) for part, path in lists.items()}
        return {
            part: [case.id for case in cases if case.patient in names] for part, names in patients.items()
        }
    return {}


def _existing(folder: Path, stem: str) -> Path | None:
    """The file of that name, compressed or not."""
    return next((folder / f"{stem}{end}" for end in _SUFFIXES if (folder / f"{stem}{end}").is_file()), None)
