"""From a checkpoint to a file that is known to say the same."""

from __future__ import annotations

import importlib.metadata
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medrl.core.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from medrl.core.errors import ConfigError, PluginError, RuntimeFault, did_you_mean
from medrl.core.export.formats import Format, format_named
from medrl.core.export.network import Network
from medrl.core.export.verifying import Verdict, record, verify
from medrl.core.registry import import_target

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

SCHEMA = 1
"""Version of the facts in an exported file."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported network.

    Attributes:
        path: File, or folder of a bundle.
        name: Of the network.
        verdict: The comparison with the checkpoint.
        others: Further networks of the checkpoint.
    """

    path: Path
    name: str
    verdict: Verdict
    others: tuple[str, ...] = ()


def checkpoint_of(model: Path) -> Checkpoint:
    """The best checkpoint of a run, or the one that is named; see `find_checkpoint`."""
    return load_checkpoint(find_checkpoint(model))


def networks_of(checkpoint: Checkpoint, manager: PluginManager) -> dict[str, Network]:
    """Rebuild the networks of a checkpoint by the plugin that wrote it; the first matters most.

    Raises:
        PluginError: The plugin names no such function, or it gives something else.
        CheckpointError: The checkpoint lacks what is needed.
    """
    method = str(checkpoint.meta.get("method"))
    info = manager.info(method)
    what = f"networks of plugin '{method}'"
    if not info.networks:
        raise PluginError(
            what,
            why="the plugin does not say how to rebuild them",
            do="its author names a function in PluginInfo(networks='module:function')",
        )
    rebuild = import_target(info.networks, what=what, do=f"repair or update the plugin '{method}'")
    found = rebuild(checkpoint, manager)
    if not isinstance(found, Mapping) or not all(isinstance(item, Network) for item in found.values()):
        raise PluginError(what, why=f"{info.networks} gave no Network by name")
    if not found:
        raise PluginError(what, why=f"there is none in {checkpoint.path}")
    for network in found.values():
        network.module.cpu().eval().requires_grad_(requires_grad=False)
    return dict(found)


def choose(found: Mapping[str, Network], name: str | None) -> str:
    """The name of the network that is meant.

    Raises:
        ConfigError: There is no such network.
    """
    if name is None:
        return next(iter(found))
    if name not in found:
        raise ConfigError(f"network '{name}'", why=f"not in this checkpoint, {did_you_mean(name, found)}")
    return name


def export(
    model: Path,
    manager: PluginManager,
    *,
    format: str,
    output: Path | None = None,
    network: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a network of a checkpoint in a format, and compare what it says with the checkpoint.

    The file appears under its name only if it agrees.

    Args:
        model: Run folder or checkpoint.
        manager: The plugins.
        format: A name of `FORMATS`.
        output: File or, for a bundle, folder; None is ``export/<network>`` in the run folder, or beside the
            checkpoint.
        network: Which one; None is the first that the plugin names.
        overwrite: Replace what is there.

    Raises:
        ConfigError: No such format or network, packages are missing, or the output exists.
        CheckpointError: The checkpoint is damaged or lacks networks.
        PluginError: Its plugin cannot rebuild them.
        RuntimeFault: The network cannot be exported in this format, or says something else then.
    """
    kind = format_named(format)
    kind.require()
    checkpoint = checkpoint_of(model)
    found = networks_of(checkpoint, manager)
    name = choose(found, network)
    target = _target(model, kind, name, output)
    if target.exists() and not overwrite:
        raise ConfigError(str(target), why="it exists", do="--overwrite, or another -o")
    chosen = found[name]
    try:
        facts = _facts(checkpoint, name, chosen, kind)
    except (RuntimeError, TypeError, ValueError) as error:
        raise PluginError(
            f"network '{name}'", why=f"it does not take the inputs that its plugin says: {error}"
        ) from error
    verdict = _write(kind, chosen, target, facts)
    return Exported(
        path=target, name=name, verdict=verdict, others=tuple(key for key in found if key != name)
    )


def _facts(checkpoint: Checkpoint, name: str, network: Network, kind: Format) -> dict[str, Any]:
    meta = checkpoint.meta
    return {
        "schema": SCHEMA,
        "format": kind.name,
        "method": str(meta.get("method")),
        "network": name,
        "step": meta.get("step"),
        "medrl": importlib.metadata.version("medrl"),
        "torch": importlib.metadata.version("torch"),
        "checkpoint_sha256": checkpoint.digest,
        "tolerance": {"absolute": kind.atol, "relative": kind.rtol},
        **network.facts(),
        "check": record(network),
    }


def _write(kind: Format, network: Network, target: Path, facts: dict[str, Any]) -> Verdict:
    """Write beside the place, verify, rename."""
    suffix = target.suffix if kind.suffix else ""
    temporary = target.parent / f".{target.stem}.{secrets.token_hex(4)}.tmp{suffix}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        kind.save(network, temporary, facts)
        verdict = verify(temporary, network)
        if not verdict.ok:
            raise RuntimeFault(
                f"export as {kind.name}",
                why="; ".join(verdict.problems),
                do="another format; nothing was written",
            )
        if target.is_dir():
            shutil.rmtree(target)
        temporary.replace(target)
    except OSError as error:
        raise RuntimeFault(
            f"cannot write {target}", why=error.strerror or str(error), do="choose another place: -o PATH"
        ) from error
    finally:
        _remove(temporary)
    return Verdict(**{**vars(verdict), "path": target})


def _target(model: Path, kind: Format, name: str, output: Path | None) -> Path:
    if output is None:
        place = model / "export" if model.is_dir() else model.parent
        return place / (f"{name}{kind.suffix}" if kind.suffix else f"{name}_bundle")
    if kind.suffix and output.suffix != kind.suffix:
        if output.is_dir() or not output.suffix:
            return output / f"{name}{kind.suffix}"
        raise ConfigError(f"-o {output}", why=f"a {kind.name} file ends with {kind.suffix}")
    if not kind.suffix and output.is_file():
        raise ConfigError(f"-o {output}", why="this is a file; a bundle is a folder")
    return output


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
