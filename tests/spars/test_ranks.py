"""Two ranks train one classifier and one policy; what they keep is the same on both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from medrl.core.stages import Pipeline

SCRIPT = """
import json, os, sys
from pathlib import Path
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.plugins.spars import running, train

config, manager = json.loads(Path(sys.argv[1]).read_text()), PluginManager.create(third_party=False)
folder, rank = Path(sys.argv[2]), os.environ["RANK"]
kept = []
original = train.validate

def watched(rt, cfg, game):
    found = original(rt, cfg, game)
    kept.append([value.double().sum().item() for value in game.agent.state_dict().values()])
    return found

train.validate = watched
job = build_train_job(manager, "spars", config, folder / "run")
running.run(job)
kept.append("again")
running.run(job)
(folder / f"kept_{rank}.json").write_text(json.dumps(kept))
"""


@pytest.mark.ddp
def test_two_ranks_agree_on_the_weights_of_the_policy_and_do_each_recorded_stage_once(tmp_path, tiny):
    Pipeline(tmp_path / "run").begin()
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "config.json").write_text(json.dumps(tiny({"warm": {"steps": 1}, "ppo": {"updates": 2}})))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(2):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "config.json"), str(tmp_path)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=env, **pipes))
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    one, other = (json.loads((tmp_path / f"kept_{rank}.json").read_text()) for rank in (0, 1))
    assert len(one) >= 3
    assert one == other
    assert one[-1] == "again", "nothing is left for the second call"
    done = {name: status.state for name, status in Pipeline(tmp_path / "run").status().items()}
    assert done == {"01_classifier": "done", "02_play": "done"}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["world_size"]) == ("finished", 2)
