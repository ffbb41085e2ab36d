"""Training of the classifier: what is learned from which labels, guards, refusal, and exact resume."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import ConfigError, RuntimeFault
from medrl.plugins.spars import classifier, data
from medrl.plugins.spars.data_config import PseudoConfig
from medrl.plugins.spars.mil.fraction import RoundFacts, refused
from medrl.plugins.spars.scoring import build_scorer

NET = {"net": {"steps": 4, "patients": 2, "windows": 4, "crop": [8, 8, 8], "channels": [4, 4, 4]}}


@pytest.fixture
def train(make_job, tmp_path):
    """Train a classifier; return its checkpoint, its scorer and its data."""

    def run(values=None, name="run"):
        job = make_job(tmp_path / name, {"stage": "classifier", **(values or {})})
        loaded = data.load(job.config)
        with job.runtime() as rt:
            classifier.fit(rt, job.config, loaded)
        found = load_checkpoint(find_checkpoint(tmp_path / name, "last"), method="spars")
        return found, build_scorer(found.meta["scorer"], found.states["scorer"]), loaded

    return run


@pytest.mark.parametrize(
    "values",
    [
        {"classifier": {"kind": "fraction", "pseudo": {"rounds": 2}}},
        {"classifier": {"kind": "presence"}, "map": {"paint": "coarse"}},
        {"classifier": {"mil": "topk", "topk": {"starts": 2, "steps": 3}}},
        {"classifier": {"kind": "compact", **NET}, "map": {"paint": "coarse"}},
    ],
    ids=["fraction", "presence", "topk", "compact"],
)
def test_no_mask_is_opened_for_labels_of_images(train, values, phantoms, tmp_path):
    root = shutil.copytree(phantoms, tmp_path / "unmasked")
    shutil.rmtree(root / "labelsTr")
    shutil.rmtree(root / "labelsTs")
    found, scorer, loaded = train({**values, "data": {"root": str(root)}})
    assert loaded.masks.opened == set()
    assert found.meta["masks_opened"] == 0
    assert found.meta["label_source"] == scorer.label_source == "image"
    assert int(scorer.ready) == 1
    scores = scorer.windows(loaded.test.volumes[0], torch.tensor([[0, 0, 0], [8, 8, 4]]), (8, 8, 4))
    assert scores.shape == (2,)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("kind", ["fraction", "compact"])
def test_crops_open_masks_of_training_and_validation_alone(train, kind):
    values = {"classifier": {"kind": kind, "label_source": "crop", **NET}, "map": {"paint": "coarse"}}
    found, scorer, loaded = train(values)
    assert loaded.masks.opened <= {*loaded.train.ids, *loaded.val.ids}
    assert set(loaded.train.ids) <= loaded.masks.opened
    assert found.meta["label_source"] == scorer.label_source == "crop"
    assert found.meta["masks_opened"] == len(loaded.masks.opened)
    manifest = json.loads(
        (find_checkpoint(found.path.parents[1], "last").parents[1] / "manifest.json").read_text()
    )
    assert manifest["label_source"] == "crop"
    assert manifest["split"]["train"] == list(loaded.train.ids)


def test_faithful_network_learns_from_enlarged_windows(train):
    net = {"net": {"steps": 1, "patients": 1, "windows": 1, "top": 1, "enlarge": [236, 236, 172]}}
    values = {"classifier": {"kind": "faithful", "calibrate": False, **net}, "map": {"paint": "coarse"}}
    with pytest.MonkeyPatch.context() as patch:
        # Scoring whole volumes by eight enlarged octants each takes longer than all other tests.
        patch.setattr(classifier.FaithfulScorer, "image_score", lambda self, volume: float(volume.mean()))
        found, scorer, _ = train(values)
    assert scorer.enlarge == (236, 236, 172)
    assert sum(p.numel() for p in scorer.network.parameters()) == 3_570_738
    assert found.meta["classifier"]["kind"] == "faithful"


def test_same_seed_gives_the_same_classifier(train):
    first, second = (train({"classifier": {"pseudo": {"rounds": 2}}}, name)[1] for name in ("a", "b"))
    other = train({"train": {"seed": 2}}, "c")[1]
    assert first.digest == second.digest
    assert other.digest != first.digest


def test_validation_tells_how_well_images_are_known(train):
    found, scorer, loaded = train()
    told = found.meta["classifier"]
    counts = [told[f"{a}_{b}"] for a in ("true", "false") for b in ("positives", "negatives")]
    assert sum(counts) == len(loaded.val)
    scores, labels = classifier.images_told(scorer, loaded.val)
    assert told["val_auc"] == pytest.approx(classifier.image_auc(scores, labels))
    assert found.meta["auc"] == told["val_auc"]


def test_classifier_near_chance_is_refused_with_advice(train, monkeypatch):
    monkeypatch.setattr(classifier, "image_auc", lambda scores, labels: 0.52)
    with pytest.raises(RuntimeFault, match="near chance") as refusal:
        train({"classifier": {"least_auc": 0.6}})
    assert "classifier.mil=topk" in refusal.value.do
    assert "label_source=crop" in refusal.value.do


def test_classifier_that_cannot_be_judged_is_let_through(caplog):
    classifier.check_auc(math.nan, 0.6, source="image")
    assert "cannot be told" in caplog.text
    assert math.isnan(classifier.image_auc([0.1, 0.2], [1, 1]))


def test_presence_from_crops_is_refused(train):
    with pytest.raises(ConfigError, match="labels of images"):
        train({"classifier": {"kind": "presence", "label_source": "crop"}, "map": {"paint": "coarse"}})


def test_round_whose_masks_grow_too_much_leaves_the_head(train, caplog):
    values = {"classifier": {"pseudo": {"rounds": 2, "growth": 1.000001}}}
    _, scorer, _ = train(values, "guarded")
    _, single, _ = train({"classifier": {"pseudo": {"rounds": 1}}}, "single")
    if "left out" in caplog.text:
        for name, value in scorer.head.state_dict().items():
            assert torch.equal(value, single.head.state_dict()[name]), name
    else:  # both rounds had no pseudo-masks at all
        assert int(scorer.round) == 1


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (RoundFacts(100, 1.0, 0.9), RoundFacts(250, 1.0, 0.9), ""),
        (RoundFacts(100, 1.0, 0.9), RoundFacts(301, 1.0, 0.9), "3.01 times"),
        (RoundFacts(100, 1.0, 0.9), RoundFacts(30, 1.0, 0.9), "0.30 times"),
        (RoundFacts(100, 1.0, 0.9), RoundFacts(100, 1.0, 0.8), "fell from 0.900 to 0.800"),
        (RoundFacts(100, 1.0, math.nan), RoundFacts(100, 1.0, math.nan), ""),
    ],
)
def test_guards_refuse_rounds_that_go_astray(before, after, why):
    assert why in refused(before, after, PseudoConfig())
    assert bool(why) == bool(refused(before, after, PseudoConfig()))


def test_midpoint_separates_images_and_has_the_middle():
    assert classifier.midpoint([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]) == 0.5
    assert classifier.midpoint([0.3, 0.3], [0, 1]) == 0.3


def test_number_of_patients_may_be_limited(train):
    _, _, loaded = train({"classifier": {"patients": 4, "cluster": {"clusters": 4}}})
    assert len(classifier._chosen(loaded.train, 4)) == 4
    assert classifier._chosen(loaded.train, 4).ids == loaded.train.ids[:4]


ANY = {"rounds": 2, "growth": 1e6, "auc_loss": 1.0, "seed": 0.0, "region": 0.0, "smallest": 0}
"""A second round that no guard refuses."""
MANY = {"cells": 300, "clusters": 100}
"""Clusters of which some are in positive volumes alone."""

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.core.runtime import Runtime
from medrl.plugins.spars import classifier, data

config, run, die_at = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3])
original = Runtime.log

def log(self, step, **values):
    original(self, step, **values)
    if step == die_at:
        os.kill(os.getpid(), signal.SIGKILL)

Runtime.log = log
job = build_train_job(PluginManager.create(third_party=False), "spars", config, run)
with job.runtime() as rt:
    classifier.fit(rt, job.config, data.load(job.config))
"""


@pytest.mark.parametrize(
    ("values", "kills"),
    [
        ({"classifier": {"pseudo": ANY, "head": {"steps": 4}, "cluster": MANY}}, (3, 7)),
        ({"classifier": {"kind": "compact", **NET}, "map": {"paint": "coarse"}}, (3,)),
    ],
    ids=["fraction", "compact"],
)
def test_killed_training_goes_on_bit_for_bit(tiny, tmp_path, values, kills):
    config, script = tmp_path / "config.json", tmp_path / "fit.py"
    config.write_text(json.dumps(tiny({"stage": "classifier", **values})))
    script.write_text(SCRIPT)

    def launch(run, die_at=0):
        command = [sys.executable, str(script), str(config), str(run), str(die_at)]
        return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = launch(whole)
    assert done.returncode == 0, done.stderr
    for step in kills:
        assert launch(broken, step).returncode == -signal.SIGKILL
    assert launch(broken).returncode == 0
    states = [load_checkpoint(find_checkpoint(Path(run), "last")).states["scorer"] for run in (whole, broken)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
