"""Tiny beating hearts and a loop whose stages take a second each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.jobs import TrainJob, build_train_job
from medrl.core.manager import PluginManager
from medrl.core.phantoms.echo import write_echo_sequences

NETWORK = {"name": "rl4seg3d.unet3d_small", "channels": [4, 8]}

SMALL: dict[str, Any] = {
    "model": NETWORK,
    "critic": NETWORK,
    "reward_model": NETWORK,
    "data": {"folds": 3},
    "sample": {"spacing_mm": [0, 0], "equalise": "off"},
    "train": {"batch_size": 2, "checkpoint_every": 2, "validate_every": 2, "device": "cpu", "timeout_s": 120},
    "source": {"steps": 4, "lr": 0.01},
    "style": {"steps": 3},
    "corrector": {"steps": 3},
    "pairs": {"count": 16},
    "reward": {"steps": 3},
    "test": {"worst_frame_thresholds": [0.0, 2.0]},
    "ppo": {"steps": 3, "inner_steps": 2, "warmup": 1, "sigma_px": 1.0, "validation_images": 2},
}


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
    """Keep prepared sequences of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def hearts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Source of 6 and target of 6 sequences of 32² pixels and 8 frames, with 2 labelled test sequences."""
    root = tmp_path_factory.mktemp("hearts")
    settings: dict[str, Any] = {"size": (32, 32), "frames": 8}
    source = write_echo_sequences(root / "source", cases=6, test_cases=0, seed=1, **settings)
    target = write_echo_sequences(root / "target", cases=6, test_cases=2, seed=2, shift=0.5, **settings)
    return {"source": source, "target": target}


@pytest.fixture(scope="session")
def small(hearts: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """Return the small config as nested values, with others laid over it."""
    base = merged(SMALL, {"data": {"root": str(hearts["source"])}, "target": {"root": str(hearts["target"])}})
    return lambda over=None: merged(base, over or {})


@pytest.fixture(scope="session")
def make_job(manager: PluginManager, small: Callable[..., dict[str, Any]]) -> Callable[..., TrainJob]:
    """Make a small training job; `values` are laid over the small config."""

    def make(run_dir: Path, values: Mapping[str, Any] | None = None, **kwargs: Any) -> TrainJob:
        return build_train_job(manager, "rl4seg3d", small(values), run_dir, **kwargs)

    return make


@pytest.fixture(scope="session")
def loop_run(tmp_path_factory: pytest.TempPathFactory, make_job: Callable[..., TrainJob]) -> Path:
    """A finished loop of the small config; tests only read it."""
    from medrl.plugins.rl4seg3d import loop

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


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(merged=merged, stage_of=stage_of, records=records, states=states, same=same)
