"""How much memory a prediction needs, said before it begins, and a limit that is kept.

The estimate counts the arrays of a case, which grow with it: the image, the probabilities of all classes and
what is averaged into them. The activations of a network on one window come on top; they do not depend on the
case. What a run really took is in its report.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from medrl.core.errors import ConfigError
from medrl.core.types import Case
from medrl.core.volume import image_suffix

GIB = 2**30
_LOOKED_AT = 32
_FLOAT = 4


@dataclass(frozen=True)
class Need:
    """Memory for one case.

    Attributes:
        shape: Grid of its first image; empty if no header tells it.
        arrays: Bytes of its arrays; 0 if unknown.
    """

    case: str
    shape: tuple[int, ...]
    arrays: int


def needs(
    cases: Sequence[Case], *, classes: int, folds: int = 1, tta: bool = False, every: bool = False
) -> list[Need]:
    """Estimate the memory of cases from their headers, the largest first; voxels are not read.

    Args:
        cases: Cases with their images.
        classes: Channels of the probabilities.
        folds: Checkpoints that are averaged.
        tta: Whether views are averaged.
        every: Look at every case, instead of those with the largest files.
    """
    chosen = list(cases)
    if not every:
        chosen = sorted(chosen, key=_file_bytes, reverse=True)[:_LOOKED_AT]
    found = []
    for case in chosen:
        shape = grid_of(case.images[0]) if case.images else ()
        found.append(
            Need(case.id, shape, array_bytes(shape, len(case.images), classes, folds=folds, tta=tta))
        )
    return sorted(found, key=lambda need: need.arrays, reverse=True)


def array_bytes(
    shape: Sequence[int], channels: int, classes: int, *, folds: int = 1, tta: bool = False
) -> int:
    """Return the bytes of the arrays of one case.

    The image once as read and once as the network gets it, probabilities of a view or fold and their mean,
    one more copy of each sum that is made over views or folds, and the labels.
    """
    if not shape:
        return 0
    copies = 2 + int(folds > 1) + int(tta)
    return math.prod(shape) * (_FLOAT * (2 * channels + copies * classes) + 8)


def grid_of(path: Path) -> tuple[int, ...]:
    """Return the shape that the header of an image tells; empty where it cannot be told cheaply."""
    suffix = image_suffix(path)
    try:
        if suffix in (".nii", ".nii.gz"):
            import nibabel as nib

            return tuple(int(size) for size in nib.load(path).shape)
        if suffix in (".mha", ".mhd", ".nrrd"):
            import SimpleITK as sitk

            reader: Any = cast(Any, sitk).ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            return tuple(int(size) for size in reader.GetSize())
    except Exception:  # noqa: BLE001 - whatever is wrong with the file is told when it is read
        return ()
    return ()


def state(needed: Sequence[Need], *, limit_gb: float = 0.0, count: int = 0) -> tuple[str, dict[str, int]]:
    """Return what to say before the start, and the same as numbers for the report.

    Args:
        needed: Estimates, the largest first.
        limit_gb: Limit of this process in GiB; 0 for none.
        count: Cases in all.

    Raises:
        ConfigError: A case needs more than the limit; every such case is named.
    """
    loaded = resident_bytes()
    known = [need for need in needed if need.arrays]
    facts = {"loaded_bytes": loaded}
    if not known:
        return "", facts
    largest = known[0]
    facts["largest_case_bytes"] = largest.arrays
    total = loaded + largest.arrays
    if limit_gb and total > limit_gb * GIB:
        big = [need for need in known if loaded + need.arrays > limit_gb * GIB]
        raise ConfigError(
            f"--max-memory {limit_gb:g}",
            why=f"{len(big)} of {count or len(known)} cases need more than {limit_gb:g} GiB",
            do=f"--max-memory {math.ceil(total / GIB * 1.25)}, or leave these cases out",
            problems=[
                f"case {need.case}, {_grid(need.shape)}: about {_gib(loaded + need.arrays)}"
                for need in big[:10]
            ],
        )
    text = (
        f"memory: about {_gib(total)} a process and the network's activations: {_gib(loaded)} loaded, "
        f"{_gib(largest.arrays)} for the largest case, {largest.case}, {_grid(largest.shape)}"
    )
    return text, facts


def resident_bytes() -> int:
    """Return the memory that this process holds now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the most memory that this process ever held."""
    return _status("VmHWM")


@contextlib.contextmanager
def limited_memory(limit_gb: float) -> Iterator[None]:
    """Let this process take no more memory than this, so that a case fails and not the machine.

    What it holds already counts. Where the system knows no such limit, or the limit is 0, nothing changes.
    """
    held, mapped = resident_bytes(), _status("VmData")
    if not limit_gb or not mapped:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    room = max(0, int(limit_gb * GIB) - held)
    wanted = mapped + room
    if before[1] != resource.RLIM_INFINITY:
        wanted = min(wanted, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was no memory on the host."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def available_bytes() -> int:
    """Return the memory that is free on this machine, 0 if it cannot be told."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 0
    match = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(match[1]) * 1024 if match else 0


def _status(name: str) -> int:
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _file_bytes(case: Case) -> int:
    total = 0
    for path in case.images:
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def _grid(shape: Sequence[int]) -> str:
    return " × ".join(str(size) for size in shape)
