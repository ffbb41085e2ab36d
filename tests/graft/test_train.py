"""The training loop: what it learns from, what it logs, what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import ConfigError, DataError, RuntimeFault
from medrl.plugins.graft import data, train
from medrl.plugins.graft.config import GraftConfig
from medrl.plugins.graft.validation import CaseCounts, Validation


def fit(job, change=None):
    with job.runtime() as rt:
        found = data.load(rt, job.config)
        if change is not None:
            change(found)
        train.fit(rt, job.config, found)
    return job.run_dir


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def student_of(run, which="last"):
    return load_checkpoint(find_checkpoint(run, which)).states["student"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def distilled(features, **over):
    return {"teachers": {"features": [str(features)]}, **over}


def test_without_teachers_it_learns_from_labels_alone(make_job, tmp_path):
    run = fit(make_job(tmp_path / "run", {"train": {"max_steps": 30, "lr": 0.01}, "data": {"folds": 2}}))
    rows = [row for row in records(run) if "loss_supervised" in row]
    assert len(rows) == 30
    first, last = (sum(row["loss_supervised"] for row in part) for part in (rows[:6], rows[-6:]))
    assert last < first
    assert not any(key.startswith("weights") or key == "loss_features" for row in rows for key in row)


@pytest.mark.parametrize(
    "over",
    [
        {"weighting": {"mode": "uniform"}, "distill": {"taps": ["neg1"]}},
        {"weighting": {"mode": "quality"}, "distill": {"taps": ["neg2"], "feature_loss": "cosine"}},
        {
            "weighting": {"mode": "probe"},
            "distill": {"taps": ["neg1", "neg2"], "projection": "orthogonal", "mask_features": True},
        },
        {
            "weighting": {"mode": "quality", "scope": "case"},
            "distill": {"feature_weight": 0, "logit_weight": 1},
        },
        {
            "weighting": {"mode": "reinforce", "prior": "uniform"},
            "distill": {"taps": ["neg1", "neg2"], "logit_weight": 1, "projection": "conv"},
            "agent": {"policy": "state", "interval": 2, "terminal": True, "gamma": 0.95},
            "split": {"reward": 0.4},
        },
        {
            "weighting": {"mode": "reinforce", "prior": "quality"},
            "agent": {"interval": 1},
            "split": {"reward": 0},
        },
    ],
    ids=["uniform", "neg2", "probe-both-masked", "logits-per-case", "state-agent", "free-agent-on-batch"],
)
def test_every_combination_of_weighting_and_distillation_trains(make_job, tmp_path, features, over):
    run = fit(make_job(tmp_path / "run", distilled(features, **over)))
    rows = [row for row in records(run) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert math.isfinite(row["loss"])
        kinds = {key.partition("/")[0] for key in row if key.startswith("weights_")}
        assert kinds
        for kind in kinds:
            weights = [row[f"{kind}/teacher_{k}"] for k in range(2)]
            assert abs(sum(weights) - 1.0) < 1e-5
            assert min(weights) >= 0.0


def test_every_trainable_tensor_is_in_one_optimiser_and_in_the_checkpoint(make_job, tmp_path, features):
    over = {
        "weighting": {"mode": "reinforce", "prior": "uniform"},
        "agent": {"policy": "state", "interval": 1},
        "split": {"reward": 0.4},
        "train": {"max_steps": 2},
    }
    states = load_checkpoint(
        find_checkpoint(fit(make_job(tmp_path / "run", distilled(features, **over))), "last")
    ).states
    held = sum(len(states[name]["param_groups"][0]["params"]) for name in ("optimizer", "agent_optimizer"))
    # Heads of lower resolutions take part in training through deep supervision.
    assert held == sum(len(states[name]) for name in ("student", "projections", "policy"))
    assert "conv1.weight" in " ".join(states["policy"])
    assert len(states["agent_optimizer"]["state"]) == len(states["policy"])


def test_the_agent_moves_its_weights_and_logs_what_it_earned(make_job, tmp_path, features):
    over = {
        "weighting": {"mode": "reinforce", "prior": "uniform"},
        "agent": {"interval": 2, "lr": 0.5},
        "split": {"reward": 0.4},
        "train": {"max_steps": 4},
    }
    rows = records(fit(make_job(tmp_path / "run", distilled(features, **over))))
    assert all("reward" in row and "entropy_neg1" in row for row in rows if "loss" in row)
    ends = [row for row in rows if "policy_neg1/teacher_0" in row]
    assert [row["step"] for row in ends] == [2, 4]
    assert ends[-1]["policy_neg1/teacher_0"] != 0.5
    assert -1.0 <= ends[-1]["correlation_neg1/teacher_1"] <= 1.0


def test_the_reward_is_measured_after_the_update_that_the_action_caused(make_job, tmp_path, features):
    """With a learning rate of almost zero the student stays, so the reward is zero."""
    over = {
        "weighting": {"mode": "reinforce", "prior": "uniform"},
        "split": {"reward": 0.4},
        "optim": {"name": "sgd", "ramp": 0},
    }
    moved = records(fit(make_job(tmp_path / "a", distilled(features, **over, train={"lr": 0.05}))))
    still = records(fit(make_job(tmp_path / "b", distilled(features, **over, train={"lr": 1e-30}))))
    assert all(row["reward"] == 0.0 for row in still if "loss" in row)
    assert all(row["reward"] != 0.0 for row in moved if "loss" in row)


def test_a_random_reward_is_noise_and_not_the_students(make_job, tmp_path, features):
    over = {"weighting": {"mode": "reinforce"}, "agent": {"random_reward": True}, "split": {"reward": 0.4}}
    over["optim"] = {"name": "sgd"}
    still = records(fit(make_job(tmp_path / "run", distilled(features, **over, train={"lr": 1e-30}))))
    rewards = [row["reward"] for row in still if "loss" in row]
    assert len(set(rewards)) == 3


def test_a_warm_up_as_long_as_the_run_is_exactly_the_prior(make_job, tmp_path, features):
    plain = fit(make_job(tmp_path / "a", distilled(features, weighting={"mode": "uniform"})))
    over = {"weighting": {"mode": "reinforce", "prior": "uniform"}, "agent": {"warmup": 3}}
    warm = fit(make_job(tmp_path / "b", distilled(features, **over)))
    assert same(student_of(plain), student_of(warm))
    assert "policy" not in load_checkpoint(find_checkpoint(warm, "last")).states


def test_equal_qualities_give_the_student_of_uniform_weights(make_job, tmp_path, features):
    plain = fit(make_job(tmp_path / "a", distilled(features, weighting={"mode": "uniform"})))
    soft = fit(
        make_job(tmp_path / "b", distilled(features, weighting={"mode": "quality", "temperature": 1e9}))
    )
    a, b = student_of(plain), student_of(soft)
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_unlabelled_cases_take_part_through_the_teachers(make_job, tmp_path, features):
    over = distilled(features, split={"labelled": 2}, train={"batch_size": 2}, weighting={"mode": "uniform"})
    with_unlabelled = fit(make_job(tmp_path / "a", over))
    assert all(math.isfinite(row["loss"]) for row in records(with_unlabelled) if "loss" in row)
    with pytest.raises(ConfigError, match="at least 2"):
        fit(make_job(tmp_path / "b", {**over, "train": {"batch_size": 1}}))


def test_accumulation_equals_one_batch_of_the_same_samples(make_job, tmp_path, phantoms):
    """Two micro-batches of one sample have the mean gradient of their losses, like one batch of two."""
    over = {"loss": {"batch_dice": False}, "augment": {"scale": 0, "shift": 0}, "optim": {"name": "sgd"}}
    over["train"] = {"max_steps": 1, "lr": 0.1, "clip_norm": 0}
    joint = fit(make_job(tmp_path / "a", {**over, "train": {**over["train"], "batch_size": 2}}))
    split = fit(make_job(tmp_path / "b", {**over, "train": {**over["train"], "accumulate": 2}}))
    a, b = student_of(joint), student_of(split)
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_accumulation_does_not_divide_what_is_logged(make_job, tmp_path):
    """One case, no augmentation, hardly a step: every micro-batch has the same loss."""
    over = {"augment": {"scale": 0, "shift": 0}, "split": {"overfit_batches": 1}, "optim": {"name": "sgd"}}
    for count in (1, 2):
        train_over = {"max_steps": 1, "lr": 1e-30, "accumulate": count}
        fit(make_job(tmp_path / str(count), {**over, "train": train_over}))
    one, two = (next(row for row in records(tmp_path / name) if "loss" in row) for name in "12")
    assert one["loss_supervised"] == pytest.approx(two["loss_supervised"], rel=1e-6)


def test_bf16_convolutions_run_in_bf16(make_job, tmp_path, monkeypatch):
    seen = set()
    original = train.as_output

    def spy(result):
        output = original(result)
        seen.add(output.features["neg1"].dtype)
        return output

    monkeypatch.setattr(train, "as_output", spy)
    fit(make_job(tmp_path / "run", {"train": {"precision": "bf16", "max_steps": 1}}))
    assert seen == {torch.bfloat16}


def test_one_broken_step_is_left_out_and_the_run_goes_on(make_job, tmp_path, monkeypatch, features):
    original, calls = train.Objective.supervised, []

    def once(self, output, batch):
        calls.append(batch.case_ids)
        return original(self, output, batch) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(train.Objective, "supervised", once)
    over = {"weighting": {"mode": "reinforce", "prior": "uniform"}, "split": {"reward": 0.4}}
    rows = records(fit(make_job(tmp_path / "run", distilled(features, **over))))
    skipped = [row for row in rows if row.get("event") == "skipped_step"]
    assert [row["cases"] for row in skipped] == [list(calls[1])]
    steps = {row["step"]: row for row in rows if "loss" in row}
    assert "reward" not in steps[2]
    assert "reward" in steps[3]


def test_validation_writes_the_best_checkpoint_and_a_summary(make_job, tmp_path):
    run = fit(make_job(tmp_path / "run", {"train": {"max_steps": 4, "validate_every": 2}}))
    rows = [row for row in records(run) if "val_dice" in row]
    assert [row["step"] for row in rows] == [2, 4]
    best = load_checkpoint(find_checkpoint(run, "best")).meta
    assert best["metric"] == max(row["val_dice"] for row in rows)
    summary = json.loads((run / "val" / "summary.json").read_text())
    assert summary["step"] == best["step"]
    assert set(summary["cases"]) == {case for case in summary["cases"] if case.startswith("prostate_")}


def test_pooled_dice_is_over_voxels_and_empty_cases_count_only_there():
    cases = {"a": CaseCounts(((8, 2, 0),)), "b": CaseCounts(((0, 0, 0),))}
    found = Validation(cases, ("organ",))
    assert found.pooled() == {"organ": 16 / 18}
    assert found.per_case() == {"a": {"organ": 16 / 18}, "b": {"organ": None}}
    assert found.mean() == {"organ": 16 / 18}


def test_an_epoch_is_one_validation_by_default(make_job, tmp_path):
    run = fit(make_job(tmp_path / "run", {"train": {"max_steps": 8, "batch_size": 2}}))
    rows = [row for row in records(run) if "val_dice" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


def test_train_and_validation_overlap_is_an_error(make_job, tmp_path, phantoms):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(phantoms, copy)
    names = [f"prostate_{k:03d}" for k in range(6)]
    (copy / "splits_final.json").write_text(json.dumps([{"train": names[:4], "val": names[3:]}]))
    with pytest.raises(DataError, match="prostate_003"):
        fit(make_job(tmp_path / "run", {"data": {"root": str(copy)}}))


def test_the_learning_rate_rises_and_falls():
    def rate(step, **optim):
        cfg = GraftConfig.model_validate(
            {"method": "graft", "train": {"max_steps": 200, "lr": 1e-3}, "optim": {"ramp": 0, **optim}}
        )
        return 1e-3 * train.schedule(cfg, step)

    assert rate(1) == pytest.approx(1e-3)
    assert rate(101) == pytest.approx(5e-4)
    assert rate(200) == pytest.approx(6.168e-8, rel=1e-3)
    assert rate(1, ramp=20) == pytest.approx(1e-4)
    assert rate(126, schedule="multistep") == pytest.approx(1e-4)
    assert rate(199, schedule="constant") == pytest.approx(1e-3)


def test_a_student_can_start_from_another_runs_weights(make_job, tmp_path, manager, phantoms):
    first = fit(make_job(tmp_path / "a"))
    start = find_checkpoint(first, "last")
    job = make_job(tmp_path / "b", {"train": {"lr": 1e-30, "max_steps": 1}, "optim": {"name": "sgd"}})
    job = type(job)(**{**job.__dict__, "init_from": start})
    assert same(student_of(first), student_of(fit(job)))


def test_feature_distillation_of_a_network_without_taps_says_what_to_do(
    make_job, tmp_path, features, monkeypatch
):
    class Bare(torch.nn.Module):
        def __init__(self, in_channels, out_channels):
            super().__init__()
            self.layer = torch.nn.Conv3d(in_channels, out_channels, 1)

        def forward(self, image):
            return self.layer(image)

    monkeypatch.setattr(train, "build_network", lambda cfg, manager, inputs, outputs: Bare(inputs, outputs))
    with pytest.raises(ConfigError, match="no features to distil"):
        fit(make_job(tmp_path / "run", distilled(features)))


def test_three_broken_steps_in_a_row_end_the_run_and_name_the_cases(make_job, tmp_path, monkeypatch):
    original = train.Objective.supervised
    monkeypatch.setattr(
        train.Objective,
        "supervised",
        lambda self, output, batch: original(self, output, batch) * float("nan"),
    )
    with pytest.raises(RuntimeFault, match="prostate_"):
        fit(make_job(tmp_path / "run", {"train": {"max_steps": 5}}))
