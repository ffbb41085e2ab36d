"""Reading run folders for people: status, steps, best value, and which there are; nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medrl.cli.console import number
from medrl.cli.progress import duration
from medrl.core.errors import ConfigError, MedrlError, did_you_mean

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager


@dataclass(frozen=True)
class RunFacts:
    """What one run folder says about itself.

    Attributes:
        status: ``running``, ``finished``, ``interrupted``, ``failed``; ``stopped`` if a running one is dead.
        metrics: The last number of each name.
        best: ``(name, value, step)`` of the best validation, if one was recorded.
        seconds: From creation to the end, 0 if unknown.
    """

    dir: Path = Path()
    status: str = ""
    method: str = ""
    step: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    best: tuple[str, float, int] | None = None
    seconds: float = 0.0
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def best_text(self) -> str:
        """Return the best value with its name."""
        if self.best is None:
            return "–"
        name, value, _ = self.best
        return f"{name} {number(value)}"

    def sentence(self) -> str:
        """Return status, steps, time and best value in one line."""
        parts = [f"{self.status or 'no status'} after {self.step} steps"]
        if self.seconds:
            parts.append(duration(self.seconds))
        if self.best is not None:
            parts.append(f"best {self.best_text()} at step {self.best[2]}")
        return ", ".join(parts)


def read_run(path: Path) -> RunFacts:
    """Read a run folder.

    Raises:
        ConfigError: There is no run at the path; near matches are named.
        RuntimeFault: Its manifest is damaged.
    """
    from medrl.core.runlog import RunFolder

    if not (path / "manifest.json").is_file():
        near = did_you_mean(path.name, [run.name for run in run_folders(path.parent)])
        raise ConfigError(
            f"{path} is no run folder", why=f"it has no manifest.json; {near}", do="medrl runs list"
        )
    run = RunFolder.open(path, lock=False)
    step, metrics, best = 0, {}, None
    for record in run.records():
        at = record.get("step")
        step = max(step, at) if isinstance(at, int) else step
        if "event" in record:
            continue
        metrics.update({key: value for key, value in record.items() if key != "step"})
        best = _better(best, record)
    manifest = run.manifest
    recorded = _recorded(manifest.get("best"), run.records())
    status = run.status
    if status == "running" and not run.owner:
        status = "stopped"
    return RunFacts(
        dir=path,
        status=status,
        method=str(manifest.get("method", "")),
        step=max(step, _whole(manifest.get("step"))),
        metrics=metrics,
        best=recorded or best,
        seconds=_seconds(manifest.get("created"), manifest.get("ended")),
        manifest=manifest,
    )


def run_folders(root: Path) -> list[Path]:
    """Return the run folders in a folder and one level below, sorted by name."""
    if not root.is_dir():
        return []
    found = {
        path.parent for pattern in ("*/manifest.json", "*/*/manifest.json") for path in root.glob(pattern)
    }
    return sorted(path for path in found if (path / "config.yaml").is_file())


def run_config(path: Path) -> dict[str, Any]:
    """Return the config that a run was started with, as nested values.

    Raises:
        ConfigError: The folder has no readable config.
    """
    from medrl.core.config import load_yaml

    return load_yaml(path / "config.yaml")


def read_runs(paths: Iterable[Path]) -> list[RunFacts]:
    """Read many runs; one that is damaged is listed with that as its status."""
    found = []
    for path in paths:
        try:
            found.append(read_run(path))
        except MedrlError as error:
            found.append(RunFacts(dir=path, status=f"damaged: {error.why or error.what}"))
    return found


def method_of_model(path: Path) -> str:
    """Return the method of a run folder or checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, or it does not tell.
        ConfigError: The path does not exist.
    """
    if not path.exists():
        raise ConfigError(f"--model {path}", why="no such file or folder", do="medrl runs list")
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.yaml").is_file():
            method = run_config(folder).get("method")
            if isinstance(method, str):
                return method
    from medrl.cli.console import console

    console().loading()
    from medrl.core.checkpoint import find_checkpoint, read_meta
    from medrl.core.errors import CheckpointError

    file = find_checkpoint(path)
    method = read_meta(file).get("method")
    if not isinstance(method, str):
        raise CheckpointError(f"checkpoint {file}", why="it does not say which method wrote it")
    return method


def require_plugin(manager: PluginManager, method: str, path: Path) -> None:
    """Refuse a run or checkpoint of a plugin that is not installed, with the installation that is missing.

    Args:
        manager: The plugins that are there.
        method: The method of the run.
        path: Run folder or checkpoint.

    Raises:
        CheckpointError: There is no plugin of this name.
    """
    from medrl.core.errors import CheckpointError

    if manager.knows(method):
        return
    facts = _origin(path)
    distribution = str(facts.get("distribution") or "")
    version = str(facts.get("plugin_version") or "")
    release = f"{distribution}=={version}" if version else distribution
    raise CheckpointError(
        f"{path} needs the plugin '{method}'",
        why=f"its package {distribution} is not installed" if distribution else "it is not installed",
        do=f"pip install '{release}'" if release else "install the package that brings it",
    )


def _origin(path: Path) -> dict[str, Any]:
    """Return what a run folder or checkpoint says about the plugin that wrote it."""
    import json

    for folder in (path, path.parent, path.parent.parent):
        if (folder / "manifest.json").is_file():
            try:
                found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                break
            return found if isinstance(found, dict) else {}
    from medrl.core.checkpoint import find_checkpoint, read_meta

    return read_meta(find_checkpoint(path))


def _better(best: tuple[str, float, int] | None, record: Mapping[str, Any]) -> tuple[str, float, int] | None:
    """Keep the highest validation Dice of the records."""
    for key, value in record.items():
        step = record.get("step")
        if not (key.startswith("val") and "dice" in key):
            continue
        if isinstance(value, (int, float)) and isinstance(step, int) and (best is None or value > best[1]):
            best = (key, float(value), step)
    return best


def _recorded(value: object, records: Iterable[Mapping[str, Any]]) -> tuple[str, float, int] | None:
    """Read the best value that a manifest records, under the name that it has among the metrics."""
    if not isinstance(value, Mapping):
        return None
    metric, step, own = value.get("metric"), value.get("step"), str(value.get("name", "metric"))
    if not isinstance(metric, (int, float)) or not isinstance(step, int):
        return None
    for record in records:
        if record.get("step") == step:
            names = [name for name, there in record.items() if name != "step" and there == metric]
            if names:
                return (own if own in names else names[0]), float(metric), step
    return own, float(metric), step


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _seconds(start: object, end: object) -> float:
    try:
        return (datetime.fromisoformat(str(end)) - datetime.fromisoformat(str(start))).total_seconds()
    except (ValueError, TypeError):
        return 0.0
