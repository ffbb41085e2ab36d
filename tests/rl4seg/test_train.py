"""The training stages: what they learn, log, keep fixed and warn of."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medrl.core.adaptation import schedules
from medrl.core.adaptation.fitting import Plateau
from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.config import Layer, resolve
from medrl.core.errors import ConfigError, DataError
from medrl.core.learned_reward import PairSet
from medrl.plugins.rl4seg import corrector_training, loop, parts, pretrain, reward_training, train
from medrl.plugins.rl4seg.config import Rl4segConfig
from medrl.plugins.rl4seg.domains import load_domains
from medrl.plugins.rl4seg.watching import Watch


@pytest.fixture
def inputs(loop_run, tools):
    """What a stage alone may start from."""
    return {
        "source": str(tools.stage_of(loop_run, "source")),
        "style": str(tools.stage_of(loop_run, "style")),
        "actor": str(tools.stage_of(loop_run, "style")),
        "corrector": str(tools.stage_of(loop_run, "corrector")),
        "reward": str(tools.stage_of(loop_run, "reward_1")),
        "pairs": [str(tools.stage_of(loop_run, "pairs_1"))],
    }


@pytest.fixture
def alone(make_job, inputs, tools):
    """Do one stage alone, from what the loop has made; return the run folder."""

    def do(run, stage, values=None):
        base = {"stage": stage, "alone": True, "inputs": inputs}
        loop.run(make_job(run, tools.merged(base, values or {})))
        return run

    return do


def rows_of(run, key, tools):
    return [row for row in tools.records(run) if key in row]


# -- supervised ------------------------------------------------------------------------------------


def test_supervised_training_fits_its_images(alone, tmp_path, tools):
    """The original's loss on probabilities cannot fall below 0.55; this one can."""
    over = {
        "model": {"name": "rl4seg.unet_small", "channels": [8, 16]},
        "source": {"steps": 150, "lr": 0.02},
        "train": {"validate_every": 150, "checkpoint_every": 150},
    }
    rows = tools.records(alone(tmp_path / "run", "source", over))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] > 0.5
    assert losses[-1] < 0.15
    assert rows[-1]["val_dice"] > 0.6


def test_cross_entropy_gets_logits():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([20.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)

    actor = parts.as_actor(Rl4segConfig(method="rl4seg"), Fixed(), 3)
    loss = pretrain.cross_entropy(actor, torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4))
    assert float(loss) < 0.05


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_torch(smoothing):
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))

    class Fixed(torch.nn.Module):
        def forward(self, images):
            return logits

    actor = parts.as_actor(Rl4segConfig(method="rl4seg"), Fixed(), 3)
    mine = pretrain.cross_entropy(actor, torch.zeros(2, 1, 4, 5), labels, smoothing=smoothing)
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert float(mine) == pytest.approx(float(theirs), rel=1e-6)


def test_style_goes_on_from_the_source_actor_and_changes_every_image(
    alone, tmp_path, tools, monkeypatch, inputs
):
    seen = []
    original = pretrain.cross_entropy

    def spy(actor, images, labels, **settings):
        if not seen:
            seen.append({name: value.clone() for name, value in actor.network.state_dict().items()})
        seen.append(images.clone())
        return original(actor, images, labels, **settings)

    monkeypatch.setattr(pretrain, "cross_entropy", spy)
    alone(tmp_path / "run", "style")
    assert tools.differences(seen[0], dict(tools.states(Path(inputs["source"]))["actor"])) == []
    assert all(float(images.min()) >= 0.0 and float(images.max()) <= 1.0 for images in seen[1:])
    assert not torch.equal(seen[1], seen[2])


def test_few_patients_are_moved_with_their_labels(alone, tmp_path, monkeypatch):
    seen = []
    original = pretrain.cross_entropy

    def spy(actor, images, labels, **settings):
        seen.append((images.clone(), labels.clone()))
        return original(actor, images, labels, **settings)

    monkeypatch.setattr(pretrain, "cross_entropy", spy)
    alone(tmp_path / "still", "source")
    still = list(seen)
    seen.clear()
    alone(tmp_path / "moved", "source", {"source": {"spatial": 1.0}})
    assert len(still) == len(seen) > 0
    for (before, truth), (after, labels) in zip(still, seen, strict=True):
        assert before.shape == after.shape
        assert not torch.equal(before, after)
        assert 0.0 < float((truth != labels).float().mean()) < 0.5


def test_the_source_is_learned_without_a_target(tmp_path, make_job, tools):
    base = {"stage": "source", "alone": True, "target": {"root": None}}
    loop.run(make_job(tmp_path / "run", base))
    last = [row for row in tools.records(tmp_path / "run") if "val_dice" in row][-1]
    assert "val_target_validity" not in last


def test_a_binary_actor_takes_no_label_smoothing():
    class One(torch.nn.Module):
        def forward(self, images):
            return torch.zeros(1, 1, 2, 2)

    actor = parts.as_actor(Rl4segConfig(method="rl4seg", actor={"kind": "binary"}), One(), 2)
    images, labels = torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2)
    assert float(pretrain.cross_entropy(actor, images, labels)) == pytest.approx(math.log(2.0))
    with pytest.raises(ConfigError, match="binary actor"):
        pretrain.cross_entropy(actor, images, labels, smoothing=0.1)


# -- corrector and reward net ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["denoiser", "vae"])
def test_a_learned_corrector_trains_on_masks_alone(alone, tmp_path, tools, kind, monkeypatch):
    seen = []
    original = corrector_training.draw

    def spy(*args, **settings):
        batch = original(*args, **settings)
        seen.append(batch)
        return batch

    monkeypatch.setattr(corrector_training, "draw", spy)
    over = {"corrector": {"kind": kind, "steps": 30, "lr": 0.01}, "train": {"validate_every": 30}}
    if kind == "vae":
        over["corrector"]["params"] = {"blocks": 1, "channels": 4, "latent": 4}
    rows = tools.records(alone(tmp_path / "run", "corrector", over))
    assert rows[28]["loss"] < rows[0]["loss"]
    assert {"val_dice", "corrupted_dice", "val_validity"} <= set(rows[-1])
    assert len(seen) == 30


def test_a_corrector_that_does_not_learn_is_not_trained(alone, tmp_path):
    with pytest.raises(ConfigError, match="this corrector is not trained"):
        alone(tmp_path / "run", "corrector", {"corrector": {"kind": "morphology"}})


def test_the_reward_net_starts_as_the_style_actor_whatever_the_mask(
    alone, tmp_path, tools, monkeypatch, inputs
):
    seen = []
    original = parts.start_reward

    def spy(cfg, net):
        original(cfg, net)
        seen.append({name: value.clone() for name, value in net.networks[0].state_dict().items()})

    monkeypatch.setattr(parts, "start_reward", spy)
    alone(tmp_path / "run", "reward")
    actor = tools.states(Path(inputs["style"]))["actor"]
    first = "encoder.0.0.weight"
    fold = 4  # pixels folded into channels
    assert torch.equal(seen[0][first][:, :fold], actor[first])
    assert float(seen[0][first][:, fold:].abs().max()) == 0.0
    rest = [name for name in actor if name != first]
    assert all(torch.equal(seen[0][name], actor[name]) for name in rest)


def test_several_reward_nets_differ_and_each_has_a_temperature(alone, tmp_path, tools):
    over = {"reward": {"nets": 2, "steps": 6}}
    reward = tools.states(alone(tmp_path / "run", "reward", over))["reward"]
    assert reward["temperature"].shape == (2,)
    assert not torch.equal(reward["networks.0.head.weight"], reward["networks.1.head.weight"])
    row = tools.records(tmp_path / "run")[-1]
    assert row["temperature"] == pytest.approx(float(reward["temperature"].mean()))
    assert 0.0 <= row["val_auroc"] <= 1.0


def test_the_temperature_is_used_in_ppo_only_where_it_is_asked_for(
    loop_run, make_job, inputs, tools, manager
):
    fitted = tools.states(Path(inputs["reward"]))["reward"]["temperature"]
    assert not torch.equal(fitted, torch.ones(1))
    for calibrated in (False, True):
        cfg = make_job(loop_run, {"reward": {"calibrated": calibrated}, "inputs": inputs}).config
        net = parts.reward_net(cfg, manager, channels=1, classes=3)
        parts.load_reward(cfg, net)
        assert torch.equal(net.temperature, fitted if calibrated else torch.ones(1))


def test_the_reward_net_reads_training_pairs_only_to_learn(alone, tmp_path, inputs, monkeypatch):
    drawn = []
    original = reward_training.draw

    def spy(numbers, size, **settings):
        found = original(numbers, size, **settings)
        drawn.extend(found.tolist())
        return found

    monkeypatch.setattr(reward_training, "draw", spy)
    alone(tmp_path / "run", "reward")
    pairs = PairSet([Path(path) for path in inputs["pairs"]])
    assert {pairs.rows[number].part for number in drawn} == {"train"}


def test_pairs_of_other_images_are_refused(alone, tmp_path):
    with pytest.raises(DataError, match="the data have"):
        alone(tmp_path / "run", "reward", {"sample": {"size": [48, 48]}})


def test_a_plateau_lowers_the_rate_after_its_patience():
    plateau = Plateau(patience=2)
    factors = []
    for loss in (1.0, 0.5, 0.6, 0.6, 0.6, 0.4, 0.4, 0.4, 0.4):
        plateau.look(loss)
        factors.append(plateau.factor)
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01])
    other = Plateau(patience=2)
    other.load_state_dict(plateau.state_dict())
    assert (other.factor, other.best, other.waited) == (plateau.factor, plateau.best, plateau.waited)


# -- reinforcement learning ------------------------------------------------------------------------


def test_the_first_ratio_is_one_and_the_policy_begins_as_its_reference(loop_run, tools):
    rows = rows_of(tools.stage_of(loop_run, "ppo_1"), "ratio_error", tools)
    assert len(rows) == 4
    assert all(row["ratio_error"] == 0.0 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert rows[-1]["kl"] > 0.0


def test_validation_measures_reward_and_validity_without_labels(loop_run, tools):
    folder = tools.stage_of(loop_run, "ppo_1")
    rows = rows_of(folder, "val_reward", tools)
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert 0.0 <= row["val_reward"] <= 1.0
        assert 0.0 <= row["val_validity"] <= 1.0
    first = tools.records(folder)[0]
    assert {"start_reward", "start_validity", "alarm_low_start_validity", "alarm_hacking"} <= set(first)
    assert "val_dice" not in {key for row in tools.records(folder) for key in row}
    best = max(rows, key=lambda row: row["val_reward"])
    assert load_best(folder)["step"] == best["step"]


def load_best(folder):
    return load_checkpoint(find_checkpoint(folder, "best")).meta


@pytest.fixture
def players_of(make_job, inputs, tmp_path, monkeypatch, tools):
    """Run PPO and return actor, reference and critic with what they were at the start."""

    def run(values):
        seen = {}
        original = train.start_players

        def spy(rt, cfg, data):
            players = original(rt, cfg, data)
            seen["players"] = players
            seen["reference"] = state_of(players.reference)
            seen["actor"] = state_of(players.actor)
            return players

        monkeypatch.setattr(train, "start_players", spy)
        base = {"stage": "ppo", "alone": True, "inputs": inputs}
        loop.run(make_job(tmp_path / "run", tools.merged(base, values)))
        return seen

    return run


def state_of(module):
    if module is None:
        return None
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("bn_mode", ["eval", "batch"])
def test_the_reference_keeps_parameters_and_buffers_to_the_last_bit(players_of, tools, bn_mode):
    seen = players_of({"actor": {"bn_mode": bn_mode}, "ppo": {"lr": 0.01}})
    reference = seen["players"].reference
    assert tools.differences(seen["reference"], state_of(reference)) == []
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    after = state_of(seen["players"].actor)
    moved = [name for name in after if not torch.equal(after[name], seen["actor"][name])]
    assert any(name.endswith("head.weight") for name in moved)
    assert any("running_mean" in name for name in moved) == (bn_mode == "batch")


@pytest.mark.parametrize(
    ("values", "parts_kept"),
    [
        ({"baseline": "critic", "entropy": 0.05}, {"actor", "critic"}),
        ({"baseline": "group", "group": 2}, {"actor"}),
        ({"algorithm": "pg"}, {"actor"}),
        ({"baseline": "critic", "reference": "source", "collapse": 0.0}, {"actor", "critic"}),
    ],
    ids=["critic", "group", "pg", "no guard"],
)
def test_every_kind_of_policy_gradient_trains(alone, tmp_path, tools, values, parts_kept):
    run = alone(tmp_path / "run", "ppo", {"ppo": values})
    held = {name for name in tools.states(run) if not name.endswith("_optimizer")} - {"guard", "watch"}
    assert held == parts_kept
    rows = rows_of(run, "loss", tools)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) for row in rows)
    if "critic" in parts_kept:
        assert any(row["critic_loss"] > 0.0 for row in rows)


def test_a_resnet_can_be_the_critic(alone, tmp_path, tools, make_job, inputs):
    base = {"stage": "ppo", "alone": True, "inputs": inputs, "ppo": {"baseline": "critic", "steps": 1}}
    job = make_job(tmp_path / "run", base)
    values = job.resolved.values() | {"critic": {"name": "rl4seg.resnet18"}}
    loop.run(replace(job, resolved=resolve(Rl4segConfig, [Layer("test", values)])))
    assert rows_of(tmp_path / "run", "critic_loss", tools)[0]["critic_loss"] > 0.0


def test_multiplying_the_critics_gradient_leaves_the_actor_alone(alone, tmp_path, tools, monkeypatch):
    """Actor and critic are clipped apart."""
    update = sys.modules["medrl.core.rl.pixelwise.update"]  # the package has a function of this name
    values = {
        "ppo": {"baseline": "critic", "steps": 1, "inner_steps": 1, "lr": 0.01, "critic_clip_norm": 0.5}
    }
    plain = tools.states(alone(tmp_path / "a", "ppo", values))["actor"]
    original = update.ppo_terms

    def louder(*args, **settings):
        terms = original(*args, **settings)
        return terms._replace(critic=1000.0 * terms.critic)

    monkeypatch.setattr(update, "ppo_terms", louder)
    loud = tools.states(alone(tmp_path / "b", "ppo", values))["actor"]
    assert tools.differences(plain, loud) == []


def test_an_oracle_reward_improves_the_policy(make_job, tmp_path, tools):
    over = {
        "model": {"name": "rl4seg.unet_small", "channels": [8, 16]},
        "source": {"steps": 60, "lr": 0.02},
        "loop": {"start": "source"},
        "reward": {"name": "rl4seg.pixelwise_accuracy"},
        "target": {"allow_labels": True},
        "ppo": {"steps": 40, "lr": 0.005, "batch": 6, "inner_steps": 3, "kl": 0.0, "warmup": 2},
        "train": {"validate_every": 40},
    }
    run = tmp_path / "run"
    loop.run(make_job(run, over))
    rows = tools.records(tools.stage_of(run, "ppo_1"))
    before, after = rows[0]["start_reward"], rows[-1]["val_reward"]
    assert after > before + 0.05
    assert after > 0.85


def test_target_images_grow_with_the_iterations_only_where_predictions_are_the_pairs(
    make_job, tmp_path, manager
):
    cfg = make_job(tmp_path / "a").config
    data = load_domains(cfg, manager)
    everything = len(data.target.train.ids)
    assert len(data.target_images(cfg).ids) == everything
    grows = {"pairs": {"kind": "prediction", "images": 4}, "corrector": {"kind": "morphology"}}
    sizes, news = [], []
    for iteration in (1, 2, 3):
        cfg = make_job(tmp_path / "a", {**grows, "iteration": iteration}).config
        sizes.append(len(data.target_images(cfg).ids))
        news.append(set(data.new_images(cfg).ids))
    assert sizes == [4, 8, min(12, everything)]
    assert news[0].isdisjoint(news[1])
    assert news[0] | news[1] | news[2] == set(data.target.train.ids)


# -- alarms and rates ------------------------------------------------------------------------------


def found(reward, validity):
    return {
        "val_reward": reward,
        "val_reward_greedy": reward,
        "val_validity": validity,
        "val_foreground": 0.2,
    }


def test_a_start_with_few_valid_masks_warns_once_and_says_what_to_do(caplog):
    watch = Watch(Rl4segConfig(method="rl4seg", loop={"start": "source"}))
    assert watch.begin(found(0.5, 0.19))["alarm_low_start_validity"] == 1.0
    assert watch.look(found(0.6, 0.19))["alarm_low_start_validity"] == 1.0
    assert len(caplog.records) == 1
    assert "--start style" in caplog.text
    caplog.clear()
    Watch(Rl4segConfig(method="rl4seg")).begin(found(0.5, 0.0))
    assert "--start style" not in caplog.text
    assert "actors longer" in caplog.text
    assert Watch(Rl4segConfig(method="rl4seg")).begin(found(0.5, 0.21))["alarm_low_start_validity"] == 0.0


def test_a_reward_that_rises_while_validity_falls_warns(caplog):
    watch = Watch(Rl4segConfig(method="rl4seg"))
    watch.begin(found(0.80, 0.60))
    assert watch.look(found(0.85, 0.58))["alarm_hacking"] == 0.0
    assert watch.look(found(0.79, 0.40))["alarm_hacking"] == 0.0
    resumed = Watch(Rl4segConfig(method="rl4seg"))
    resumed.load_state_dict(watch.state_dict())
    assert resumed.look(found(0.85, 0.40))["alarm_hacking"] == 1.0
    assert "the share of valid masks fell by 20%" in caplog.text


def test_rates_rise_and_fall_as_their_schedules_say():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=100)
    for step in range(1, 101):
        assert schedules.one_cycle(step, 100) == pytest.approx(torchs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if step < 100:
            torchs.step()
    assert [schedules.one_cycle(1, steps) for steps in (1, 2, 3)] == [1.0, 1.0, 1.0]
    warm = [schedules.warm_and_decay(step, 60, 10, linear=True) for step in range(1, 61)]
    assert warm[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert warm[10] == 1.0
    assert warm[-1] == pytest.approx(1 / 50)
