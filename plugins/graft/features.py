"""Teacher feature files: written whole with metadata, read as memory maps, refused when they do not fit.

One folder for each teacher holds ``teacher.json`` and one folder for each case::

    features/teacher_0/teacher.json
    features/teacher_0/case_007/neg1.npy    (C, D, H, W) raw output of the tapped convolution
    features/teacher_0/case_007/logits.npy  (K, D, H, W) before sigmoid or softmax
    features/teacher_0/case_007/meta.json   case, teacher, window, spacing, digests

bfloat16, which numpy lacks, is stored as the uint16 of the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from medrl.core.errors import DataError, RuntimeFault

from .mapped import Stored, Verified
from .windows import Window

FORMAT = 1
TEACHER_FILE = "teacher.json"
CASE_FILE = "meta.json"
LOGITS = "logits"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SPACING_TOLERANCE = 0.01
_EXTRACT_AGAIN = "run `medrl graft extract-features` again with the config of this student"


@dataclass(frozen=True)
class Expected:
    """What the student needs of a feature file: this case, this box, this grid."""

    case_id: str
    window: Window
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    image_hash: str = ""


@dataclass
class TeacherFolder:
    """The extracted features of one teacher.

    Attributes:
        path: The folder.
        name: Short name for logs, the folder's name.
        teacher: Digest of the teacher's checkpoint.
        channels: Channels of each array by name: ``{"neg1": 8, "logits": 2}``.
        target: What the logits mean: `binary`, `3class` or `classes`.
        labels: Label values by name.
        verify: Check digests when a file is first opened.
        family: Convention of the logits (`regions.teacher_probabilities`).
        trained_on: Which cases the teacher has seen (`teachers.seen.TrainedOn`); empty if that is unknown.
    """

    path: Path
    teacher: str
    channels: dict[str, int]
    target: str
    labels: dict[str, int]
    dtype: torch.dtype
    verify: bool = True
    family: str = "nnunet"
    trained_on: dict[str, Any] = field(default_factory=dict)
    _verified: Verified = field(default_factory=Verified, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    def __contains__(self, case_id: str) -> bool:
        return (self.path / case_id / CASE_FILE).is_file()

    def cases(self) -> list[str]:
        """Identifiers of the cases whose features are complete."""
        return sorted(item.name for item in self.path.iterdir() if (item / CASE_FILE).is_file())

    def read(self, expected: Expected, names: Sequence[str]) -> dict[str, Tensor]:
        """Map the arrays of one case, each ``(C, D, H, W)`` in the stored precision.

        Raises:
            DataError: A file is missing, damaged, or of another case, teacher, window or grid; file and
                case are named.
        """
        meta = self.check(expected)
        arrays = {}
        for name in names:
            path = self.path / expected.case_id / f"{name}.npy"
            if name not in meta["arrays"]:
                raise _refuse(
                    path, expected.case_id, f"this teacher has no '{name}', it has {sorted(meta['arrays'])}"
                )
            arrays[name] = self._map(path, expected.case_id, meta["arrays"][name])
        return arrays

    def check(self, expected: Expected) -> dict[str, Any]:
        """Compare the metadata of one case with what the student needs; reads no array.

        Raises:
            DataError: As `read`.
        """
        case_id = expected.case_id
        path = self.path / case_id / CASE_FILE
        meta = _read_json(path, case_id)
        try:
            window = Window.from_meta(meta["window"])
            found: dict[str, tuple[Any, Any]] = {
                "case": (str(meta["case"]), case_id),
                "teacher": (str(meta["teacher"]), self.teacher),
                "image shape": (list(meta["shape"]), list(expected.shape)),
                "window": (window.to_meta(), expected.window.to_meta()),
            }
            spacing = [float(value) for value in meta["spacing"]]
            arrays: Mapping[str, Mapping[str, Any]] = meta["arrays"]
            if expected.image_hash:
                found["image content"] = (str(meta["image_hash"])[:12], expected.image_hash[:12])
            for name, entry in arrays.items():
                found[f"channels of {name}"] = (int(entry["shape"][0]), self.channels.get(name))
        except (KeyError, TypeError, ValueError) as error:
            raise _refuse(
                path, case_id, f"its metadata are incomplete ({type(error).__name__}: {error})"
            ) from error
        for what, (has, needs) in found.items():
            if has != needs:
                raise _refuse(path, case_id, f"{what} is {has}, the student needs {needs}")
        if not np.allclose(spacing, expected.spacing, rtol=_SPACING_TOLERANCE):
            raise _refuse(
                path, case_id, f"spacing is {spacing} mm, the image has {list(expected.spacing)} mm"
            )
        return meta

    def _map(self, path: Path, case_id: str, entry: Mapping[str, Any]) -> Tensor:
        stored, digest = Stored(path, self.dtype), entry["sha256"]
        try:
            tensor = stored.open()
            if list(tensor.shape) != list(entry["shape"]):
                why = f"it holds {list(tensor.shape)}, its metadata say {entry['shape']}"
                raise _refuse(path, case_id, why)
            if self.verify and not self._verified.has(path, digest):
                if _digest(_plain(tensor)) != digest:
                    raise _refuse(path, case_id, "its content changed since it was written (digest)")
                self._verified.add(path, digest)
            elif get_worker_info() is not None:
                stored.read_ahead()  # the training process maps it a few batches later
        except (OSError, ValueError) as error:
            raise _refuse(path, case_id, f"it cannot be read ({error})") from error
        return tensor


class FeatureWriter:
    """Writes the features of one teacher, each case whole or not at all.

    Raises:
        DataError: The folder already holds the features of another teacher.
    """

    def __init__(
        self,
        path: Path,
        *,
        teacher: str,
        source: str,
        channels: Mapping[str, int],
        target: str,
        labels: Mapping[str, int],
        dtype: str,
        pooled: bool = False,
        trained_on: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.teacher = teacher
        self.dtype = DTYPES[dtype]
        path.mkdir(parents=True, exist_ok=True)
        record = {
            "format": FORMAT,
            "teacher": teacher,
            "source": source,
            "channels": dict(channels),
            "target": target,
            "labels": dict(labels),
            "dtype": dtype,
            **({"pooled": True} if pooled else {}),
            **({"trained_on": dict(trained_on)} if trained_on else {}),
        }
        old = path / TEACHER_FILE
        if old.is_file():
            known = _read_json(old, "")
            compared = {*record, "pooled"} - {"source", "trained_on"}
            if any(known.get(key) != record.get(key) for key in compared):
                raise DataError(
                    str(path),
                    why="it holds the features of another teacher, or of other taps, precision or pooling",
                    do="choose a new folder with -o, or remove this one",
                )
        _write(old, json.dumps(record, indent=2).encode() + b"\n")

    def has(self, expected: Expected) -> bool:
        """Whether the features of a case are already there and fit."""
        try:
            open_teacher(self.path).check(expected)
        except DataError:
            return False
        return True

    def write(self, expected: Expected, arrays: Mapping[str, Tensor]) -> Path:
        """Write the arrays of one case, each ``(C, D, H, W)``.

        Raises:
            RuntimeFault: Values are not finite in the chosen precision, or the disk is full.
        """
        target = self.path / expected.case_id
        draft = self.path / f".{expected.case_id}.{secrets.token_hex(4)}.tmp"
        try:
            draft.mkdir()
            entries = {}
            for name, tensor in arrays.items():
                entries[name] = self._write_array(draft / f"{name}.npy", expected.case_id, tensor)
            meta = {
                "case": expected.case_id,
                "teacher": self.teacher,
                "window": expected.window.to_meta(),
                "shape": list(expected.shape),
                "spacing": list(expected.spacing),
                "image_hash": expected.image_hash,
                "arrays": entries,
            }
            _write(draft / CASE_FILE, json.dumps(meta, indent=2).encode() + b"\n")
            if target.exists():
                shutil.rmtree(target)
            draft.replace(target)
        except OSError as error:
            raise RuntimeFault(str(target), why=f"cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return target

    def _write_array(self, path: Path, case_id: str, tensor: Tensor) -> dict[str, Any]:
        stored = tensor.detach().to("cpu", self.dtype).contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise RuntimeFault(
                f"case {case_id}: {path.name}",
                why=f"the teacher's values are not finite in {self.dtype}",
                do="extract with --precision bf16 or fp32",
            )
        array = _plain(stored)
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        return {"shape": list(array.shape), "sha256": _digest(array)}


def open_teacher(path: Path, *, verify: bool = True) -> TeacherFolder:
    """Open the feature folder of one teacher.

    Raises:
        DataError: It is no feature folder, or of another format.
    """
    record = _read_json(path / TEACHER_FILE, "")
    try:
        if record["format"] != FORMAT:
            raise _refuse(path / TEACHER_FILE, "", f"format {record['format']}, this version reads {FORMAT}")
        return TeacherFolder(
            path=path,
            teacher=str(record["teacher"]),
            channels={str(name): int(count) for name, count in record["channels"].items()},
            target=str(record["target"]),
            labels={str(name): int(value) for name, value in record["labels"].items()},
            dtype=DTYPES[record["dtype"]],
            verify=verify,
            # `import-features` turns every family's logits into the student's own channels.
            family=str(record.get("family", "nnunet")),
            trained_on=dict(record.get("trained_on") or {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _refuse(
            path / TEACHER_FILE, "", f"it is incomplete ({type(error).__name__}: {error})"
        ) from error


def open_teachers(
    paths: Iterable[Path], *, taps: Sequence[str], target: str, labels: Mapping[str, int], verify: bool = True
) -> tuple[TeacherFolder, ...]:
    """Open all teachers and check that they fit the student.

    Args:
        paths: Feature folders, or folders that hold some (taken in the order of their names).
        taps: Layers that will be compared.
        target: Kind of target of the student.
        labels: Label values of the student's dataset.
        verify: Check digests when a file is first opened.

    Raises:
        DataError: A folder holds no features, lacks a tap, or was made for other targets or labels.
    """
    folders: list[Path] = []
    for path in paths:
        if (path / TEACHER_FILE).is_file():
            folders.append(path)
            continue
        inner = sorted(path.glob(f"*/{TEACHER_FILE}"), key=_natural) if path.is_dir() else []
        if not inner:
            raise DataError(
                str(path),
                why="no feature folder: there is no teacher.json in it or one level below",
                do="medrl graft extract-features --teachers RUNS --data DATA -o " + str(path),
            )
        folders += [file.parent for file in inner]
    doubled = {folder.resolve() for folder in folders}
    if len(doubled) != len(folders):
        raise DataError("teachers.features", why="a teacher is listed twice", do="list each folder once")
    teachers = tuple(open_teacher(folder, verify=verify) for folder in folders)
    for teacher in teachers:
        if teacher.target != target or teacher.labels != dict(labels):
            raise DataError(
                str(teacher.path),
                why=f"the teacher predicts {teacher.target} of {teacher.labels}, "
                f"the student {target} of {dict(labels)}",
                do="train the teachers with the same target.kind and the same dataset.json labels",
            )
        missing = [tap for tap in taps if tap not in teacher.channels]
        if missing:
            raise DataError(
                str(teacher.path),
                why=f"it has no features of {', '.join(missing)}, only {', '.join(sorted(teacher.channels))}",
                do=f"medrl graft extract-features --taps {','.join(taps)} …",
            )
    return teachers


def _natural(path: Path) -> tuple[object, ...]:
    name = path.parent.name
    digits = "".join(item for item in name if item.isdigit())
    return (name.rstrip("0123456789"), int(digits) if digits else -1, name)


def _plain(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor as it lies in a file."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data.cast("B")).hexdigest()


def _refuse(path: Path, case_id: str, why: str) -> DataError:
    what = f"case {case_id}: {path}" if case_id else str(path)
    return DataError(what, why=why, do=_EXTRACT_AGAIN, case=case_id)


def _read_json(path: Path, case_id: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _refuse(path, case_id, "there is no such file") from error
    except (OSError, ValueError) as error:
        raise _refuse(path, case_id, f"it cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise _refuse(path, case_id, "it is no JSON object")
    return record


def _write(path: Path, content: bytes) -> None:
    """Replace a small file at once."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
