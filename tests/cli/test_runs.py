import json

import pytest


@pytest.fixture
def two(medrl, toy):
    medrl("train", "toy", "-o", "runs/a")
    medrl("train", "toy", "-o", "runs/b", "--set", "train.lr=0.5", "--max-steps", 6)
    return toy / "runs"


def test_list_shows_each_run_with_status_step_and_best(medrl, two):
    answer = medrl("runs", "list")
    rows = [line.split() for line in answer.err.splitlines()[2:]]
    assert rows == [
        ["runs/a", "toy", "finished", "4", "val_dice", "1.0000"],
        ["runs/b", "toy", "finished", "6", "val_dice", "1.0000"],
    ]
    facts = json.loads(medrl("runs", "list", "--json").out)
    assert [item["step"] for item in facts] == [4, 6]


def test_list_of_nothing_says_so(medrl):
    answer = medrl("runs", "list")
    assert (answer.code, "no runs in runs" in answer.err) == (0, True)
    assert json.loads(medrl("runs", "list", "--json").out) == []


def test_list_shows_a_damaged_run_as_damaged(medrl, two):
    (two / "a" / "manifest.json").write_text("{")
    answer = medrl("runs", "list")
    assert answer.code == 0
    assert "damaged" in answer.err
    assert "runs/b" in answer.err


def test_a_run_whose_process_is_dead_is_stopped_and_not_running(medrl, two):
    manifest = json.loads((two / "a" / "manifest.json").read_text())
    (two / "a" / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    assert "stopped" in medrl("runs", "list").err
    assert "go on: medrl resume runs/a" in medrl("runs", "show", "runs/a").err


def test_show_tells_the_last_numbers_and_the_checkpoints(medrl, two):
    answer = medrl("runs", "show", "runs/a")
    assert "finished after 4 steps" in answer.err
    assert "runs/a/checkpoints/last.pt" in answer.err
    facts = json.loads(medrl("runs", "show", "runs/a", "--json").out)
    assert facts["metrics"]["loss"] == 0.25
    assert facts["manifest"]["status"] == "finished"


def test_diff_shows_what_differs_and_nothing_else(medrl, two):
    facts = json.loads(medrl("runs", "diff", "runs/a", "runs/b", "--json").out)
    assert facts["config"] == {"train.lr": [0.001, 0.5], "train.max_steps": [4, 6]}
    err = medrl("runs", "diff", "runs/a", "runs/b").err
    assert "train.lr" in err
    assert "data.fold " not in err
    assert "the configs are equal" in medrl("runs", "diff", "runs/a", "runs/a").err


@pytest.mark.parametrize("command", [["show", "runs/c"], ["diff", "runs/a", "runs/c"], ["report", "runs/c"]])
def test_a_folder_that_is_no_run_is_named(medrl, two, command):
    answer = medrl("runs", *command)
    assert (answer.code, "runs/c is no run folder" in answer.err) == (2, True)


def test_report_is_one_html_file_in_the_run(medrl, two):
    answer = medrl("runs", "report", "runs/a", "runs/b")
    assert answer.code == 0
    assert "val_dice" in (two / "a" / "report.html").read_text()
    assert (two / "b" / "report.html").is_file()
