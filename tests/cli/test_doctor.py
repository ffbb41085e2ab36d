import json
import resource
from itertools import pairwise

import pytest

from medrl.cli import doctor as module
from medrl.cli.doctor import satisfies


def findings(answer):
    return json.loads(answer.out)["findings"]


def test_every_area_is_examined_and_a_broken_plugin_is_a_problem_with_a_fix(medrl):
    answer = medrl("doctor", "--json")
    found = findings(answer)
    assert {item["area"] for item in found} >= {"python", "packages", "cpu", "gpu", "ranks", "plugin"}
    problems = [item for item in found if item["state"] == "problem"]
    assert [item["what"].split()[0] for item in problems] == ["wreck"]
    assert problems[0]["do"]
    assert answer.code == 1


def test_each_problem_has_one_fix_command(medrl):
    answer = medrl("doctor")
    lines = answer.err.splitlines()
    for line, below in pairwise(lines):
        if line.startswith("problem"):
            assert below.startswith("         do: ")


def test_it_names_distribution_and_file_of_each_plugin(medrl):
    text = medrl("doctor").err
    assert "toy of medrl-toy 1.2 (third-party)" in text
    assert "medrl_toy/plugin.py" in text


def test_without_problems_the_exit_code_is_0_and_notes_count_with_strict_only(medrl, monkeypatch):
    note = module.Finding("x", "limited", module.NOTE, "fix it")
    monkeypatch.setattr(module, "examinations", lambda _ctx: [("x", lambda: iter([note]))])
    assert medrl("doctor").code == 0
    assert "do: fix it" in medrl("doctor").err
    assert medrl("doctor", "--strict").code == 1


def test_an_examination_that_fails_is_a_problem_and_the_others_go_on(medrl, monkeypatch):
    def bad():
        raise OSError("no")
        yield

    good = module.Finding("y", "fine")
    monkeypatch.setattr(module, "examinations", lambda _ctx: [("x", bad), ("y", lambda: iter([good]))])
    answer = medrl("doctor", "--json")
    assert [item["state"] for item in findings(answer)] == ["problem", "ok"]
    assert answer.code == 1


def test_few_open_files_and_little_shared_memory_are_notes_with_a_command(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (256, 1_000_000))
    (limit,) = module.open_files()
    assert (limit.state, limit.do) == ("note", "ulimit -n 65536")
    monkeypatch.setattr(module, "SHARED_MEMORY", 10**18)
    (memory,) = module.shared_memory()
    assert (memory.state, "--shm-size" in memory.do) == ("note", True)


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.10", True),
        ("2.9.1", ">=2.10", False),
        ("1.2.1", ">=1.2,<2", True),
        ("2.0", ">=1.2,<2", False),
        ("2", "<2", False),
        ("1.0", "", True),
        ("3.0.1", "!=3.0.1", False),
        ("1.4.9", "~=1.4", True),
        ("2.0", "~=1.4", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version, wanted, fits):
    assert satisfies(version, wanted) is fits
