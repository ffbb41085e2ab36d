"""``medrl predict --parts``: parts as processes, one report, and a run that goes on."""

import json
from pathlib import Path

import pytest

from medrl.cli.predict_parts import FOLDER, _fitting, _resources

TOY = str(Path(__file__).parent / "toy")
CALL = ("predict", "-i", "images", "-o", "out", "--model", "m", "--overlap", 0.25)


@pytest.fixture
def model(medrl, toy, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TOY)
    medrl("train", "toy", "-o", "m")
    (toy / "images").mkdir()
    return toy / "m"


def report(toy):
    return json.loads((toy / "out" / "report.json").read_text())


def test_parts_are_processes_and_their_reports_become_one(medrl, toy, model):
    answer = medrl(*CALL, "--parts", 2, "--max-memory", 3, "--loud")
    assert answer.code == 0, answer.err
    found = report(toy)
    assert list(found["cases"]) == ["toy_001", "toy_002"]
    assert (found["max_memory_gb"], found["overlap"], found["continue"]) == (3.0, 0.25, True)
    assert json.loads((toy / "out" / "seen.json").read_text())["loud"] is True
    assert "2 cases in out" in answer.err
    assert sorted(path.name for path in (toy / "out" / FOLDER).glob("*.log")) == [
        "part1of2.log",
        "part2of2.log",
    ]


def test_a_part_that_is_killed_is_named_and_the_same_command_goes_on(medrl, toy, model, monkeypatch):
    monkeypatch.setenv("MEDRL_TOY_KILL", "2")
    answer = medrl(*CALL, "--parts", 2)
    assert answer.code == 1
    assert "missing: part 2 left no report" in answer.err
    assert list(report(toy)["cases"]) == ["toy_001"]
    monkeypatch.delenv("MEDRL_TOY_KILL")
    assert medrl(*CALL, "--parts", 2).code == 0
    assert list(report(toy)["cases"]) == ["toy_001", "toy_002"]


def test_a_failed_case_of_a_part_is_exit_code_3(medrl, toy, model, monkeypatch):
    monkeypatch.setenv("MEDRL_TOY_BAD", "1")
    answer = medrl(*CALL, "--parts", 2)
    assert answer.code == 3
    assert "case toy_001: it is broken" in answer.err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--parts", 2, "--part", "1/2"), "--part and --parts"),
        (("--jobs", 2), "add --parts N"),
        (("--parts", 0), "--parts"),
    ],
)
def test_options_that_contradict_each_other_are_refused(medrl, toy, model, arguments, what):
    answer = medrl(*CALL, *arguments)
    assert answer.code == 2
    assert what in answer.err
    assert not (toy / "out").exists()


def test_as_many_processes_as_the_memory_allows(monkeypatch):
    from medrl.core.predicting import memory

    monkeypatch.setattr(memory, "available_bytes", lambda: 10 * 2**30)
    assert _fitting(8, 3.0) == 3
    assert _fitting(2, 3.0) == 2
    assert _fitting(8, 30.0) == 1
    assert _fitting(8, 0.0) == 8


def test_a_job_asks_for_the_memory_of_a_worker():
    shared = {"resource": ("minutes=5",), "max_memory": 6.0}
    assert (_resources(shared).memory_gb, _resources(shared).minutes) == (6.0, 5)
    assert _resources({"resource": ("memory_gb=9",), "max_memory": 6.0}).memory_gb == 9.0
    assert _resources({"resource": (), "max_memory": 0.0}).memory_gb == 16.0
