"""States as tensors and plain types: what may be stored, and how numpy values are carried."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from medrl.core.errors import CheckpointError

_ARRAY = "__numpy__"
_PLAIN = (type(None), bool, int, float, str, bytes)


def pack(value: Any, where: str = "state") -> Any:
    """Return `value` as tensors, dicts, lists, tuples and plain scalars, ready for weights-only storage.

    Numpy arrays become marked tensors, numpy scalars numbers, paths text. Tensors are detached; a view of a
    larger storage is copied, so that the file does not carry the rest of it.

    Raises:
        CheckpointError: A value of another type; its place is named.
    """
    if isinstance(value, torch.Tensor):
        return _pack_tensor(value)
    if isinstance(value, np.ndarray):
        return _pack_array(value, where)
    if isinstance(value, np.generic):
        return pack(value.item(), where)
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        packed: dict[Any, Any] = {}
        for key, item in value.items():
            packed[_pack_key(key, where)] = pack(item, f"{where}.{key}")
        versions = getattr(value, "_metadata", None)
        if versions is None:
            return packed
        ordered = OrderedDict(packed)  # the state of a module carries the versions of its layers
        ordered._metadata = pack(versions, where)  # type: ignore[attr-defined]  # torch's own convention
        return ordered
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (bool, int, float, str)):  # a subclass, such as an enumeration of text
        for kind in (bool, int, float, str):
            if isinstance(value, kind):
                return kind(value)
    raise CheckpointError(
        f"{where} cannot be stored",
        why=f"it is neither tensor nor plain type but {type(value).__module__}.{type(value).__name__}",
        do="return tensors, numbers, text, lists and dicts from state_dict()",
    )


def unpack(value: Any) -> Any:
    """Return what `pack` was given, with numpy arrays again as arrays."""
    if isinstance(value, dict):
        if _ARRAY in value:
            return value["data"].numpy().astype(np.dtype(value[_ARRAY]), copy=False).reshape(value["shape"])
        for key in value:
            value[key] = unpack(value[key])
        return value
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, tuple):
        return tuple(unpack(item) for item in value)
    return value


def size_of(value: Any) -> int:
    """Return an upper estimate of the stored size of packed values in bytes; shared storages count once."""
    seen: set[int] = set()

    def measure(item: Any) -> int:
        if isinstance(item, torch.Tensor):
            key = item.untyped_storage().data_ptr() or id(item)
            if key in seen:
                return 256
            seen.add(key)
            return item.untyped_storage().nbytes() + 512
        if isinstance(item, Mapping):
            return 64 + sum(measure(key) + measure(entry) for key, entry in item.items())
        if isinstance(item, (list, tuple)):
            return 64 + sum(measure(entry) for entry in item)
        if isinstance(item, (str, bytes)):
            return 4 * len(item) + 16
        return 16

    return measure(value) + 4096


def _pack_tensor(value: torch.Tensor) -> torch.Tensor:
    tensor = value.detach()
    if (
        tensor.layout is torch.strided
        and tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    ):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _pack_array(value: np.ndarray[Any, Any], where: str) -> dict[str, Any]:
    array = np.ascontiguousarray(value)
    stored = {"u": np.int64, "b": np.uint8}.get(array.dtype.kind) if array.dtype != np.uint8 else None
    too_large = array.dtype == np.uint64 and array.size and int(array.max()) >= 2**63
    if array.dtype.kind not in "iufb" or too_large:
        raise CheckpointError(
            f"{where} cannot be stored", why=f"numpy arrays of {array.dtype} are not supported"
        )
    carried = array.astype(stored or array.dtype.newbyteorder("="), copy=True)
    return {
        _ARRAY: array.dtype.str,
        "shape": list(value.shape),
        "data": torch.from_numpy(carried.reshape(-1)),
    }


def _pack_key(key: Any, where: str) -> Any:
    if isinstance(key, np.generic):
        key = key.item()
    if type(key) in (str, int, float, bool) or key is None:
        return key
    if isinstance(key, tuple):
        return tuple(_pack_key(item, where) for item in key)
    raise CheckpointError(f"{where} cannot be stored", why=f"its key {key!r} is neither text nor number")
