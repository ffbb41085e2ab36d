"""Two ranks: equal in every parameter, validated as one process would, ended together by early stopping."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from medrl.core.checkpoint import find_checkpoint, load_checkpoint, load_into
from medrl.plugins.graft import data, train
from medrl.plugins.graft.validation import Validator

pytestmark = pytest.mark.ddp

SCRIPT = """
import hashlib, json, os, sys
from pathlib import Path
import torch
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.plugins.graft import data, train

rank, manager = os.environ["RANK"], PluginManager.create(third_party=False)
kept = {}
original = train.steer

def steer(scene, policy):
    kept.update(student=scene.student, projections=scene.projections, priors=scene.priors, policy=policy)
    return original(scene, policy)

train.steer = steer
for name, config in json.loads(Path(sys.argv[1]).read_text()).items():
    job = build_train_job(manager, "graft", config, Path(sys.argv[2]) / name)
    with job.runtime() as rt:
        train.fit(rt, job.config, data.load(rt, job.config))
        digests = {}
        for part, module in kept.items():
            if module is None:
                continue
            for key, tensor in module.state_dict().items():
                raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                digests[f"{part}.{key}"] = hashlib.sha256(raw).hexdigest()
        last = {"digests": digests, "completed": rt.completed}
    (Path(sys.argv[2]) / f"{name}_{rank}.json").write_text(json.dumps(last))
"""


@pytest.fixture(scope="module")
def five(tmp_path_factory, phantoms):
    """Phantoms of which five are validated: three for one rank and two for the other."""
    root = tmp_path_factory.mktemp("five") / "data"
    shutil.copytree(phantoms, root)
    names = [f"prostate_{k:03d}" for k in range(6)]
    (root / "splits_final.json").write_text(json.dumps([{"train": names[:1], "val": names[1:]}]))
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory, five, teacher_runs):
    """A run with everything that learns, and one that is stopped early, in two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    base = {
        "data": {"root": str(five)},
        "model": {"name": "graft.tiny", "features": [4, 8]},
        "sample": {"size": [8, 32, 32]},
        "teachers": {"features": [str(teacher_runs)], "source": "live"},
        "train": {
            "max_steps": 4,
            "batch_size": 1,
            "checkpoint_every": 4,
            "validate_every": 2,
            "device": "cpu",
            "timeout_s": 120,
        },
        "validation": {"panels": 1},
    }
    learning = {
        "distill": {"taps": ["neg1", "neg2"], "logit_weight": 1.0, "projection": "orthogonal"},
        "weighting": {"mode": "reinforce", "prior": "uniform"},
        "agent": {"policy": "state", "interval": 1, "lr": 0.1},
        "split": {"reward_mode": "batch"},
    }
    stopped = {
        "weighting": {"mode": "uniform"},
        "train": {**base["train"], "max_steps": 20},
        "validation": {"early_stopping": True, "patience": 2, "min_delta": 1.0, "panels": 0},
    }
    (folder / "fit.py").write_text(SCRIPT)
    configs = {"learning": {**base, **learning}, "stopped": {**base, **stopped}}
    (folder / "config.json").write_text(json.dumps(configs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, str(folder / "fit.py"), str(folder / "config.json"), str(folder)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = "\n".join(process.communicate(timeout=400)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0], said
    return folder


def of_ranks(folder, name):
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(2)]


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_student_projections_priors_and_policy_are_equal_bit_for_bit(runs):
    one, two = of_ranks(runs, "learning")
    assert one == two
    assert one["completed"] == 4
    parts = {name.partition(".")[0] for name in one["digests"]}
    assert parts == {"student", "projections", "priors", "policy"}
    assert len(one["digests"]) > 40


def test_both_ranks_trained_the_policy(runs):
    moved = load_checkpoint(find_checkpoint(runs / "learning", "last")).states["policy"]
    assert float(moved["heads.neg1.weight"].abs().sum()) > 0


def test_two_ranks_validate_five_cases_as_one_process_does(runs, make_job, five):
    logged = [row for row in rows_of(runs, "learning") if "val_dice" in row][-1]
    job = make_job(runs / "one", {"data": {"root": str(five)}})
    with job.runtime() as rt:
        found = data.load(rt, job.config)
        student = train.start_student(rt, job.config, found)
        load_into(student, load_checkpoint(find_checkpoint(runs / "learning", "last")).states["student"])
        rt.prepare(student)
        result = Validator(rt, job.config, found, train.Objective(job.config, found.plan.target, ()))(student)
        rt.checkpoint.register(student=student)
    assert len(result.cases) == 5
    assert {key: logged[key] for key in result.metrics()} == result.metrics()


def test_early_stopping_ends_both_ranks_after_the_same_step(runs):
    one, two = of_ranks(runs, "stopped")
    assert one["completed"] == two["completed"] == 4
    assert max(row["step"] for row in rows_of(runs, "stopped")) == 4
    assert load_checkpoint(find_checkpoint(runs / "stopped", "last")).meta["step"] == 4


def test_pictures_and_table_are_written_once(runs):
    assert len(list((runs / "learning").rglob("center_slice_comparison.png"))) == 4
    assert len((runs / "learning" / "training_log.csv").read_text().splitlines()) == 3
