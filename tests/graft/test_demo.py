"""The demonstration from synthetic data to report, as small as it can be."""

from __future__ import annotations

import pytest

from medrl.core.jobs import DemoJob
from medrl.plugins.graft import demo

TINY = demo.Scale(
    shape=(16, 16, 6),
    teacher_cases=5,
    student_cases=5,
    test_cases=2,
    labelled=3,
    good=2,
    swapped=1,
    untrained=1,
    teacher_steps=2,
    random_reward=True,
    panels=1,
)


@pytest.fixture
def result(tmp_path, manager, monkeypatch):
    """The outcome of a demonstration of a few steps, and what it said on the way."""
    monkeypatch.setitem(demo.SCALES, "smoke", TINY)
    quick = {**demo.TUNED["train"], "max_steps": 4, "validate_every": 4, "checkpoint_every": 4}
    monkeypatch.setitem(demo.TUNED, "train", quick)
    said = []
    job = DemoJob(method="graft", folder=tmp_path, manager=manager, preset="smoke", say=said.append)
    return demo.run(job), said


def test_the_demo_compares_method_baselines_and_controls_in_one_page(result, tmp_path):
    outcome, said = result
    assert list(outcome.columns) == ["Dice prostate", "Dice cancer", "mean Dice"]
    roles = {name: role for name, role, _ in outcome.rows}
    assert roles == {
        "student, labels only": "baseline",
        "student, graft": "method",
        "student, all teachers equal": "control",
        "student, agent on noise": "control",
        "mean of all teachers": "baseline",
        "best single teacher": "baseline",
    }
    for _, _, numbers in outcome.rows:
        assert len(numbers) == 3
        assert all(0.0 <= number <= 1.0 for number in numbers)
    assert outcome.report == tmp_path / "report.html"
    page = outcome.report.read_text()
    for title in ("Result", "The teachers", "Which teachers the student listened to", "Test cases"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("teacher_2") > 0
    assert "http" not in page.partition("<body>")[0].replace("http-equiv", "")
    assert any("hospital B" in line for line in said)


def test_the_notes_say_which_teachers_are_spoilt_and_what_the_method_left_them(result):
    outcome, _ = result
    notes = " ".join(outcome.notes)
    assert f"teacher_2 {demo.SWAPPED}" in notes
    assert f"teacher_3 {demo.UNTRAINED}" in notes
    assert "they would have 50% of the weight" in notes
    assert "synthetic images and one seed" in notes
