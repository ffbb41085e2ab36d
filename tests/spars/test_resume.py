"""A run that was killed and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.core.runtime import Runtime
from medrl.plugins.spars import running

config, manager = json.loads(Path(sys.argv[1]).read_text()), PluginManager.create(third_party=False)
run, die_at, stage = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
original = Runtime.log

def log(self, step, **values):
    original(self, step, **values)
    here = self.run.dir.name == stage if stage != "-" else self.run.dir == run
    if here and step == die_at:
        os.kill(os.getpid(), signal.SIGKILL)

Runtime.log = log
running.run(build_train_job(manager, "spars", config, run))
"""


@pytest.fixture
def launch(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(values, run, die_at=0, stage="-"):
        config = tmp_path / "config.json"
        config.write_text(json.dumps(values))
        command = [sys.executable, str(tmp_path / "script.py"), str(config), str(run), str(die_at), stage]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)

    return start


def states(run):
    from medrl.core.checkpoint import find_checkpoint, load_checkpoint

    return load_checkpoint(find_checkpoint(run, "last")).states


def differences(a, b, where=""):
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and a.contiguous().view(-1).view(torch.uint8).equal(
            b.contiguous().view(-1).view(torch.uint8)
        )
        return [] if same else [where]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{where}: keys"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: length"]
        return [
            found
            for k, (x, y) in enumerate(zip(a, b, strict=True))
            for found in differences(x, y, f"{where}[{k}]")
        ]
    return [] if a == b else [f"{where}: {a} {b}"]


def records(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    skipped = ("seconds", "time", "steps_per_second")
    return [{key: value for key, value in row.items() if key not in skipped} for row in rows]


def test_a_run_killed_in_each_stage_goes_on_bit_for_bit(launch, tiny, tmp_path):
    values = tiny({"train": {"checkpoint_every": 1}})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = launch(values, whole)
    assert done.returncode == 0, done.stderr
    for die_at, stage in ((1, "classifier"), (2, "-"), (4, "-")):
        done = launch(values, broken, die_at, stage)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = launch(values, broken)
    assert done.returncode == 0, done.stderr
    for part in ("", "stages/classifier"):
        assert differences(states(whole / part), states(broken / part)) == []
        assert records(whole / part) == records(broken / part)
