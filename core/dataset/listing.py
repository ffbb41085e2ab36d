"""Files of a folder as cases: channel numbers, DICOM folders, suffixes of label files."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from medrl.core.errors import DataError
from medrl.core.volume import image_stem, is_dicom_file, is_image_file

from .names import safe_case_id

_CHANNEL = re.compile(r"(.+)_(\d{4})")
LABEL_SUFFIXES = ("_gt", "_seg", "_label", "_labels", "_mask", "_segmentation", "-seg", "-label")


@dataclass(frozen=True)
class Entry:
    """One image file, or one folder of DICOM slices, and its name without suffix."""

    path: Path
    stem: str


def holds_dicom(folder: Path) -> bool:
    """Whether a folder directly holds DICOM files."""
    return folder.is_dir() and any(is_dicom_file(path) for path in sorted(folder.iterdir()))


def folder_entries(folder: Path, *, dicom: bool = False) -> list[Entry]:
    """Return the visible images of a folder by name; with `dicom`, also its folders of DICOM slices."""
    entries = []
    for path in sorted(folder.iterdir()):
        if is_image_file(path):
            entries.append(Entry(path, image_stem(path)))
        elif dicom and not path.name.startswith(".") and path.is_dir() and holds_dicom(path):
            entries.append(Entry(path, path.name))
    return entries


def channel_groups(
    root: Path, entries: Sequence[Entry], *, single: bool = False
) -> tuple[dict[str, dict[int, Path]], list[tuple[str, str, str]]]:
    """Group ``<case>_0000``, ``<case>_0001``, … into cases.

    Args:
        root: Only for messages.
        entries: Images of one folder.
        single: Where not every name ends in four digits, each file is a case with one channel.

    Returns:
        ``{case: {channel: path}}`` and problems ``(case, path, why)``.
    """
    matches = [_CHANNEL.fullmatch(entry.stem) for entry in entries]
    numbered = all(matches) and bool(matches)
    # Four digits may also be a running number: without any `_0000` they are no channels.
    numbered &= not single or any(match is not None and match.group(2) == "0000" for match in matches)
    groups: dict[str, dict[int, Path]] = {}
    problems: list[tuple[str, str, str]] = []
    for entry, match in zip(entries, matches, strict=True):
        where = str(entry.path.relative_to(root)) if entry.path.is_relative_to(root) else str(entry.path)
        if numbered and match is not None:
            name, channel = match.group(1), int(match.group(2))
        elif single:
            name, channel = entry.stem, 0
        elif match is not None:
            name, channel = match.group(1), int(match.group(2))
        else:
            problems.append((entry.stem, where, "the name does not end in a channel number such as _0000"))
            continue
        try:
            files = groups.setdefault(safe_case_id(name), {})
        except DataError as error:
            problems.append((name, where, error.why))
            continue
        if channel in files:
            problems.append((name, where, f"two files for one case and channel, also {files[channel].name}"))
        else:
            files[channel] = entry.path
    return groups, problems


def strip_label_suffix(stem: str, cases: Collection[str]) -> str:
    """Return the case that a label file belongs to: ``x_gt`` belongs to ``x`` where ``x`` is a case."""
    if stem in cases:
        return stem
    for suffix in LABEL_SUFFIXES:
        if stem.lower().endswith(suffix) and stem[: -len(suffix)] in cases:
            return stem[: -len(suffix)]
    return stem
