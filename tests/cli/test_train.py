import json

import pytest

from medrl.core.config import load_yaml, parse_yaml


def seen(folder):
    return json.loads((folder / "seen.json").read_text())


def config(folder):
    return load_yaml(folder / "config.yaml")


def test_layers_win_in_the_documented_order(medrl, toy):
    (toy / "c.yaml").write_text("train: {max_steps: 5, lr: 0.5, batch_size: 7}\n")
    common = ["train", "toy", "--print-config"]

    def steps(*arguments):
        return parse_yaml(medrl(*common, *arguments).out)["train"]["max_steps"]

    assert steps() == 4
    assert steps("--preset", "smoke") == 3
    assert steps("--preset", "smoke", "-c", "c.yaml") == 5
    assert steps("--preset", "smoke", "-c", "c.yaml", "--max-steps", 6) == 6
    assert steps("--preset", "smoke", "-c", "c.yaml", "--max-steps", 6, "--set", "train.max_steps=7") == 7


def test_print_config_names_the_origin_of_each_value_and_is_valid_yaml(medrl, toy):
    (toy / "c.yaml").write_text("train: {lr: 0.5}\n")
    out = medrl(
        "train",
        "toy",
        "-c",
        "c.yaml",
        "--mode",
        "greedy",
        "--seed",
        9,
        "--set",
        "policy.clip=0.1",
        "--print-config",
    ).out
    origin = {line.split(":")[0].strip(): line.partition("#")[2].strip() for line in out.splitlines()}
    assert origin["lr"] == "c.yaml"
    assert origin["mode"] == "--mode"
    assert origin["seed"] == "--seed"
    assert origin["clip"] == "--set"
    assert origin["checkpoint_every"] == "defaults.yaml"
    assert origin["batch_size"] == "built in"
    (toy / "again.yaml").write_text(out)
    again = medrl("train", "toy", "-c", "again.yaml", "--print-config").out
    assert parse_yaml(again) == parse_yaml(out)


def test_all_config_errors_are_told_at_once(medrl, toy):
    (toy / "c.yaml").write_text("train: {lr: fast, max_step: 3}\npolcy: {}\n")
    answer = medrl(
        "train", "toy", "-c", "c.yaml", "--set", "data.folds=1", "--set", "nonsense", "--set", "x.y=1"
    )
    assert answer.code == 2
    problems = [line for line in answer.err.splitlines() if line.startswith("       - ")]
    assert len(problems) == 6
    for text in ("train.lr", "'max_steps'", "'policy'", "data.folds", "--set nonsense", "x: unknown key"):
        assert any(text in line for line in problems), text


def test_an_unknown_registry_key_is_told_before_anything_is_loaded(medrl):
    answer = medrl("train", "toy", "--set", "model.name=toy.lime", "-o", "r")
    assert answer.code == 2
    assert "no 'toy.lime', did you mean 'toy.line'" in answer.err
    assert "loading torch" not in answer.err


def test_paths_of_flags_are_taken_from_the_working_folder_and_of_files_from_the_file(medrl, toy):
    (toy / "sub").mkdir()
    (toy / "sub" / "c.yaml").write_text("data: {root: images}\n")
    from_file = parse_yaml(medrl("train", "toy", "-c", "sub/c.yaml", "--print-config").out)
    from_flag = parse_yaml(
        medrl("train", "toy", "-c", "sub/c.yaml", "--data", "images", "--print-config").out
    )
    assert from_file["data"]["root"] == str(toy / "sub" / "images")
    assert from_flag["data"]["root"] == str(toy / "images")


def test_a_run_folder_holds_the_config_and_the_command(medrl, toy):
    answer = medrl("train", "toy", "-o", "r", "--mode", "greedy", "--shout", "--log", "jsonl,tensorboard")
    assert answer.code == 0
    assert config(toy / "r")["policy"]["mode"] == "greedy"
    assert config(toy / "r")["train"]["log"] == ["jsonl", "tensorboard"]
    assert seen(toy / "r")["shout"] is True
    assert seen(toy / "r")["command"][:3] == ["medrl", "train", "toy"]
    assert "medrl predict toy -i IMAGES -o OUT --model r" in answer.err
    assert "report: r/report.html" in answer.err


def test_a_run_folder_that_medrl_names_is_always_a_new_one(medrl, toy):
    assert [medrl("train", "toy").code for _ in range(3)] == [0, 0, 0]
    names = sorted(path.name for path in (toy / "runs").iterdir())
    assert len(names) == 3
    assert names[1].endswith("-2")
    assert names[2].endswith("-3")


def test_the_method_may_be_left_out_where_the_file_names_it(medrl, toy):
    (toy / "c.yaml").write_text("method: toy\n")
    assert medrl("train", "-c", "c.yaml", "--mode", "greedy", "-o", "r").code == 0
    assert seen(toy / "r")["mode"] == "greedy"


def test_the_method_may_stand_after_the_options(medrl, toy):
    assert medrl("train", "--mode", "greedy", "-o", "r", "toy").code == 0
    assert seen(toy / "r")["mode"] == "greedy"


def test_a_file_for_another_method_is_refused(medrl, toy):
    (toy / "c.yaml").write_text("method: graft\n")
    answer = medrl("train", "toy", "-c", "c.yaml")
    assert (answer.code, "it is for method 'graft'" in answer.err) == (2, True)


@pytest.mark.parametrize("arguments", [["tooy"], ["--dry-run", "tooy"], ["tooy", "--help"]])
def test_a_wrong_method_gives_the_nearest(medrl, arguments):
    answer = medrl("train", *arguments)
    assert (answer.code, "no method 'tooy': did you mean 'toy'?" in answer.err) == (2, True)


def test_no_method_lists_the_known_ones(medrl):
    answer = medrl("train")
    known = answer.err.partition("known methods: ")[2].splitlines()[0].split(", ")
    assert (answer.code, {"graft", "toy"} <= set(known)) == (2, True)


def test_help_of_a_method_shows_its_own_options_and_the_shared_ones(medrl):
    out = medrl("train", "toy", "--help").out
    assert out.index("Options of toy") < out.index("--mode") < out.index("Options of every method")
    assert "--max-steps" in out
    assert "--mode" not in medrl("train", "--help").out


def test_an_unknown_preset_names_the_nearest(medrl):
    answer = medrl("train", "toy", "--preset", "smok")
    assert (answer.code, "did you mean 'smoke'?" in answer.err) == (2, True)


def test_dry_run_says_what_would_be_done_and_writes_nothing(medrl, toy):
    answer = medrl("train", "toy", "--dry-run", "--max-steps", 9)
    assert answer.code == 0
    assert "9 steps" in answer.err
    assert "nothing was written" in answer.err
    assert list(toy.iterdir()) == []


def test_dry_run_checks_dataset_and_split(medrl, toy):
    pytest.importorskip("nibabel")
    assert medrl("data", "synth", "prostate", "d", "--cases", 5).code == 0
    good = medrl("train", "toy", "--data", "d", "--fold", 1, "--dry-run")
    assert good.code == 0
    assert "1: 4 cases for training, 1 for validation" in good.err
    assert medrl("train", "toy", "--data", "d", "--fold", 7, "--dry-run").code == 2
    assert medrl("train", "toy", "--data", "none", "--dry-run").code == 3
    next((toy / "d" / "labelsTr").glob("*.nii.gz")).unlink()
    assert medrl("train", "toy", "--data", "d", "--dry-run").code == 3


def test_dry_run_refuses_a_folder_with_another_config_and_shows_the_difference(medrl):
    medrl("train", "toy", "-o", "r")
    answer = medrl("train", "toy", "-o", "r", "--set", "train.lr=0.5", "--dry-run")
    assert answer.code == 2
    assert "train.lr: 0.001 -> 0.5" in answer.err
    assert "would be continued" in medrl("train", "toy", "-o", "r", "--dry-run").err
    assert "would be continued" in medrl("train", "toy", "-o", "r", "--max-steps", 9, "--dry-run").err


def test_dry_run_refuses_a_folder_that_cannot_be_made(medrl, toy):
    (toy / "file").write_text("x")
    answer = medrl("train", "toy", "-o", "file/run", "--dry-run")
    assert (answer.code, "is a file" in answer.err) == (2, True)


def test_resume_must_needs_to_know_the_run(medrl):
    answer = medrl("train", "toy", "--resume", "must")
    assert (answer.code, "-o RUN" in answer.err) == (2, True)


def test_all_folds_and_several_seeds_are_ordinary_runs_with_a_table(medrl, toy):
    answer = medrl("train", "toy", "--fold", "all", "--seeds", 2, "--set", "data.folds=3", "-o", "many")
    assert answer.code == 0
    folders = sorted(path.name for path in (toy / "many").iterdir())
    assert folders == [f"fold{fold}_seed{seed}" for fold in range(3) for seed in (1, 2)]
    values = config(toy / "many" / "fold2_seed2")
    assert (values["data"]["fold"], values["train"]["seed"]) == (2, 2)
    rows = [line for line in answer.err.splitlines() if "finished" in line and "many/" in line]
    assert len(rows) == 6
    assert "mean 0.9000" in answer.err


def test_seeds_begin_at_the_given_seed(medrl, toy):
    assert medrl("train", "toy", "--seed", 5, "--seeds", 2, "-o", "many").code == 0
    assert sorted(path.name for path in (toy / "many").iterdir()) == ["seed5", "seed6"]
    assert config(toy / "many" / "seed6")["train"]["seed"] == 6


def test_a_failed_run_does_not_stop_the_others_and_gives_the_exit_code(medrl, monkeypatch, toy):
    monkeypatch.setenv("MEDRL_TOY_FAIL", "DataError")
    answer = medrl("train", "toy", "--seeds", 3, "-o", "many")
    assert answer.code == 3
    assert answer.err.count("error: case toy_001") == 3
    assert len([line for line in answer.err.splitlines() if " failed " in line]) == 3


def test_a_signal_stops_all_runs(medrl, monkeypatch, toy):
    monkeypatch.setenv("MEDRL_TOY_FAIL", "signal")
    answer = medrl("train", "toy", "--seeds", 3, "-o", "many")
    assert answer.code == 143
    assert [path.name for path in (toy / "many").iterdir()] == ["seed1"]


def test_fast_dev_run_leaves_nothing_behind(medrl, toy, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(toy))
    answer = medrl("train", "toy", "--fast-dev-run")
    assert answer.code == 0
    assert "finished after 2 steps" in answer.err
    assert list(toy.iterdir()) == []


def test_fast_dev_run_is_kept_where_a_folder_is_named(medrl, toy):
    assert medrl("train", "toy", "--fast-dev-run", "-o", "r").code == 0
    assert config(toy / "r")["train"]["max_steps"] == 2


def test_init_from_must_exist(medrl):
    answer = medrl("train", "toy", "--init-from", "nowhere.pt", "-o", "r")
    assert (answer.code, "--init-from nowhere.pt" in answer.err) == (2, True)


def test_progress_is_plain_lines_without_a_terminal(medrl):
    err = medrl("train", "toy", "-o", "r").err
    assert "step 4/4  loss 0.2500" in err
    assert "\x1b" not in err


def test_an_option_of_a_method_that_hides_a_shared_one_is_a_defect_of_the_plugin(medrl, monkeypatch):
    import click
    import medrl_toy.commands as commands

    clash = click.Option(["--seed"])
    monkeypatch.setattr(commands.train, "params", [*commands.train.params, clash])
    answer = medrl("train", "toy")
    assert (answer.code, "its option --seed is one that every method has" in answer.err) == (5, True)


def test_several_runs_inside_a_launcher_are_refused(medrl, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    answer = medrl("train", "toy", "--seeds", 2)
    assert (answer.code, "--devices" in answer.err) == (2, True)


def test_ranks_of_one_launch_choose_the_same_folder(medrl, monkeypatch, toy):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert medrl("train", "toy").code == 0
    assert len(list((toy / "runs").iterdir())) == 1
