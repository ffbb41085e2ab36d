"""Two ranks: equal weights on both, work divided, a NaN on one of them skipped by both."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.ddp

SCRIPT = """
import hashlib, json, os, sys
from pathlib import Path
import torch
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.core.runtime import Runtime
from medrl.plugins.rl4seg import domains, loop, pretrain, train

config, manager = json.loads(Path(sys.argv[1]).read_text()), PluginManager.create(third_party=False)
rank, out = int(os.environ["RANK"]), Path(sys.argv[3])
finish, draw, cross_entropy, seen, calls = Runtime.finish, domains.draw, pretrain.cross_entropy, {}, []

def weights(self):
    finish(self)
    whole = hashlib.sha256()
    for _, item in self.checkpoint.registered():
        if isinstance(item, torch.nn.Module):
            for value in item.state_dict().values():
                whole.update(value.detach().contiguous().numpy().tobytes())
    (out / f"{self.run.dir.name}_{rank}.sha").write_text(whole.hexdigest())

def drawn(rt, images, cfg, *, stage, step, size):
    batch = draw(rt, images, cfg, stage=stage, step=step, size=size)
    seen.setdefault(stage, []).append(batch.ids)
    return batch

def broken(actor, images, labels, **settings):
    calls.append(1)
    loss = cross_entropy(actor, images, labels, **settings)
    return loss * (float("nan") if (rank, len(calls)) == (1, 2) else 1.0)

Runtime.finish = weights
pretrain.draw = train.draw = drawn
pretrain.cross_entropy = broken
loop.run(build_train_job(manager, "rl4seg", config, Path(sys.argv[2])))
(out / f"seen_{rank}.json").write_text(json.dumps(seen))
"""

VALUES = {"ppo": {"baseline": "critic", "entropy": 0.01}, "reward": {"nets": 2}, "loop": {"iterations": 2}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, small, tools):
    """A loop of two iterations in two ranks; rank 1 meets a NaN in the second step of the source stage."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "config.json").write_text(json.dumps(small(VALUES)))
    codes, said = tools.launch(folder, SCRIPT, folder / "config.json", folder / "run", folder, ranks=2)
    assert codes == [0, 0], said
    return folder


def test_both_ranks_end_every_stage_with_the_same_weights(ranks):
    names = {path.stem.rpartition("_")[0] for path in ranks.glob("*.sha")}
    assert {name.partition("_")[2] for name in names} >= {
        "source",
        "style",
        "corrector",
        "reward_1",
        "ppo_1",
        "reward_2",
        "ppo_2",
    }
    for name in names:
        assert (ranks / f"{name}_0.sha").read_text() == (ranks / f"{name}_1.sha").read_text(), name


def test_a_nan_on_one_rank_is_skipped_by_both(ranks, tools):
    rows = tools.records(tools.stage_of(ranks / "run", "source"))
    skipped = [row for row in rows if row.get("event") == "skipped_step"]
    assert [(row["step"], row["ranks"]) for row in skipped] == [(2, [1])]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_the_ranks_divide_the_images_of_an_epoch(ranks):
    one, two = (json.loads((ranks / f"seen_{rank}.json").read_text()) for rank in range(2))
    assert one["source"][0] != two["source"][0]
    assert set(one["source"][0]).isdisjoint(two["source"][0])
    assert len(set(one["source"][0]) | set(two["source"][0])) == 8
    assert set(one["ppo"][0]).isdisjoint(two["ppo"][0])
