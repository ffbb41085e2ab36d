"""The pieces that the layouts share: JSON files, names of channels and labels, cases from listed files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medrl.core.errors import DataError
from medrl.core.types import Case
from medrl.core.volume import IMAGE_SUFFIXES, image_stem

from .model import Dataset
from .names import patient_of, safe_case_id, safe_path

JSON_LIMIT = 64 * 2**20

Problems = list[tuple[str, str, str]]
"""What is wrong: ``(case, path, why)``."""


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of at most 64 MiB.

    Raises:
        DataError: It is missing, damaged, too large or no object.
    """
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise DataError(str(path), why="larger than 64 MiB")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(str(path), why="no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(str(path), why=f"cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(str(path), why="expected a JSON object")
    return content


def channel_names_of(value: Any, path: Path) -> tuple[str, ...]:
    """Return channel names from a list or from ``{"0": name, "1": name}``."""
    if isinstance(value, Mapping):
        keys = sorted(value, key=lambda key: int(key) if str(key).isdigit() else -1)
        if [str(key) for key in keys] == [str(k) for k in range(len(keys))] and keys:
            return tuple(str(value[key]) for key in keys)
    elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise DataError(str(path), why='channel_names must be {"0": name, "1": name, …} or a list of names')


def labels_of(value: Any, path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Return ``{name: value}`` from nnU-Net's ``{name: value}`` or MSD's ``{"value": name}``."""
    info: dict[str, Any] = {}
    if not isinstance(value, Mapping) or not value:
        raise DataError(str(path), why='labels must be {"background": 0, name: 1, …}')
    if all(
        str(key).isdigit() and isinstance(name, str) and not name.isdigit() for key, name in value.items()
    ):
        value = {name: int(key) for key, name in value.items()}
    labels: dict[str, int] = {}
    regions: dict[str, list[int]] = {}
    for name, number in value.items():
        items = number if isinstance(number, list) else [number]
        if not items or not all(
            isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in map(_whole, items)
        ):
            raise DataError(
                str(path), why=f"label '{name}' must be a whole number from 0 on, found {number!r}"
            )
        numbers = [int(item) for item in items]
        if str(name) == "ignore":
            raise DataError(str(path), why="an 'ignore' label is not supported", do="relabel those voxels")
        if len(numbers) == 1:
            labels[str(name)] = numbers[0]
        else:
            regions[str(name)] = numbers
    if regions:
        info["regions"] = regions
        for number in sorted({item for items in regions.values() for item in items} - set(labels.values())):
            labels[f"label_{number}"] = number
    if len(set(labels.values())) != len(labels):
        raise DataError(str(path), why="two labels have the same value")
    if 0 not in labels.values():
        labels = {"background": 0, **labels}
    return labels, info


def _whole(value: Any) -> Any:
    """Turn text such as ``"1"``, which some files hold, into a number."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


def patients_of(meta: Mapping[str, Any]) -> dict[str, str]:
    """Return the patient of each case where the dataset names them (``patients``)."""
    patients = meta.get("patients")
    return {str(key): str(name) for key, name in patients.items()} if isinstance(patients, Mapping) else {}


def make_case(
    root: Path,
    case_id: str,
    images: Sequence[Path],
    label: Path | None,
    patients: Mapping[str, str],
    part: str = "",
) -> Case:
    """Make a case of listed files; `part` is Tr or Ts where the layout has a folder of further masks."""
    return Case(
        id=case_id,
        images=tuple(images),
        label=label,
        patient=patients.get(case_id) or patient_of(case_id),
        masks=_masks(root / f"masks{part}", case_id) if part else {},
    )


def _masks(folder: Path, case_id: str) -> dict[str, Path]:
    """Find further label files: ``masksTr/<case>_<name>.nii.gz``, ``masksTr/<name>/<case>.nii.gz``."""
    if not folder.is_dir():
        return {}
    found: dict[str, Path] = {}
    for suffix in IMAGE_SUFFIXES:
        if (folder / f"{case_id}{suffix}").is_file():
            found["mask"] = folder / f"{case_id}{suffix}"
        for path in sorted(folder.glob(f"{case_id}_*{suffix}")):
            found.setdefault(image_stem(path)[len(case_id) + 1 :], path)
        for path in sorted(folder.glob(f"*/{case_id}{suffix}")):
            found.setdefault(path.parent.name, path)
    return found


def listed_case(
    root: Path,
    name: str,
    entry: Mapping[str, Any],
    patients: Mapping[str, str],
    problems: Problems,
) -> Case | None:
    """Make a case of files that a JSON file names; every path must lie below the root and exist."""
    try:
        case_id = safe_case_id(name)
        images = [safe_path(root, str(item)) for item in entry["images"]]
        label = safe_path(root, str(entry["label"])) if entry.get("label") else None
        masks = {str(key): safe_path(root, str(item)) for key, item in (entry.get("masks") or {}).items()}
    except DataError as error:
        problems.append((name, error.what, error.why))
        return None
    missing = [path for path in (*images, *([label] if label else []), *masks.values()) if not path.exists()]
    if missing or not images:
        where = missing[0].relative_to(root) if missing else "dataset.json"
        problems.append((case_id, str(where), "no such file" if missing else "no image is named"))
        return None
    patient = patients.get(case_id) or patient_of(case_id)
    return Case(id=case_id, images=tuple(images), label=label, patient=patient, masks=masks)


def is_inside(root: Path, case: Case, problems: Problems) -> bool:
    """Record a file that a symbolic link takes out of the dataset."""
    for path in (*case.images, *([case.label] if case.label else []), *case.masks.values()):
        try:
            safe_path(root, path.relative_to(root))
        except DataError as error:
            problems.append((case.id, str(path.relative_to(root)), error.why))
            return False
    return True


def doubled_ids(root: Path, dataset: Dataset) -> Problems:
    """Find identifiers that are used twice, or differ only in upper and lower case."""
    seen: dict[str, str] = {}
    problems = []
    for case in (*dataset.cases, *dataset.test_cases):
        key = case.id.casefold()
        if key in seen:
            problems.append((case.id, str(root), f"the identifier is used twice (also {seen[key]})"))
        seen[key] = case.id
    return problems
