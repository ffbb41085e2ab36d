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

from medrl.core.checkpoint import find_checkpoint, load_checkpoint, load_into
from medrl.core.jobs import build_train_job
from medrl.plugins.graft import data, train, validation

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from medrl.core.errors import RuntimeFault
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.plugins.graft import data, train

config, manager = json.loads(Path(sys.argv[1]).read_text()), PluginManager.create(third_party=False)
rank, original, supervised = int(os.environ.get("RANK", "0")), train.set_rate, train.Objective.supervised

def fit(run, *, die=None, poison_at=0):
    count = [0]
    def set_rate(optimizer, cfg, step):
        if step == 5 and die is not None:
            die()
        return original(optimizer, cfg, step)
    def broken(self, output, batch):
        count[0] += 1
        return supervised(self, output, batch) * (float("nan") if (rank, count[0]) == (1, poison_at) else 1.0)
    train.set_rate, train.Objective.supervised = set_rate, broken
    job = build_train_job(manager, "graft", config, Path(run))
    with job.runtime() as rt:
        train.fit(rt, job.config, data.load(rt, job.config))

def fall():
    raise RuntimeFault("this rank ends here")

for task in sys.argv[2:]:
    name, run = task.split("=")
    if name == "kill":
        fit(run, die=lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif name == "fall":
        try:
            fit(run, die=fall, poison_at=2)
        except RuntimeFault:
            pass
    else:
        fit(run, poison_at=2 if name == "poisoned" else 0)
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


def launch(folder, config, *tasks, ranks=1):
    """Do some tasks one after the other in `ranks` processes; return exit codes and what they said."""
    (folder / "fit.py").write_text(SCRIPT)
    (folder / "config.json").write_text(json.dumps(config))
    port, started = str(free_port()), []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(folder / "fit.py"), str(folder / "config.json"), *tasks]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=env, **pipes))
    said = "\n".join(process.communicate(timeout=240)[0] for process in started)
    return [process.returncode for process in started], said


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


def test_six_steps_equal_three_a_kill_and_three_more(tmp_path, manager, phantoms, features):
    config = values(phantoms, features)
    codes, said = launch(tmp_path, config, f"kill={tmp_path / 'killed'}")
    assert codes == [-signal.SIGKILL], said
    assert last(tmp_path / "killed").meta["step"] == 3
    for name in ("straight", "killed"):
        job = build_train_job(manager, "graft", config, tmp_path / name)
        with job.runtime() as rt:
            train.fit(rt, job.config, data.load(rt, job.config))
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    states = set(last(tmp_path / "straight").states)
    assert states >= {
        "student",
        "projections",
        "policy",
        "agent",
        "optimizer",
        "agent_optimizer",
        "terminal_reward",
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, phantoms, features):
    """A straight run and one that fell at step 5 and went on, in two ranks; rank 1 meets a NaN at step 2."""
    folder = tmp_path_factory.mktemp("two_ranks")
    tasks = [f"poisoned={folder / 'straight'}", f"fall={folder / 'fell'}", f"resume={folder / 'fell'}"]
    codes, said = launch(folder, values(phantoms, features), *tasks, ranks=2)
    assert codes == [0, 0], said
    return folder


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ddp
def test_two_ranks_resume_bit_for_bit_too(two_ranks):
    assert_same_run(two_ranks / "straight", two_ranks / "fell")
    assert len(last(two_ranks / "straight").ranks) == 2


@pytest.mark.ddp
def test_a_nan_on_one_rank_is_skipped_by_both_and_hangs_none(two_ranks):
    skipped = [row for row in rows_of(two_ranks / "straight") if row.get("event") == "skipped_step"]
    assert [(row["step"], row["ranks"]) for row in skipped] == [(2, [1])]


@pytest.mark.ddp
def test_two_ranks_validate_as_one(two_ranks, make_job, phantoms, features):
    """One process validates the two ranks' last student; every number is the same."""
    logged = [row for row in rows_of(two_ranks / "straight") if "val_dice" in row][-1]
    job = make_job(two_ranks / "one", {"data": {"folds": 3}})
    with job.runtime() as rt:
        found = data.load(rt, job.config)
        student = train.start_student(rt, job.config, found)
        load_into(student, last(two_ranks / "straight").states["student"])
        rt.prepare(student)
        supervised = train.Objective(job.config, found.plan.target, ())
        result = validation.Validator(rt, job.config, found, supervised)(student)
        rt.checkpoint.register(student=student)
    assert {key: logged[key] for key in result.metrics()} == result.metrics()
    assert len(result.cases) == 2
    assert "val_loss" in logged
