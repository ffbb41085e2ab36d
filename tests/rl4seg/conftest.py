"""Small synthetic echo data and helpers for the tests of rl4seg."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.jobs import TrainJob, build_train_job
from medrl.core.manager import PluginManager
from medrl.core.phantoms.echo import write_echo

NETWORK = {"name": "rl4seg.unet_small", "channels": [4, 8]}

SMALL: dict[str, Any] = {
    "model": NETWORK,
    "critic": NETWORK,
    "reward_model": NETWORK,
    "data": {"folds": 3},
    "sample": {"clahe": False},
    "train": {"batch_size": 4, "checkpoint_every": 2, "validate_every": 2, "device": "cpu", "timeout_s": 120},
    "source": {"steps": 4, "lr": 0.01},
    "style": {"steps": 3},
    "corrector": {"steps": 3},
    "pairs": {"count": 24},
    "reward": {"steps": 4},
    "ppo": {"steps": 4, "inner_steps": 2, "warmup": 1, "sigma_px": 1.0, "validation_images": 4},
}
"""A loop whose stages take a fraction of a second each."""


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested values over others."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


@pytest.fixture(scope="session")
def manager() -> PluginManager:
    return PluginManager.create(third_party=False)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep prepared images of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def echoes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Source of 12 and target of 12 images of 32² pixels, with 4 labelled test images."""
    root = tmp_path_factory.mktemp("echoes")
    source = write_echo(root / "source", cases=12, test_cases=0, seed=1, shape=(32, 32))
    target = write_echo(root / "target", cases=12, test_cases=4, seed=2, shape=(32, 32), shift=0.5)
    return {"source": source, "target": target}


@pytest.fixture(scope="session")
def small(echoes: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """Return the small config as nested values, with others laid over it."""
    base = merged(SMALL, {"data": {"root": str(echoes["source"])}, "target": {"root": str(echoes["target"])}})
    return lambda over=None: merged(base, over or {})


@pytest.fixture(scope="session")
def make_job(manager: PluginManager, small: Callable[..., dict[str, Any]]) -> Callable[..., TrainJob]:
    """Make a small training job; `values` are laid over the small config."""

    def make(run_dir: Path, values: Mapping[str, Any] | None = None, **kwargs: Any) -> TrainJob:
        return build_train_job(manager, "rl4seg", small(values), run_dir, **kwargs)

    return make


@pytest.fixture(scope="session")
def loop_run(tmp_path_factory: pytest.TempPathFactory, make_job: Callable[..., TrainJob]) -> Path:
    """A finished loop of the small config; tests only read it."""
    from medrl.plugins.rl4seg import loop

    run = tmp_path_factory.mktemp("loop") / "run"
    loop.run(make_job(run))
    return run


def stage_of(run: Path, kind: str) -> Path:
    """The folder of a stage of a loop, such as ``ppo_1``."""
    (found,) = run.glob(f"stages/*_{kind}")
    return found


def records(run: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def states(run: Path, which: str = "last") -> dict[str, Any]:
    """The states in a checkpoint of a run."""
    return load_checkpoint(find_checkpoint(run, which)).states


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return where two nested states differ, tensors compared by their bytes."""
    if isinstance(a, torch.Tensor):
        equal = a.dtype == b.dtype and a.shape == b.shape
        equal = equal and a.contiguous().view(-1).view(torch.uint8).equal(
            b.contiguous().view(-1).view(torch.uint8)
        )
        return [] if equal else [where]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{where}: keys"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: length"]
        pairs = enumerate(zip(a, b, strict=True))
        return [found for k, (x, y) in pairs for found in differences(x, y, f"{where}[{k}]")]
    return [] if a == b else [f"{where}: {a} {b}"]


def launch(folder: Path, script: str, *arguments: object, ranks: int = 1) -> tuple[list[int], str]:
    """Run a script in `ranks` processes; return exit codes and what they said."""
    (folder / "script.py").write_text(script)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(folder / "script.py"), *map(str, arguments)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=env, **pipes))
    said = "\n".join(process.communicate(timeout=300)[0] for process in started)
    return [process.returncode for process in started], said


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        merged=merged,
        stage_of=stage_of,
        records=records,
        states=states,
        differences=differences,
        launch=launch,
    )
