"""Training of the reward model and of the policy on tiny phantoms."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import CheckpointError, ConfigError, DataError
from medrl.plugins.kspace import domain, parts, running, supervised, train
from medrl.plugins.kspace.game import Game
from medrl.plugins.kspace.plan import Plan
from medrl.plugins.kspace.reward_training import segmentation_loss, soft_dice


def test_a_reward_run_logs_dice_by_acceleration_and_keeps_the_mean_of_the_weights(reward_run, tools):
    rows = tools.records(reward_run)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    (last,) = [row for row in rows if "val_dice" in row]
    assert {"val_dice_r1", "val_dice_r4"} <= set(last)
    found = tools.states(reward_run)
    assert {"network", "segmenter", "mean", "optimizer"} <= set(found)
    assert tools.differences(found["network"], found["segmenter"]) != []


def test_a_policy_run_warms_up_in_two_halves_and_goes_on_with_ppo(policy_run, tools):
    rows = [row for row in tools.records(policy_run) if "phase" in row]
    phases = [row["phase"] for row in rows]
    assert phases == (["collect"] * 2 + ["imitate"] * 2) * 2 + ["ppo"] * 3
    assert all(
        row["imitation_gain"] <= row["imitation_best"] + 1e-7 for row in rows if row["phase"] == "imitate"
    )
    assert all(row["updates"] >= 1 for row in rows if row["phase"] == "ppo")


def test_a_policy_run_measures_every_budget_and_keeps_the_best(policy_run, tools):
    scores = [row for row in tools.records(policy_run) if "val_score" in row]
    assert all({"val_score_2", "val_score_3"} <= set(row) for row in scores)
    best = max(row["val_score"] for row in scores)
    manifest = load_checkpoint(find_checkpoint(policy_run, "best")).meta
    assert manifest["metric"] == pytest.approx(best, abs=1e-12)


def test_the_policy_run_holds_the_reward_model_unchanged(policy_run, reward_run, tools):
    trained = tools.states(reward_run, "best")["segmenter"]
    assert tools.differences(tools.states(policy_run)["segmenter"], trained) == []


def test_a_policy_run_trains_what_it_needs_and_nothing_names(tmp_path, make_job, tools):
    running.run(make_job(tmp_path / "run", {"warm": {"kind": "none"}, "ppo": {"updates": 1}}))
    assert len([row for row in tools.records(tmp_path / "run" / "stages" / "reward") if "loss" in row]) == 4
    assert [row["phase"] for row in tools.records(tmp_path / "run") if "phase" in row] == ["ppo"]


def test_the_first_minibatch_of_ppo_has_a_ratio_of_one(tmp_path, make_job, reward_run, monkeypatch):
    kls, clipped = [], []
    original = train.ppo_update

    def watched(policy, optimizer, batch, config, **kwargs):
        log_probs, _, _ = policy.evaluate_actions(batch.observations, batch.actions, batch.masks)
        ratio = (log_probs - batch.log_probs).exp()
        kls.append(float((ratio - 1.0).detach().abs().max()))
        clipped.append(float(((ratio - 1.0).abs() > config.clip).float().mean()))
        return original(policy, optimizer, batch, config, **kwargs)

    monkeypatch.setattr(train, "ppo_update", watched)
    running.run(make_job(tmp_path / "run", {"inputs": {"reward": str(reward_run)}}))
    assert len(kls) == 3
    assert max(kls) < 1e-5
    assert max(clipped) == 0.0


def test_the_faithful_network_and_the_reward_of_asmr_learn_too(tmp_path, make_job, reward_run, tools):
    values = {
        "inputs": {"reward": str(reward_run)},
        "agent": {"name": "kspace.faithful", "steps_dim": 8, "feature_dim": 8},
        "reward": {"mode": "asmr", "rec": 0.0, "seg": 1.0, "delay_step": 1},
        "budget": {"shared": True},
        "sampler": {"kind": "weighted"},
        "warm": {"kind": "none"},
        "ppo": {"updates": 1, "group": 1, "normalise": "minibatch"},
    }
    running.run(make_job(tmp_path / "run", values, without=("agent",)))
    (row,) = [row for row in tools.records(tmp_path / "run") if row.get("phase") == "ppo"]
    assert row["updates"] > 0
    # h(z) of a log-probability is negative.
    assert row["reward"] < 0


@pytest.mark.parametrize("mode", ["delta", "terminal"])
def test_every_reward_mode_trains(tmp_path, make_job, reward_run, tools, mode):
    values = {"inputs": {"reward": str(reward_run)}, "reward": {"mode": mode}, "warm": {"kind": "none"}}
    running.run(make_job(tmp_path / "run", values))
    assert all("reward" in row for row in tools.records(tmp_path / "run") if row.get("phase") == "ppo")


def test_stacks_train_with_a_reward_model_of_slices(tmp_path, make_job, reward_run, tools):
    values = {
        "acquisition": {"geometry": "stack"},
        "inputs": {"reward": str(reward_run)},
        "warm": {"states": 8},
        "ppo": {"updates": 1},
    }
    running.run(make_job(tmp_path / "run", values))
    assert 0 < tools.records(tmp_path / "run")[-1]["val_score"] < 1


def test_volumes_train_with_a_reward_model_of_volumes(tmp_path, make_job, tools):
    values = {
        "acquisition": {"geometry": "volume3d"},
        "sample": {"phase_scope": "scan"},
        "model": {"name": "kspace.unet", "base": 2},
        "seg": {"steps": 1},
        "warm": {"states": 8},
        "ppo": {"updates": 1},
    }
    running.run(make_job(tmp_path / "run", values, without=("model",)))
    assert 0 < tools.records(tmp_path / "run")[-1]["val_score"] < 1
    weights = tools.states(tmp_path / "run")["segmenter"]
    assert max(value.ndim for value in weights.values()) == 5


def test_a_blind_policy_chooses_the_same_lines_for_every_case(tmp_path, make_job, manager, reward_run):
    from medrl.plugins.kspace.policies import AgentLines
    from medrl.plugins.kspace.restoring import open_run

    running.run(make_job(tmp_path / "run", {"inputs": {"reward": str(reward_run)}, "blind": True}))
    found = open_run(tmp_path / "run", manager, torch.device("cpu"))
    cases = domain.load(found.cfg).cases("val", found.cfg, torch.device("cpu"))
    observer = found.observer(cases)
    lines = AgentLines(found.policy()).order(observer, torch.arange(len(cases)), 3, torch.Generator())
    assert (lines == lines[0]).all()


def test_without_labels_only_the_reconstruction_is_rewarded(make_job, tmp_path, phantoms):
    job = make_job(tmp_path / "run")
    data = domain.load(job.config)
    assert data.classes == 4
    bare = domain.Data(
        type(data.parts)(
            train=data.parts.train.without_labels(),
            val=data.parts.val.without_labels(),
            test=None,
            plan=data.parts.plan,
            dataset=data.parts.dataset,
        )
    )
    with job.runtime() as rt, pytest.raises(DataError, match="no labels"):
        Game.build(rt, job.config, bare)


def test_the_reconstruction_network_is_trained_and_used(tmp_path, make_job, tools):
    values = {"acquisition": {"recon": "unet"}, "warm": {"states": 8}, "ppo": {"updates": 1}}
    running.run(make_job(tmp_path / "run", values))
    assert "val_ssim" in tools.records(tmp_path / "run" / "stages" / "recon")[-1]
    assert {"agent", "segmenter", "recon"} <= set(tools.states(tmp_path / "run"))


def test_a_run_that_is_no_reward_model_is_refused(make_job, tmp_path, policy_run, manager):
    cfg = make_job(tmp_path).config
    network = parts.segmenter(cfg, manager, classes=4)
    with pytest.raises(CheckpointError, match="holds no"):
        parts.load_part(policy_run, "recon", network, "inputs.recon")
    with pytest.raises(ConfigError, match="does not exist"):
        parts.load_part(tmp_path / "nowhere", "segmenter", network, "inputs.reward")


# -- parts of the loop ------------------------------------------------------------------------------------


def test_the_plan_of_a_run_covers_every_step_once():
    plan = Plan(collects=2, epochs=3, updates=4)
    phases = [plan.at(step)[0] for step in range(1, plan.total + 1)]
    assert phases == (["collect"] * 2 + ["imitate"] * 3) * 2 + ["ppo"] * 4
    assert [step for step in range(1, 15) if plan.ends_phase(step)] == [2, 5, 7, 10]
    assert [plan.imitation_factor(number) for number in (1, 3, 4, 6)] == pytest.approx([1.0, 0.05, 1.0, 0.05])
    assert [plan.ppo_factor(number) for number in (1, 3)] == [1.0, 0.5]


def test_two_ranks_draw_together_what_one_draws(make_job, tmp_path):
    class Place:
        def __init__(self, rank, world):
            self.rank, self.world_size = rank, world

    cfg = make_job(tmp_path).config
    cases = domain.load(cfg).cases("train", cfg, torch.device("cpu"), supervised=True)
    half = cfg.seg.model_copy(update={"batch": 2})

    def draw(place, stage):
        return supervised.draw_batch(place, cases, cfg, stage, name="x", step=3, augment=cfg.seg.augment)

    whole = draw(Place(0, 1), cfg.seg)
    two = [draw(Place(rank, 2), half) for rank in (0, 1)]
    assert whole.ids == two[0].ids + two[1].ids
    assert torch.equal(whole.mask, torch.cat([part.mask for part in two]))
    assert torch.equal(whole.cases.kspace, torch.cat([part.cases.kspace for part in two]))


def test_soft_dice_of_the_truth_is_one_and_the_background_counts_only_when_asked():
    labels = torch.tensor([[[0, 1], [2, 0]]])
    sure = 50.0 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    assert float(soft_dice(sure, labels)) == pytest.approx(1.0, abs=1e-6)
    wrong = 50.0 * torch.nn.functional.one_hot(torch.zeros_like(labels), 3).movedim(-1, 1).float()
    assert float(soft_dice(wrong, labels)) == pytest.approx(0.0, abs=1e-6)
    # Two of four pixels right: 2·2 / (4 + 2).
    assert float(soft_dice(wrong, labels, background=True)) == pytest.approx(2 / 9, abs=1e-6)


def test_further_outputs_count_half_as_much_each(make_job, tmp_path):
    cfg = make_job(tmp_path, {"seg": {"dice": 0.0}}).config
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    good, bad = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    good[:, 0], bad[:, 1] = 4.0, 4.0
    one, other = (float(segmentation_loss(cfg, [item], labels)) for item in (good, bad))
    both = float(segmentation_loss(cfg, [good, bad], labels))
    assert both == pytest.approx(2 / 3 * one + 1 / 3 * other, rel=1e-6)


def test_the_running_mean_starts_at_a_tenth_and_leaves_the_network_alone():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 0.0)
    mean = supervised.RunningMean(network, 0.99)
    torch.nn.init.constant_(network.weight, 1.0)
    mean.update(network)
    assert float(mean.network.weight) == pytest.approx(0.9)
    mean.update(network)
    assert float(mean.network.weight) == pytest.approx(1.0 - 0.1 * 2 / 11)
    assert float(network.weight) == 1.0


def test_ppo_goes_on_from_a_policy_with_the_scales_of_its_features(
    tmp_path, make_job, reward_run, policy_run, tools
):
    values = {
        "inputs": {"reward": str(reward_run)},
        "warm": {"kind": "none"},
        "ppo": {"updates": 1},
    }
    start = find_checkpoint(policy_run, "best")
    job = dataclasses.replace(make_job(tmp_path / "run", values), init_from=start)
    running.run(job)
    before, after = tools.states(policy_run, "best")["agent"], tools.states(tmp_path / "run")["agent"]
    scales = [name for name in before if "scale" in name]
    assert scales
    assert all(torch.equal(before[name], after[name]) for name in scales)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_wrong_paths_are_found_before_a_run_folder_is_made(tmp_path, make_job):
    run = tmp_path / "run"
    with pytest.raises(DataError, match="nowhere"):
        running.run(make_job(run, {"data": {"root": str(tmp_path / "nowhere")}}))
    with pytest.raises(CheckpointError, match="nothing"):
        running.run(make_job(run, {"inputs": {"reward": str(tmp_path / "nothing")}}))
    with pytest.raises(ConfigError, match=r"data\.root"):
        running.run(make_job(run, without=("data",)))
    assert not run.exists()
