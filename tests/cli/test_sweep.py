"""Many runs: the plan, who does it, what is left after an interruption, and the table of the folders."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medrl.cli.many import FOLDER, Variations, parse_grid, safe_name
from medrl.core.config import load_yaml
from medrl.core.errors import ConfigError
from medrl.core.runlog import RunLock

TOY = str(Path(__file__).parent / "toy")
GRID = ("--grid", "policy.mode=fair,greedy", "--grid", "train.lr=1e-3,0.01")


@pytest.fixture(autouse=True)
def children_find_the_toy(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TOY)


def folders(root):
    return sorted(path.name for path in root.iterdir() if path.name[0] != "." and path.is_dir())


def stamp(root):
    return {path.parent.name: path.read_text() for path in root.glob("*/command.txt")}


# -- the plan ----------------------------------------------------------------------------------------


def test_a_grid_gives_every_combination_with_folds_and_seeds():
    varied = Variations({"a.x": (1, 2), "a.y": ("p",)}, folds=(0, 1), seeds=(5,))
    runs = list(varied.runs())
    assert len(runs) == len(varied) == 4
    assert runs[0] == ("x=1_y=p_fold0", {"a.x": 1, "a.y": "p"}, 0, 5)


def test_keys_that_end_alike_are_named_whole():
    ((name, *_),) = Variations({"a.lr": (1,), "b.lr": (2,)}).runs()
    assert name == "a.lr=1_b.lr=2"


def test_values_of_a_grid_are_yaml():
    assert parse_grid(["m.features=[16, 32],[8]", "t.lr=1e-3,2"]) == {
        "m.features": ([16, 32], [8]),
        "t.lr": (0.001, 2),
    }


@pytest.mark.parametrize("texts", [["x"], ["x="], ["=1"], ["x=1", "x=2"], ["x=[1"]])
def test_a_grid_that_is_none_is_named(texts):
    with pytest.raises(ConfigError, match="--grid"):
        parse_grid(texts)


def test_a_name_is_safe_and_long_ones_stay_apart():
    assert safe_name("../a b/c") == "a-b-c"
    long = [safe_name("x" * 200 + end) for end in "ab"]
    assert max(map(len, long)) < 130
    assert long[0] != long[1]


def test_print_config_and_dry_run_show_each_run_and_write_nothing(medrl, toy):
    out = medrl("sweep", "toy", *GRID, "-o", "many", "--print-config").out
    assert out.count("method: toy") == 4
    told = medrl("sweep", "toy", *GRID, "-o", "many", "--dry-run").err
    assert "run 4 of 4" in told
    assert list(toy.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("toy",), "nothing varies"),
        (("toy", "--grid", "train.lr=1e-3,0.001"), "two runs have the folder"),
        (("toy", "--grid", "policy.mod=fair"), "unknown key"),
        (("toy", "--grid", "train.seed=1,2", "--seeds", "2"), "varies twice"),
        (("toy", "--grid", "train.lr=fast,slow"), "train.lr"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused_before_anything_is_written(medrl, toy, arguments, what):
    answer = medrl("sweep", *arguments, "-o", "many")
    assert answer.code == 2
    assert what in answer.err
    assert list(toy.iterdir()) == []


def test_a_file_with_a_sweep_is_not_taken_for_one_run(medrl, toy):
    (toy / "s.yaml").write_text("method: toy\nsweep: {grid: {train.lr: [0.1, 0.2]}}\n")
    answer = medrl("train", "-c", "s.yaml", "-o", "r")
    assert (answer.code, "medrl sweep s.yaml" in answer.err) == (2, True), answer.err


def test_all_problems_of_a_grid_are_told_at_once(medrl):
    err = medrl("sweep", "toy", "--grid", "train.lr=0.1,fast,slow", "-o", "many").err
    assert "'fast'" in err
    assert "'slow'" in err


# -- doing it ----------------------------------------------------------------------------------------


def test_a_sweep_makes_ordinary_runs_and_a_table_from_their_folders(medrl, toy):
    (toy / "c.yaml").write_text(
        "method: toy\ntrain: {max_steps: 2}\n"
        "sweep: {grid: {policy.mode: [fair, greedy]}, folds: [0, 2], seeds: 1}\n"
    )
    answer = medrl("sweep", "c.yaml", "-o", "many", "--jobs", 2, "--shout")
    assert answer.code == 0, answer.err
    assert folders(toy / "many") == [
        f"mode={mode}_fold{fold}" for mode in ("fair", "greedy") for fold in (0, 2)
    ]
    run = toy / "many" / "mode=greedy_fold2"
    values = load_yaml(run / "config.yaml")
    assert (values["policy"]["mode"], values["data"]["fold"], values["train"]["max_steps"]) == (
        "greedy",
        2,
        2,
    )
    assert json.loads((run / "seen.json").read_text())["shout"] is True
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
    with (toy / "many" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["policy.mode"], row["runs"], row["finished"]) for row in rows] == [
        ("fair", "2", "2"),
        ("greedy", "2", "2"),
    ]
    # folds 0 and 2 give 1.0 and 0.8: mean 0.9, deviation 0.1 * sqrt 2, t of one degree of freedom 12.7062
    assert float(rows[0]["mean"]) == pytest.approx(0.9, abs=1e-9)
    assert float(rows[0]["standard_deviation"]) == pytest.approx(0.1414214, abs=1e-6)
    assert float(rows[0]["high"]) - 0.9 == pytest.approx(12.7062 * 0.1, abs=1e-4)
    assert "95 % interval" in answer.err


def test_the_same_sweep_again_does_nothing_and_a_lost_run_alone_is_done_again(medrl, toy):
    call = ("sweep", "toy", *GRID, "-o", "many", "--jobs", 2)
    assert medrl(*call).code == 0
    before = stamp(toy / "many")
    again = medrl(*call)
    assert (again.code, "4 runs of 4 finished before" in again.err) == (0, True)
    assert stamp(toy / "many") == before
    import shutil

    shutil.rmtree(toy / "many" / "mode=fair_lr=0.01")
    assert medrl(*call).code == 0
    after = stamp(toy / "many")
    assert sorted(after) == sorted(before)


def test_more_points_extend_a_sweep(medrl, toy):
    assert medrl("sweep", "toy", "--grid", "train.lr=0.1", "--seeds", 1, "-o", "many").code == 0
    before = stamp(toy / "many")
    assert medrl("sweep", "toy", "--grid", "train.lr=0.1,0.2", "-o", "many").code == 0
    assert folders(toy / "many") == ["lr=0.1", "lr=0.2"]
    assert stamp(toy / "many")["lr=0.1"] == before["lr=0.1"]


def test_another_config_in_a_run_folder_is_refused_before_any_run(medrl, toy):
    assert medrl("sweep", "toy", "--grid", "train.lr=0.1,0.2", "-o", "many").code == 0
    answer = medrl("sweep", "toy", "--grid", "train.lr=0.1,0.2,0.3", "--mode", "greedy", "-o", "many")
    assert answer.code == 2
    assert answer.err.count("policy.mode: fair -> greedy") == 2
    assert folders(toy / "many") == ["lr=0.1", "lr=0.2"]


def test_a_failed_run_does_not_stop_the_others_and_its_log_is_named(medrl, toy, monkeypatch):
    monkeypatch.setenv("MEDRL_TOY_FAIL", "DataError")
    answer = medrl("sweep", "toy", "--grid", "train.lr=0.1,0.2", "-o", "many")
    assert answer.code == 3
    assert answer.err.count("failed: lr=0.") == 2
    assert "case toy_001: it is broken" in answer.err
    monkeypatch.delenv("MEDRL_TOY_FAIL")
    again = medrl("sweep", "toy", "--grid", "train.lr=0.1,0.2", "-o", "many")
    assert again.code == 0, again.err
    assert "resumed" in (toy / "many" / "lr=0.1" / "manifest.json").read_text()


def test_two_sweeps_in_one_folder_are_refused(medrl, toy):
    (toy / "many" / FOLDER).mkdir(parents=True)
    lock = RunLock(toy / "many" / FOLDER / "lock")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import time; from pathlib import Path; from medrl.core.runlog import RunLock;"
            f"RunLock(Path({str(lock.path)!r})).acquire(); print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        answer = medrl("sweep", "toy", *GRID, "-o", "many")
        assert answer.code == 1
        assert "many is in use" in answer.err
        assert str(holder.pid) in answer.err
        assert folders(toy / "many") == []
    finally:
        holder.kill()
        holder.wait()
    assert medrl("sweep", "toy", *GRID, "-o", "many", "--jobs", 2).code == 0


def test_an_interrupted_sweep_stops_its_runs_and_goes_on_later(toy):
    call = [sys.executable, "-m", "medrl.cli", "sweep", "toy", "--grid", "train.lr=0.1,0.2", "-o", "many"]
    environment = {**os.environ, "PYTHONPATH": TOY}
    process = subprocess.Popen(
        call, env={**environment, "MEDRL_TOY_FAIL": "wait"}, cwd=toy, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (toy / "waiting_0").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    log = (toy / "many" / FOLDER / "logs" / "lr=0.1.log").read_text()
    assert "stopped by a signal" in log, "the run was asked to save"
    assert folders(toy / "many") == ["lr=0.1"]
    again = subprocess.run(call, env=environment, cwd=toy, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert folders(toy / "many") == ["lr=0.1", "lr=0.2"]


def test_a_full_disk_is_told_with_the_path(medrl, toy):
    """A limit of the file size stands for the disk, since a root user can fill anything else."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300));"
        "from medrl.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "sweep", "toy", "--grid", "train.lr=0.1,0.2", "-o", "many"],
        env={**os.environ, "PYTHONPATH": TOY, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=toy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "many/.sweep/plan/lr=0.1.yaml" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((toy / "many" / FOLDER / "plan").iterdir()) == []


def test_train_with_jobs_uses_the_same_planner(medrl, toy):
    answer = medrl("train", "toy", "--fold", "all", "--set", "data.folds=2", "--jobs", 2, "-o", "many")
    assert answer.code == 0, answer.err
    assert folders(toy / "many") == ["fold0", "fold1"]
    assert "mean 0.9500" in answer.err


def test_a_single_run_can_be_done_elsewhere(medrl, toy):
    answer = medrl("train", "toy", "--executor", "local", "-o", "one")
    assert answer.code == 0, answer.err
    assert (toy / "one" / "seen.json").exists()


def test_a_sweep_and_stages_as_tasks_inside_a_launcher_are_refused(medrl, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    answer = medrl("sweep", "toy", *GRID)
    assert (answer.code, "--executor slurm" in answer.err) == (2, True)
    answer = medrl("train", "graft", "--by", "stage", "--set", "data.root=.", "-o", "r")
    assert (answer.code, "every rank would start the tasks" in answer.err) == (2, True), answer.err


def test_stages_as_tasks_need_a_method_with_stages(medrl, toy):
    answer = medrl("train", "toy", "--by", "stage", "--executor", "local", "-o", "r")
    assert (answer.code, "method 'toy' has no stages" in answer.err) == (2, True)
    assert not (toy / "r").exists()


# -- the table ---------------------------------------------------------------------------------------


def test_the_summary_needs_nothing_but_the_folders(medrl, toy):
    assert medrl("sweep", "toy", *GRID, "--seeds", 2, "-o", "many", "--jobs", 2).code == 0
    import shutil

    shutil.rmtree(toy / "many" / FOLDER)
    found = json.loads(medrl("runs", "summary", "many", "--json").out)
    assert found["metric"] == "val_dice"
    settings = [(row["setting"]["policy.mode"], row["setting"]["train.lr"]) for row in found["rows"]]
    assert sorted(settings) == [("fair", 0.001), ("fair", 0.01), ("greedy", 0.001), ("greedy", 0.01)]
    assert {(row["runs"], row["finished"], row["spread"]) for row in found["rows"]} == {(2, 2, 0.0)}
    other = json.loads(medrl("runs", "summary", "many", "--metric", "loss", "--json").out)
    assert {row["mean"] for row in other["rows"]} == {0.25}
    assert medrl("runs", "summary", "many", "--metric", "los").code == 2
    assert medrl("runs", "summary", ".").code == 2


def test_runs_that_are_not_finished_are_counted_and_left_out_of_the_mean(medrl, toy):
    assert (
        medrl("sweep", "toy", "--grid", "train.lr=0.1,0.2", "--seeds", 2, "-o", "many", "--jobs", 2).code == 0
    )
    path = toy / "many" / "lr=0.1_seed2" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "failed"}))
    found = json.loads(medrl("runs", "summary", "many", "--json").out)
    rows = {row["setting"]["train.lr"]: row for row in found["rows"]}
    assert (rows[0.1]["runs"], rows[0.1]["finished"], rows[0.1]["spread"]) == (2, 1, None)
    assert rows[0.2]["finished"] == 2
