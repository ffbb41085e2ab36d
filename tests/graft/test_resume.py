"""A run that was killed and resumed equals one that was not, bit for bit; two ranks agree with one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.plugins.graft import data, train

task = json.loads(Path(sys.argv[1]).read_text())
die_at = int(sys.argv[2])
poison_at = int(sys.argv[3])
rank = int(os.environ.get("RANK", "0"))

original = train.set_rate
def set_rate(optimizer, cfg, step):
    if step == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(optimizer, cfg, step)
train.set_rate = set_rate

supervised = train.Objective.supervised
count = [0]
def broken(self, output, batch):
    count[0] += 1
    factor = float("nan") if rank == 1 and count[0] == poison_at else 1.0
    return supervised(self, output, batch) * factor
train.Objective.supervised = broken

manager = PluginManager.create(third_party=False)
job = build_train_job(manager, "graft", task["values"], Path(task["run"]))
with job.runtime() as rt:
    train.fit(rt, job.config, data.load(rt, job.config))
"""


def values(phantoms, features, **over):
    """Everything that has a state: agent with a state, terminal reward, orthogonal maps, unlabelled cases."""
    base = {
        "data": {"root": str(phantoms), "folds": 3},
        "model": {"name": "graft.tiny", "features": [4, 8]},
        "sample": {"size": [8, 32, 32]},
        "teachers": {"features": [str(features)]},
        "split": {"labelled": 3, "reward": 0.34},
        "distill": {"projection": "orthogonal", "logit_weight": 1.0},
        "weighting": {"mode": "reinforce", "prior": "quality"},
        "agent": {"policy": "state", "interval": 2, "terminal": True, "gamma": 0.9, "lr": 0.05},
        "train": {
            "max_steps": 6,
            "batch_size": 2,
            "checkpoint_every": 3,
            "validate_every": 2,
            "device": "cpu",
            "timeout_s": 60,
        },
    }
    return {**base, **over}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder, run, config, *, ranks=1, die_at=0, poison_at=0):
    """Train in `ranks` processes and return their exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fit.py").write_text(SCRIPT)
    task = folder / "task.json"
    task.write_text(json.dumps({"values": config, "run": str(run)}))
    port, started = str(free_port()), []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(folder / "fit.py"), str(task), str(die_at), str(poison_at)]
        started.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate(timeout=240)[0] for process in started]
    codes = [process.returncode for process in started]
    if die_at == 0:
        assert codes == [0] * ranks, "\n".join(outputs)
    return codes


def differences(a, b, where="") -> list[str]:
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


def last(run: Path):
    return load_checkpoint(find_checkpoint(run, "last"))


def assert_same_run(a: Path, b: Path):
    one, two = last(a), last(b)
    assert one.meta["step"] == two.meta["step"] == 6
    assert differences(one.states, two.states) == []
    assert differences(one.ranks, two.ranks) == []
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


def test_six_steps_equal_three_a_kill_and_three_more(tmp_path, phantoms, features):
    config = values(phantoms, features)
    launch(tmp_path, tmp_path / "straight", config)
    codes = launch(tmp_path, tmp_path / "killed", config, die_at=5)
    assert codes == [-signal.SIGKILL]
    assert last(tmp_path / "killed").meta["step"] == 3
    launch(tmp_path, tmp_path / "killed", config)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    states = last(tmp_path / "straight").states
    assert {
        "student",
        "projections",
        "policy",
        "agent",
        "optimizer",
        "agent_optimizer",
        "terminal_reward",
    } <= set(states)


@pytest.mark.ddp
def test_two_ranks_resume_bit_for_bit_too(tmp_path, phantoms, features):
    config = values(phantoms, features)
    launch(tmp_path, tmp_path / "straight", config, ranks=2)
    codes = launch(tmp_path, tmp_path / "killed", config, ranks=2, die_at=5)
    assert all(code != 0 for code in codes)
    launch(tmp_path, tmp_path / "killed", config, ranks=2)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.ddp
def test_a_nan_on_one_rank_is_skipped_by_both_and_hangs_none(tmp_path, phantoms, features):
    config = values(phantoms, features)
    launch(tmp_path, tmp_path / "run", config, ranks=2, poison_at=3)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [row for row in rows if row.get("event") == "skipped_step"]
    assert [(row["step"], row["ranks"]) for row in skipped] == [(3, [1])]
    assert last(tmp_path / "run").meta["step"] == 6


@pytest.mark.ddp
def test_two_ranks_validate_as_one(tmp_path, phantoms, features):
    """Both start from one student and do not move; pooled and per-case Dice must be the same numbers."""
    train = {**values(phantoms, features)["train"], "lr": 1e-30, "max_steps": 2}
    config = values(
        phantoms, features, train=train, optim={"name": "sgd"}, data={"root": str(phantoms), "folds": 2}
    )
    launch(tmp_path, tmp_path / "one", config)
    launch(tmp_path, tmp_path / "two", config, ranks=2)

    def validations(run):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k.startswith("val_")} for row in rows if "val_dice" in row]

    assert validations(tmp_path / "one") == validations(tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "val" / "summary.json").read_text()) for name in ("one", "two"))
    assert one["cases"] == two["cases"]
    assert len(one["cases"]) == 3
