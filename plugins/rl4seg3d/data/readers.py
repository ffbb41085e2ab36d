"""The layout of the original: ``img/<study>/<view>/<uuid>_0000.nii.gz``, ``segmentation/…`` and a CSV file.

Nothing is written to it. Source: upstream datamodules/RL_3d_datamodule.py.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from medrl.core.adaptation.dividing import PARTS, PartedDataset
from medrl.core.dataset import safe_path
from medrl.core.errors import ConfigError, DataError, did_you_mean
from medrl.core.types import Case

LABELS = {"background": 0, "LV": 1, "MYO": 2}
AREA_MM = 0.37
"""Size of the pixels in which the area of a frame is counted."""
SPLIT_COLUMNS = ("lm_split2", "split_official_test")
"""Of Cardinal, and of iCardio."""
_COLUMNS = ("study", "view", "dicom_uuid")


def find_csv(root: Path) -> Path | None:
    """Return the CSV file of the original's layout, if there is one alone."""
    if root.is_file():
        return root if root.suffix.lower() == ".csv" else None
    found = sorted(root.glob("*.csv"))
    return found[0] if len(found) == 1 and (root / "img").is_dir() else None


def open_original(
    root: Path, *, exclude: Sequence[str] = (), split_column: str = "", max_image_area: int = 0
) -> PartedDataset:
    """Open a dataset in the layout of the original.

    Args:
        root: Folder, or its CSV file.
        exclude: Sequences to leave out.
        split_column: Column that says train, val, test or pred.
        max_image_area: Sequences with more pixels of 0.37 mm in a frame are left out; 0 = no limit.

    Raises:
        ConfigError: No such column, none that tells the size of frames where it is asked for, or a sequence
            to leave out does not exist.
        DataError: There is no CSV file, or an image is missing.
    """
    table = find_csv(Path(root))
    if table is None:
        raise DataError(
            str(root), why="no CSV file with a folder img/ beside it", do="--set data.reader=core"
        )
    folder = table.parent
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(str(table), why=f"cannot be read ({error})") from error
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise DataError(str(table), why=f"it has no column {', '.join(missing)}")
    column = split_column or next((name for name in SPLIT_COLUMNS if name in columns), "")
    if column and column not in columns:
        raise ConfigError("data.split_column", why=did_you_mean(column, columns))
    if max_image_area:
        rows = [row for row in rows if _area(row, table) <= max_image_area]
    cases: list[Case] = []
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for row in rows:
        name = row["dicom_uuid"]
        place = Path(row["study"]) / row["view"].lower()
        image = safe_path(folder / "img", str(place / f"{name}_0000.nii.gz"))
        if not image.is_file():
            raise DataError(f"case {name}", why=f"{image.relative_to(folder)} is missing", case=name)
        label = safe_path(folder / "segmentation", str(place / f"{name}.nii.gz"))
        cases.append(
            Case(id=name, images=(image,), label=label if label.is_file() else None, patient=row["study"])
        )
        if column and row[column] in parts:
            parts[row[column]].append(name)
    names = [case.id for case in cases]
    unknown = [name for name in exclude if name not in names]
    if unknown:
        raise ConfigError("exclude", why=f"no case '{unknown[0]}'", do=did_you_mean(unknown[0], names))
    if len(set(names)) < len(names):
        raise DataError(str(table), why="one dicom_uuid is there twice")
    return PartedDataset(
        root=folder,
        layout="original",
        cases=[case for case in cases if case.id not in exclude],
        parts=parts,
        labels=LABELS,
        channel_names=("echo",),
        excluded=exclude,
    )


def _area(row: Mapping[str, str], table: Path) -> float:
    """Pixels of 0.37 mm in a frame, from its columns H and W in pixels, dx and dy in cm."""
    try:
        height, width, dx, dy = (float(row[name]) for name in ("H", "W", "dx", "dy"))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "max_image_area",
            why=f"{table.name} does not tell H, W, dx and dy of {row['dicom_uuid']}",
            do="max_image_area=0",
        ) from error
    return (height * dy * 10.0 / AREA_MM) * (width * dx * 10.0 / AREA_MM)
