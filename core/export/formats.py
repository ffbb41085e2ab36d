"""The formats: how a network is written, and how the loader of that ecosystem runs it again."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from medrl.core.errors import CheckpointError, ConfigError, RuntimeFault, did_you_mean
from medrl.core.export import bundle
from medrl.core.export.network import Network, named

Facts: TypeAlias = dict[str, Any]
Run: TypeAlias = Callable[[Sequence[Tensor]], dict[str, Tensor]]
"""Inputs ``(N, *shape)`` to outputs by name."""

KEY = "medrl"
"""Under this name a file keeps its facts, as JSON."""
_EXTRA = "medrl.json"


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: As it is asked for.
        suffix: Of the file; a bundle is a folder.
        packages: What must be installed to write and to verify it.
        atol: Absolute part of the tolerance of an output.
        rtol: Relative part: ``|found - expected| <= atol + rtol * |expected|``.
        save: Writes a network with facts.
        facts: Reads the facts of a file.
        load: Makes the file run, with the loader of its ecosystem; weights alone need the network too.
    """

    name: str
    suffix: str
    packages: tuple[str, ...]
    atol: float
    rtol: float
    save: Callable[[Network, Path, Facts], None]
    facts: Callable[[Path], Facts]
    load: Callable[[Path, Facts, Network | None], Run]

    def require(self) -> None:
        """Refuse a format whose packages are not installed.

        Raises:
            ConfigError: Names them.
        """
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"format {self.name}",
                why=f"{', '.join(missing)} not installed",
                do="pip install 'medrl[export]'",
            )


def format_of(path: Path) -> Format | None:
    """The format of an exported file or folder, told by its name; None if it is none."""
    if path.is_dir():
        return FORMATS["monai-bundle"] if bundle.is_bundle(path) else None
    return next((item for item in FORMATS.values() if item.suffix and path.suffix == item.suffix), None)


def format_named(name: str) -> Format:
    """The format of a name.

    Raises:
        ConfigError: There is none; near matches are named.
    """
    if name not in FORMATS:
        raise ConfigError(f"format '{name}'", why=did_you_mean(name, FORMATS))
    return FORMATS[name]


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters write about their own future."""
    import contextlib
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -- safetensors -------------------------------------------------------------------------------------


def _save_safetensors(network: Network, path: Path, facts: Facts) -> None:
    from safetensors.torch import save

    tensors = _weights(network.module if network.weights is None else network.weights)
    text = _text({**facts, "weights_sha256": weights_digest(tensors)})
    path.write_bytes(save(tensors, metadata={KEY: text}))


def _safetensors_facts(path: Path) -> Facts:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    return _facts(path, found)


def _load_safetensors(path: Path, facts: Facts, network: Network | None) -> Run:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    if weights_digest(tensors) != facts.get("weights_sha256"):
        raise CheckpointError(str(path), why="its weights are not those that were written", do="export again")
    if network is None:
        return lambda _inputs: {}
    module, inner = copy.deepcopy((network.module, network.weights))
    try:
        (module if inner is None else inner).load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            str(path), why=f"its weights do not fit the network: {_first(error)}"
        ) from error
    return _module_run(module, network.outputs)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone().contiguous() for name, value in module.state_dict().items()}


# -- TorchScript -------------------------------------------------------------------------------------


def traced(network: Network) -> Any:
    """The network as TorchScript.

    Raises:
        RuntimeFault: It cannot be traced.
    """
    try:
        with quiet(), torch.no_grad():
            trace: Any = torch.jit.trace
            return trace(network.module.eval(), network.phantoms(2), check_trace=False)
    except Exception as error:  # the tracer raises many kinds of errors
        raise RuntimeFault("torchscript", why=f"the network cannot be traced: {_first(error)}") from error


def _save_torchscript(network: Network, path: Path, facts: Facts) -> None:
    with quiet():
        torch.jit.save(traced(network), str(path), _extra_files={_EXTRA: _text(facts)})
    bundle.forget_sources(path)


def _torchscript_facts(path: Path) -> Facts:
    extra = {_EXTRA: ""}
    _load_jit(path, extra)
    return _facts(path, extra[_EXTRA])


def _load_torchscript(path: Path, facts: Facts, _network: Network | None) -> Run:
    return _module_run(_load_jit(path, {}), facts["outputs"])


def _load_jit(path: Path, extra: dict[str, str]) -> Any:
    try:
        load: Any = torch.jit.load
        with quiet():
            return load(str(path), map_location="cpu", _extra_files=extra)
    except (RuntimeError, ValueError, OSError) as error:
        raise _unreadable(path, error) from error


# -- ONNX --------------------------------------------------------------------------------------------


def _save_onnx(network: Network, path: Path, facts: Facts) -> None:
    import onnx

    buffer = io.BytesIO()
    try:
        with quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                network.module.eval(),
                network.phantoms(2),
                dynamo=True,
                verbose=False,
                input_names=list(network.inputs),
                output_names=list(network.outputs),
                dynamic_shapes=tuple({0: torch.export.Dim("N")} for _ in network.inputs),
            )
            program.save(buffer)
    except Exception as error:  # exporter and its libraries raise many kinds of errors
        raise RuntimeFault("onnx", why=f"the network cannot be exported: {_first(error)}") from error
    model = onnx.load_from_string(buffer.getvalue())
    _forget_sources(model.graph)
    for function in model.functions:
        _forget_sources(function)
    onnx.helper.set_model_props(model, {KEY: _text(facts)})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _forget_sources(graph: Any) -> None:
    """Leave out where in the source each node came from: paths of the machine that exported."""
    for item in (*graph.node, *getattr(graph, "value_info", ()), graph):
        if hasattr(item, "metadata_props"):
            del item.metadata_props[:]
        if hasattr(item, "doc_string"):
            item.doc_string = ""


def _onnx_facts(path: Path) -> Facts:
    return _facts(path, _session(path).get_modelmeta().custom_metadata_map.get(KEY))


def _load_onnx(path: Path, facts: Facts, _network: Network | None) -> Run:
    session = _session(path)

    def run(inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        given = {name: value.numpy() for name, value in zip(facts["inputs"], inputs, strict=True)}
        found = session.run(list(facts["outputs"]), given)
        return dict(zip(facts["outputs"], map(torch.from_numpy, found), strict=True))

    return run


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has error classes of its own for each cause
        raise _unreadable(path, error) from error


# -- MONAI bundle ------------------------------------------------------------------------------------


def _save_bundle(network: Network, path: Path, facts: Facts) -> None:
    bundle.write(network, traced(network), path, facts)


def _load_bundle(path: Path, facts: Facts, _network: Network | None) -> Run:
    with quiet():
        module = bundle.load(path)
    return _module_run(module, facts["outputs"])


# -- shared ------------------------------------------------------------------------------------------


def _module_run(module: Any, outputs: Sequence[str]) -> Run:
    def run(inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return named(module.eval()(*inputs), outputs)

    return run


def _facts(path: Path, text: Any) -> Facts:
    if isinstance(text, bytes):
        text = text.decode()
    try:
        found = json.loads(text) if text else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or "inputs" not in found:
        raise CheckpointError(
            str(path), why="medrl did not export it", do="medrl model export RUN --format FORMAT"
        )
    return found


def _text(facts: Facts) -> str:
    return json.dumps(facts, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    why = "it does not exist" if not path.exists() else f"it cannot be read: {_first(error)}"
    return CheckpointError(str(path), why=why, do="medrl model export RUN --format FORMAT")


FORMATS: dict[str, Format] = {
    item.name: item
    for item in (
        Format(
            "safetensors",
            ".safetensors",
            ("safetensors",),
            0.0,
            0.0,
            _save_safetensors,
            _safetensors_facts,
            _load_safetensors,
        ),
        Format(
            "torchscript", ".ts", (), 1e-5, 1e-5, _save_torchscript, _torchscript_facts, _load_torchscript
        ),
        Format(
            "onnx",
            ".onnx",
            ("onnx", "onnxscript", "onnxruntime"),
            1e-4,
            1e-4,
            _save_onnx,
            _onnx_facts,
            _load_onnx,
        ),
        Format("monai-bundle", "", ("monai",), 1e-5, 1e-5, _save_bundle, bundle.facts, _load_bundle),
    )
}
"""By name."""
