"""Small synthetic data and helpers for the tests of graft."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medrl.core.config import Layer, resolve_method
from medrl.core.jobs import TrainJob, build_train_job
from medrl.core.manager import PluginManager
from medrl.core.phantoms.prostate import write_prostate

SMALL = {
    "data": {"folds": 3},
    "model": {"name": "graft.tiny", "features": [4, 8]},
    "sample": {"size": [8, 32, 32]},
    "train": {"max_steps": 3, "batch_size": 1, "checkpoint_every": 3, "device": "cpu"},
    "validation": {"panels": 0},
}
"""A config whose training takes a fraction of a second."""


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay nested values over others."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


@pytest.fixture(scope="session")
def manager() -> PluginManager:
    return PluginManager.create(third_party=False)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and two test prostates of 32 × 32 × 8 voxels."""
    root = tmp_path_factory.mktemp("phantoms") / "prostate"
    return write_prostate(root, cases=6, test_cases=2, seed=3, shape=(32, 32, 8), spacing=(1.0, 1.0, 3.0))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep prepared cases of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def resolve(manager: PluginManager, phantoms: Path) -> Callable[..., Any]:
    """Resolve the small config of two-step teachers with further layers."""
    base = merged(SMALL, {"data": {"root": str(phantoms)}, "train": {"max_steps": 2}})
    return lambda layers: resolve_method(manager, "graft", layers=[Layer("test", base), *layers])


@pytest.fixture(scope="session")
def teacher_runs(
    tmp_path_factory: pytest.TempPathFactory, manager: PluginManager, resolve: Callable[..., Any]
) -> Path:
    """Two teachers of two steps."""
    from medrl.plugins.graft import teachers

    root = tmp_path_factory.mktemp("teachers")
    teachers.train_teachers(manager, resolve, root, count=2)
    return root


@pytest.fixture(scope="session")
def features(
    tmp_path_factory: pytest.TempPathFactory,
    manager: PluginManager,
    resolve: Callable[..., Any],
    teacher_runs: Path,
) -> Path:
    """What the two teachers say about the student's training fold."""
    from medrl.plugins.graft import teachers

    root = tmp_path_factory.mktemp("features")
    teachers.extract(
        manager, resolve([]).config, teachers.find_teachers(teacher_runs), root, taps=["neg1", "neg2"]
    )
    return root


@pytest.fixture
def make_job(manager: PluginManager, phantoms: Path) -> Callable[..., TrainJob]:
    """Make a small training job; keyword `values` are laid over the small config."""

    def make(run_dir: Path, values: dict[str, Any] | None = None, **kwargs: Any) -> TrainJob:
        base = merged(SMALL, {"data": {"root": str(phantoms)}})
        return build_train_job(manager, "graft", merged(base, values or {}), run_dir, **kwargs)

    return make
