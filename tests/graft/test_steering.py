"""Every weighting inside the training loop: what it does to the weights, what it logs, what it refuses."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import ConfigError
from medrl.core.report import build_report
from medrl.plugins.graft import data, train
from medrl.plugins.graft.agent import Agreement
from medrl.plugins.graft.config import GraftConfig
from medrl.plugins.graft.features import open_teacher
from medrl.plugins.graft.priors import batch_quality
from medrl.plugins.graft.regions import BINARY
from medrl.plugins.graft.rewards import RewardMeter


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


def merged(base, over):
    """Lay nested values over others."""
    return {**base, **{key: {**base.get(key, {}), **value} for key, value in over.items()}}


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


def states_of(run):
    return load_checkpoint(find_checkpoint(run, "last")).states


@pytest.mark.parametrize(
    "over",
    [
        {"weighting": {"mode": "reinforce", "prior": "uniform"}},
        {"weighting": {"mode": "align", "prior": "uniform"}},
        {"weighting": {"mode": "legacy"}, "agent": {"blend": "uniform"}},
    ],
    ids=["reinforce", "align", "legacy"],
)
def test_a_warm_up_of_the_whole_run_equals_uniform_weights_bit_for_bit(make_job, tmp_path, features, over):
    two_epochs = {"max_steps": 8}
    plain = fit(
        make_job(tmp_path / "a", distilled(features, weighting={"mode": "uniform"}, train=two_epochs))
    )
    agent = {**over.get("agent", {}), "warmup": 8}
    warm = fit(make_job(tmp_path / "b", distilled(features, **{**over, "agent": agent}, train=two_epochs)))
    assert same(student_of(plain), student_of(warm))
    assert "policy" not in states_of(warm)


def test_the_published_warm_up_starts_from_ones_and_never_switches_the_agent_off(
    make_job, tmp_path, features
):
    """Four labelled cases: four steps an epoch; a warm-up of two epochs, then one longer than the run."""
    over = {"weighting": {"mode": "legacy"}, "train": {"max_steps": 9}, "split": {"reward_mode": "batch"}}
    run = fit(make_job(tmp_path / "a", distilled(features, **over, agent={"warmup": 8})))
    sums = [sum(weights_of(row)) for row in rows_of(run)]
    assert sums == pytest.approx([2.0] * 4 + [1.5] * 4 + [1.0], abs=1e-5)
    run = fit(make_job(tmp_path / "b", distilled(features, **over, agent={"warmup": 16})))
    sums = [sum(weights_of(row)) for row in rows_of(run)]
    assert sums == pytest.approx([2.0] * 4 + [1.75] * 4 + [1.5], abs=1e-5)


def test_the_documented_warm_up_of_legacy_starts_from_equal_weights(make_job, tmp_path, features):
    over = {"weighting": {"mode": "legacy"}, "agent": {"warmup": 2, "blend": "uniform"}}
    rows = rows_of(fit(make_job(tmp_path / "run", distilled(features, **over))))
    assert weights_of(rows[0]) == [0.5, 0.5]
    assert all(sum(weights_of(row)) == pytest.approx(1.0, abs=1e-5) for row in rows)


@pytest.mark.parametrize(
    "over",
    [
        {"weighting": {"mode": "legacy"}, "agent": {"interval": 2, "dynamic": True, "optimizer": "adam"}},
        {"weighting": {"mode": "reinforce"}, "agent": {"interval": 1, "policy": "state", "horizon": 2}},
    ],
    ids=["legacy", "reinforce"],
)
def test_every_trainable_tensor_is_in_one_optimiser_and_in_the_checkpoint(make_job, tmp_path, features, over):
    distill = {"taps": ["neg1", "neg2"], "logit_weight": 1, "projection": "orthogonal"}
    over = {**over, "split": {"reward": 0.4}, "train": {"max_steps": 4}}
    states = states_of(fit(make_job(tmp_path / "run", distilled(features, **over, distill=distill))))
    held = sum(len(states[name]["param_groups"][0]["params"]) for name in ("optimizer", "agent_optimizer"))
    trainable = ("student", "projections", "policy")
    # Buffers of the orthogonal maps are no parameters.
    buffers = sum(name.endswith(".base") for name in states["projections"])
    assert held == sum(len(states[name]) for name in trainable) - buffers
    first = [name for name in states["policy"] if name.endswith("conv1.weight")]
    assert len(first) == 2
    moments = states["agent_optimizer"]["state"]
    assert len(moments) == len(states["policy"])
    moved = [number for number, name in enumerate(states["policy"]) if name in first]
    if over["weighting"]["mode"] == "legacy":
        assert all(float(moments[number]["exp_avg_sq"].sum()) > 0 for number in moved)


def test_accumulation_does_not_shrink_the_step_of_the_agent(make_job, tmp_path, features):
    """With a random reward and no state the agent sees nothing of the batches; SGD shows any scaling."""
    over = {
        "weighting": {"mode": "reinforce", "prior": "uniform"},
        "agent": {"random_reward": True, "optimizer": "sgd", "lr": 0.1, "interval": 2, "clip_norm": 0},
        "split": {"reward": 0.4},
    }
    found = []
    for accumulate in (1, 3):
        values = distilled(features, **over, train={"accumulate": accumulate, "max_steps": 4})
        found.append(states_of(fit(make_job(tmp_path / str(accumulate), values)))["policy"])
    assert same(*found)
    assert any(float(value.abs().sum()) > 0 for value in found[0].values())


def test_micro_batches_of_one_step_share_an_action(make_job, tmp_path, features, monkeypatch):
    over = {"weighting": {"mode": "reinforce", "prior": "uniform"}, "split": {"reward": 0.4}}
    original, seen = train.Objective.__call__, []

    def spy(self, output, batch, projections, weights):
        seen.append(weights["neg1"][0].tolist())
        return original(self, output, batch, projections, weights)

    monkeypatch.setattr(train.Objective, "__call__", spy)
    fit(make_job(tmp_path / "run", distilled(features, **over, train={"accumulate": 2, "max_steps": 2})))
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert seen[0] != seen[2]


@pytest.mark.parametrize(
    "name", ["align", "meta-adaptive", "legacy-episode", "legacy-step", "reinforce-horizon"]
)
def test_one_broken_step_is_left_out_and_the_run_goes_on(make_job, tmp_path, features, monkeypatch, name):
    original, calls = train.Objective.__call__, []

    def broken(self, *given):
        loss, facts = original(self, *given)
        calls.append(1)
        return loss * (float("nan") if len(calls) == 2 else 1.0), facts

    monkeypatch.setattr(train.Objective, "__call__", broken)
    values = merged(distilled(features, **MODES[name]), {"train": {"max_steps": 6}})
    run = fit(make_job(tmp_path / "run", values))
    rows = rows_of(run)
    assert len(rows) == 6
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(bool(torch.isfinite(value).all()) for value in student_of(run).values())


def test_a_reward_that_is_not_finite_is_not_learned_from(make_job, tmp_path, features, monkeypatch):
    original, calls = RewardMeter.level, []

    def level(self, student, batch):
        calls.append(1)
        return float("nan") if len(calls) == 2 else original(self, student, batch)

    monkeypatch.setattr(RewardMeter, "level", level)
    over = {"weighting": {"mode": "reinforce"}, "agent": {"interval": 5}, "split": {"reward": 0.4}}
    states = states_of(fit(make_job(tmp_path / "run", distilled(features, **over))))
    assert len(states["agent"]["episode"]["rewards"]) == 2


@pytest.mark.parametrize("mode", ["reinforce", "align"])
def test_cross_fitting_loses_no_label_and_never_trains_on_the_fold_in_use(
    make_job, tmp_path, features, monkeypatch, mode
):
    over = {
        "weighting": {"mode": mode, "prior": "uniform", "align_every": 2},
        "agent": {"interval": 2, "reward_cases": 9},
        "split": {"reward_mode": "crossfit", "reward_folds": 2},
        "train": {"max_steps": 8},
    }
    measured, trained = [], []
    original, call = RewardMeter.batch, train.Objective.__call__

    def batch(self, episode, training):
        found = original(self, episode, training)
        measured.append((len(trained) - 1, set(found.case_ids)))
        return found

    def spy(self, output, given, *rest):
        trained.append(set(given.case_ids))
        return call(self, output, given, *rest)

    monkeypatch.setattr(RewardMeter, "batch", batch)
    monkeypatch.setattr(train.Objective, "__call__", spy)
    fit(make_job(tmp_path / "run", distilled(features, **over)))
    assert measured
    for step, cases in measured:
        episode = range(step - step % 2, step + 1)
        assert all(not trained[k] & cases for k in episode)
    everything = set().union(*trained)
    assert everything == set().union(*(cases for _, cases in measured))
    assert len(everything) == 4
    assert len({frozenset(cases) for _, cases in measured}) == 2


def test_an_action_is_held_over_the_horizon_and_rewarded_at_its_end(make_job, tmp_path, features):
    over = {
        "weighting": {"mode": "reinforce", "prior": "uniform"},
        "agent": {"horizon": 3, "interval": 1},
        "split": {"reward": 0.4},
        "train": {"max_steps": 7},
    }
    rows = rows_of(fit(make_job(tmp_path / "run", distilled(features, **over))))
    weights = [tuple(weights_of(row)) for row in rows]
    assert weights[0] == weights[1] == weights[2]
    assert weights[3] == weights[4] == weights[5]
    assert len(set(weights)) == 3
    assert [row["step"] for row in rows if "reward" in row] == [3, 6]
    assert [row["step"] for row in rows if "return" in row] == [3, 6]


def test_the_reward_over_a_horizon_is_the_sum_of_the_changes_in_it(make_job, tmp_path, features):
    """Held weights of a floor of almost one are equal weights, so both runs train the same student."""
    over = {
        "weighting": {"mode": "reinforce", "prior": "uniform", "floor": 0.999999},
        "split": {"reward": 0.4},
        "train": {"max_steps": 4},
    }
    agent = {"kappa": 1e9, "lr": 0.0001, "interval": 99, "reward_cases": 9}
    one = rows_of(fit(make_job(tmp_path / "a", distilled(features, **over, agent=agent))))
    two = rows_of(fit(make_job(tmp_path / "b", distilled(features, **over, agent={**agent, "horizon": 2}))))
    for k in (1, 3):
        assert two[k]["reward"] == pytest.approx(one[k - 1]["reward"] + one[k]["reward"], abs=0.02)


def test_a_horizon_needs_cases_of_its_own(make_job, tmp_path, features):
    over = {
        "weighting": {"mode": "reinforce"},
        "agent": {"horizon": 2},
        "split": {"reward_mode": "batch"},
    }
    with pytest.raises(ConfigError, match="cases of its own"):
        fit(make_job(tmp_path / "run", distilled(features, **over)))


def test_the_rate_can_follow_the_number_of_updates(make_job, tmp_path, features):
    over = {
        "weighting": {"mode": "reinforce"},
        "agent": {"interval": 2, "reach": 3.0},
        "split": {"reward": 0.4},
        "train": {"max_steps": 4},
    }
    states = states_of(fit(make_job(tmp_path / "run", distilled(features, **over))))
    assert states["agent_optimizer"]["param_groups"][0]["lr"] == 1.5


def test_alignment_trusts_the_teacher_whose_loss_is_that_of_the_labels(
    make_job, tmp_path, features, monkeypatch
):
    """One teacher wants what the labels want, the other the opposite."""

    def losses(self, output, batch, projections):
        own = self.supervised(output, batch)
        return {"neg1": torch.stack([own, -own])[None]}

    monkeypatch.setattr(train.Objective, "teacher_losses", losses)
    over = {
        "weighting": {"mode": "align", "prior": "uniform", "align_every": 1},
        "split": {"reward": 0.4},
        "train": {"max_steps": 4},
    }
    rows = rows_of(fit(make_job(tmp_path / "run", distilled(features, **over))))
    assert weights_of(rows[0]) == [0.5, 0.5]
    assert weights_of(rows[-1])[0] > 0.9
    assert rows[-1]["alignment_neg1/teacher_0"] > 0.5 > -0.5 > rows[-1]["alignment_neg1/teacher_1"]
    assert all(math.isfinite(row["reward_loss"]) for row in rows)


def test_alignment_logs_how_weights_and_measurements_went_together(make_job, tmp_path, features, monkeypatch):
    taken, original = [], Agreement.update

    def spy(self, weights, measured):
        taken.append((weights.tolist(), measured.tolist()))
        original(self, weights, measured)

    monkeypatch.setattr(Agreement, "update", spy)
    over = {
        "weighting": {"mode": "align", "prior": "uniform", "align_every": 1},
        "split": {"reward": 0.4},
        "train": {"max_steps": 6},
    }
    rows = rows_of(fit(make_job(tmp_path / "run", distilled(features, **over))))
    assert len(taken) == len(rows) == 6
    for row, (weights, _) in zip(rows, taken, strict=True):
        assert weights == pytest.approx(weights_of(row), abs=1e-6)
    assert rows[0]["correlation_neg1/teacher_0"] == 0.0
    for teacher in range(2):
        pairs = np.array([(weights[teacher], measured[teacher]) for weights, measured in taken])
        expected = np.corrcoef(pairs.T)[0, 1]
        assert rows[-1][f"correlation_neg1/teacher_{teacher}"] == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 1e-3


@pytest.mark.parametrize("mode", ["reinforce", "align", "legacy"])
def test_the_report_of_a_run_draws_weights_entropy_and_correlation(make_job, tmp_path, features, mode):
    over = {
        "weighting": {"mode": mode, "prior": "uniform", "align_every": 1},
        "agent": {"interval": 2},
        "split": {"reward": 0.4},
        "distill": {"logit_weight": 1.0},
        "train": {"max_steps": 4},
    }
    run = fit(make_job(tmp_path / "run", distilled(features, **over)))
    page = build_report(run).read_text()
    for kind in ("neg1", "logits"):
        for what in ("weights", "correlation"):
            assert f"<b>{what}_{kind}</b>" in page
            assert f"{what}_{kind}/teacher_1" in page
        assert f"entropy_{kind}" in page
    shown = page.split("more curves")[0]
    assert "<b>weights_neg1</b>" in shown


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_measuring_the_alignment_leaves_no_trace_in_the_student(make_job, tmp_path, features, optim):
    """At an endless temperature the scores change nothing but rounding of the equal weights."""
    base = distilled(features, split={"reward_mode": "batch"}, optim={"name": optim})
    plain = fit(make_job(tmp_path / "a", {**base, "weighting": {"mode": "uniform"}}))
    align = {"mode": "align", "prior": "uniform", "align_every": 1, "align_temperature": 1e12}
    measured = fit(make_job(tmp_path / "b", {**base, "weighting": align}))
    assert same(student_of(plain), student_of(measured))


def test_a_random_reward_replaces_the_alignment(make_job, tmp_path, features, monkeypatch):
    def nothing(self, output, batch, projections):
        return {"neg1": torch.zeros(1, 2)}

    monkeypatch.setattr(train.Objective, "teacher_losses", nothing)
    over = {"weighting": {"mode": "align", "prior": "uniform", "align_every": 1}, "split": {"reward": 0.4}}
    real = rows_of(fit(make_job(tmp_path / "a", distilled(features, **over))))
    noise = {**over, "agent": {"random_reward": True}}
    random = rows_of(fit(make_job(tmp_path / "b", distilled(features, **noise))))
    assert all(row["alignment_neg1/teacher_0"] == 0.0 for row in real)
    assert all(row["alignment_neg1/teacher_0"] != 0.0 for row in random)


def test_meta_weights_favour_the_teacher_that_is_near(make_job, tmp_path, features, monkeypatch):
    def losses(self, output, batch, projections):
        return {"neg1": torch.tensor([[0.1, 5.0]])}

    monkeypatch.setattr(train.Objective, "teacher_losses", losses)
    over = {"weighting": {"mode": "meta", "meta": "standard"}}
    assert weights_of(rows_of(fit(make_job(tmp_path / "a", distilled(features, **over))))[0]) == [1.0, 0.0]
    monkeypatch.setattr(
        train.Objective, "teacher_losses", lambda *_given: {"neg1": torch.tensor([[0.1, float("nan")]])}
    )
    assert weights_of(rows_of(fit(make_job(tmp_path / "b", distilled(features, **over))))[0]) == [0.5, 0.5]


def test_the_published_reward_is_that_of_the_student_before_its_update(make_job, tmp_path, features):
    over = {
        "weighting": {"mode": "legacy"},
        "split": {"reward_mode": "batch"},
        "optim": {"name": "sgd", "ramp": 0},
    }
    moved = rows_of(fit(make_job(tmp_path / "a", distilled(features, **over, train={"lr": 0.05}))))
    still = rows_of(fit(make_job(tmp_path / "b", distilled(features, **over, train={"lr": 1e-30}))))
    assert moved[0]["reward"] == still[0]["reward"]
    assert moved[1]["reward"] != still[1]["reward"]


def test_the_published_episode_ends_with_the_level_of_the_validation(make_job, tmp_path, features):
    over = {
        "weighting": {"mode": "legacy"},
        "split": {"reward_mode": "batch"},
        "agent": {"interval": 2},
        "train": {"max_steps": 3, "validate_every": 3},
    }
    run = fit(make_job(tmp_path / "run", distilled(features, **over)))
    rows = rows_of(run)
    assert rows[1]["terminal_reward"] == pytest.approx((rows[0]["reward"] + rows[1]["reward"]) / 2)
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["terminal_reward"] == pytest.approx(100.0 * last["val_dice"])
    assert states_of(run)["agent"]["rewards"] == []


@pytest.mark.parametrize("update", ["episode", "step"])
def test_the_published_updates_change_the_policy(make_job, tmp_path, features, update):
    over = {"weighting": {"mode": "legacy"}, "split": {"reward_mode": "batch"}}
    found = []
    for rate in (1e-3, 1e-30):
        agent = {"update": update, "interval": 3, "step_every": 2, "optimizer": "sgd", "lr": rate}
        values = distilled(features, **over, agent=agent, train={"batch_size": 2})
        found.append(states_of(fit(make_job(tmp_path / str(rate), values)))["policy"])
    assert not same(*found)


def test_logits_of_another_family_are_read_by_its_own_rules():
    """ProViCNet: four softmax classes, the last two are cancer."""
    label = torch.zeros(1, 2, 4, 4, dtype=torch.long)
    label[..., :2] = 2
    four = torch.nn.functional.one_hot(label, 4).permute(0, 4, 1, 2, 3).float() * 20.0
    batch = SimpleNamespace(
        logits=[four],
        valid=[torch.ones(1, 1, 1, 1, 1)],
        label=label,
        labelled=torch.tensor([True]),
        features={},
        case_ids=("a",),
    )
    found = SimpleNamespace(plan=SimpleNamespace(target=BINARY), families=("provicnet",))
    assert batch_quality(batch, found).tolist() == [[1.0]]
    objective = train.Objective(
        GraftConfig(method="graft", distill={"mask_features": True}), BINARY, (), ("provicnet",)
    )
    assert all(bool((mask == 1).all()) for mask in objective.masks(batch))
    same_voxels = torch.sigmoid(objective.teacher_logits(0, four)) > 0.5
    assert torch.equal(same_voxels[:, 1], label == 2)


def test_a_feature_folder_says_the_family_of_its_logits(tmp_path, features):
    folder = tmp_path / "teacher"
    folder.mkdir()
    record = json.loads((features / "teacher_0" / "teacher.json").read_text())
    (folder / "teacher.json").write_text(json.dumps(record))
    assert open_teacher(folder).family == "nnunet"
    (folder / "teacher.json").write_text(json.dumps({**record, "family": "provicnet"}))
    assert open_teacher(folder).family == "provicnet"


def test_another_supervised_loss_is_chosen_by_its_key(make_job, tmp_path):
    run = fit(
        make_job(tmp_path / "a", {"loss": {"name": "graft.tversky", "params": {"false_negative": 0.9}}})
    )
    assert all(0.0 <= row["loss_supervised"] <= 1.0 for row in rows_of(run))
    with pytest.raises(ConfigError, match="tversky"):
        fit(make_job(tmp_path / "b", {"loss": {"name": "graft.tverski"}}))
    with pytest.raises(ConfigError, match="no scalar"):
        fit(make_job(tmp_path / "c", {"loss": {"name": "graft.feature_mse"}}))
    with pytest.raises(ConfigError, match=r"loss\.name is empty"):
        fit(make_job(tmp_path / "d", {"loss": {"params": {"gamma": 1}}}))
    with pytest.raises(ConfigError, match="false_negatif"):
        fit(make_job(tmp_path / "e", {"loss": {"name": "graft.tversky", "params": {"false_negatif": 1}}}))


def test_every_registered_part_can_be_imported(manager):
    manager.load("graft")
    for kind in ("losses", "agents", "rewards"):
        registry = manager.registry(kind)
        keys = [entry.key for entry in registry.entries() if entry.plugin == "graft"]
        assert keys
        assert all(callable(registry.get(key)) for key in keys)


def test_balancing_divides_each_part_of_the_loss_by_its_running_size(make_job, tmp_path, features):
    base = distilled(features, weighting={"mode": "uniform"}, distill={"logit_weight": 1})
    plain = fit(make_job(tmp_path / "a", base))
    late = fit(make_job(tmp_path / "b", {**base, "loss": {"balance": True, "balance_warmup": 10}}))
    soon = fit(make_job(tmp_path / "c", {**base, "loss": {"balance": True, "balance_warmup": 0}}))
    assert same(student_of(plain), student_of(late))
    assert not same(student_of(plain), student_of(soon))
    first = rows_of(soon)[0]
    means = states_of(
        fit(make_job(tmp_path / "d", {**base, "loss": {"balance": True}, "train": {"max_steps": 1}}))
    )
    for name, mean in means["loss_balancer"]["means"].items():
        assert mean == pytest.approx(0.9 + 0.1 * first[f"loss_{name}"], rel=1e-5)


@pytest.mark.parametrize(("mode", "rate"), [("reinforce", 0.05), ("legacy", 1e-3)])
def test_the_policy_has_the_rate_of_its_method(make_job, tmp_path, features, mode, rate):
    over = {"weighting": {"mode": mode}, "split": {"reward_mode": "batch"}, "train": {"max_steps": 1}}
    states = states_of(fit(make_job(tmp_path / "run", distilled(features, **over))))
    group = states["agent_optimizer"]["param_groups"][0]
    assert group["lr"] == rate
    assert ("betas" in group) == (mode == "reinforce")


def test_where_a_teachers_file_shows_nothing_it_pulls_the_student_nowhere():
    from medrl.plugins.graft.models.outputs import StudentOutput

    main = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    valid = torch.ones(1, 2, 4, 4, 4)
    valid[:, :, 2:] = 0
    batch = SimpleNamespace(
        logits=[torch.full((1, 2, 4, 4, 4), 9.0)], valid=[valid], mask=torch.ones(1, 4, 4, 4)
    )
    cfg = GraftConfig(method="graft", distill={"logit_weight": 1.0})
    objective = train.Objective(cfg, BINARY, (), ("nnunet",))
    objective.logit_losses(StudentOutput([main], {}), batch).sum().backward()
    assert main.grad is not None
    assert float(main.grad[:, :, 2:].abs().max()) < 1e-8  # what rounding leaves
    assert float(main.grad[:, :, :2].abs().min()) > 1e-6
    (mask,) = objective.masks(batch)
    assert torch.equal(mask, valid[:, :1])
