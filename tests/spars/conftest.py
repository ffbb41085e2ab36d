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

    kind = "compact"
    has_dense = False

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
