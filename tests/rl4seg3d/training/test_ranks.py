"""Two ranks: equal weights on both, windows divided, every stage done once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ddp

SCRIPT = """
import hashlib, json, os, sys
from pathlib import Path
import torch
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.core.runtime import Runtime
from medrl.plugins.rl4seg3d import domains, loop, pretrain, train

config, manager = json.loads(Path(sys.argv[1]).read_text()), PluginManager.create(third_party=False)
rank, out = int(os.environ["RANK"]), Path(sys.argv[3])
finish, draw, seen = Runtime.finish, domains.draw, {}

def weights(self):
    finish(self)
    whole = hashlib.sha256()
    for _, item in self.checkpoint.registered():
        if isinstance(item, torch.nn.Module):
            for value in item.state_dict().values():
                whole.update(value.detach().contiguous().numpy().tobytes())
    (out / f"{self.run.dir.name}_{rank}.sha").write_text(whole.hexdigest())

def drawn(rt, sequences, cfg, **settings):
    batch = draw(rt, sequences, cfg, **settings)
    seen.setdefault(settings["stage"], []).append(batch.index)
    return batch

Runtime.finish = weights
pretrain.draw = train.draw = drawn
loop.run(build_train_job(manager, "rl4seg3d", config, Path(sys.argv[2])))
(out / f"seen_{rank}.json").write_text(json.dumps(seen))
"""

VALUES = {
    "ppo": {"baseline": "critic", "entropy": 0.01, "rewards": "separate", "steps": 2},
    "train": {"batch_size": 1},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, small):
    """A loop in two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "config.json").write_text(json.dumps(small(VALUES)))
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(2):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [
            sys.executable,
            *(str(folder / name) for name in ("script.py", "config.json", "run")),
            str(folder),
        ]
        started.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return folder


def test_both_ranks_end_every_stage_with_the_same_weights(ranks):
    names = {path.stem.rpartition("_")[0] for path in ranks.glob("*.sha")}
    kinds = {name.partition("_")[2] for name in names}
    assert kinds >= {"source", "style", "corrector", "anatomical_1", "landmark_1", "ppo_1"}
    for name in names:
        assert (ranks / f"{name}_0.sha").read_text() == (ranks / f"{name}_1.sha").read_text(), name


def test_the_ranks_divide_the_sequences(ranks):
    one, two = (json.loads((ranks / f"seen_{rank}.json").read_text()) for rank in range(2))
    for stage in ("source", "style", "ppo"):
        assert set(one[stage][0]).isdisjoint(two[stage][0])


def test_every_stage_is_done(ranks):
    stages = json.loads((ranks / "run" / "stages.json").read_text())["stages"]
    assert {record["state"] for record in stages.values()} == {"done"}
    assert len(stages) == 8
