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
