"""The demonstration, on images of 32² pixels and a few steps."""

from __future__ import annotations

import pytest

from medrl.core.jobs import DemoJob, DemoResult
from medrl.plugins.rl4seg import demo
from medrl.plugins.rl4seg.compare import catalogue

QUICK = {
    "model": {"channels": [4, 8]},
    "reward_model": {"channels": [4, 8]},
    "sample": {"size": [32, 32]},
    "data": {"folds": 3},
    "train": {"batch_size": 4, "precision": "fp32"},
    "source": {"steps": 4},
    "style": {"steps": 3},
    "corrector": {"steps": 3},
    "pairs": {"count": 24},
    "reward": {"steps": 3},
    "ppo": {"steps": 2, "inner_steps": 2, "warmup": 1, "validation_images": 4},
}


@pytest.fixture(scope="module")
def shown(manager, tmp_path_factory) -> tuple[DemoResult, list[str]]:
    said: list[str] = []
    scale = demo.Scale(
        source=12,
        target=8,
        test=4,
        methods=demo.SCALES["smoke"].methods,
        seeds=1,
        judge=False,
        values=QUICK,
        shape=(32, 32),
    )
    job = DemoJob(
        method="rl4seg",
        folder=tmp_path_factory.mktemp("demo"),
        manager=manager,
        preset="smoke",
        say=said.append,
    )
    return demo.run(job, scale), said


def test_the_table_has_baseline_method_and_control(shown):
    result, _ = shown
    assert [role for _, role, _ in result.rows] == ["baseline", "baseline", "baseline", "method", "control"]
    assert result.columns == ["Dice", "valid masks", "HD95 (mm)"]
    assert all(len(numbers) == 3 for _, _, numbers in result.rows)
    assert all(0.0 <= numbers[0] <= 1.0 for _, _, numbers in result.rows)


def test_the_report_stands_alone_and_shows_images(shown):
    result, _ = shown
    page = result.report.read_text()
    assert result.report.is_file()
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert page.count('<figure class="panel">') == 4
    for words in ("Result", "All methods", "How training went", "Test images", "Do it yourself"):
        assert words in page


def test_the_notes_carry_the_numbers_of_the_table_and_the_limits(shown):
    result, said = shown
    dice = {name: numbers[0] for name, _, numbers in result.rows}
    assert f"Dice {dice['source-only']:.3f}" in result.notes[0]
    assert f"Dice {dice['PPO, reward of noise']:.3f}" in result.notes[1]
    assert "not how well the method does on patients" in result.notes[-1]
    assert said[0].startswith("data: 12 labelled images")


@pytest.mark.parametrize("preset", ["smoke", "small"])
def test_every_scale_has_what_the_notes_speak_of(preset):
    keys = set(demo.SCALES[preset].methods)
    assert {"source", "style", "style-ppo", "style-ppo-random"} <= keys <= set(catalogue.BY_KEY)
    assert not {key for key in keys if catalogue.BY_KEY[key].role == "bound"}
