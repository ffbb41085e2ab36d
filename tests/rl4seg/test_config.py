"""The config of rl4seg: every field explained, presets as the sources have them, mistakes named."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from pydantic import BaseModel

from medrl.core.config import Layer, flatten, parse_yaml, resolve, resolve_method
from medrl.core.errors import ConfigError
from medrl.plugins.rl4seg.config import Rl4segConfig
from medrl.plugins.rl4seg.stages import batch_of, interval_of, plan_stages, steps_of
from medrl.plugins.rl4seg.train import settings

_spec = importlib.util.spec_from_file_location(
    "rl4seg_write_defaults", Path(__file__).parents[1] / "write_defaults.py"
)
write_defaults = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(write_defaults)

PRESETS = ("smoke", "small", "paper", "release")


def blocks(model, prefix=""):
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from blocks(kind, f"{prefix}{name}.")


def config(**values):
    return resolve(Rl4segConfig, [Layer("test", {"method": "rl4seg", **values})]).config


@pytest.mark.parametrize(("name", "field"), list(blocks(Rl4segConfig)), ids=lambda item: str(item)[:40])
def test_every_field_says_what_it_means(name, field):
    assert field.description
    assert len(field.description) > 8


def test_the_defaults_file_holds_every_value_of_the_model_and_nothing_else():
    stored = parse_yaml(write_defaults.path("rl4seg").read_text())
    model = Rl4segConfig(method="rl4seg").model_dump(mode="json")
    model.pop("medrl")
    assert flatten(stored) == flatten(model), "run python tests/write_defaults.py rl4seg"
    assert write_defaults.path("rl4seg").read_text() == write_defaults.render("rl4seg")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_as_written(manager, preset):
    resolved = resolve_method(manager, "rl4seg", preset=preset)
    assert f"preset {preset}" in set(resolved.origins.values())


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_the_presets_of_the_original_have_its_values(manager, preset):
    cfg = resolve_method(manager, "rl4seg", preset=preset).config
    assert (cfg.model.name, cfg.critic.name, cfg.reward_model.name) == ("rl4seg.unet",) * 3
    assert (cfg.reward.head, cfg.reward.encoding, cfg.reward.init) == ("binary", "scalar", "random")
    assert (cfg.reward.epochs, cfg.reward.batch, cfg.reward.lr, cfg.reward.schedule) == (
        50,
        64,
        1e-3,
        "plateau",
    )
    assert (cfg.pairs.kind, cfg.pairs.images, cfg.pairs.keep) == ("prediction", 2500, True)
    assert cfg.corrector.kind == "vae"
    assert (cfg.ppo.baseline, cfg.ppo.reference, cfg.actor.bn_mode) == ("critic", "source", "batch")
    assert (cfg.ppo.clip, cfg.ppo.inner_steps, cfg.ppo.lr, cfg.ppo.clip_norm) == (0.2, 5, 5e-4, 0.5)
    assert (cfg.ppo.epochs, cfg.ppo.select, cfg.ppo.pseudo_labels) == (5, "best", True)
    assert (cfg.source.epochs, cfg.source.batch, cfg.source.lr, cfg.source.select) == (50, 32, 1e-3, "best")
    assert (cfg.loop.iterations, cfg.loop.start) == (4, "source")
    assert cfg.loop.shrink_perturb == (preset == "release")
    assert not cfg.target.allow_labels


@pytest.mark.parametrize(
    ("iteration", "entropy", "kl", "batch"),
    [(1, 0.15, 0.05, 8), (2, 0.075, 0.025, 16), (3, 0.05, 0.1 / 6, 24), (4, 0.0375, 0.0125, 32)],
)
def test_the_paper_divides_entropy_and_kl_by_twice_the_iteration(manager, iteration, entropy, kl, batch):
    layer = Layer("test", {"iteration": iteration})
    cfg = resolve_method(manager, "rl4seg", preset="paper", layers=[layer]).config
    numbers = settings(cfg)
    assert numbers.entropy == pytest.approx(entropy)
    assert numbers.kl == pytest.approx(kl)
    assert batch_of(cfg.ppo, cfg) == batch
    assert batch_of(cfg.source, cfg) == 32


def test_the_small_preset_has_the_steps_of_the_findings(manager):
    cfg = resolve_method(manager, "rl4seg", preset="small").config
    steps = (cfg.source.steps, cfg.style.steps, cfg.corrector.steps, cfg.reward.steps, cfg.ppo.steps)
    assert steps == (400, 400, 500, 300, 60)
    assert (cfg.pairs.count, cfg.train.batch_size, cfg.train.precision) == (1920, 16, "bf16")
    ppo = cfg.ppo
    assert (ppo.inner_steps, ppo.lr, ppo.warmup, ppo.kl, ppo.entropy, ppo.clip) == (
        3,
        5e-4,
        10,
        0.02,
        0.0,
        0.2,
    )
    assert (ppo.baseline, ppo.baseline_value, ppo.sigma_px, ppo.decay) == ("constant", 0.5, 2.0, "linear")
    assert (cfg.reward.name, cfg.reward.head, cfg.reward.init) == ("rl4seg.composite", "class", "style")


def test_the_default_is_the_recipe_of_the_findings_and_the_paper_that_of_the_original(manager):
    cfg = resolve_method(manager, "rl4seg").config
    names = [stage.name for stage in plan_stages(cfg)]
    assert names == [
        "01_source",
        "02_style",
        "03_corrector",
        "04_pairs_1",
        "05_reward_1",
        "06_ppo_1",
        "07_test",
    ]
    paper = [stage.kind for stage in plan_stages(resolve_method(manager, "rl4seg", preset="paper").config)]
    assert paper == ["source", "corrector", *["pairs", "reward", "ppo"] * 4, "test"]


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ({"loop": {"start": "source"}, "reward": {"name": "rl4seg.pixelwise_accuracy"}}, ["source", "ppo"]),
        ({"inputs": {"reward": "r", "corrector": "c", "source": "s"}}, ["style", "ppo"]),
        (
            {"inputs": {"source": "s", "style": "t"}, "corrector": {"kind": "atlas"}},
            ["pairs", "reward", "ppo"],
        ),
    ],
    ids=["oracle", "given", "atlas"],
)
def test_stages_that_nothing_needs_are_left_out(values, kinds):
    assert [stage.kind for stage in plan_stages(config(**values))] == [*kinds, "test"]


def test_steps_come_from_the_stage_from_its_epochs_or_from_the_limit_of_a_trial():
    cfg = config(source={"steps": 0, "epochs": 3, "batch": 8}, train={"batch_size": 4})
    assert steps_of(cfg.source, cfg, 20) == 9
    assert steps_of(cfg.source, cfg, 20, world_size=2) == 6
    assert interval_of(cfg.source, cfg, 9) == 3
    assert interval_of(cfg.style, cfg, 100) == 25
    trial = config(source={"steps": 50}, train={"max_steps": 2})
    assert steps_of(trial.source, trial, 20) == 2


def test_another_reward_keeps_the_settings_of_its_training(manager):
    layer = Layer("--reward", {"reward": {"name": "rl4seg.reward_unet"}})
    cfg = resolve_method(manager, "rl4seg", preset="small", layers=[layer]).config
    assert (cfg.reward.name, cfg.reward.steps) == ("rl4seg.reward_unet", 300)


def test_a_file_of_rules_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config(rules="mine.yaml").rules == str(tmp_path / "mine.yaml")
    assert config(rules="echo_atrium").rules == "echo_atrium"


def test_all_mistakes_are_reported_together_with_suggestions():
    layers = [
        Layer("file", {"method": "rl4seg", "rewrad": {"head": "class"}, "ppo": {"inner_step": 3}}),
        Layer("--set", {"loop": {"iterations": 0}}),
    ]
    with pytest.raises(ConfigError) as error:
        resolve(Rl4segConfig, layers)
    text = "\n".join(error.value.problems)
    assert "'reward'" in text
    assert "'inner_steps'" in text
    assert "loop.iterations" in text


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"corrector": {"kind": "none"}}, "needs a corrector"),
        ({"pairs": {"kind": "prediction"}, "corrector": {"kind": "none"}}, "needs a corrector"),
        ({"reward": {"head": "binary"}}, "needs reward.head"),
        ({"ppo": {"pseudo_labels": True}}, "pairs.kind"),
        ({"train": {"accumulate": 2}}, "accumulate"),
        ({"sample": {"size": [64, 0]}}, "size"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, word):
    with pytest.raises(ConfigError, match=word):
        config(**values)
