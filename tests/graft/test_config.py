"""The config of graft: every field explained, presets valid, mistakes named."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from pydantic import BaseModel

from medrl.core.config import Layer, flatten, parse_yaml, resolve, resolve_method
from medrl.core.errors import ConfigError
from medrl.plugins.graft.config import GraftConfig

_spec = importlib.util.spec_from_file_location(
    "write_defaults", Path(__file__).parents[1] / "write_defaults.py"
)
write_defaults = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(write_defaults)

PRESETS = ("smoke", "small", "paper", "legacy")


def blocks(model, prefix=""):
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from blocks(kind, f"{prefix}{name}.")


@pytest.mark.parametrize(("name", "field"), list(blocks(GraftConfig)), ids=lambda item: str(item)[:40])
def test_every_field_says_what_it_means(name, field):
    assert field.description
    assert len(field.description) > 8


def test_the_defaults_file_holds_every_value_of_the_model_and_nothing_else():
    stored = parse_yaml(write_defaults.path("graft").read_text())
    model = GraftConfig(method="graft").model_dump(mode="json")
    model.pop("medrl")
    assert flatten(stored) == flatten(model), "run python tests/write_defaults.py graft"
    assert write_defaults.path("graft").read_text() == write_defaults.render("graft")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_as_written(manager, preset):
    resolved = resolve_method(manager, "graft", preset=preset)
    assert f"preset {preset}" in set(resolved.origins.values())


def test_the_legacy_preset_has_the_published_values(manager):
    config = resolve_method(manager, "graft", preset="legacy").config
    assert config.distill.feature_loss == "cosine"
    assert config.distill.projection == "orthogonal"
    assert (config.optim.name, config.optim.momentum, config.train.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (config.train.batch_size, config.train.accumulate, config.train.lr) == (2, 2, 1e-3)
    assert (config.agent.gamma, config.agent.reward_alpha, config.agent.interval) == (0.95, 0.7, 50)
    assert config.loss.batch_dice


def test_all_mistakes_are_reported_together_with_suggestions():
    layers = [
        Layer("file", {"method": "graft", "weigthing": {"mode": "quality"}, "distill": {"temprature": 3}}),
        Layer("--set", {"agent": {"kappa": -1}}),
    ]
    with pytest.raises(ConfigError) as error:
        resolve(GraftConfig, layers)
    text = "\n".join(error.value.problems)
    assert "weigthing" in text
    assert "'weighting'" in text
    assert "'temperature'" in text
    assert "agent.kappa" in text


@pytest.mark.parametrize(
    "values",
    [
        {"sample": {"normalization": "stats"}},
        {"sample": {"size": [4, -1, 4]}},
        {"distill": {"taps": ["neg3"]}},
        {"split": {"reward": 1.0}},
        {"weighting": {"temperature": 0}},
    ],
)
def test_impossible_values_are_refused(values):
    with pytest.raises(ConfigError):
        resolve(GraftConfig, [Layer("file", {"method": "graft", **values})])
