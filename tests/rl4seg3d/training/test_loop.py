"""The loop on beating hearts: every stage once, resumed to the same weights, no target label opened."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import ConfigError, Interrupted
from medrl.core.learned_reward import PairSet
from medrl.core.runtime import Runtime
from medrl.plugins.rl4seg3d import loop

NAMES = [
    "01_source",
    "02_style",
    "03_corrector",
    "04_pairs_1",
    "05_anatomical_1",
    "06_landmark_1",
    "07_ppo_1",
    "08_test",
]


def done(run):
    stages = json.loads((run / "stages.json").read_text())["stages"]
    return {name: record["state"] for name, record in stages.items()}


def test_every_stage_runs_once_and_leaves_a_run_of_its_own(loop_run, tools):
    assert done(loop_run) == dict.fromkeys(NAMES, "done")
    assert [row["stage"] for row in tools.records(loop_run)] == NAMES
    for kind, steps in (("source", 4), ("style", 3), ("anatomical_1", 3), ("landmark_1", 3), ("ppo_1", 3)):
        meta = load_checkpoint(find_checkpoint(tools.stage_of(loop_run, kind), "last")).meta
        assert meta["step"] == steps


def test_the_runs_own_checkpoint_holds_the_last_actor_and_the_reward_nets(loop_run, tools):
    mine = tools.states(loop_run)
    assert set(mine) == {"actor", "reward_anatomical", "reward_landmark"}
    assert tools.same(mine["actor"], tools.states(tools.stage_of(loop_run, "ppo_1"))["actor"])
    landmark = tools.states(tools.stage_of(loop_run, "landmark_1"))["reward"]
    assert tools.same(mine["reward_landmark"], landmark)
    meta = load_checkpoint(find_checkpoint(loop_run)).meta
    assert meta["label_names"] == {"background": 0, "LV": 1, "MYO": 2}
    assert (meta["stages_done"], meta["rewards_ready"]) == (8, ["anatomical", "landmark"])
    assert meta["plan"]["spacing_mm"] is None


def test_the_test_scores_whole_sequences(loop_run):
    content = json.loads((loop_run / "test.json").read_text())
    assert list(content["summary"]) == ["source", "style", "iteration_1"]
    numbers = content["summary"]["iteration_1"]
    assert {"dice", "hd", "anat_valid_frames", "temporal_valid", "temporal_errors"} <= set(numbers)
    assert len(content["images"]["ids"]) == 2
    rewards, worst = (content["images"]["values"][name] for name in ("reward", "worst_frame_reward"))
    assert all(0.0 <= low <= high <= 1.0 for low, high in zip(worst, rewards, strict=True))
    assert numbers["reward"] == pytest.approx(sum(rewards) / 2)
    every, none = content["validated"]["0"], content["validated"]["2"]
    assert (every["sequences"], every["summary"]) == (2, numbers)
    assert none == {"sequences": 0, "summary": {}}


def test_pairs_are_windows_and_no_subject_is_in_two_parts(loop_run, tools):
    pairs = PairSet(tools.stage_of(loop_run, "pairs_1"))
    assert pairs.shape == (1, 32, 32, 4)
    parts = {}
    for row in pairs.rows:
        assert parts.setdefault(row.subject, row.part) == row.part
    assert set(parts.values()) == {"train", "val"}


def test_a_finished_loop_does_nothing_again(loop_run, make_job, tmp_path):
    run = Path(shutil.copytree(loop_run, tmp_path / "run"))
    before = (run / "metrics.jsonl").read_text()
    loop.run(make_job(run))
    assert (run / "metrics.jsonl").read_text() == before


def test_what_was_lost_is_made_again_to_the_last_bit_without_target_labels(
    loop_run, make_job, tmp_path, hearts, tools
):
    run = Path(shutil.copytree(loop_run, tmp_path / "run"))
    shutil.rmtree(tools.stage_of(run, "ppo_1"))
    loop.run(make_job(run))
    assert tools.same(tools.states(loop_run)["actor"], tools.states(run)["actor"])
    target = Path(shutil.copytree(hearts["target"], tmp_path / "target"))
    shutil.rmtree(target / "labelsTr")
    inputs = {kind: str(tools.stage_of(loop_run, kind)) for kind in ("source", "style", "corrector")}
    inputs |= {kind: str(tools.stage_of(loop_run, f"{kind}_1")) for kind in ("anatomical", "landmark")}
    bare = tmp_path / "bare"
    loop.run(make_job(bare, {"target": {"root": str(target)}, "inputs": inputs}))
    assert list(done(bare)) == ["01_ppo_1", "02_test"]
    assert tools.same(tools.states(loop_run)["actor"], tools.states(bare)["actor"])


@pytest.mark.parametrize(("kind", "step"), [("style", 1), ("landmark_1", 2), ("ppo_1", 1)])
def test_a_stopped_loop_goes_on_to_the_same_weights(
    loop_run, make_job, tmp_path, tools, monkeypatch, kind, step
):
    """The loop before the stage is taken over; the stage is stopped in the middle and resumed."""
    run = Path(shutil.copytree(loop_run, tmp_path / "run"))
    for name in NAMES[next(n for n, name in enumerate(NAMES) if name.endswith(kind)) :]:
        shutil.rmtree(run / "stages" / name, ignore_errors=True)
    original = Runtime.log

    def stopping(self, at, **metrics):
        original(self, at, **metrics)
        if self.run.dir.name.endswith(kind) and at == step:
            self._stop.number = signal.SIGTERM

    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "log", stopping)
        with pytest.raises(Interrupted):
            loop.run(make_job(run))
    loop.run(make_job(run))
    assert tools.same(tools.states(loop_run), tools.states(run))


def test_an_oracle_reads_target_labels_only_with_permission(make_job, tmp_path):
    oracle = {"reward": {"name": "rl4seg3d.pixelwise_accuracy"}, "loop": {"start": "source"}}
    with pytest.raises(ConfigError, match=r"target labels"):
        loop.run(make_job(tmp_path / "a", oracle))
    loop.run(make_job(tmp_path / "b", {**oracle, "target": {"allow_labels": True}}))
    assert list(done(tmp_path / "b")) == ["01_source", "02_ppo_1", "03_test"]


def test_a_network_of_images_is_one_clear_error(make_job, tmp_path):
    with pytest.raises(ConfigError, match="it does not take a volume or sequence"):
        loop.run(make_job(tmp_path / "run", {"model": {"name": "rl4seg.unet_small", "channels": [4, 8]}}))
