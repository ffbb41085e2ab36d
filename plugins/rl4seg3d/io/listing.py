"""Which files a prediction reads, and where its results go: the tree of folders is kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from medrl.core.dataset.names import safe_case_id, safe_path
from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Case
from medrl.core.volume import image_stem, image_suffix, is_dicom_file

SUFFIXES = (".nii", ".nii.gz", ".dcm")
SIDE_FOLDERS = ("rewards", "uncertainty", "probabilities", "previews", "reports")
"""Where results beside the segmentation go."""


def list_sequences(path: Path, *, leave_out: Path | None = None) -> list[Case]:
    """List a file, or every ``.nii``, ``.nii.gz`` and DICOM file under a folder, in order of their names.

    A case is named after its file: without the suffix and a trailing ``_0000``, with the folders above it.
    Hidden files and folders are left out, and so is what lies in `leave_out`, the output of an earlier
    prediction.

    Raises:
        DataError: Nothing is found, two files would have one name, or a name is not safe as a file name.
    """
    if path.is_file():
        return [Case(id=safe_case_id(_stem(path)), images=(path,))]
    if not path.is_dir():
        raise DataError(str(path), why="no such file or folder")
    hidden = leave_out.resolve() if leave_out is not None and leave_out.is_dir() else None
    if hidden is not None and path.resolve().is_relative_to(hidden):
        hidden = None
    cases: list[Case] = []
    owners: dict[str, Path] = {}
    for folder, folders, names in os.walk(path):
        here = Path(folder)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (here / name).resolve() != hidden
        )
        for name in sorted(names):
            file = here / name
            if name.startswith(".") or not _is_sequence(file):
                continue
            parts = [safe_case_id(part) for part in here.relative_to(path).parts]
            case_id = "/".join([*parts, safe_case_id(_stem(file))])
            other = owners.setdefault(case_id.casefold(), file)
            if other is not file:
                raise DataError(
                    f"case {case_id}",
                    why=f"two inputs would have one result: {other.name} and {file.name}",
                    do="rename one of them",
                )
            cases.append(Case(id=case_id, images=(file,)))
    if not cases:
        raise DataError(str(path), why="no sequence is found here (.nii, .nii.gz or DICOM)")
    return sorted(cases, key=lambda case: case.id)


def plan_sequences(output: Path, cases: Sequence[Case]) -> tuple[Path, dict[str, Path]]:
    """Return the output folder and the segmentation of each case.

    Raises:
        ConfigError: One file is named for several cases.
        DataError: A result would overwrite an input or a result of another kind.
    """
    if image_suffix(output) in (".nii", ".nii.gz") and not output.is_dir():
        if len(cases) != 1:
            raise ConfigError(f"output {output}", why=f"one file for {len(cases)} cases", do="name a folder")
        folder, planned = output.parent, {cases[0].id: output}
    else:
        folder = output
        planned = {case.id: safe_path(output, f"{case.id}.nii.gz") for case in cases}
    inputs = {image.resolve() for case in cases for image in case.images}
    for case in cases:
        target = planned[case.id]
        if target.resolve() in inputs:
            raise DataError(
                f"case {case.id}",
                why=f"the result would overwrite an input, {target}",
                do="name another folder",
            )
        if case.id.split("/")[0] in SIDE_FOLDERS and "/" in case.id:
            raise DataError(
                f"case {case.id}",
                why=f"the folder {case.id.split('/')[0]} holds results of another kind",
                do="rename that folder of the input",
            )
    return folder, planned


def _is_sequence(file: Path) -> bool:
    suffix = image_suffix(file)
    if suffix:
        return suffix in SUFFIXES and file.is_file()
    return is_dicom_file(file)


def _stem(file: Path) -> str:
    return image_stem(file).removesuffix("_0000")
