"""Weights that other programs wrote, and loading any weights into a module."""

from __future__ import annotations

import logging
import pickle  # only subclassed; every global but tensor parts is replaced by an inert stub
import types
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from medrl.core.errors import CheckpointError

_log = logging.getLogger("medrl.checkpoint")
_SHOWN = 5


def load_foreign(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """Load a checkpoint of another program onto the CPU without executing anything from it.

    Args:
        path: A ``.pt``, ``.pth`` or ``.tar`` file of `torch.save`, zip or legacy format.
        trust: Also accept files with pickled Python objects, as old training scripts write them. Every global
            that is not part of a tensor is replaced by an inert stub, so that still nothing of the file is
            executed; what the stubs stood for is dropped. A pickled module yields its ``state_dict``.

    Raises:
        CheckpointError: Missing, damaged, a TorchScript archive, or not loadable without `trust`.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if _is_torchscript(path):
        raise CheckpointError(
            f"{path} is a TorchScript archive",
            why="it holds code, and medrl loads weights only",
            do="save its state_dict() with torch.save in the program that made it",
        )
    try:
        if trust:
            content = torch.load(
                path, map_location="cpu", weights_only=False, pickle_module=_stubbing_pickle()
            )
            content = _without_stubs(content)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds of errors for unusable files
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} cannot be loaded as weights",
            why=f"{type(error).__name__}: {first}",
            do="copy it again if it is damaged"
            + (
                ""
                if trust
                else "; if it holds pickled Python objects, add --trust-checkpoint (nothing is executed)"
            ),
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds no weights", why=f"a dict is expected, found {type(content).__name__}"
        )
    return dict(content)


def load_into(module: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> list[str]:
    """Copy weights into a module after comparing every name and shape; the module is untouched on error.

    Args:
        module: The module to fill.
        state: Its ``state_dict``.
        strict: Missing and unknown names are errors; otherwise only shapes must fit.

    Returns:
        The names that `state` lacks or the module does not know (empty when strict).

    Raises:
        CheckpointError: With the first names that are missing, unknown or of another shape.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    wrong = [
        f"{name}: {_shape(state[name])} in the checkpoint, {_shape(own[name])} in the model"
        for name in own
        if name in state and _shape(state[name]) != _shape(own[name])
    ]
    problems = [_list("other shapes", wrong)] if wrong else []
    if strict:
        problems += [_list("missing", missing)] if missing else []
        problems += [_list("unknown", unknown)] if unknown else []
    if problems:
        raise CheckpointError(
            f"the weights do not fit {type(module).__name__}",
            why="; ".join(problems),
            do="train and predict with the same model settings (model.*, labels and channels of the dataset)",
        )
    try:
        module.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit {type(module).__name__}", why=str(error)) from error
    return missing + unknown


# -- private ---------------------------------------------------------------------------------------


class _Stub:
    """Stands for any object of a pickle; takes every construction and call, and does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _Stub:
        stub = super().__new__(cls)
        stub.state = None
        return stub

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.state: Any

    def __call__(self, *_args: Any, **_kwargs: Any) -> _Stub:
        return _Stub()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _value: Any) -> None:
        pass

    def extend(self, _values: Any) -> None:
        pass

    def add(self, _value: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


def _stub_class(module: str, name: str) -> type[_Stub]:
    return type("Stub", (_Stub,), {"origin": f"{module}.{name}"})


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.nn.parameter", "Parameter"): nn.Parameter,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
}
for _name in dir(torch):
    if isinstance(getattr(torch, _name), torch.dtype):
        _ALLOWED["torch", _name] = getattr(torch, _name)
for _name in (
    "DoubleStorage",
    "FloatStorage",
    "HalfStorage",
    "BFloat16Storage",
    "LongStorage",
    "IntStorage",
    "ShortStorage",
    "CharStorage",
    "ByteStorage",
    "BoolStorage",
):
    for _module in ("torch", "torch.cuda"):
        _ALLOWED[_module, _name] = getattr(torch, _name)


class _StubbingUnpickler(pickle.Unpickler):
    """Resolves tensor parts and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        return _stub_class(module, name) if found is None else found


def _stubbing_pickle() -> types.ModuleType:
    """Return a stand-in for the module `pickle`, as `torch.load` takes it."""
    stand_in = types.ModuleType("medrl_stubbing_pickle")

    def load(file: IO[bytes], **options: Any) -> Any:
        return _StubbingUnpickler(file, **options).load()

    stand_in.Unpickler = _StubbingUnpickler  # type: ignore[attr-defined]
    stand_in.load = load  # type: ignore[attr-defined]
    stand_in.UnpicklingError = pickle.UnpicklingError  # type: ignore[attr-defined]
    return stand_in


def _without_stubs(value: Any) -> Any:
    """Return the tree without stubs: a pickled module becomes its state_dict, anything else is dropped."""
    if isinstance(value, _Stub):
        state = _module_state(value)
        return state or None
    if isinstance(value, Mapping):
        kept: dict[Any, Any] = {}
        for key, item in value.items():
            cleaned = _without_stubs(item)
            if isinstance(key, _Stub) or (cleaned is None and item is not None):
                _log.info("dropped '%s' of a foreign checkpoint: no tensor and no plain value", key)
                continue
            kept[key] = cleaned
        return kept
    if isinstance(value, (list, tuple)):
        items = [_without_stubs(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _module_state(stub: _Stub, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a stub that stands for an `nn.Module`; empty for anything else."""
    if not isinstance(stub.state, Mapping):
        return {}
    found: dict[str, torch.Tensor] = {}
    skipped = stub.state.get("_non_persistent_buffers_set", ())
    for group in ("_parameters", "_buffers"):
        entries = stub.state.get(group)
        if isinstance(entries, Mapping):
            for name, tensor in entries.items():
                if isinstance(tensor, torch.Tensor) and (
                    not isinstance(skipped, (set, tuple)) or name not in skipped
                ):
                    found[f"{prefix}{name}"] = tensor.detach()
    children = stub.state.get("_modules")
    if isinstance(children, Mapping):
        for name, child in children.items():
            if isinstance(child, _Stub):
                found.update(_module_state(child, f"{prefix}{name}."))
    return found


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(
                name.endswith("/constants.pkl") or name == "constants.pkl" for name in archive.namelist()
            )
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _list(title: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {title} ({', '.join(names[:_SHOWN])}{more})"
