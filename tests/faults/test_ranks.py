"""Two gloo ranks: exact resume, agreement, and an end for all when one dies, raises, leaves or hangs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medrl.core.checkpoint import load_checkpoint, read_meta
from medrl.core.errors import RuntimeFault
from medrl.core.runlog import RunFolder
from medrl.core.runlog.lock import process_alive
from medrl.core.runtime.ranks import Place, Ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "core" / "ranks"))
import run_toy
import toy_run as toy

LIMIT_S = 120
SCRIPT = Path(run_toy.__file__)


def end_of(processes, folder):
    """Return exit codes and messages; a rank that hangs fails the test."""
    deadline = time.monotonic() + LIMIT_S
    for process in processes:
        process.join(max(1.0, deadline - time.monotonic()))
    codes = tuple(process.exitcode for process in processes)
    for process in processes:
        process.kill()
    return codes, [(folder / f"stderr_{rank}").read_text() for rank in range(len(processes))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Everything of two ranks that ends well, from one start through torchrun."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*launcher, str(SCRIPT), "resume", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S * 2,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.ddp
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_resume_bit_for_bit(finished, precision):
    folder, _ = finished
    straight, parts = (toy.state_of(folder / f"{name}_{precision}") for name in ("straight", "parts"))
    assert straight == parts
    assert len(straight["ranks"]) == 2
    a, b = straight["ranks"]
    assert a["rng"]["torch"] != b["rng"]["torch"], "each rank has a stream of its own"
    records = [
        (folder / f"{name}_{precision}" / "metrics.jsonl").read_text() for name in ("straight", "parts")
    ]
    assert records[0] == records[1]


@pytest.mark.ddp
def test_all_parameters_are_equal_across_ranks(finished):
    _, facts = finished
    assert [(fact["parameters_equal"], fact["mixed_equal"]) for fact in facts] == [(True, True)] * 2


@pytest.mark.ddp
def test_nan_on_one_rank_is_never_stepped_on_any_and_hangs_none(finished):
    folder, facts = finished
    for fact in facts:
        assert fact["unchanged"] == [False, True, False, True], "steps 2 and 4 of 5 change nothing"
    events = [record for record in RunFolder.open(folder / "nan", lock=False).records() if "event" in record]
    assert [(event["step"], event["ranks"], len(event["cases"])) for event in events] == [
        (2, [1], 2),
        (4, [1], 2),
    ]


@pytest.mark.ddp
def test_two_ranks_give_the_metrics_of_one_on_the_same_cases(finished, tmp_path):
    _, facts = finished
    with toy.make_job(tmp_path / "run", 1).runtime() as rt:
        loader = rt.loader(toy.Cases(5), batch_size=2, shuffle=False, name="score5")
        found = {}
        for batch in loader.epoch():
            for name, x in zip(batch["case"], batch["x"], strict=True):
                found[name] = float(x.pow(2).mean())
        alone = rt.gather(found)
    for fact in facts:
        assert fact["scores"]["per_case"] == alone
        assert fact["scores"]["mean"] == sum(alone.values()) / 5
        assert fact["scores"]["cases"] == [f"case_{index}" for index in range(5)]


@pytest.mark.ddp
def test_values_are_reduced_over_ranks(finished):
    folder, facts = finished
    for fact in facts:
        assert fact["reduced"] == [1.5, 3.0, 2.0, 1.0, 1.0]
        assert fact["tensor"] == [1.5, 4.5]
    last = list(RunFolder.open(folder / "nan", lock=False).records())[-1]
    assert last == {"step": 5, "both": 0.5, "same": 0.1, "vector": [0.5, 1.0]}


@pytest.mark.ddp
def test_a_gradient_that_one_rank_lacks_counts_as_zero(finished):
    _, facts = finished
    for fact in facts:
        assert fact["half"] == pytest.approx([0.05, 0.05], rel=1e-6), "half of lr 0.1 times gradient 1"


@pytest.mark.ddp
def test_no_file_of_the_ranks_is_left_after_a_good_end(finished):
    folder, _ = finished
    assert list(folder.glob("*/.ranks")) == []


@pytest.mark.ddp
def test_a_state_of_two_ranks_continues_in_one_process(finished, tmp_path, caplog):
    import shutil

    folder, _ = finished
    shutil.copytree(folder / "straight_fp32", tmp_path / "run")
    toy.train(tmp_path / "run", 8, accumulate=2)
    assert toy.state_of(tmp_path / "run")["step"] == 8
    assert "written by 2 processes and this run has 1" in caplog.text


CASES = [
    # mode, exit codes of both ranks, what rank 0 says about rank 1, timeout in seconds
    ("kill", (1, -9), "rank 1 died at step 3 (cases case_bad)", 60),
    ("raise", (1, 3), "rank 1 failed at step 3 (cases case_bad)", 60),
    ("defect", (1, 1), "ValueError: a defect of the method", 60),
    ("exit", (1, 1), "the method called sys.exit(0)", 60),
    ("hard_exit", (1, 0), "rank 1 died at step 3 (cases case_bad)", 60),
    ("sleep", (1, 1), "rank 1 gave no answer for 2 s, last at step 3 (cases case_bad)", 2),
    ("early", (1, 1), "rank 1: end of the run at step 3", 60),
]


@pytest.mark.ddp
@pytest.mark.parametrize(("mode", "codes", "cause", "timeout_s"), CASES, ids=[case[0] for case in CASES])
def test_when_one_rank_is_lost_all_end_and_the_cause_is_told(tmp_path, mode, codes, cause, timeout_s):
    found, texts = end_of(run_toy.launch(mode, tmp_path, ranks=2, timeout_s=timeout_s), tmp_path)
    assert found == codes, texts
    log = (tmp_path / "run" / "log.txt").read_text()
    assert cause in texts[0] or cause in log, (texts, log)
    assert "step 3" in texts[0], "the surviving rank names its step"
    run = RunFolder.open(tmp_path / "run", lock=False)
    assert (run.status, run.owner) == ("failed", {})
    meta = read_meta(tmp_path / "run" / "checkpoints" / "last.pt")
    assert (meta["step"], meta["world_size"]) == (2, 2)


@pytest.mark.ddp
def test_when_the_shared_folder_is_full_all_ranks_end_with_the_cause_and_go_on_later(finished, tmp_path):
    codes, texts = end_of(run_toy.launch("full", tmp_path, ranks=2), tmp_path)
    assert codes == (1, 1), texts
    cause = f"checkpoint {tmp_path / 'run' / 'checkpoints' / 'step_000004.pt'} cannot be written"
    assert all(cause in text for text in texts), texts
    run = RunFolder.open(tmp_path / "run", lock=False)
    assert (run.status, run.owner) == ("failed", {})
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["last.pt", "step_000002.pt"], "nothing that was cut short is left"
    codes, texts = end_of(run_toy.launch("room", tmp_path, ranks=2), tmp_path)
    assert codes == (0, 0), texts
    assert toy.state_of(tmp_path / "run") == toy.state_of(finished[0] / "straight_fp32")


@pytest.mark.ddp
def test_a_signal_to_one_rank_makes_both_save_and_stop(tmp_path):
    processes = run_toy.launch("signals", tmp_path, ranks=2)
    deadline = time.monotonic() + LIMIT_S
    while not (tmp_path / "ready_1").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGTERM)
    codes, texts = end_of(processes, tmp_path)
    assert codes == (143, 143), texts
    run = RunFolder.open(tmp_path / "run", lock=False)
    assert run.status == "interrupted"
    step = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").meta["step"]
    assert max(record["step"] for record in run.records()) == step


@pytest.mark.ddp
def test_ranks_whose_launcher_is_killed_end_and_say_so(tmp_path):
    launcher = run_toy.fork.Process(target=run_toy.launch_and_wait, args=("signals", tmp_path, 2))
    launcher.start()
    deadline = time.monotonic() + LIMIT_S
    while not all((tmp_path / f"ready_{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pids = [int((tmp_path / f"pid_{rank}").read_text()) for rank in range(2)]
    launcher.kill()
    launcher.join()
    while any(process_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if process_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "no rank is left behind"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"its launcher, process {launcher.pid}, is gone" in log
    assert RunFolder.open(tmp_path / "run", lock=False).status == "failed"


def test_a_rank_that_cannot_find_the_others_says_so(monkeypatch):
    import medrl.core.runtime.ranks as module

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(module, "_START_S", 1.0)
    with pytest.raises(RuntimeFault, match="rank 1 of 2 cannot reach the others"):
        Ranks(Place(1, 2), timeout_s=1.0, cuda=False)
