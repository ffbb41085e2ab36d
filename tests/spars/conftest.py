from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medrl.plugins.spars.boxsum import integral, window_means
from medrl.plugins.spars.lattice import Lattice
from medrl.plugins.spars.table import ScoreTable


class DenseScorer(nn.Module):
    """The score of a voxel is its value; that of a window the mean."""

    kind = "fraction"
    has_dense = True

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(weight)))
        self.calls = 0

    @property
    def digest(self):
        return hashlib.sha256(self.weight.detach().numpy().tobytes()).hexdigest()

    def dense(self, volume):
        return (volume * self.weight.detach()).clamp(0, 1)

    def windows(self, volume, corners, window):
        self.calls += 1
        return window_means(integral(self.dense(volume)), corners, window)


class LazyScorer(DenseScorer):
    """A network that sees the content of windows alone, without a dense form."""

    kind = "faithful"
    has_dense = False
    local = True

    def __init__(self, weight=1.0):
        super().__init__(weight)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1))
        self.sizes = []

    def dense(self, volume):
        raise AssertionError("there is no dense form")

    @torch.no_grad()
    def windows(self, volume, corners, window):
        self.calls += 1
        self.sizes.append(len(corners))
        wx, wy, wz = window
        crops = [volume[x : x + wx, y : y + wy, z : z + wz] for x, y, z in corners.tolist()]
        found = self.net(torch.stack(crops).unsqueeze(1)).flatten(1).sum(dim=1)
        return torch.sigmoid(found * self.weight)


def blobs(count=3, shape=(24, 24, 16), seed=0, sizes=None):
    """Volumes with a bright ball each, and noise."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        size = (sizes or [shape] * count)[number]
        axes = torch.meshgrid(*(torch.arange(length) for length in size), indexing="ij")
        centre = [float(torch.rand((), generator=generator)) * (length - 10) + 5 for length in size]
        far = sum((axis - place) ** 2 for axis, place in zip(axes, centre, strict=True))
        noise = 0.05 * torch.rand(size, generator=generator)
        found.append(torch.where(far < 16, 0.9, 0.0) + noise)
    return found


@pytest.fixture
def make_table():
    """A table of volumes with blobs."""

    def make(count=3, *, scorer=None, window=(8, 8, 8), stride=4, volumes=None, **settings):
        volumes = blobs(count) if volumes is None else volumes
        scorer = DenseScorer() if scorer is None else scorer
        return ScoreTable(volumes, scorer, window=window, stride=stride, **settings)

    return make


@pytest.fixture
def fakes():
    """Scorers and volumes for tests of the game."""
    return SimpleNamespace(DenseScorer=DenseScorer, LazyScorer=LazyScorer, blobs=blobs, Lattice=Lattice)


# -- runs ----------------------------------------------------------------------------------------------

TINY = {
    "classifier": {
        "least_auc": 0.0,
        "cluster": {"cells": 60, "clusters": 12, "runs": 1, "iterations": 2},
        "head": {"steps": 12, "widths": [8], "batch": 256},
        "pseudo": {"rounds": 1, "smallest": 4},
    },
    "score": {"window": [8, 8, 4], "stride": [4, 4, 4]},
    "warm": {"steps": 2, "batch": 16},
    "ppo": {"updates": 3, "envs": 4, "steps": 6, "minibatch": 12},
    "env": {"horizon": 6},
    "map": {"episodes": 2, "horizon": 6, "smallest": 4},
    "validation": {"volumes": 2, "episodes": 1},
    "train": {"checkpoint_every": 2, "device": "cpu", "timeout_s": 120},
}
"""A run whose stages take about a second each."""


def merged(base, over):
    """Lay nested values over others."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


@pytest.fixture(scope="session")
def manager():
    from medrl.core.manager import PluginManager

    return PluginManager.create(third_party=False)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep prepared volumes and scores of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """12 volumes with presence labels and 3 test volumes, 24 × 24 × 16 voxels."""
    from medrl.core.phantoms.abdomen import write_abdomen

    root = tmp_path_factory.mktemp("abdomen") / "data"
    return write_abdomen(
        root, cases=12, test_cases=3, seed=1, shape=(24, 24, 16), radius=(3.0, 4.5), distractors=(1, 1)
    )


@pytest.fixture(scope="session")
def tiny(phantoms):
    """The tiny config as nested values, with others laid over it."""
    base = merged(TINY, {"data": {"root": str(phantoms), "folds": 3}})

    def values(over=None, without=()):
        return merged({key: value for key, value in base.items() if key not in without}, over or {})

    return values


@pytest.fixture(scope="session")
def make_job(manager, tiny):
    """Make a tiny training job: `values` over the tiny config, of which blocks `without` are left out."""
    from medrl.core.jobs import build_train_job

    def make(run_dir, values=None, *, without=(), **kwargs):
        return build_train_job(manager, "spars", tiny(values, without), run_dir, **kwargs)

    return make


@pytest.fixture(scope="session")
def play_run(tmp_path_factory, make_job):
    """A finished run of classifier and policy; tests only read it."""
    from medrl.plugins.spars import running

    run = tmp_path_factory.mktemp("play") / "run"
    running.run(make_job(run))
    return run
