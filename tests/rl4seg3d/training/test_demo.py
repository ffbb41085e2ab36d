"""The demonstration, on sequences of 32² pixels and a few steps."""

from __future__ import annotations

import pytest

from medrl.core.jobs import DemoJob, DemoResult
from medrl.plugins.rl4seg3d import demo

NETWORK = {"channels": [4, 8]}
QUICK = {
    "model": NETWORK,
    "critic": NETWORK,
    "reward_model": NETWORK,
    "data": {"folds": 3},
    "train": {"batch_size": 2, "precision": "fp32"},
    "source": {"steps": 2},
    "style": {"steps": 2},
    "corrector": {"steps": 2},
    "pairs": {"count": 16},
    "reward": {"steps": 2},
    "ppo": {"steps": 1, "inner_steps": 1, "validation_images": 2},
}


@pytest.fixture(scope="module")
def shown(manager, tmp_path_factory) -> tuple[DemoResult, list[str]]:
    said: list[str] = []
    scale = demo.Scale(source=6, target=6, test=2, frames=6, size=(32, 32), values=QUICK)
    folder = tmp_path_factory.mktemp("demo")
    job = DemoJob(method="rl4seg3d", folder=folder, manager=manager, preset="smoke", say=said.append)
    return demo.run(job, scale), said


def test_the_table_has_baseline_method_and_control(shown):
    result, said = shown
    assert [role for _, role, _ in result.rows] == ["baseline", "baseline", "method", "control"]
    assert result.columns == ["Dice", "valid frames", "frames that jump", "HD (mm)"]
    assert all(0.0 <= numbers[0] <= 1.0 for _, _, numbers in result.rows)
    assert "without labels" in said[0]


def test_the_report_stands_alone_and_shows_sequences(shown):
    page = shown[0].report.read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count('<figure class="panel">') == 2
    assert "reference" in page
    assert shown[0].notes[-1].startswith("These are synthetic")
