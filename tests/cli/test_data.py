import json

import pytest

from medrl.cli.data import kinds


@pytest.fixture
def dataset(medrl, toy):
    assert medrl("data", "synth", "prostate", "d", "--cases", 5).code == 0
    return toy / "d"


def test_check_of_a_good_dataset_finds_no_problem(medrl, dataset):
    answer = medrl("data", "check", "d")
    assert (answer.code, answer.out) == (0, "")
    assert "5, 5 for testing" in answer.err
    assert "no problem was found" in answer.err


def test_check_names_every_damaged_file_and_is_exit_code_3(medrl, dataset):
    images = sorted((dataset / "imagesTr").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:1000])
    images[-1].unlink()
    answer = medrl("data", "check", "d")
    assert answer.code == 3
    assert images[0].name in answer.err
    assert "prostate_004" in answer.err
    facts = json.loads(medrl("data", "check", "d", "--json").out)
    assert facts["ok"] is False
    assert {problem["case"] for problem in facts["problems"]} == {"prostate_000", "prostate_004"}


def test_check_leaves_out_excluded_cases(medrl, dataset):
    image = dataset / "imagesTr" / "prostate_000_0000.nii.gz"
    image.write_bytes(b"")
    assert medrl("data", "check", "d").code == 3
    assert "prostate_000" not in medrl("data", "check", "d", "--exclude", "prostate_000").err.replace(
        "notes", ""
    )


def test_fingerprint_tells_the_same_in_json_and_for_people(medrl, dataset, toy):
    answer = medrl("data", "fingerprint", "d", "--json", "-o", "f.json")
    facts = json.loads(answer.out)
    assert facts == json.loads((toy / "f.json").read_text())
    people = medrl("data", "fingerprint", "d")
    assert people.out == ""
    assert facts["content_hash"] in people.err
    assert "0.5×0.5×3" in people.err


def test_split_writes_the_folds_once(medrl, dataset):
    answer = medrl("data", "split", "d", "--folds", 2, "--seed", 3, "--json")
    parts = json.loads((dataset / "splits_final.json").read_text())
    assert json.loads(answer.out)["folds"] == parts
    assert sorted(parts[0]["val"] + parts[1]["val"]) == [f"prostate_00{index}" for index in range(5)]
    again = medrl("data", "split", "d", "--folds", 3)
    assert (again.code, "--force" in again.err) == (2, True)
    assert medrl("data", "split", "d", "--folds", 3, "--force").code == 0
    assert len(json.loads((dataset / "splits_final.json").read_text())) == 3


def test_convert_makes_nnunet_raw_of_a_plain_folder(medrl, dataset, toy):
    for name, source, suffix in (("images", "imagesTr", "_0000.nii.gz"), ("labels", "labelsTr", ".nii.gz")):
        (toy / "plain" / name).mkdir(parents=True)
        for index in range(3):
            content = (dataset / source / f"prostate_00{index}{suffix}").read_bytes()
            (toy / "plain" / name / f"c{index}.nii.gz").write_bytes(content)
    arguments = ["data", "convert", "plain", "Dataset001_P", "--from", "folder"]
    answer = medrl(*arguments, "--label", "a=1", "--label", "b=2", "--label", "c=3", "--channels", "T2")
    assert answer.code == 0, answer.err
    description = json.loads((toy / "Dataset001_P" / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "T2"}
    assert {"a", "b", "c"} <= set(description["labels"])
    assert medrl("data", "check", "Dataset001_P").code == 0
    again = medrl(*arguments)
    assert (again.code, "not empty" in again.err) == (2, True)


def test_a_label_that_is_no_pair_is_refused(medrl, toy):
    (toy / "plain").mkdir()
    answer = medrl("data", "convert", "plain", "out", "--from", "folder", "--label", "liver")
    assert (answer.code, "NAME=VALUE" in answer.err) == (2, True)


def test_synth_gives_the_same_bytes_for_the_same_seed(medrl, dataset, toy):
    medrl("data", "synth", "prostate", "e", "--cases", 5)
    medrl("data", "synth", "prostate", "f", "--cases", 5, "--seed", 1)
    name = "imagesTr/prostate_000_0000.nii.gz"
    first, same, other = ((toy / folder / name).read_bytes() for folder in ("d", "e", "f"))
    assert first == same
    assert first != other


def test_an_unknown_kind_gives_the_nearest(medrl):
    answer = medrl("data", "synth", "prostrate", "d")
    assert (answer.code, "did you mean 'prostate'?" in answer.err) == (2, True)


def test_set_reaches_the_writer_and_every_kind_is_a_dataset(medrl, toy):
    arguments = ("--cases", 2, "--set", "shift=1", "--set", "shape=[32, 48]", "--set", "style=outside")
    assert medrl("data", "synth", "echo", "echo", *arguments).code == 0
    record = json.loads((toy / "echo" / "dataset.json").read_text())["phantom"]
    assert (record["shift"], record["shape"], record["style"]) == (1.0, [32, 48], "outside")
    assert medrl("data", "check", "echo").code == 0
    assert {"echo", "prostate"} <= set(kinds())
    assert not any(name.startswith("_") for name in kinds())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shfit=0.5", "did you mean 'shift' or 'shape_shift'?"),
        ("shift=strong", "expected a value like 0.0"),
        ("shape=[64]", "expected a value like [64, 64]"),
        ("seed=3", "it has an option of its own"),
        ("shift", "expected KEY=VALUE"),
    ],
)
def test_a_wrong_set_is_refused_by_name(medrl, toy, text, said):
    answer = medrl("data", "synth", "echo", "echo", "--set", text)
    assert (answer.code, said in answer.err, text in answer.err) == (2, True, True)
    assert not (toy / "echo").exists()


def test_preview_writes_a_picture(medrl, dataset, toy):
    assert medrl("data", "preview", "d", "--case", "prostate_002", "-o", "pictures/p.png").code == 0
    assert (toy / "pictures" / "p.png").read_bytes().startswith(b"\x89PNG")
    answer = medrl("data", "preview", "d", "--case", "prostate_00")
    assert (answer.code, "did you mean" in answer.err) == (3, True)


@pytest.mark.parametrize("command", [["check"], ["fingerprint"], ["split"], ["preview"]])
def test_a_missing_folder_is_named(medrl, command):
    answer = medrl("data", *command, "nowhere")
    assert (answer.code, "nowhere: no such file or folder" in answer.err) == (2, True)
