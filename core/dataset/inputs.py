"""What `predict` accepts as input, and where its results go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from medrl.core.errors import DataError
from medrl.core.types import Case
from medrl.core.volume import image_stem, image_suffix, is_dicom_file, is_image_file

from .layouts import IMAGE_FOLDERS, MANIFEST, open_dataset
from .listing import Entry, channel_groups, folder_entries, holds_dicom
from .model import some
from .names import patient_of, safe_case_id, safe_path

_CHANNEL = re.compile(r"(.+)_(\d{4})")


def list_inputs(path: Path | str, channel_names: Sequence[str] = ("image",)) -> list[Case]:
    """List the cases of an input path without reading an image.

    Accepted are one image file, a folder of images (``<case>.nii.gz``, or ``<case>_0000.nii.gz``, …
    for several channels), a folder of DICOM slices, a folder of such folders, a folder with one folder
    for each case whose files (or DICOM folders) are named after the channels, and a dataset, of which
    the test cases are taken, or all cases if it has none.

    Args:
        path: File or folder.
        channel_names: Channels that the model expects, in order.

    Raises:
        DataError: Nothing usable is found, or a case lacks a channel.
    """
    path = Path(path)
    names = tuple(channel_names) or ("image",)
    if not path.exists():
        raise DataError(str(path), why="no such file or folder")
    if path.is_file():
        if path.name == MANIFEST or path.suffix == ".json":
            return _of_dataset(path)
        return [_of_file(path, names)]
    if (path / "dataset.json").is_file() or (path / MANIFEST).is_file():
        return _of_dataset(path)
    if holds_dicom(path):
        return _finish(path, [_case(path.resolve().name, [path])], names)
    entries = folder_entries(path, dicom=True)
    if entries:
        return _finish(path, _of_entries(path, entries, names), names)
    if any((path / name).is_dir() for name in IMAGE_FOLDERS):
        return _of_dataset(path)
    cases = [case for folder in _folders(path) if (case := _of_case_folder(folder, names)) is not None]
    if not cases:
        raise DataError(
            str(path),
            why="no image is found here (.nii.gz, .nii, .mha, .nrrd or DICOM)",
            do="name a file or folder",
        )
    return _finish(path, cases, names)


def plan_outputs(cases: Sequence[Case], out_dir: Path | str, *, suffix: str = ".nii.gz") -> dict[str, Path]:
    """Return the output file of each case, before any work is done.

    Raises:
        DataError: Two cases would be written to one file (also where upper and lower case are the
            same), or an output would overwrite an input.
    """
    out_dir = Path(out_dir)
    planned: dict[str, Path] = {}
    owners: dict[str, Case] = {}
    inputs = {
        image.resolve() for case in cases for image in (*case.images, *([case.label] if case.label else []))
    }
    for case in cases:
        target = safe_path(out_dir, safe_case_id(case.id) + suffix)
        other = owners.setdefault(case.id.casefold(), case)
        if other is not case:
            raise DataError(
                f"case {case.id}",
                why=f"two inputs would be written to {target.name}: {_where(other)} and {_where(case)}",
                do="rename one of them",
                case=case.id,
            )
        if target.resolve() in inputs:
            raise DataError(
                f"case {case.id}",
                why=f"the result would overwrite an input, {target}",
                do="choose another output folder",
                case=case.id,
            )
        planned[case.id] = target
    return planned


def _of_dataset(path: Path) -> list[Case]:
    dataset = open_dataset(path)
    return list(dataset.test_cases or dataset.cases)


def _of_file(path: Path, names: tuple[str, ...]) -> Case:
    if not is_image_file(path) and not is_dicom_file(path):
        raise DataError(str(path), why="not an image that is read here (.nii.gz, .nii, .mha, .nrrd, .dcm)")
    match = _CHANNEL.fullmatch(image_stem(path))
    if match is None:
        return _case(image_stem(path), [path])
    # One of several channel files: take its siblings.
    stem, suffix = match.group(1), image_suffix(path)
    siblings = [
        path.with_name(f"{stem}_{k:04d}{path.name[len(path.name) - len(suffix) :]}")
        for k in range(len(names))
    ]
    if path not in siblings:
        return _case(image_stem(path), [path])
    missing = [sibling.name for sibling in siblings if not sibling.is_file()]
    if missing:
        raise DataError(
            f"case {stem}", why=f"the model needs {len(names)} channels; missing: {some(missing)}", case=stem
        )
    return _case(stem, siblings)


def _of_entries(path: Path, entries: Sequence[Entry], names: tuple[str, ...]) -> list[Case]:
    groups, problems = channel_groups(path, entries, single=True)
    if problems:
        case_id, where, why = problems[0]
        raise DataError(f"case {case_id}: {where}", why=why, do="rename the file", case=case_id)
    cases: list[Case] = []
    for case_id, files in groups.items():
        numbered = (
            image_stem(next(iter(files.values()))) != case_id and not next(iter(files.values())).is_dir()
        )
        if numbered and sorted(files) != list(range(len(names))):
            wrong = sorted(set(files) ^ set(range(len(names))))
            raise DataError(
                f"case {case_id}",
                why=f"the model needs {len(names)} channels ({', '.join(names)}); "
                f"missing or too many: {some(f'{case_id}_{k:04d}' for k in wrong)}",
                case=case_id,
            )
        cases.append(_case(case_id, [files[k] for k in sorted(files)]))
    return cases


def _of_case_folder(folder: Path, names: tuple[str, ...]) -> Case | None:
    """Make a case of a folder whose files or DICOM folders are named after the channels."""
    entries = folder_entries(folder, dicom=True)
    if not entries:
        return None
    chosen: list[Path] = []
    for name in names:
        found = [entry.path for entry in entries if _is_channel(entry.stem, name)]
        if not found and len(names) == 1 and len(entries) == 1:
            found = [entries[0].path]
        if len(found) != 1:
            what = "is missing" if not found else f"is ambiguous: {some(path.name for path in found)}"
            raise DataError(
                f"case {folder.name}",
                why=f"channel {name} {what}",
                do=f"name the files after the channels: {', '.join(names)}",
                case=folder.name,
            )
        chosen.append(found[0])
    return _case(folder.name, chosen)


def _is_channel(stem: str, name: str) -> bool:
    return stem.casefold() == name.casefold() or stem.casefold().endswith(
        ("_" + name.casefold(), "-" + name.casefold())
    )


def _finish(path: Path, cases: Sequence[Case], names: tuple[str, ...]) -> list[Case]:
    """Refuse cases that have several files where the model wants another number."""
    for case in cases:
        if len(case.images) > 1 and len(case.images) != len(names):
            raise DataError(
                f"case {case.id}",
                why=f"{len(case.images)} channel files, the model expects {len(names)} ({', '.join(names)})",
                do=f"look at {path}",
                case=case.id,
            )
    return sorted(cases, key=lambda case: case.id)


def _folders(path: Path) -> list[Path]:
    return sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))


def _case(name: str, images: Sequence[Path]) -> Case:
    case_id = safe_case_id(name)
    return Case(id=case_id, images=tuple(images), patient=patient_of(case_id))


def _where(case: Case) -> str:
    return str(case.images[0]) if case.images else case.id
