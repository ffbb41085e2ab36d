import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.ddp
TOY = str(Path(__file__).parent / "toy")


def test_devices_starts_one_rank_each_through_the_launcher(medrl_process, toy):
    answer = medrl_process("train", "toy", "--devices", 2, "--mode", "greedy")
    assert answer.code == 0, answer.err
    assert (toy / "rank_1_of_2").exists()
    (run,) = (toy / "runs").iterdir()
    assert (run / "seen.json").exists()
    assert answer.err.count("step 4/4") == 1
    assert "OMP_NUM_THREADS" not in answer.err


def test_the_exit_code_of_a_rank_is_that_of_the_command(medrl_process):
    answer = medrl_process("train", "toy", "--devices", 2, "-o", "r", MEDRL_TOY_FAIL="DataError")
    assert answer.code == 3
    assert "case toy_001: it is broken" in answer.err
    assert "Traceback" not in answer.err


def test_termination_reaches_all_ranks_and_is_143(toy):
    environment = {**os.environ, "PYTHONPATH": TOY, "MEDRL_TOY_FAIL": "wait"}
    process = subprocess.Popen(
        [sys.executable, "-m", "medrl.cli", "train", "toy", "--devices", "2", "-o", "r"],
        env=environment,
        cwd=toy,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not all((toy / f"waiting_{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "stopped by a signal" in err
    assert "Traceback" not in err


def test_folds_and_devices_go_together(medrl_process, toy):
    answer = medrl_process(
        "train", "toy", "--devices", 2, "--fold", "all", "--set", "data.folds=2", "-o", "many"
    )
    assert answer.code == 0, answer.err
    assert sorted(path.name for path in (toy / "many").iterdir()) == ["fold0", "fold1"]
    assert "fold: 1" in (toy / "many" / "fold1" / "config.yaml").read_text()
