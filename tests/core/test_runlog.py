"""Run folders: files, records, lock, log, TensorBoard."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medrl.core.errors import ConfigError
from medrl.core.runlog import RunFolder, TensorBoardSink, new_run_name


def create(path, **options):
    return RunFolder.create(
        path, **{"config_yaml": "method: toy\n", "command": ["medrl", "train", "a b"], **options}
    )


def test_a_new_folder_holds_config_command_and_manifest(tmp_path):
    run = create(tmp_path / "deep" / "run", manifest={"method": "toy", "root": Path("/data")})
    run.close("finished")
    assert (run.dir / "config.yaml").read_text() == "method: toy\n"
    assert (run.dir / "command.txt").read_text() == "medrl train 'a b'\n"
    manifest = json.loads((run.dir / "manifest.json").read_text())
    assert (manifest["status"], manifest["method"], manifest["root"]) == ("finished", "toy", "/data")
    assert manifest["created"] <= manifest["ended"]
    assert run.checkpoints_dir.is_dir()


def test_records_are_one_json_object_a_line(tmp_path):
    run = create(tmp_path / "run")
    run.metrics(1, loss=0.5, weights=[1, 2.5], array=np.arange(2), scalar=np.float32(0.25))
    run.metrics(2, loss=float("nan"), worst=float("inf"), text="ü")
    run.event(2, "skipped_step", cases=["a"])
    run.close("finished")
    lines = (run.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "weights": [1, 2.5], "array": [0, 1], "scalar": 0.25},
        {"step": 2, "loss": None, "worst": None, "text": "ü"},
        {"step": 2, "event": "skipped_step", "cases": ["a"]},
    ]
    assert list(run.records()) == [json.loads(line) for line in lines]


def test_records_after_a_step_are_dropped_and_writing_goes_on(tmp_path):
    run = create(tmp_path / "run")
    for step in (1, 2, 3):
        run.metrics(step, loss=step)
    assert run.truncate_metrics(1) == 2
    run.metrics(2, loss=9)
    assert [(record["step"], record["loss"]) for record in run.records()] == [(1, 1), (2, 9)]
    run.close()


def test_a_line_cut_short_by_a_kill_is_left_out_and_does_not_swallow_the_next(tmp_path):
    run = create(tmp_path / "run")
    run.metrics(1, loss=1)
    run.close("failed")
    with run.metrics_path.open("a") as file:
        file.write('{"step": 2, "lo')
    run = RunFolder.open(run.dir)
    run.metrics(3, loss=3)
    assert [record["step"] for record in run.records()] == [1, 3]
    run.close()


def test_a_record_is_on_disk_at_once(tmp_path):
    run = create(tmp_path / "run")
    run.metrics(1, loss=1)
    assert [record["step"] for record in RunFolder.open(run.dir, lock=False).records()] == [1]
    run.close()


def test_notes_are_merged_into_the_manifest(tmp_path):
    run = create(tmp_path / "run", manifest={"a": 1})
    run.note(b=2)
    run.note(a=3)
    run.close()
    found = RunFolder.open(run.dir, lock=False)
    assert (found.manifest["a"], found.manifest["b"], found.status) == (3, 2, "running")


def test_messages_of_medrl_go_to_the_log_while_the_folder_is_open(tmp_path):
    logger = logging.getLogger("medrl.test")
    run = create(tmp_path / "run")
    logger.info("inside")
    other = RunFolder.attach(run.dir, rank=1)
    logger.warning("from two")
    other.close()
    run.close()
    logger.info("after")
    text = (run.dir / "log.txt").read_text()
    assert "INFO medrl.test: inside" in text
    assert "rank 1 WARNING medrl.test: from two" in text
    assert "after" not in text


def test_reading_a_folder_neither_locks_nor_changes_it(tmp_path):
    run = create(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.dir.iterdir() if path.is_file()}
    found = RunFolder.open(run.dir, lock=False)
    assert found.owner["pid"] == os.getpid()
    assert found.config_yaml == "method: toy\n"
    found.close("finished")
    assert {path.name: path.read_bytes() for path in run.dir.iterdir() if path.is_file()} == before
    run.close()
    assert found.owner == {}


def test_a_continued_run_keeps_all_its_commands(tmp_path):
    run = create(tmp_path / "run")
    run.replace_config("method: toy\ntrain: {max_steps: 9}\n", "medrl resume run")
    assert (run.dir / "command.txt").read_text().splitlines() == ["medrl train 'a b'", "medrl resume run"]
    assert "max_steps: 9" in run.config_yaml
    run.close()


def test_a_folder_that_holds_a_run_or_none_is_told_apart(tmp_path):
    create(tmp_path / "run").close()
    with pytest.raises(ConfigError, match="already holds a run"):
        create(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds no run"):
        RunFolder.open(tmp_path)


def test_run_names_carry_date_method_fold_and_config():
    name = new_run_name("graft", 0, "a1b2c3d4")
    date, method, fold, config = name.split("_")
    assert (len(date), method, fold, config) == (10, "graft", "fold0", "a1b2")
    assert new_run_name("graft", None, "a1b2c3d4").count("_") == 2


def test_run_folders_are_read_without_torch(tmp_path):
    create(tmp_path / "run").close("finished")
    code = (
        "import sys; from pathlib import Path; from medrl.core.runlog import RunFolder;"
        f"RunFolder.open(Path({str(tmp_path / 'run')!r}), lock=False);"
        "print([name for name in ('torch', 'numpy', 'monai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tensorboard_gets_scalars_and_elements_of_lists(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    sink.write(1, {"loss": 0.5, "weights": [0.25, 0.75], "mode": "text", "bad": float("nan")})
    sink.write(2, {"loss": 0.25})
    sink.flush()
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "weights/0", "weights/1"]
    assert [(item.step, item.value) for item in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_missing_tensorboard_is_an_error_with_its_install_command(tmp_path, monkeypatch):
    sys.path.insert(0, str(Path(__file__).parent / "ranks"))
    import toy_run as toy

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard, which is not installed") as caught:
        toy.train(tmp_path / "run", 2, log=("jsonl", "tensorboard"))
    assert "pip install 'medrl[log]'" in caught.value.do
    assert not (tmp_path / "run").exists(), "nothing is begun"


def test_a_run_writes_tensorboard_events_when_asked(tmp_path):
    pytest.importorskip("tensorboard")
    sys.path.insert(0, str(Path(__file__).parent / "ranks"))
    import toy_run as toy

    toy.train(tmp_path / "run", 2, log=("jsonl", "tensorboard"))
    assert len(list((tmp_path / "run" / "tensorboard").glob("events.*"))) == 1
