"""The config of kspace: defaults, presets, and what is refused."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from medrl.core.config import Layer, presets, resolve_method
from medrl.core.errors import ConfigError
from medrl.plugins.kspace.config import KspaceConfig


def resolved(manager, preset=None, **values):
    return resolve_method(manager, "kspace", preset=preset, layers=[Layer("test", values)]).config


def test_the_written_defaults_are_those_of_the_model(manager):
    script = runpy.run_path(str(Path(__file__).parents[1] / "write_defaults.py"))
    assert script["path"]("kspace").read_text() == script["render"]("kspace")
    assert resolved(manager) == KspaceConfig(method="kspace")


def test_every_preset_resolves(manager):
    names = sorted(set(presets(manager, "kspace")) - {"defaults"})
    assert names == ["asmr", "fast", "medrl", "small", "smoke"]
    for name in names:
        assert resolved(manager, name).method == "kspace"


def test_the_preset_medrl_is_the_default_under_a_name(manager):
    assert resolved(manager, "medrl") == resolved(manager)


def test_the_preset_asmr_has_the_numbers_of_the_original(manager):
    cfg = resolved(manager, "asmr")
    ppo = cfg.ppo
    assert (ppo.envs, ppo.steps, ppo.epochs, ppo.minibatch) == (128, 72, 2, 256)
    assert ppo.envs * ppo.steps == 36 * ppo.minibatch
    assert (ppo.gamma, ppo.lam, ppo.clip, ppo.entropy, ppo.clip_norm) == (0.99, 0.95, 0.2, 0.01, 0.5)
    assert (ppo.lr, ppo.weight_decay, ppo.decay, ppo.target_kl) == (1e-4, 1e-4, "constant", 0.0)
    assert ppo.updates == 10**8 // (ppo.envs * ppo.steps)
    assert (cfg.reward.mode, cfg.reward.delay_step, cfg.acquisition.init_center) == ("asmr", 7, 0)
    assert (cfg.budget.train, cfg.budget.eval, cfg.budget.shared) == ((5, 50), (40,), True)
    assert (cfg.seg.lr, cfg.seg.weight_decay, cfg.seg.epochs, cfg.seg.schedule) == (1e-4, 0.1, 400, "step")
    assert cfg.warm.kind == "none"
    assert cfg.train.seed == 666


def test_the_reward_model_of_the_original_has_lost_its_rate_after_twelve_epochs(manager):
    from medrl.plugins.kspace.supervised import rate_of

    stage = resolved(manager, "asmr").seg
    rates = [rate_of(stage, epoch * 10 + 1, 4000, 10) for epoch in (0, 2, 3, 12)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-8])


def test_the_cosine_rises_over_its_warm_up_and_ends_at_a_hundredth(manager):
    from medrl.plugins.kspace.supervised import rate_of

    stage = resolved(manager).seg
    rates = [rate_of(stage, step, 100, 10) for step in (1, 5, 100)]
    assert rates == pytest.approx([2e-4, 1e-3, 1e-5])


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"budget": {"train": [5, 4]}}, "must rise"),
        ({"budget": {"eval": [8, 4]}}, "rising"),
        ({"budget": {"eval": []}}, "rising"),
        ({"reward": {"rec": 0.0, "seg": 0.0}}, "both 0"),
        ({"reward": {"mode": "asmr", "delay_step": 50}}, "delay_step"),
        ({"ppo": {"envs": 10, "group": 4}}, "multiple"),
        ({"warm": {"kind": "none"}, "ppo": {"updates": 0}}, "nothing is learned"),
        ({"acquisition": {"points": True}}, "volume3d"),
        ({"acquisition": {"geometry": "volume3d", "recon": "unet"}}, "slices"),
        ({"seg": {"rates": [0.5, 0.2]}}, "rise"),
        ({"seg": {"accelerations": [0.5]}}, "from 1"),
        ({"ppo": {"unknown": 1}}, "unknown"),
    ],
)
def test_settings_without_a_meaning_are_refused(manager, values, why):
    with pytest.raises(ConfigError) as error:
        resolved(manager, **values)
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("values", "free"),
    [
        ({"sample": {"shape": [64, 64]}, "acquisition": {"init_center": 4}}, 60),
        ({"sample": {"shape": [64, 64]}, "acquisition": {"init_center": 4, "sampled_indices": [20, 39]}}, 16),
        ({"sample": {"shape": [64, 64]}, "acquisition": {"init_center": 0}}, 64),
    ],
)
def test_a_budget_may_take_all_lines_that_are_left_and_no_more(values, free):
    def made(budget):
        return KspaceConfig.model_validate({"method": "kspace", **values, "budget": budget})

    assert made({"train": [1, free], "eval": [free]}).budget.eval == (free,)
    with pytest.raises(ValueError, match=f"train reaches {free + 1}, but {free} lines"):
        made({"train": [1, free + 1], "eval": [free]})
    with pytest.raises(ValueError, match=f"eval reaches {free + 1}, but {free} lines"):
        made({"train": [1, free], "eval": [1, free + 1]})
