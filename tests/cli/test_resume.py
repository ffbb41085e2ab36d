import json

import pytest

from medrl.core.config import load_yaml


def seen(folder):
    return json.loads((folder / "seen.json").read_text())


@pytest.fixture
def stopped(medrl, toy, monkeypatch):
    """A run folder 'r' whose last step failed."""
    monkeypatch.setenv("MEDRL_TOY_FAIL", "DataError")
    medrl("train", "toy", "-o", "r", "--mode", "greedy", "--shout")
    monkeypatch.delenv("MEDRL_TOY_FAIL")
    return toy / "r"


def test_resume_uses_the_config_and_the_options_of_the_run(medrl, stopped):
    answer = medrl("resume", "r")
    assert answer.code == 0
    assert seen(stopped)["mode"] == "greedy"
    assert seen(stopped)["shout"] is True
    assert seen(stopped)["resume"] == "must"
    assert seen(stopped)["command"] == ["medrl", "train", "toy", "-o", "r", "--mode", "greedy", "--shout"]


def test_a_finished_run_is_left_as_it_is(medrl, toy):
    medrl("train", "toy", "-o", "r")
    before = (toy / "r" / "metrics.jsonl").read_bytes()
    answer = medrl("resume", "r")
    assert (answer.code, "nothing is left to do" in answer.err) == (0, True)
    assert "--extend-to 8" in answer.err
    assert (toy / "r" / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_extended(medrl, toy):
    medrl("train", "toy", "-o", "r")
    answer = medrl("resume", "r", "--extend-to", 9)
    assert answer.code == 0
    assert "step 9/9" in answer.err


def test_a_run_is_not_extended_backwards(medrl, toy):
    medrl("train", "toy", "-o", "r")
    answer = medrl("resume", "r", "--extend-to", 2)
    assert (answer.code, "4 steps already" in answer.err) == (2, True)


def test_a_run_without_checkpoint_names_the_command_that_starts_it(medrl, stopped):
    (stopped / "checkpoints" / "last.pt").unlink()
    answer = medrl("resume", "r")
    assert answer.code == 4
    assert "do:    medrl train toy -o r --mode greedy --shout" in answer.err


def test_a_folder_that_is_no_run_gives_the_nearest(medrl, stopped):
    answer = medrl("resume", "rr")
    assert (answer.code, "did you mean 'r'?" in answer.err) == (2, True)


def test_options_of_a_method_become_defaults_where_the_command_is_lost(medrl, stopped):
    (stopped / "command.txt").unlink()
    answer = medrl("resume", "r")
    assert answer.code == 0
    assert "taken as their defaults" in answer.err
    assert seen(stopped)["shout"] is False


def test_the_device_may_change(medrl, stopped):
    assert medrl("resume", "r", "--device", "cpu").code == 0
    assert load_yaml(stopped / "config.yaml")["method"] == "toy"
