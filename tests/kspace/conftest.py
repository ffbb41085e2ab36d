from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from medrl.plugins.kspace.cases import Cases, initial_lines, possible_lines
from medrl.plugins.kspace.features import GROUPS, ColumnFeatures
from medrl.plugins.kspace.fourier import fft2c, fftc
from medrl.plugins.kspace.imaging import Imaging
from medrl.plugins.kspace.models import CompactNet
from medrl.plugins.kspace.observer import CaseObserver


def hearts(count, size, generator):
    """Discs within rings within ellipses: images ``(count, size, size)`` and labels 0 to 3."""
    line = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    images, labels = [], []
    for _ in range(count):
        cx, cy, scale = (torch.rand(3, generator=generator) - 0.5).mul(0.3).tolist()
        radius = ((x - cx) ** 2 + (y - cy) ** 2).sqrt() / (1 + scale)
        label = torch.zeros(size, size, dtype=torch.uint8)
        label[(radius > 0.45) & (radius < 0.7) & (x < cx)] = 1
        label[radius < 0.45] = 2
        label[radius < 0.25] = 3
        image = (
            0.3 * ((x / 0.9) ** 2 + (y / 0.8) ** 2 < 1) + torch.tensor([0.0, 0.6, -0.1, 0.7])[label.long()]
        )
        images.append(image.clamp(0, 1))
        labels.append(label)
    return torch.stack(images), torch.stack(labels)


@pytest.fixture
def make_cases():
    """Cases of hearts with a smooth phase."""

    def make(count=4, size=16, *, initial=2, seed=0, phase=1.0, padding=None, indices=None):
        generator = torch.Generator().manual_seed(seed)
        images, labels = hearts(count, size, generator)
        line = torch.linspace(-1, 1, size)
        turns = (torch.rand(count, 2, 1, 1, generator=generator) - 0.5) * 2 * phase
        smooth = turns[:, 0] * line[None, None, :] ** 2 + turns[:, 1] * line[None, :, None]
        return Cases(
            ids=tuple(f"case{number}" for number in range(count)),
            kspace=fft2c(torch.polar(images, smooth.expand(images.shape).contiguous())),
            target=images,
            labels=labels,
            possible=possible_lines(count, size, indices=indices, padding=padding),
            initial=initial_lines(count, size, initial, padding=padding),
        )

    return make


@pytest.fixture
def volumes():
    """Slices as stacks, or as volumes with a transform along depth; short ones end with empty slices."""

    def make(cases, groups, *, geometry="stack", points=False):
        rows = list(groups.values())
        depth = max(len(row) for row in rows)

        def put(values):
            found = torch.zeros(len(rows), depth, *values.shape[1:], dtype=values.dtype)
            for number, row in enumerate(rows):
                found[number, : len(row)] = values[row]
            return found

        there = put(torch.ones(len(cases), dtype=torch.bool))
        kspace, wide = put(cases.kspace), depth if points else 1
        return Cases(
            ids=tuple(groups),
            kspace=fftc(kspace, (1,)) if geometry == "volume3d" else kspace,
            target=put(cases.target),
            labels=put(cases.labels),
            possible=torch.stack([cases.possible[row].all(dim=0).repeat(wide) for row in rows]),
            initial=torch.stack([cases.initial[row].all(dim=0).repeat(wide) for row in rows]),
            geometry=geometry,
            points=points,
            slices=None if bool(there.all()) else there,
        )

    return make


@pytest.fixture
def make_observer():
    """An observer with an untrained compact network, or with none."""

    def make(cases, *, segmenter="compact", groups=GROUPS, seed=0):
        network = None
        if segmenter == "compact":
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network = CompactNet(widths=(4, 6))
        elif segmenter is not None:
            network = segmenter
        imaging = Imaging(network)
        features = None
        if groups is not None and not cases.points:
            features = ColumnFeatures(
                cases, groups=groups, classes=imaging.classes, predicts=imaging.predicts, deep=imaging.deep
            )
        return CaseObserver(cases, imaging, features)

    return make


# -- runs ----------------------------------------------------------------------------------------------

TINY = {
    "sample": {"shape": [16, 16]},
    "acquisition": {"init_center": 2},
    "budget": {"train": [2, 3], "eval": [2, 3]},
    "model": {"name": "kspace.compact", "widths": [4, 6]},
    "agent": {"name": "kspace.columns", "width": 8, "embedding": 2},
    "seg": {"steps": 4, "ema": 0.9, "accelerations": [1.0, 4.0]},
    "recon_model": {"name": "kspace.recon_unet", "base": 4, "levels": 2},
    "recon": {"steps": 2},
    "warm": {"states": 16, "chunk": 4, "epochs": 2, "batch": 8},
    "ppo": {"updates": 3, "envs": 4, "group": 2, "minibatch": 6, "epochs": 2, "steps": 4},
    "validation": {"cases": 4},
    "train": {"batch_size": 4, "checkpoint_every": 2, "validate_every": 4, "device": "cpu", "timeout_s": 120},
}
"""A run whose stages take a fraction of a second each: 4 + 8 (warm start) + 3 (PPO) steps."""


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
    """Keep prepared scans of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """5 synthetic patients with 2 frames of 2 slices, 16² pixels, and 2 test patients."""
    from medrl.core.phantoms.cardiac import write_cardiac

    root = tmp_path_factory.mktemp("hearts") / "data"
    return write_cardiac(root, cases=5, test_cases=2, seed=1, shape=(16, 16), slices=2)


@pytest.fixture(scope="session")
def tiny(phantoms):
    """The tiny config as nested values, with others laid over it."""
    base = merged(TINY, {"data": {"root": str(phantoms)}})

    def values(over=None, without=()):
        return merged({key: value for key, value in base.items() if key not in without}, over or {})

    return values


@pytest.fixture(scope="session")
def make_job(manager, tiny):
    """Make a tiny training job: `values` over the tiny config, of which blocks `without` are left out."""
    from medrl.core.jobs import build_train_job

    def make(run_dir, values=None, *, without=(), **kwargs):
        return build_train_job(manager, "kspace", tiny(values, without), run_dir, **kwargs)

    return make


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory, make_job):
    """A finished run of a reward model; tests only read it."""
    from medrl.plugins.kspace import running

    run = tmp_path_factory.mktemp("reward") / "run"
    running.run(make_job(run, {"stage": "reward"}))
    return run


@pytest.fixture(scope="session")
def policy_run(tmp_path_factory, make_job, reward_run):
    """A finished run of a policy; tests only read it."""
    from medrl.plugins.kspace import running

    run = tmp_path_factory.mktemp("policy") / "run"
    running.run(make_job(run, {"inputs": {"reward": str(reward_run)}}))
    return run


def records(run):
    """The records of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def states(run, which="last"):
    """The states in a checkpoint of a run."""
    from medrl.core.checkpoint import find_checkpoint, load_checkpoint

    return load_checkpoint(find_checkpoint(run, which)).states


def differences(a, b, where=""):
    """Where two nested states differ, tensors compared by their bytes."""
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


def launch(folder, script, *arguments, ranks=1):
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
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=env, **pipes))
    said = "\n".join(process.communicate(timeout=300)[0] for process in started)
    return [process.returncode for process in started], said


@pytest.fixture(scope="session")
def tools():
    """The helpers above."""
    return SimpleNamespace(
        merged=merged, records=records, states=states, differences=differences, launch=launch
    )
