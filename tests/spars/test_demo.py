"""The demonstration: its table, and what it says."""

from __future__ import annotations

from medrl.core.jobs import DemoJob
from medrl.plugins.spars import demo
from medrl.plugins.spars.demo import Scale


def test_the_demo_shows_every_policy_and_says_what_numbers_are_not(
    manager, tmp_path, monkeypatch, tiny, phantoms
):
    del phantoms
    values = {key: value for key, value in tiny().items() if key not in ("data", "train")}
    scale = Scale(
        cases=12,
        test_cases=4,
        shape=(24, 24, 16),
        radius=(3.0, 4.5),
        distractors=(1, 1),
        folds=3,
        values=values,
    )
    monkeypatch.setitem(demo.SCALES, "smoke", scale)
    said = []
    job = DemoJob(method="spars", folder=tmp_path, manager=manager, preset="smoke", seed=1, say=said.append)
    result = demo.run(job)
    names = [name for name, _, _ in result.rows]
    assert names == ["exhaustive scan", "greedy look-ahead", "self-play", "random walk", "random tiles"]
    assert all(len(numbers) == len(result.columns) for _, _, numbers in result.rows)
    assert {role for _, role, _ in result.rows} == {"method", "baseline", "control"}
    assert "image labels alone" in " ".join(result.notes)
    assert "not how well" in result.notes[-1]
    page = result.report.read_text()
    assert page.count('<figure class="panel">') == 4
    assert page.count('alt="paths in abdomen_test_') == 4
    assert "abdomen_test_003, without a lesion" in page
    assert len(said) == 3
