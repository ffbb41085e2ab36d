"""Arrays that stay in their files: mapped where they are used, passed between processes by name.

A loading process checks an array and asks the system to read it ahead; what it passes on is the path. The
training process maps the same pages. So no value is copied on the way, and the memory of a rank does not
grow with its loading processes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEMORY = {torch.bfloat16: np.uint16, torch.float16: np.float16, torch.float32: np.float32}
"""How each precision lies in a file; numpy lacks bfloat16."""

_SLOTS = 1 << 15
_PROBES = 16


@dataclass(frozen=True)
class Stored:
    """The file of an array, and its precision."""

    path: Path
    dtype: torch.dtype

    def open(self) -> Tensor:
        """Map the array.

        Copy on write: processes share the pages, and writing to the tensor does not change the file.

        Raises:
            OSError: The file is missing or cannot be read.
            ValueError: It is damaged or of another precision.
        """
        try:
            array = np.load(self.path, mmap_mode="c", allow_pickle=False)
        except EOFError as error:
            raise ValueError("the file is empty") from error
        if array.dtype != MEMORY[self.dtype]:
            raise ValueError(f"it holds {array.dtype}, expected {self.dtype}")
        tensor = torch.from_numpy(array)
        if self.dtype == torch.bfloat16:
            tensor = tensor.view(torch.bfloat16)
        tensor.stored = self  # type: ignore[attr-defined]
        return tensor

    def read_ahead(self) -> None:
        """Ask the system to read the file into the page cache, without waiting for it."""
        if not hasattr(os, "posix_fadvise"):
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def by_name(tensor: Tensor) -> Tensor | Stored:
    """The file of a tensor that `Stored.open` gave; any other tensor itself."""
    stored: Tensor | Stored = getattr(tensor, "stored", tensor)
    return stored


def by_value(item: Tensor | Stored) -> Tensor:
    """The tensor again."""
    return item.open() if isinstance(item, Stored) else item


class Verified:
    """Files whose digest was compared, known to this process and to all that it forks, in both directions.

    A file counts as another one once its size, time or inode changed. The table is a memory map without a
    file; where it is full, or two processes write at once, a file is at worst compared again.
    """

    def __init__(self) -> None:
        self._table: NDArray[np.int64] = np.frombuffer(mmap.mmap(-1, 8 * _SLOTS), dtype=np.int64)

    def has(self, path: Path, digest: str) -> bool:
        """Whether this file, as it is now, was found to have this digest."""
        key = _key(path, digest)
        return bool((self._table[_places(key)] == key).any())

    def add(self, path: Path, digest: str) -> None:
        """Note that it has."""
        key = _key(path, digest)
        places = _places(key)
        free = np.flatnonzero(self._table[places] == 0)
        self._table[places[free[0] if free.size else 0]] = key


def _key(path: Path, digest: str) -> int:
    """A number for a file as it is now and a digest, never 0."""
    status = path.stat()
    text = f"{path.absolute()}\n{status.st_ino}\n{status.st_size}\n{status.st_mtime_ns}\n{digest}"
    found = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True) | 1


def _places(key: int) -> NDArray[np.int64]:
    """The slots in which a number may lie."""
    return (key % _SLOTS + np.arange(_PROBES)) % _SLOTS
