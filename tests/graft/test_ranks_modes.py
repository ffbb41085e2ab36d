"""Every weighting in two ranks: they stay equal, and a NaN on one of them hangs none."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint

pytestmark = pytest.mark.ddp

SCRIPT = """
import json, os, sys
from pathlib import Path
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.plugins.graft import data, train

rank, manager = int(os.environ["RANK"]), PluginManager.create(third_party=False)
original = train.Objective.__call__
for name, config in json.loads(Path(sys.argv[1]).read_text()).items():
    calls = []

    def broken(self, *given):
        calls.append(1)
        loss, facts = original(self, *given)
        return loss * (float("nan") if (rank, len(calls)) == (1, 2) else 1.0), facts

    train.Objective.__call__ = broken
    job = build_train_job(manager, "graft", config, Path(sys.argv[2]) / name)
    with job.runtime() as rt:
        train.fit(rt, job.config, data.load(rt, job.config))
"""

AGENT = {"interval": 2, "gamma": 0.9, "lr": 0.05}
MODES = {
    "align": {
        "weighting": {"mode": "align", "prior": "uniform", "align_every": 2},
        "split": {"reward_mode": "crossfit", "reward_folds": 2},
    },
    "meta": {"weighting": {"mode": "meta"}},
    "legacy": {"weighting": {"mode": "legacy"}, "agent": AGENT, "split": {"reward_mode": "batch"}},
    "legacy_step": {
        "weighting": {"mode": "legacy"},
        "agent": {**AGENT, "update": "step", "step_every": 2},
        "split": {"reward_mode": "batch"},
    },
    "reinforce": {
        "weighting": {"mode": "reinforce", "prior": "uniform"},
        "agent": {**AGENT, "policy": "state", "horizon": 2, "interval": 1, "terminal": True},
        "split": {"reward": 0.4},
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, phantoms, features):
    """All weightings one after the other in two processes; rank 1 meets a NaN in the second step."""
    folder = tmp_path_factory.mktemp("ranks")
    base = {
        "data": {"root": str(phantoms), "folds": 3},
        "model": {"name": "graft.tiny", "features": [4, 8]},
        "sample": {"size": [8, 32, 32]},
        "teachers": {"features": [str(features)]},
        "distill": {"logit_weight": 1.0},
        "train": {
            "max_steps": 5,
            "batch_size": 1,
            "checkpoint_every": 5,
            "validate_every": 4,
            "device": "cpu",
            "timeout_s": 60,
        },
    }
    (folder / "fit.py").write_text(SCRIPT)
    (folder / "config.json").write_text(json.dumps({name: {**base, **over} for name, over in MODES.items()}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(folder / "fit.py"), str(folder / "config.json"), str(folder)]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = "\n".join(process.communicate(timeout=300)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0], said
    return folder


@pytest.mark.parametrize("name", MODES)
def test_two_ranks_skip_the_broken_step_together_and_stay_equal(runs, name):
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    skipped = [row for row in rows if row.get("event") == "skipped_step"]
    assert [(row["step"], row["ranks"]) for row in skipped] == [(2, [1])]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]
    found = load_checkpoint(find_checkpoint(runs / name, "last"))
    assert all(bool(torch.isfinite(value).all()) for value in found.states["student"].values())
    if name == "align":
        one, two = (rank["objects"]["alignment_neg1"] for rank in found.ranks)
        assert torch.equal(one["mean"], two["mean"])
        assert float(one["square"].sum()) > 0
    if name == "reinforce":
        one, two = (rank["objects"]["agent"]["baseline"] for rank in found.ranks)
        assert one == two
        assert sum("reward" in row for row in rows) == 2
    if name == "legacy":
        assert sum("terminal_reward" in row for row in rows) >= 2
        assert all(math.isfinite(row["reward"]) for row in rows if "reward" in row)
