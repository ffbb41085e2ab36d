"""The preset `faithful`, from classifier to masks, on tiny volumes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from medrl.core.jobs import build_train_job
from medrl.plugins.spars import classifier, evaluate, restoring, running, scoring
from medrl.plugins.spars.agent import FaithfulAgent
from medrl.plugins.spars.scoring import FaithfulScorer

TINY = {
    "sample": {"volume_size": [24, 24, 16]},
    "classifier": {
        "least_auc": 0.0,
        "net": {"steps": 2, "patients": 2, "windows": 4, "crop": [12, 12, 8], "enlarge": [12, 12, 8]},
    },
    "score": {"window": [8, 8, 4]},
    "ppo": {"updates": 3},
    "map": {"horizon": 8},
    "validation": {"volumes": 2, "episodes": 1},
    "train": {"checkpoint_every": 1, "device": "cpu", "timeout_s": 120},
}
"""What is smaller than in the preset; everything else is the preset's."""


class SmallNet(nn.Module):
    """In the place of 3.6 million parameters that take no window below 236 × 236 × 172."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv3d(1, 4, 3, stride=2), nn.Linear(4, 2)

    def forward(self, images):
        return self.linear(self.conv(images).relu().mean(dim=(2, 3, 4)))


class Fused(nn.Module):
    """What scores: the same."""

    def __init__(self, network, dtype):
        super().__init__()
        assert dtype == torch.float32
        self.network = network

    def forward(self, images):
        return self.network(images)


@pytest.fixture
def small(monkeypatch):
    for module in (classifier, scoring):
        monkeypatch.setattr(module, "FaithfulNet", SmallNet)
    monkeypatch.setattr(scoring, "FusedFaithfulNet", Fused)


def test_the_preset_trains_classifier_and_policy_and_both_are_measured(small, manager, phantoms, tmp_path):
    run = tmp_path / "run"
    values = {**TINY, "data": {"root": str(phantoms), "folds": 3}}
    running.run(build_train_job(manager, "spars", values, run, preset="faithful"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    played = [row for row in rows if row.get("phase") == "ppo"]
    assert len(played) == 3
    assert "win_vs_dummy" in played[0]
    assert all("win_vs_live" in row and row["updates"] == 4 for row in played[1:])
    opened = restoring.open_run(run, manager, torch.device("cpu"))
    assert isinstance(opened.agent, FaithfulAgent)
    assert isinstance(opened.scorer, FaithfulScorer)
    assert opened.threshold["value"] == 0.5
    found = evaluate.run(manager, [run], tmp_path / "out", policies=["self-play"], device="cpu")
    assert "no weak supervision" in found.summary["notes"][0]
    assert all(len(each) == 3 for each in found.rows.values())
    assert all(row.windows <= 2 * 8 for row in found.rows["self-play"])
