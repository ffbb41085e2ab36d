"""The config of spars: defaults, presets, what is refused."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from medrl.core.config import Layer, presets, resolve_method
from medrl.core.errors import ConfigError
from medrl.plugins.spars.config import SparsConfig


def resolved(manager, preset=None, **values):
    return resolve_method(manager, "spars", preset=preset, layers=[Layer("test", values)]).config


def test_the_written_defaults_are_those_of_the_model(manager):
    script = runpy.run_path(str(Path(__file__).parents[1] / "write_defaults.py"))
    assert script["path"]("spars").read_text() == script["render"]("spars")
    assert resolved(manager) == SparsConfig(method="spars")


def test_every_preset_resolves(manager):
    names = sorted(set(presets(manager, "spars")) - {"defaults"})
    assert names == ["faithful", "medrl", "small", "smoke"]
    for name in names:
        assert resolved(manager, name).method == "spars"


def test_the_preset_medrl_is_the_default_under_a_name(manager):
    assert resolved(manager, "medrl") == resolved(manager)


def test_the_default_opens_no_mask_and_scans(manager):
    cfg = resolved(manager)
    assert (cfg.classifier.label_source, cfg.map.choose, cfg.map.policy) == ("image", "image", "scan")


def test_the_preset_faithful_has_the_numbers_of_the_original(manager):
    cfg = resolved(manager, "faithful")
    assert (cfg.classifier.kind, cfg.classifier.label_source, cfg.model.name) == (
        "faithful",
        "crop",
        "spars.faithful",
    )
    assert (cfg.classifier.patients, cfg.classifier.net.steps) == (24, 192)
    assert (cfg.classifier.net.patients, cfg.classifier.net.windows, cfg.classifier.net.lr) == (4, 10, 1e-3)
    assert (cfg.classifier.net.crop, cfg.classifier.net.enlarge) == ((96, 96, 64), (256, 256, 180))
    assert (cfg.score.window, cfg.score.stride) == ((48, 48, 24), (4, 4, 4))
    assert (cfg.sample.volume_size, cfg.sample.hu_window) == ((256, 256, 180), None)
    assert (cfg.env.start, cfg.env.tie, cfg.env.tau, cfg.env.horizon) == ("corner_center", "win", 0.3, 32)
    assert (cfg.env.writers, cfg.env.reward, cfg.opponents.kind) == ("agent", "spars.sign", "live")
    ppo = cfg.ppo
    assert (ppo.updates, ppo.envs, ppo.steps, ppo.minibatch, ppo.epochs) == (10000, 1, 32, 8, 1)
    assert ppo.updates * ppo.steps == 320_000
    assert ppo.updates * ppo.steps // ppo.minibatch == 40_000
    assert (ppo.gamma, ppo.lam, ppo.clip, ppo.entropy, ppo.value_coef) == (0.99, 0.95, 0.2, 0.0, 0.5)
    assert (ppo.lr, ppo.clip_norm, ppo.decay, cfg.warm.kind) == (3e-4, 0.5, "constant", "none")
    assert (cfg.map.policy, cfg.map.paint, cfg.map.aggregate, cfg.map.threshold) == (
        "self-play",
        "coarse",
        "sum",
        0.5,
    )
    assert not cfg.map.normalise


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"score": {"window": [0, 8, 8]}}, "positive"),
        ({"score": {"stride": [4, 4, 0]}}, "positive"),
        ({"classifier": {"kind": "compact"}}, "use coarse"),
        ({"warm": {"kind": "none"}, "ppo": {"updates": 0}}, "nothing is learned"),
        ({"sample": {"volume_size": [8, 8, 8], "spacing_mm": [1.0, 1.0, 1.0]}}, "contradict"),
        ({"sample": {"hu_window": [250.0, -200.0]}}, "rise"),
        ({"ppo": {"unknown": 1}}, "unknown"),
        ({"env": {"tau": 7.0}}, "env.tau"),
        ({"env": {"tau": -0.1}}, "env.tau"),
        ({"score": {"window": [2, 8, 8]}}, "give at most the window"),
        ({"score": {"scales": []}}, "scales must be"),
        ({"score": {"scales": [1.0, -2.0]}}, "scales must be"),
        ({"ppo": {"lr": 7.0}}, "ppo.lr"),
        ({"ppo": {"updates": 3, "value_first": 3}}, "value_first 3"),
        ({"warm": {"lr": 7.0}}, "warm.lr"),
        ({"opponents": {"pool": 9}}, "opponents.pool"),
        ({"map": {"threshold": 1.0}}, "from 0 to below 1"),
        ({"map": {"threshold": -0.1}}, "from 0 to below 1"),
        ({"map": {"thresholds": []}}, "thresholds is empty"),
        ({"map": {"thresholds": [0.5, 45.0]}}, "got 45"),
        ({"map": {"fine": [0, 4, 4]}}, "fine must be"),
        ({"map": {"fine_stride": [5, 2, 2]}}, "fine_stride ["),
        ({"map": {"paint": "nested", "fine": [4, 4, 9]}}, "nothing would be painted"),
        ({"data": {"target": []}}, "data: target is empty"),
        ({"classifier": {"cluster": {"grid": [2, 0, 2]}}}, "classifier.cluster: grid"),
        ({"classifier": {"topk": {"first": 3, "last": 4}}}, "from first to last"),
        ({"classifier": {"topk": {"lr": 7.0}}}, "classifier.topk.lr"),
        ({"classifier": {"pseudo": {"region": 7.0}}}, "classifier.pseudo.region"),
        ({"classifier": {"pseudo": {"region": 0.6, "seed": 0.5}}}, "seeds lie within the region"),
        ({"classifier": {"pseudo": {"auc_loss": 7.0}}}, "classifier.pseudo.auc_loss"),
        ({"classifier": {"head": {"widths": [8, 0]}}}, "classifier.head: widths"),
        ({"classifier": {"head": {"lr": 7.0}}}, "classifier.head.lr"),
        ({"classifier": {"gate": {"limits": [0.6, 0.05]}}}, "classifier.gate: limits"),
        ({"classifier": {"gate": {"margin": 7.0}}}, "classifier.gate.margin"),
        ({"classifier": {"net": {"crop": [96, 0, 64]}}}, "classifier.net: crop"),
        ({"classifier": {"net": {"channels": []}}}, "classifier.net: channels"),
        ({"classifier": {"net": {"windows": 4, "top": 5}}}, "top 5 exceeds"),
        ({"classifier": {"net": {"lr": 7.0}}}, "classifier.net.lr"),
        ({"classifier": {"kind": "presence", "label_source": "crop"}}, "labels of images"),
    ],
)
def test_settings_without_a_meaning_are_refused(manager, values, why):
    with pytest.raises(ConfigError) as error:
        resolved(manager, **values)
    assert len(error.value.problems) == 1
    assert why in error.value.problems[0]
    assert "\n" not in error.value.problems[0]


def test_thresholds_of_plain_sums_may_exceed_1(manager):
    summed = {"paint": "coarse", "aggregate": "sum", "threshold": 3.0}
    assert resolved(manager, map=summed).map.threshold == 3.0
    with pytest.raises(ConfigError, match="from 0 to below 1"):
        resolved(manager, map={**summed, "normalise": True})
