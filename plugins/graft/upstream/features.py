"""Feature files of the original: ``features_<case>.pt`` and ``.npz`` of three families of teachers.

============== ========================= ==================================== ==========================
family         file                      features                             logits
============== ========================= ==================================== ==========================
nnunet         ``features_<case>``       ``[C, D, H, W]``, perhaps a leading 1 same, before the sigmoid
provicnet      ``features_<case>``       ``[D, C, H, W]``                     ``[D, 4, H, W]`` of a softmax
prostatlasdiff ``diffusion_features_…``  ``[D, C, 3, H, W]``                  ``[D, 1, 3, H, W]``
============== ========================= ==================================== ==========================

The keys are ``feature_neg1`` and ``logits``, and perhaps ``feature_neg2``; ProViCNet nests them under
``features``. Nothing of a file is executed: ``.pt`` is loaded as weights only, ``.npz`` without pickle.

Source: specification §1; upstream dataset/pimedloader_3d_with_features.py.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.checkpoint import load_foreign
from medrl.core.dataset import safe_case_id
from medrl.core.errors import CheckpointError, DataError
from medrl.plugins.graft.features import LOGITS, Expected
from medrl.plugins.graft.regions import Target, teacher_probabilities, teacher_threshold

from .windows import Align, find_place, placed, refuse

FORMATS = ("npz", "pt")
VALID = "valid"
"""Name of the array that says where a teacher's logits count: ``(K, D, H, W)`` of 0 and 1."""

_KEYS = {"neg1": "feature_neg1", "neg2": "feature_neg2", LOGITS: "logits"}
_DAMAGE = (
    OSError, ValueError, EOFError, KeyError, NotImplementedError, MemoryError, SyntaxError,
    zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip
"""What numpy and zipfile raise for damaged archives."""
_LARGEST = 15.0
"""Logits made of probabilities stay within ±15, about 3e-7 from 0 and 1."""


@dataclass(frozen=True)
class UpstreamTeacher:
    """Where the feature files of one teacher lie and how they are laid out.

    Attributes:
        name: Such as ``fold0`` or ``provicnet``.
        folders: Searched in this order.
        family: ``nnunet``, ``provicnet`` or ``prostatlasdiff``.
        format: Format that is looked for first, ``pt`` or ``npz``.
    """

    name: str
    folders: tuple[Path, ...]
    family: str = "nnunet"
    format: str = "npz"

    def stem(self, case_id: str) -> str:
        """Name of a case's file without suffix."""
        prefix = "diffusion_features" if self.family == "prostatlasdiff" else "features"
        return f"{prefix}_{safe_case_id(case_id)}"


def family_of(name: str) -> str:
    """The family that a teacher's name tells: ``provicnet``, ``prostatlasdiff``, else ``nnunet``.

    >>> family_of("provicnet_fold2"), family_of("fold0")
    ('provicnet', 'nnunet')
    """
    low = name.casefold()
    return next((family for family in ("provicnet", "prostatlasdiff") if family in low), "nnunet")


def find_file(teacher: UpstreamTeacher, case_id: str, *, min_bytes: int = 0) -> Path:
    """Find the feature file of a case: in each folder the teacher's format, then ``.npz``, then ``.pt``.

    Args:
        teacher: Whose file.
        case_id: Exact case identifier.
        min_bytes: A smaller file counts as missing (the original takes files under 1 MB for failed writes).

    Raises:
        DataError: There is none; the folders and files that are too small are named.
    """
    stem = teacher.stem(case_id)
    small = []
    for folder in teacher.folders:
        for suffix in dict.fromkeys((teacher.format, *FORMATS)):
            path = folder / f"{stem}.{suffix}"
            if path.is_file():
                if path.stat().st_size >= min_bytes:
                    return path
                small.append(f"{path} has {path.stat().st_size} bytes")
    where = ", ".join(map(str, teacher.folders)) or "no folder"
    why = f"no file {stem}.{teacher.format} (nor .npz, .pt) in {where}"
    if small:
        why = f"{'; '.join(small)}, fewer than {min_bytes}"
    raise DataError(
        f"case {case_id}, teacher {teacher.name}",
        why=why,
        do="extract its features again, or leave the case out (--skip-missing, or data.exclude)",
        case=case_id,
    )


def read_upstream(
    path: Path,
    teacher: UpstreamTeacher,
    case_id: str,
    taps: Sequence[str] = ("neg1",),
    *,
    trust: bool = False,
) -> dict[str, Tensor]:
    """Read a feature file and bring its arrays into the order ``[C, D, H, W]``, in the stored precision.

    Args:
        path: The file.
        teacher: Gives the family.
        case_id: Only for messages.
        taps: ``neg1``, ``neg2``; only these are read.
        trust: Also accept a ``.pt`` with pickled Python objects; they are replaced by inert stubs.

    Returns:
        Each tap and ``logits``. The logits keep the family's own channels: nnU-Net's regions or classes,
        four classes of ProViCNet, three slices of ProstAtlasDiff.

    Raises:
        DataError: The file is damaged, lacks an array, or one has another shape or is not finite; file and
            case are named.
    """
    names = (*taps, LOGITS)
    stored = _read_npz(path, case_id, names) if path.suffix == ".npz" else _read_pt(path, case_id, trust)
    arrays = {}
    for name in names:
        if _KEYS[name] not in stored:
            raise refuse(path, case_id, f"it has no '{_KEYS[name]}', it has {sorted(map(str, stored))}")
        arrays[name] = _in_order(path, case_id, teacher.family, name, stored[_KEYS[name]])
    depths = {name: int(array.shape[1]) for name, array in arrays.items()}
    if len(set(depths.values())) != 1:
        raise refuse(path, case_id, f"its arrays have different depths: {depths}")
    return arrays


def student_logits(logits: Tensor, family: str, target: Target) -> tuple[Tensor, tuple[bool, ...]]:
    """Turn a teacher's logits ``[K, D, H, W]`` into logits of the student's channels.

    Their sigmoid (or softmax, for exclusive classes) is the probability that the family means:

    - nnU-Net: the same channels; three regions for a binary target give ``[ch0, max(ch1, ch2)]``.
    - ProViCNet: regions ``[1−p0, p2+p3]`` or ``[1−p0, p2, p3]``, exact through log-sum-exp; its four classes
      themselves, or the last two joined, for exclusive classes.
    - ProstAtlasDiff: the centre slice; p = σ(x) over its largest value, over 0.2, at most 1. It calls a voxel
      cancer above 0.1, so the logit of p is moved for 0.1 to lie at 0, where every threshold here is.

    Returns:
        ``[C, D, H, W]`` float32, and for each channel whether the teacher says anything about it:
        ProstAtlasDiff knows nothing of the prostate.

    Raises:
        DataError: The channels do not fit the family and the target.
    """
    logits = logits.float()
    said = (True,) * target.channels
    if family == "provicnet" and int(logits.shape[0]) == 4 and target.kind in _PROVICNET:
        parts = []
        for inside in _PROVICNET[target.kind]:
            joined = torch.logsumexp(logits[list(inside)], dim=0)
            if not target.softmax:
                joined = joined - torch.logsumexp(logits[[k for k in range(4) if k not in inside]], dim=0)
            parts.append(joined)
        return torch.stack(parts), said
    if family == "prostatlasdiff":
        p = teacher_probabilities(logits[None], target, family)[0]
        centre = torch.logit(torch.tensor(teacher_threshold(family)))
        found = (torch.logit(p) - centre).clamp(-_LARGEST, _LARGEST)
        return found, tuple(name != "prostate" for name in target.names)
    if family == "nnunet" and target.kind == "binary" and int(logits.shape[0]) == 3:
        return torch.cat((logits[:1], logits[1:].amax(dim=0, keepdim=True))), said
    if family != "nnunet" or int(logits.shape[0]) != target.channels:
        teacher_probabilities(logits[None], target, family)  # raises and says what is expected
        raise DataError(
            f"logits of a {family} teacher", why=f"{logits.shape[0]} channels do not fit {target.kind}"
        )
    return logits, said


_PROVICNET: dict[str, tuple[tuple[int, ...], ...]] = {
    "binary": ((1, 2, 3), (2, 3)),
    "3class": ((1, 2, 3), (2,), (3,)),
    "classes": ((0,), (1,), (2,), (3,)),
    "binary_classes": ((0,), (1,), (2, 3)),
}


def outside_logits(target: Target) -> Tensor:
    """Logits ``[C]`` of what lies outside a teacher's view: background, for sure.

    A padded 0 would mean probability 0.5.
    """
    values = torch.full((target.channels,), -_LARGEST)
    if target.softmax:
        values[0] = _LARGEST
    return values


def fitted(
    arrays: Mapping[str, Tensor],
    teacher: UpstreamTeacher,
    expected: Expected,
    target: Target,
    path: Path,
    align: Align,
) -> dict[str, Tensor]:
    """Bring the arrays of `read_upstream` onto the student's window and channels.

    Returns:
        The taps, each with its own plane; ``logits`` ``[K, D, H, W]`` on the window, background where the
        file shows nothing; and `VALID`, 1 where they count: inside the file's view, and in channels that
        the teacher knows.

    Raises:
        DataError: See `find_place`, `placed` and `student_logits`.
    """
    place = find_place(tuple(arrays[LOGITS].shape), expected, align, path)
    try:
        logits, said = student_logits(arrays[LOGITS], teacher.family, target)
    except DataError as error:
        raise refuse(path, expected.case_id, f"{error.what}: {error.why}", do=error.do) from error
    found = {name: placed(array, place, expected, path) for name, array in arrays.items() if name != LOGITS}
    seen = torch.ones(logits.shape) * torch.tensor(said, dtype=torch.float32).view(-1, 1, 1, 1)
    valid = placed(seen, place, expected, path)
    logits = placed(logits, place, expected, path, fill=outside_logits(target))
    plane = expected.window.size[1:]
    if tuple(logits.shape[-2:]) != plane:
        size = (logits.shape[1], *plane)
        logits = F.interpolate(logits[None], size=size, mode="trilinear", align_corners=False)[0]
        valid = F.interpolate(valid[None], size=size, mode="nearest")[0]
    return {**found, LOGITS: logits, VALID: valid}


def _in_order(path: Path, case_id: str, family: str, name: str, value: Any) -> Tensor:
    """One stored array as ``[C, D, H, W]``."""
    array = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
    if not isinstance(array, Tensor) or not array.is_floating_point():
        kind = array.dtype if isinstance(array, Tensor) else type(value).__name__
        raise refuse(path, case_id, f"'{_KEYS[name]}' is {kind}, expected an array of floating-point numbers")
    shape = tuple(array.shape)
    if family == "nnunet":
        if array.dim() == 5 and shape[0] == 1:
            array = array[0]
        ok, wanted = array.dim() == 4, "[C, D, H, W] or [1, C, D, H, W]"
    elif family == "provicnet":
        ok, wanted = array.dim() == 4, "[D, C, H, W]"
        array = array.permute(1, 0, 2, 3) if ok else array
    else:
        logits = name == LOGITS
        ok = array.dim() == 5 and shape[2] == 3 and (shape[1] == 1 or not logits)
        wanted = "[D, 1, 3, H, W]" if logits else "[D, C, 3, H, W]"
        if ok:
            array = array.flatten(1, 2).permute(1, 0, 2, 3)
    if not ok or 0 in shape:
        raise refuse(
            path, case_id, f"'{_KEYS[name]}' has shape {list(shape)}, a {family} teacher has {wanted}"
        )
    if not bool(torch.isfinite(array).all()):
        raise refuse(path, case_id, f"'{_KEYS[name]}' holds values that are not finite")
    return array


def _read_npz(path: Path, case_id: str, names: Sequence[str]) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as content:
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise refuse(path, case_id, "it is a single array, not an .npz archive")
            wanted = {_KEYS[name] for name in names}
            return {key: content[key] if key in wanted else None for key in content.files}
    except _DAMAGE as error:
        raise refuse(path, case_id, f"it cannot be read ({type(error).__name__}: {error})") from error


def _read_pt(path: Path, case_id: str, trust: bool) -> dict[str, Any]:
    try:
        content = load_foreign(path, trust=trust)
    except CheckpointError as error:
        raise refuse(path, case_id, error.why or error.what, do=error.do) from error
    inner = content.get("features")
    return dict(inner) if isinstance(inner, Mapping) else content
