"""Two ranks train one reward model and one policy; what they keep is the same on both."""

from __future__ import annotations

import json

import pytest

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.plugins.kspace import running, train

config, manager = json.loads(Path(sys.argv[1]).read_text()), PluginManager.create(third_party=False)
folder, rank = Path(sys.argv[2]), os.environ["RANK"]
kept = {}
original = train.validate

def watched(rt, cfg, game):
    found = original(rt, cfg, game)
    weights = torch.cat([value.detach().double().flatten() for value in game.agent.state_dict().values()])
    kept.setdefault("weights", []).append(weights.tolist())
    kept.setdefault("scores", []).append(found["val_score"])
    return found

train.validate = watched
for stage in config["stages"]:
    values = {key: value for key, value in config.items() if key != "stages"}
    if stage == "policy":
        values["inputs"] = {"reward": str(folder / "reward")}
    running.run(build_train_job(manager, "kspace", {**values, "stage": stage}, folder / stage))
(folder / f"kept_{rank}.json").write_text(json.dumps(kept))
"""


@pytest.mark.ddp
def test_two_ranks_agree_on_weights_and_scores(tmp_path, tiny, tools):
    values = tiny({"warm": {"states": 16}, "ppo": {"updates": 2}, "seg": {"steps": 2}})
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**values, "stages": ["reward", "policy"]}))
    codes, said = tools.launch(tmp_path, SCRIPT, config, tmp_path, ranks=2)
    assert codes == [0, 0], said
    one, other = (json.loads((tmp_path / f"kept_{rank}.json").read_text()) for rank in (0, 1))
    assert len(one["scores"]) >= 3
    assert one["scores"] == other["scores"]
    assert one["weights"] == other["weights"]
    # The two ranks share the states of the warm start: one chunk each in each half.
    phases = [row["phase"] for row in tools.records(tmp_path / "policy") if "phase" in row]
    assert phases == (["collect"] + ["imitate"] * 2 + ["collect"] + ["imitate"] * 2 + ["ppo"] * 2)


@pytest.mark.ddp
def test_a_reward_model_of_two_ranks_learns_as_one_with_twice_the_batch(tmp_path, tiny, make_job, tools):
    """Without batch normalisation, whose statistics each rank has of its own."""
    from medrl.plugins.kspace import running

    network = {"name": "kspace.unetpp", "base": 2, "deep_supervision": False}
    values = {"stage": "reward", "model": network, "seg": {"steps": 2, "ema": 0.0, "dice": 0.0}}
    running.run(make_job(tmp_path / "one", values, without=("model",)))
    half = tools.merged(values, {"seg": {"batch": 2}})
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**tiny(half, ("model",)), "stages": ["reward"]}))
    codes, said = tools.launch(tmp_path, SCRIPT, config, tmp_path, ranks=2)
    assert codes == [0, 0], said
    one, two = (
        [row["loss"] for row in tools.records(tmp_path / name) if "loss" in row] for name in ("one", "reward")
    )
    assert len(one) == 2
    assert two == pytest.approx(one, rel=1e-4)
