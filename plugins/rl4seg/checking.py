"""Anatomical validity of the label maps in a folder: every file by itself, one bad file stops nothing."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError
from medrl.core.types import Volume
from medrl.core.validity import Report, Rules, check, worker_pool
from medrl.core.volume import is_image_file, read_volume

FILES_A_TASK = 16


@dataclass(frozen=True)
class FileResult:
    """What was found in one file.

    Attributes:
        file: Path below the folder, with forward slashes.
        frames: Verdict on each frame; a two-dimensional file has one.
        error: Why it could not be read or checked; empty if it could.
        unlisted: Values that the rules do not name, taken for background.
    """

    file: str
    frames: tuple[Report, ...] = ()
    error: str = ""
    unlisted: tuple[int, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether it was read and every frame is valid."""
        return bool(self.frames) and all(report.valid for report in self.frames)

    @property
    def failed(self) -> dict[str, int]:
        """Rules that some frame does not pass, with the number of such frames, in the order of the rules."""
        return dict(Counter(name for report in self.frames for name in report.failed))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        if self.error:
            return {"file": self.file, "error": self.error}
        return {
            "file": self.file,
            "valid": self.valid,
            "failed": list(self.failed),
            "unlisted": list(self.unlisted),
            "frames": [report.to_dict() for report in self.frames],
        }


@dataclass(frozen=True)
class FolderResult:
    """What was found in a folder.

    Attributes:
        rules: The rules.
        files: One result for each file, sorted by path.
    """

    rules: Rules
    files: tuple[FileResult, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of files and frames by verdict."""
        frames = [report for result in self.files for report in result.frames]
        unreadable = sum(bool(result.error) for result in self.files)
        valid = sum(result.valid for result in self.files)
        return {
            "files": len(self.files),
            "valid": valid,
            "invalid": len(self.files) - valid - unreadable,
            "unreadable": unreadable,
            "frames": len(frames),
            "valid_frames": sum(report.valid for report in frames),
        }

    @property
    def failed(self) -> dict[str, int]:
        """Number of frames that do not pass, for each rule."""
        found = Counter(name for result in self.files for report in result.frames for name in report.failed)
        return {rule.name: found[rule.name] for rule in self.rules.rules}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "rules": self.rules.to_dict(),
            "counts": self.counts,
            "failed": self.failed,
            "files": [result.to_dict() for result in self.files],
        }

    def to_json(self) -> bytes:
        """Return everything as JSON; NaN becomes null."""
        return (json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

    def to_csv(self) -> str:
        """Return one line a frame with every value; a file that could not be read has one line too."""
        names = [rule.name for rule in self.rules.rules]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", "frame", "valid", "failed", "error", *names])
        for result in self.files:
            if result.error:
                writer.writerow([result.file, "", "", "", result.error, *[""] * len(names)])
            for number, report in enumerate(result.frames):
                values = [_number(report.values[name]) for name in names]
                verdict = "true" if report.valid else "false"
                writer.writerow([result.file, number, verdict, " ".join(report.failed), "", *values])
        return text.getvalue()


def check_folder(folder: Path | str, rules: Rules, *, workers: int = 0) -> FolderResult:
    """Check every image below a folder, or one file.

    A file of two dimensions is one label map, a stack `(X, Y, T)` or `(X, Y, 1, T)` one for each frame. An
    axis of length 1 is dropped wherever it is.

    Args:
        folder: Searched with all its subfolders; hidden files are left out.
        rules: From `load_rules`.
        workers: Processes that read and check; 0 works in this one.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    folder = Path(folder)
    paths = list(_images(folder))
    if not paths:
        why = "no image is found here (.nii.gz, .nii, .mha, .nrrd, .dcm)" if folder.exists() else "not found"
        raise DataError(str(folder), why=why)
    root = folder if folder.is_dir() else folder.parent
    work: Callable[[Path], FileResult] = partial(_check_file, root=root, rules=rules)
    if workers > 0 and len(paths) > 1:
        with worker_pool(min(workers, len(paths))) as pool:
            size = min(FILES_A_TASK, math.ceil(len(paths) / workers))
            return FolderResult(rules, tuple(pool.map(work, paths, chunksize=size)))
    return FolderResult(rules, tuple(map(work, paths)))


def _images(folder: Path) -> Iterator[Path]:
    if is_image_file(folder):
        yield folder
    elif folder.is_dir():
        below = (path for path in sorted(folder.rglob("*")) if is_image_file(path))
        yield from (path for path in below if not _hidden(path.relative_to(folder)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check_file(path: Path, *, root: Path, rules: Rules) -> FileResult:
    name = path.relative_to(root).as_posix()
    try:
        volume = read_volume(path)
        frames, spacing = _frames(volume)
        reports = tuple(check(frame, rules, spacing) for frame in frames)
    except DataError as error:
        return FileResult(name, error=error.why or error.what)
    # Without a label for the background, 0 is it.
    known = {0, *rules.labels.values()} if "background" not in rules.labels else set(rules.labels.values())
    present = map(int, np.unique(volume.data))
    return FileResult(name, reports, unlisted=tuple(value for value in present if value not in known))


def _frames(volume: Volume) -> tuple[NDArray[Any], tuple[float, float]]:
    """Return the label maps `(T, X, Y)` of a file and their pixel size in mm.

    Raises:
        DataError: The file has more dimensions than a stack of frames.
    """
    data, spacing = volume.data, list(volume.spacing)
    # (C, X, Y, Z): the last unit axis in space is the missing one; then C counts frames.
    for axis in (3, 1, 2):
        if data.shape[axis] == 1:
            del spacing[axis - 1]
            return data.squeeze(axis), (spacing[0], spacing[1])
    if data.shape[0] != 1:
        raise DataError("the file", why=f"has shape {data.shape[1:]} and {data.shape[0]} channels; no frames")
    return np.moveaxis(data[0], -1, 0), (spacing[0], spacing[1])


def _number(value: float) -> str:
    return "nan" if math.isnan(value) else f"{value:.10g}"
