"""The file of one cache entry: named arrays and plain values, verified, mapped into memory.

====== ============================== =============================================================
offset size                           content
====== ============================== =============================================================
0      8                              ``MEDRLC01``
8      8                              length of the header, little endian
16     32                             SHA-256 of the header
48     header length                  JSON: arrays (name, type, shape, offset), meta, SHA-256 of payload
...    a multiple of 64 bytes         payload, each array on a 64-byte boundary, little endian
====== ============================== =============================================================

Every byte is covered by one of the two digests or is compared with what it must be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Arrays: TypeAlias = "Mapping[str, NDArray[Any] | Tensor]"

_MAGIC = b"MEDRLC01"
_PREFIX = len(_MAGIC) + 8 + 32
_ALIGN = 64
_MAX_HEADER = 16 * 2**20
_NUMPY_TYPES = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
    | {"float16", "float32", "float64", "complex64", "complex128"}
)

_verified: set[tuple[str, int, int, int]] = set()
"""(path, inode, size, mtime) of files whose payload this process, or the one it was forked from, checked."""


class DamagedEntry(Exception):
    """The file is no whole entry."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedArrays:
    """The arrays of one entry and its plain values.

    Attributes:
        arrays: Read-only arrays by name, mapped from the file; bfloat16 appears as uint16.
        meta: Plain values stored beside them.
        types: Stored type by name, such as ``float32`` or ``bfloat16``.
        path: File of the entry; None when the cache could not be written and the arrays lie in memory.
    """

    arrays: Mapping[str, NDArray[Any]]
    meta: Mapping[str, Any]
    types: Mapping[str, str]
    path: Path | None = None
    _writable: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def tensor(self, name: str) -> Tensor:
        """The array as a tensor of its stored type, bfloat16 included, without a copy.

        The mapping is copy-on-write: writing to the tensor changes neither the file nor what another
        `get` of the entry sees, in this process or in another.
        """
        import torch

        tensor = torch.from_numpy(self._writable[name])
        return tensor.view(torch.bfloat16) if self.types[name] == "bfloat16" else tensor


def write_entry(
    file: BinaryIO, arrays: Mapping[str, NDArray[Any]], types: Mapping[str, str], meta: Mapping[str, Any]
) -> None:
    """Write a whole entry; `arrays` and `types` come from `plain_arrays`."""
    offset, described, payload = 0, [], hashlib.sha256()
    for name, array in arrays.items():
        described.append({"name": name, "type": types[name], "shape": list(array.shape), "offset": offset})
        payload.update(_bytes(array))
        payload.update(_padding(array.nbytes))
        offset += array.nbytes + len(_padding(array.nbytes))
    header = json.dumps(
        {"arrays": described, "meta": meta, "payload": payload.hexdigest(), "bytes": offset}
    ).encode()
    file.write(_MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest())
    file.write(header)
    file.write(_padding(_PREFIX + len(header)))
    for array in arrays.values():
        file.write(_bytes(array))
        file.write(_padding(array.nbytes))


def entry_size(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Bytes of the payload that the arrays will need."""
    return sum(array.nbytes + len(_padding(array.nbytes)) for array in arrays.values())


def open_entry(path: Path) -> CachedArrays:
    """Map an entry; its payload is verified when this process opens the file for the first time.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedEntry: If a byte differs from what was written.
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        header, start = _read_header(file, status.st_size)
        raw: NDArray[np.uint8] = (
            np.memmap(file, dtype=np.uint8, mode="c") if status.st_size else np.empty(0, np.uint8)
        )
        identity = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
        if identity not in _verified:
            if hashlib.sha256(_bytes(raw[start:])).hexdigest() != header["payload"]:
                raise DamagedEntry("the digest of its arrays differs")
            _verified.add(identity)
        with contextlib.suppress(OSError):
            # The time of use, for eviction: mounts often do not keep it. A foreign read-only cache is fine.
            os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))
    writable = {item["name"]: _mapped(raw, start, item) for item in header["arrays"]}
    return _entry(writable, {item["name"]: item["type"] for item in header["arrays"]}, header["meta"], path)


def entry_in_memory(
    arrays: Mapping[str, NDArray[Any]], types: Mapping[str, str], meta: Mapping[str, Any]
) -> CachedArrays:
    """An entry without a file, for a cache that cannot be written; the arrays are copied."""
    return _entry({name: array.copy() for name, array in arrays.items()}, types, meta, None)


def plain_arrays(arrays: Arrays) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Turn arrays and tensors into contiguous little-endian numpy arrays, and name their types.

    Raises:
        ConfigError: If a type cannot be stored.
    """
    found: dict[str, NDArray[Any]] = {}
    types: dict[str, str] = {}
    for name, value in arrays.items():
        array, kind = _plain_array(value)
        if kind != "bfloat16" and kind not in _NUMPY_TYPES:
            raise ConfigError("cache", why=f"array {name!r} has type {kind}, which cannot be stored")
        found[name] = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
        types[name] = kind
    return found, types


def plain(value: Any, where: str) -> Any:
    """Reduce a value to what JSON holds: text, numbers, booleans, None, lists, dicts with text keys.

    Raises:
        ConfigError: If something else is inside; the place is named.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return plain(value.item(), where)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError("cache", why=f"{where} has the key {key!r}, which is no text")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    raise ConfigError(
        "cache",
        why=f"{where} is a {type(value).__name__}, which is no plain value",
        do="use text, numbers, booleans, lists and dicts",
    )


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """Check the first part of the file; return the header and the start of the payload."""
    prefix = file.read(_PREFIX)
    if len(prefix) < _PREFIX or prefix[:8] != _MAGIC:
        raise DamagedEntry("it is no cache entry")
    length = int.from_bytes(prefix[8:16], "little")
    if length > min(_MAX_HEADER, size):
        raise DamagedEntry("its header is longer than the file")
    text = file.read(length)
    if hashlib.sha256(text).digest() != prefix[16:48]:
        raise DamagedEntry("the digest of its header differs")
    padding = _padding(_PREFIX + length)
    start = _PREFIX + length + len(padding)
    if file.read(len(padding)) != padding:
        raise DamagedEntry("it is not filled with zeros after its header")
    header: dict[str, Any] = json.loads(text)
    if any(item["type"] not in _NUMPY_TYPES | {"bfloat16"} for item in header["arrays"]):
        raise DamagedEntry("it holds an array of an unknown type")
    if size != start + header["bytes"]:
        raise DamagedEntry(f"it has {size} of {start + header['bytes']} bytes")
    return header, start


def _mapped(raw: NDArray[np.uint8], start: int, item: Mapping[str, Any]) -> NDArray[Any]:
    """One array of the payload, as a view."""
    kind = np.dtype(np.uint16 if item["type"] == "bfloat16" else item["type"]).newbyteorder("<")
    first = start + item["offset"]
    last = first + math.prod(item["shape"]) * kind.itemsize
    return raw[first:last].view(kind).reshape(item["shape"])


def _entry(
    writable: dict[str, NDArray[Any]], types: Mapping[str, str], meta: Mapping[str, Any], path: Path | None
) -> CachedArrays:
    arrays = {}
    for name, array in writable.items():
        arrays[name] = array.view()
        arrays[name].flags.writeable = False
    return CachedArrays(arrays=arrays, meta=meta, types=types, path=path, _writable=writable)


def _plain_array(value: Any) -> tuple[NDArray[Any], str]:
    """A numpy array and the name of the type that it stands for."""
    if isinstance(value, np.ndarray):
        return value, value.dtype.name
    import torch

    if not isinstance(value, torch.Tensor):
        array = np.asarray(value)
        return array, array.dtype.name
    tensor = value.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy(), "bfloat16"
    array = tensor.numpy()
    return array, array.dtype.name


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _padding(length: int) -> bytes:
    return b"\0" * (-length % _ALIGN)
