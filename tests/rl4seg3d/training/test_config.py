"""The config of rl4seg3d: every field explained, presets valid, contradictions refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from pydantic import BaseModel

from medrl.core.config import Layer, flatten, known_keys, parse_yaml, resolve, resolve_method
from medrl.core.errors import ConfigError
from medrl.core.jobs import ConfigOption
from medrl.plugins.rl4seg3d import commands_train
from medrl.plugins.rl4seg3d.config import Rl4seg3dConfig
from medrl.plugins.rl4seg3d.stages import course_of, plan_stages
from medrl.plugins.rl4seg3d.train import settings

_spec = importlib.util.spec_from_file_location(
    "rl4seg3d_write_defaults", Path(__file__).parents[2] / "write_defaults.py"
)
write_defaults = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(write_defaults)


def blocks(model, prefix=""):
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from blocks(kind, f"{prefix}{name}.")


def config(**values):
    return resolve(Rl4seg3dConfig, [Layer("test", {"method": "rl4seg3d", **values})]).config


def test_every_field_says_what_it_means():
    assert [name for name, field in blocks(Rl4seg3dConfig) if len(field.description or "") < 9] == []


def test_the_defaults_file_holds_every_value_of_the_model_and_nothing_else():
    model = Rl4seg3dConfig(method="rl4seg3d").model_dump(mode="json")
    model.pop("medrl")
    text = write_defaults.path("rl4seg3d").read_text()
    assert flatten(parse_yaml(text)) == flatten(model)
    assert text == write_defaults.render("rl4seg3d"), "run python tests/write_defaults.py rl4seg3d"


@pytest.mark.parametrize("preset", ["smoke", "small", "paper"])
def test_every_preset_is_valid_as_written(manager, preset):
    resolved = resolve_method(manager, "rl4seg3d", preset=preset)
    assert f"preset {preset}" in set(resolved.origins.values())


@pytest.mark.parametrize(("iteration", "entropy", "kl"), [(1, 0.15, 0.05), (3, 0.05, 0.05 / 3)])
def test_the_paper_divides_entropy_and_kl_by_the_iteration(manager, iteration, entropy, kl):
    layer = Layer("test", {"iteration": iteration})
    cfg = resolve_method(manager, "rl4seg3d", preset="paper", layers=[layer]).config
    numbers = settings(cfg)
    assert (numbers.entropy, numbers.kl) == (pytest.approx(entropy), pytest.approx(kl))
    assert (numbers.clip, numbers.inner_steps, cfg.ppo.lr, cfg.ppo.critic_lr) == (0.2, 4, 0.01, 0.005)
    assert (cfg.loop.iterations, cfg.reward.nets) == (4, ("anatomical", "landmark"))
    for block in (cfg.source, cfg.reward):
        course = course_of(block, cfg, 160)
        assert (course.batch, course.accumulate, course.steps) == (1, 16, 500)


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ({}, ["source", "style", "corrector", "pairs", "anatomical", "landmark", "ppo"]),
        (
            {"loop": {"start": "source"}, "reward": {"name": "rl4seg3d.pixelwise_accuracy"}},
            ["source", "ppo"],
        ),
        (
            {"reward": {"nets": ["landmark"]}, "inputs": {"source": "s", "style": "t"}},
            ["pairs", "landmark", "ppo"],
        ),
        (
            {"inputs": {"anatomical": "a", "source": "s", "style": "t", "corrector": "c"}},
            ["pairs", "landmark", "ppo"],
        ),
        (
            {"loop": {"iterations": 2}, "reward": {"nets": ["anatomical"], "weight": 1.0}},
            ["source", "style", "pairs", "anatomical", "ppo", "pairs", "anatomical", "ppo"],
        ),
    ],
    ids=["default", "oracle", "landmark alone", "given", "two iterations"],
)
def test_stages_that_nothing_needs_are_left_out(values, kinds):
    assert [stage.kind for stage in plan_stages(config(**values))] == [*kinds, "test"]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"corrector": {"kind": "none"}}, "needs a corrector"),
        ({"reward": {"head": "binary"}}, "needs a corrector and reward.head"),
        ({"reward": {"nets": []}}, "one or more"),
        ({"reward": {"criterion": "mse"}}, "head `binary`"),
        ({"ppo": {"pseudo_labels": True}}, "pairs.kind"),
        ({"target": {"gt_frac": 0.5}}, "allow_labels"),
        ({"sample": {"size": [40, 40]}}, "multiple"),
        ({"sample": {"spacing_mm": [0.4, 0]}}, "spacing_mm"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, word):
    with pytest.raises(ConfigError, match=word):
        config(**values)


def test_every_option_names_a_config_key_and_the_stages_are_those_of_the_config():
    options = [item for item in commands_train.train.params if isinstance(item, ConfigOption)]
    keys = known_keys(Rl4seg3dConfig)
    assert [item.config_key for item in options if item.config_key not in keys] == []
    (stage,) = [item for item in options if item.name == "stage"]
    assert list(stage.type.choices) == Rl4seg3dConfig.model_json_schema()["properties"]["stage"]["enum"]
