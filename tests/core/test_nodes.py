"""Two nodes on one machine: two agents of torchrun that meet on the loopback through c10d."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from medrl.core.checkpoint import read_meta
from medrl.core.runlog import RunFolder
from medrl.core.runlog.lock import process_alive

sys.path.insert(0, str(Path(__file__).parent / "ranks"))
import run_nodes

pytestmark = pytest.mark.ddp
LIMIT_S = 240
SCRIPT = Path(run_nodes.__file__)


class Enough(Exception):
    """Ends a run of a test."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def agents(mode, folder):
    """Start one agent of torchrun for each node."""
    port = free_port()
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run",
        "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", f"test{port}",
        "--local-addr", "127.0.0.1", str(SCRIPT), mode, str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = []
    for node in range(2):
        with (folder / f"agent_{node}").open("w") as out:
            started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
    return started


def end_of(processes, folder):
    """Return the exit codes of the agents and what they wrote."""
    deadline = time.monotonic() + LIMIT_S
    try:
        for process in processes:
            process.wait(max(1.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [(folder / f"agent_{node}").read_text() for node in range(2)]
    return [process.returncode for process in processes], texts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    codes, texts = end_of(agents("good", folder), folder)
    assert codes == [0, 0], texts
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with the same global batch."""
    folder = tmp_path_factory.mktemp("alone")
    return run_nodes.train(folder / "run", 6, batch_size=4)


def test_both_nodes_have_one_rank_each(finished):
    places = [facts["place"] for facts in finished[1]]
    assert [place["RANK"] for place in places] == ["0", "1"]
    assert {(place["WORLD_SIZE"], place["LOCAL_RANK"]) for place in places} == {("2", "0")}
    assert sorted(place["GROUP_RANK"] for place in places) == ["0", "1"]


@pytest.mark.parametrize("name", ["plain", "accumulated"])
def test_the_weights_are_those_of_one_process_with_the_same_global_batch(finished, alone, name):
    folder, _ = finished
    weights, _ = alone
    for rank in range(2):
        found = torch.load(folder / f"{name}_{rank}.pt", weights_only=True)
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


def test_two_identical_runs_are_equal_bit_for_bit_on_every_rank(finished):
    _, facts = finished
    assert len({fact[name]["weights"] for fact in facts for name in ("plain", "again")}) == 1


def test_scores_are_gathered_by_case_whatever_the_number_of_ranks(finished, alone):
    _, facts = finished
    _, scores = alone
    for fact in facts:
        assert list(fact["plain"]["scores"]) == list(scores) == [f"case_{index:02d}" for index in range(12)]
        assert fact["plain"]["scores"] == pytest.approx(scores, rel=1e-5, abs=1e-6)


def test_a_run_that_was_stopped_goes_on_to_the_same_result(finished):
    _, facts = finished
    for fact in facts:
        assert fact["resumed"] == fact["plain"]["scores"]


def test_a_step_sends_its_gradients_once_and_less_than_one_percent_beside(finished):
    _, facts = finished
    for fact in facts:
        for counted in fact["traffic"].values():
            assert counted["reductions"] == 1, "micro-batches do not reduce"
            assert counted["reduced"] == counted["parameters"]
            assert counted["total"] <= 1.01 * counted["parameters"]


@pytest.mark.parametrize("victim", ["rank", "agent"])
def test_when_a_rank_or_the_agent_of_a_node_is_killed_all_end_and_the_run_goes_on_later(tmp_path, victim):
    processes = agents("long", tmp_path)
    deadline = time.monotonic() + LIMIT_S
    while not all((tmp_path / f"pid_{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline, (tmp_path / "agent_0").read_text()
        time.sleep(0.05)
    time.sleep(0.3)
    pids = [int((tmp_path / f"pid_{rank}").read_text()) for rank in range(2)]
    if victim == "rank":
        os.kill(pids[1], signal.SIGKILL)
    else:
        parent = int(Path(f"/proc/{pids[1]}/stat").read_text().rpartition(")")[2].split()[1])
        assert parent in {process.pid for process in processes}
        os.kill(parent, signal.SIGKILL)
    codes, texts = end_of(processes, tmp_path)
    assert all(code != 0 for code in codes), texts
    while any(process_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(process_alive(pid) for pid in pids), "no rank is left behind"
    log = (tmp_path / "run" / "log.txt").read_text()
    run = RunFolder.open(tmp_path / "run", lock=False)
    assert run.owner == {}
    if victim == "rank":
        assert run.status == "failed"
        assert "rank 1 died" in log or any("rank 1 died" in text for text in texts), (log, texts)
    elif run.status == "failed":
        assert "its launcher, process" in log, (log, texts)
    else:  # the other agent noticed first, and asked its rank to stop: both saved
        assert run.status == "interrupted"
        assert "signal 15: saving" in log
    step = read_meta(tmp_path / "run" / "checkpoints" / "last.pt")["step"]
    assert step >= 2
    seen = []

    def enough(_rt, at):
        seen.append(at)
        raise Enough

    with pytest.raises(Enough):
        run_nodes.train(tmp_path / "run", 20_000, batch_size=2, before=enough)
    assert seen == [step + 1], "one process goes on where the two nodes saved last"
