"""The stages by themselves: what they learn from, rewards fused or separate, a critic of every resolution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medrl.core.adaptation.sets import take
from medrl.core.config import ModelConfig
from medrl.core.errors import ConfigError, DataError
from medrl.core.learned_reward import PairSet
from medrl.core.rl.pixelwise import ppo_terms, rollout
from medrl.plugins.rl4seg3d import loop, scoring, train
from medrl.plugins.rl4seg3d.domains import load_domains
from medrl.plugins.rl4seg3d.landmark_training import LandmarkPairs


@pytest.fixture
def inputs(loop_run, tools):
    """What a stage alone may start from."""
    found = {kind: str(tools.stage_of(loop_run, kind)) for kind in ("source", "style", "corrector")}
    found |= {kind: str(tools.stage_of(loop_run, f"{kind}_1")) for kind in ("anatomical", "landmark")}
    return found | {"actor": found["style"], "pairs": [str(tools.stage_of(loop_run, "pairs_1"))]}


@pytest.fixture
def alone(make_job, inputs, tools):
    """Do one stage alone, from what the loop has made; return the run folder."""

    def do(run, stage, values=None):
        base = {"stage": stage, "alone": True, "inputs": inputs}
        loop.run(make_job(run, tools.merged(base, values or {})))
        return run

    return do


def test_a_voxel_of_the_worked_example():
    """Specification §12.12."""
    one = torch.ones(1)
    for reward, expected in ((0.8, -0.4932), (0.203, 0.3646 - 0.135)):
        terms = ppo_terms(
            -0.5 * one, -0.7 * one, -0.6 * one, reward * one, 0.5,
            clip=0.2, kl=0.015, entropy=0.9 * one, entropy_coef=0.15,
        )  # fmt: skip
        assert float(terms.actor) == pytest.approx(expected, abs=2e-4)


def test_supervised_training_fits_its_windows(alone, tmp_path, tools):
    over = {
        "model": {"name": "rl4seg3d.unet3d_small", "channels": [8, 16]},
        "source": {"steps": 60, "lr": 0.02},
        "train": {"validate_every": 60, "checkpoint_every": 60},
    }
    rows = tools.records(alone(tmp_path / "run", "source", over))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] > 0.5
    assert losses[-1] < 0.35


def test_the_first_ratio_is_one_and_the_policy_begins_as_its_reference(loop_run, tools):
    rows = [row for row in tools.records(tools.stage_of(loop_run, "ppo_1")) if "ratio_error" in row]
    assert [row["ratio_error"] for row in rows] == [0.0] * 3
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"ppo": {"rewards": "separate", "baseline": "critic"}}, {"actor", "critic"}),
        ({"ppo": {"baseline": "group", "group": 2, "sigma_t": 0.0, "sigma_px": 0.0}}, {"actor"}),
        ({"ppo": {"algorithm": "pg"}, "actor": {"actions": "greedy"}}, {"actor"}),
        ({"reward": {"stretch": True, "temporal": 1.0, "fusion": "product"}}, {"actor"}),
    ],
    ids=["separate", "group", "greedy pg", "stretched"],
)
def test_every_kind_of_policy_gradient_trains(alone, tmp_path, tools, values, kept):
    run = alone(tmp_path / "run", "ppo", values)
    held = {name for name in tools.states(run) if not name.endswith("_optimizer")} - {"guard", "watch"}
    assert held == kept
    rows = [row for row in tools.records(run) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_one_reward_by_itself_is_the_fused_one(alone, tmp_path, tools):
    """With one network, separate and fused rewards are the same training, but for the pass that is shared."""
    nets = {"reward": {"nets": ["anatomical"]}, "ppo": {"steps": 2, "inner_steps": 1}}
    fused = tools.states(alone(tmp_path / "a", "ppo", nets))["actor"]
    own = tools.merged(nets, {"ppo": {"rewards": "separate"}})
    separate = tools.states(alone(tmp_path / "b", "ppo", own))["actor"]
    for name, value in fused.items():
        assert torch.allclose(value, separate[name], rtol=0.0, atol=1e-6), name


def test_a_deep_critic_learns_at_every_resolution(make_job, tmp_path, manager):
    deep = ModelConfig(name="rl4seg3d.unet3d", base_filters=2, deep_supervision=True)
    cfg = make_job(tmp_path / "run").config.model_copy(update={"critic": deep})
    critic = train.parts.critic(cfg, manager, channels=1)
    values = critic.train()(torch.rand(1, 1, 64, 64, 4))
    assert [tuple(value.shape) for value in values] == [(1, 64, 64, 4), (1, 32, 32, 4), (1, 16, 16, 2)]
    assert all(0.0 <= float(value.detach().min()) <= float(value.detach().max()) <= 1.0 for value in values)
    assert critic.eval()(torch.rand(1, 1, 64, 64, 4)).shape == (1, 64, 64, 4)


def test_landmark_pairs_move_bases_by_their_number_alone(loop_run, make_job, tmp_path, manager, tools):
    cfg = make_job(tmp_path / "run").config
    domains = load_domains(cfg, manager)
    plain = PairSet(tools.stage_of(loop_run, "pairs_1"))
    pairs = LandmarkPairs(plain, cfg, domains)
    numbers = list(range(len(plain)))
    images, actions, targets = pairs.batch(numbers)
    again = pairs.batch(numbers[3:5])
    assert torch.equal(again.actions, actions[3:5])
    assert torch.equal(again.truths, targets[3:5])
    moved = [n for n in numbers if not torch.equal(actions[n], plain.batch([n]).actions[0])]
    assert 0 < len(moved) < len(plain)
    assert targets.dtype == torch.float32
    assert 0.0 <= float(targets.min()) <= float(targets.max()) <= 1.0
    assert images.shape == (len(plain), 1, 32, 32, 4)


def test_the_landmark_net_fits_its_temperature_to_soft_targets(loop_run, tools):
    last = tools.records(tools.stage_of(loop_run, "landmark_1"))[-1]
    assert {"val_loss", "val_reward", "temperature"} <= set(last)
    assert 0.0 <= last["val_loss"] <= 1.0


PREDICTION = {
    "pairs": {"kind": "prediction", "images": 2, "keep": True, "minimum_dice": 0.0, "validation": 0.5},
    "data": {"split_seed": 4},
    "corrector": {"kind": "temporal"},
    "reward": {"head": "binary", "encoding": "scalar", "criterion": "mse", "init": "random", "weight": 1.0},
    "loop": {"start": "source", "iterations": 2},
    "source": {"steps": 60, "lr": 0.02},
    "ppo": {
        "steps": 1,
        "baseline": "critic",
        "reference": "source",
        "per_iteration": "original",
        "pseudo_labels": True,
        "pseudo_target": "reward",
    },
}
"""The paper's way, in small; one rule, so that an actor of 60 steps has valid masks."""


def test_the_papers_way_runs_two_iterations_with_new_sequences(make_job, tmp_path, tools):
    rules = tmp_path / "some_lv.yaml"
    rules.write_text(
        "medrl_rules: 1\nrows: y\nlabels: {background: 0, lv: 1, myo: 2}\n"
        "rules:\n  lv: {measure: exists, region: lv}\n"
    )
    run = tmp_path / "run"
    loop.run(make_job(run, tools.merged(PREDICTION, {"rules": str(rules)})))
    ids = [{row.origin.id for row in PairSet(tools.stage_of(run, f"pairs_{k}")).rows} for k in (1, 2)]
    assert ids[0]
    assert ids[0].isdisjoint(ids[1])
    assert {row["stage"] for row in tools.records(run)} >= {"03_anatomical_1", "09_ppo_2"}


def test_labels_are_asked_for_only_where_they_are(make_job, tmp_path, manager):
    domains = load_domains(make_job(tmp_path / "run").config, manager)
    windows = domains.target.train.some_windows(2)
    with pytest.raises(DataError, match="no labels"):
        take(windows, [0], torch.device("cpu")).truth()


def test_a_network_that_answers_with_the_truth_scores_one(make_job, tmp_path, manager):
    """Windows are blended over whole sequences; a constant sequence comes back as it is."""
    domains = load_domains(make_job(tmp_path / "run").config, manager)
    sequences = domains.source.val
    rules = train.parts.general.rules_of("echo", domains.label_names)
    masks = [np.asarray(label) for label in sequences.labels]
    summary = scoring.score_masks(masks, sequences, rules).summary()
    assert (summary["dice"], summary["hd"]) == (1.0, 0.0)
    assert (summary["anat_valid"], summary["temporal_valid"]) == (1.0, 1.0)
    assert (summary["LM/mae_mm"], summary["LM/failed_frames"], summary["LM/mistake_per_cycle_5mm"]) == (
        0,
        0,
        0,
    )
    moved = [np.roll(mask, 1, axis=0) for mask in masks]
    found = scoring.score_masks(moved, sequences, rules).summary()
    assert found["LM/mae"] == pytest.approx(1.0)
    assert found["LM/mae_mm_L"] == pytest.approx(float(sequences.spacing_mm[0, 0]))
    frames = sequences.images[0].float() / 255.0
    found = scoring.probabilities(lambda x: torch.cat([x, 1 - x, 0 * x], dim=1), frames)
    wanted = torch.softmax(torch.cat([frames, 1 - frames, 0 * frames]), dim=0)
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(("share", "known"), [(0.0, 0), (0.4, 2), (1.0, 5)])
def test_true_labels_of_known_sequences_are_their_actions(make_job, tmp_path, manager, share, known):
    target = {"gt_frac": share, "allow_labels": True}
    cfg = make_job(tmp_path / "run", {"target": target}).config
    domains = load_domains(cfg, manager)
    names = train.known_sequences(cfg, domains.target.train)
    assert len(names) == known
    assert (domains.target.train.labels is None) == (known == 0)
    if known == 0:
        return
    batch = take(domains.target.train.some_windows(0), range(10), torch.device("cpu"))
    pseudo = {
        "forced": torch.arange(10) == 0,
        "forced_actions": torch.full_like(batch.truth(), 2),
    }
    here = torch.tensor([name.rpartition("_t")[0] in names for name in batch.ids])
    for given, before in (({}, torch.zeros(10, dtype=torch.bool)), (pseudo, pseudo["forced"])):
        found = train.with_truth(given, batch, names)
        assert torch.equal(found["forced"], here | before)
        assert torch.equal(found["forced_actions"][here], batch.truth()[here])
    assert bool((found["forced_actions"][~here] == 2).all())


def test_ppo_takes_true_labels_of_known_sequences_as_actions(alone, tmp_path, monkeypatch):
    played = []

    def watched(*args, **kwargs):
        found = rollout(*args, **kwargs)
        played.append((found, kwargs["forced_actions"]))
        return found

    monkeypatch.setattr(train, "rollout", watched)
    alone(tmp_path / "run", "ppo", {"target": {"gt_frac": 1.0, "allow_labels": True}})
    assert len(played) == 3
    for found, truth in played:
        assert bool(found.forced.all())
        assert torch.equal(found.actions.cpu(), truth)
        assert int(truth.max()) == 2


def test_an_oracle_reward_improves_the_policy(make_job, tmp_path, tools):
    over = {
        "model": {"name": "rl4seg3d.unet3d_small", "channels": [8, 16]},
        "source": {"steps": 30, "lr": 0.02},
        "loop": {"start": "source"},
        "reward": {"name": "rl4seg3d.pixelwise_accuracy"},
        "target": {"allow_labels": True},
        "ppo": {"steps": 15, "lr": 0.005, "batch": 4, "inner_steps": 3, "kl": 0.0, "warmup": 2},
        "train": {"validate_every": 15},
    }
    loop.run(make_job(tmp_path / "run", over))
    rows = tools.records(tools.stage_of(tmp_path / "run", "ppo_1"))
    assert rows[-1]["val_reward"] > rows[0]["start_reward"] + 0.02


def test_a_corrector_that_does_not_learn_is_not_trained(alone, tmp_path):
    with pytest.raises(ConfigError, match="this corrector is not trained"):
        alone(tmp_path / "run", "corrector", {"corrector": {"kind": "temporal"}})
    assert not Path(tmp_path / "run" / "checkpoints" / "last.pt").exists()
