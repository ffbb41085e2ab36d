"""Every weighting inside the training loop: what it does to the weights, what it logs, what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import ConfigError
from medrl.plugins.graft import data, train


def fit(job):
    with job.runtime() as rt:
        train.fit(rt, job.config, data.load(rt, job.config))
    return job.run_dir


def rows_of(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def student_of(run):
    return load_checkpoint(find_checkpoint(run, "last")).states["student"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def distilled(features, **over):
    return {"teachers": {"features": [str(features)]}, **over}


def weights_of(row, kind="neg1"):
    return [row[f"weights_{kind}/teacher_{k}"] for k in range(2)]


def test_fixed_weights_are_used_as_given_and_scaled_to_one(make_job, tmp_path, features):
    over = {"weighting": {"mode": "fixed", "fixed": [3, 1]}, "distill": {"logit_weight": 1}}
    for row in rows_of(fit(make_job(tmp_path / "run", distilled(features, **over)))):
        assert weights_of(row) == pytest.approx([0.75, 0.25])
        assert weights_of(row, "logits") == pytest.approx([0.75, 0.25])


def test_a_teacher_of_weight_zero_does_not_reach_the_student(make_job, tmp_path, features):
    over = {"weighting": {"mode": "fixed", "fixed": [1, 0]}, "train": {"clip_norm": 0}}
    rows = rows_of(fit(make_job(tmp_path / "run", distilled(features, **over))))
    assert all(weights_of(row) == [1.0, 0.0] and math.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("given", [[], [0, 0], [1, -1], [float("nan"), 1]])
def test_fixed_weights_without_sense_are_refused(make_job, tmp_path, features, given):
    with pytest.raises(ConfigError, match="fixed"):
        make_job(tmp_path / "run", distilled(features, weighting={"mode": "fixed", "fixed": given}))


def test_fixed_weights_for_another_number_of_teachers_are_refused(make_job, tmp_path, features):
    job = make_job(tmp_path / "run", distilled(features, weighting={"mode": "fixed", "fixed": [1, 1, 1]}))
    with pytest.raises(ConfigError, match="3 numbers for 2 teachers"):
        fit(job)


MODES = {
    "align": {"weighting": {"mode": "align", "prior": "quality", "align_every": 1}},
    "align-both": {
        "weighting": {"mode": "align", "prior": "uniform", "align_every": 2},
        "distill": {"logit_weight": 1, "taps": ["neg1", "neg2"]},
        "split": {"reward_mode": "crossfit", "reward_folds": 2},
        "train": {"precision": "bf16"},
    },
    "meta-standard": {"weighting": {"mode": "meta", "meta": "standard"}, "distill": {"logit_weight": 1}},
    "meta-adaptive": {"weighting": {"mode": "meta", "meta": "adaptive"}},
    "meta-context": {"weighting": {"mode": "meta", "meta": "context"}, "distill": {"logit_weight": 1}},
    "meta-context-logits": {
        "weighting": {"mode": "meta", "meta": "context"},
        "distill": {"logit_weight": 1, "feature_weight": 0},
    },
    "legacy-episode": {
        "weighting": {"mode": "legacy"},
        "agent": {"interval": 2, "optimizer": "sgd", "lr": 0.001, "gamma": 0.95, "dynamic": True},
        "distill": {"logit_weight": 1},
    },
    "legacy-step": {
        "weighting": {"mode": "legacy"},
        "agent": {"update": "step", "step_every": 2, "gated_diversity": False},
        "split": {"reward_mode": "batch"},
        "train": {"batch_size": 2},
    },
    "reinforce-crossfit": {
        "weighting": {"mode": "reinforce", "prior": "quality"},
        "agent": {"interval": 1, "terminal": True, "reach": 1.0},
        "split": {"reward_mode": "crossfit", "reward_folds": 2},
    },
    "reinforce-horizon": {
        "weighting": {"mode": "reinforce", "prior": "quality"},
        "agent": {"interval": 1, "horizon": 2, "policy": "state"},
        "distill": {"logit_weight": 1},
        "split": {"reward": 0.4},
    },
    "reinforce-batch": {
        "weighting": {"mode": "reinforce", "prior": "uniform"},
        "agent": {"interval": 2},
        "split": {"reward_mode": "batch"},
    },
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_trains_and_logs_weights_on_the_simplex(make_job, tmp_path, features, name):
    rows = rows_of(fit(make_job(tmp_path / "run", distilled(features, **MODES[name]))))
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert math.isfinite(row["loss"])
        kinds = [key[8:].partition("/")[0] for key in row if key.startswith("weights_")]
        assert kinds
        for kind in kinds:
            assert sum(weights_of(row, kind)) == pytest.approx(1.0, abs=1e-5)
            assert min(weights_of(row, kind)) >= 0.0
            assert 0.0 <= row[f"entropy_{kind}"] <= math.log(2) + 1e-6
