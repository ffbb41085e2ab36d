import json

import pytest


def seen(folder):
    return json.loads((folder / "seen.json").read_text())


@pytest.fixture
def model(medrl, toy):
    medrl("train", "toy", "-o", "m")
    (toy / "images").mkdir()
    return toy / "m"


def test_the_method_is_read_from_the_run(medrl, toy, model):
    answer = medrl("predict", "-i", "images", "-o", "out", "--model", "m", "--loud", "--part", "2/3")
    assert answer.code == 0
    assert seen(toy / "out") == {
        "checkpoints": ["m/checkpoints/last.pt"],
        "loud": True,
        "part": [2, 3],
    }
    assert "1 case in out" in answer.err


def test_another_method_than_that_of_the_checkpoint_is_an_error(medrl, model):
    answer = medrl("predict", "graft", "-i", "images", "-o", "out", "--model", "m")
    assert answer.code == 4
    assert "it was trained by 'toy', not by 'graft'" in answer.err


def test_a_folder_of_folds_stands_for_all_of_them_and_folds_chooses(medrl, toy, model):
    medrl("train", "toy", "--fold", "all", "--set", "data.folds=3", "-o", "many")
    medrl("predict", "-i", "images", "-o", "all", "--model", "many")
    medrl("predict", "-i", "images", "-o", "some", "--model", "many", "--folds", "2,0")
    assert [path.split("/")[1] for path in seen(toy / "all")["checkpoints"]] == ["fold0", "fold1", "fold2"]
    assert [path.split("/")[1] for path in seen(toy / "some")["checkpoints"]] == ["fold2", "fold0"]
    answer = medrl("predict", "-i", "images", "-o", "x", "--model", "many", "--folds", "7")
    assert (answer.code, "there: 0, 1, 2" in answer.err) == (2, True)


def test_failed_cases_are_named_and_the_exit_code_is_3(medrl, model, monkeypatch):
    monkeypatch.setenv("MEDRL_TOY_FAIL", "yes")
    answer = medrl("predict", "-i", "images", "-o", "out", "--model", "m")
    assert answer.code == 3
    assert "case toy_001: it is broken" in answer.err


def test_a_missing_model_or_input_is_named(medrl, model):
    answer = medrl("predict", "-i", "images", "-o", "out", "--model", "nowhere")
    assert (answer.code, "--model nowhere" in answer.err) == (2, True)
    answer = medrl("predict", "-i", "nothing", "-o", "out", "--model", "m")
    assert (answer.code, "-i nothing" in answer.err) == (2, True)
    assert medrl("predict", "-i", "images", "-o", "out").code == 2


def test_a_run_without_checkpoint_is_exit_code_4(medrl, model):
    (model / "checkpoints" / "last.pt").unlink()
    assert medrl("predict", "-i", "images", "-o", "out", "--model", "m").code == 4


@pytest.mark.parametrize("part", ["0/3", "4/3", "x", "1"])
def test_a_part_that_does_not_exist_is_refused(medrl, model, part):
    answer = medrl("predict", "-i", "images", "-o", "out", "--model", "m", "--part", part)
    assert (answer.code, "--part" in answer.err) == (2, True)


def test_input_and_output_may_follow_the_method_without_flags(medrl, toy, model):
    answer = medrl("predict", "toy", "images", "out", "--checkpoint", "m")
    assert (answer.code, seen(toy / "out")["checkpoints"]) == (0, ["m/checkpoints/last.pt"])
    answer = medrl("predict", "toy", "images", "--model", "m")
    assert (answer.code, "-o is missing" in answer.err) == (2, True)
    answer = medrl("predict", "toy", "images", "-i", "images", "-o", "out", "--model", "m")
    assert (answer.code, "-i and -o already say where" in answer.err) == (2, True)


def test_a_path_in_the_place_of_the_method_is_named(medrl, model):
    answer = medrl("predict", "--model", "m", "images", "out")
    assert (answer.code, "no method 'images'" in answer.err) == (2, True)


def test_weights_of_other_programs_are_left_to_the_method(medrl, toy, model):
    (toy / "foreign.pt").write_bytes(b"weights of another program")
    answer = medrl("predict", "toy", "images", "out", "--checkpoint", "foreign.pt")
    assert (answer.code, seen(toy / "out")["checkpoints"]) == (0, ["foreign.pt"])
