"""The loop: which stages run, what they read, what is done again, what never looks at target labels."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.config import Layer, resolve
from medrl.core.errors import CheckpointError, ConfigError, DataError
from medrl.core.learned_reward import PairSet
from medrl.core.manager import PluginManager
from medrl.plugins.rl4seg import loop
from medrl.plugins.rl4seg.config import Rl4segConfig

PREDICTION = {
    "pairs": {"kind": "prediction", "images": 5, "keep": True, "minimum_dice": 0.0, "validation": 0.5},
    "reward": {
        "name": "rl4seg.reward_unet",
        "head": "binary",
        "encoding": "scalar",
        "init": "random",
        "schedule": "plateau",
        "select": "best",
    },
    "corrector": {"kind": "morphology"},
    "loop": {"start": "source", "iterations": 2},
    "source": {"steps": 60, "lr": 0.02},
    "actor": {"bn_mode": "batch"},
    "ppo": {
        "baseline": "critic",
        "reference": "source",
        "per_iteration": "original",
        "entropy": 0.3,
        "pseudo_labels": True,
        "pseudo_target": "reward",
        "select": "best",
        "steps": 2,
        "batch": 2,
    },
}
"""The paper's way, in small; one rule, so that an actor of 60 steps has valid masks."""


@pytest.fixture(scope="module")
def one_rule(tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "some_lv.yaml"
    path.write_text(
        "medrl_rules: 1\nrows: y\nlabels: {background: 0, lv: 1, myo: 2}\n"
        "rules:\n  lv: {measure: exists, region: lv}\n"
    )
    return path


@pytest.fixture(scope="module")
def paper_like(tmp_path_factory, make_job, one_rule, tools):
    """Two iterations in the way of the original."""
    run = tmp_path_factory.mktemp("paper") / "run"
    loop.run(make_job(run, tools.merged(PREDICTION, {"rules": str(one_rule)})))
    return run


def done(run):
    return {
        name: record["state"]
        for name, record in json.loads((run / "stages.json").read_text())["stages"].items()
    }


def finished_at(run):
    stages = json.loads((run / "stages.json").read_text())["stages"]
    return {name: record["finished"] + str(record["seconds"]) for name, record in stages.items()}


def test_every_stage_runs_once_and_leaves_a_run_of_its_own(loop_run, tools):
    names = ["01_source", "02_style", "03_corrector", "04_pairs_1", "05_reward_1", "06_ppo_1", "07_test"]
    assert done(loop_run) == dict.fromkeys(names, "done")
    rows = tools.records(loop_run)
    assert [row["stage"] for row in rows] == names
    for kind, steps in (("source", 4), ("style", 3), ("corrector", 3), ("reward_1", 4), ("ppo_1", 4)):
        folder = tools.stage_of(loop_run, kind)
        assert json.loads((folder / "manifest.json").read_text())["status"] == "finished"
        assert load_checkpoint(find_checkpoint(folder, "last")).meta["step"] == steps


def test_the_runs_own_checkpoint_holds_the_last_actor_and_the_reward_net(loop_run, tools):
    mine = tools.states(loop_run)
    assert set(mine) == {"actor", "reward"}
    ppo, reward = (tools.states(tools.stage_of(loop_run, kind)) for kind in ("ppo_1", "reward_1"))
    assert tools.differences(mine["actor"], ppo["actor"]) == []
    assert tools.differences(mine["reward"], reward["reward"]) == []
    meta = load_checkpoint(find_checkpoint(loop_run)).meta
    assert meta["label_names"] == {"background": 0, "LV": 1, "MYO": 2}
    assert (meta["stages_done"], meta["reward_ready"]) == (7, True)
    assert meta["plan"]["size"] == [32, 32]
    assert meta["config"]["rules"] == "echo"


def test_the_test_scores_every_actor_and_the_final_one_image_by_image(loop_run):
    content = json.loads((loop_run / "test.json").read_text())
    assert list(content["summary"]) == ["source", "style", "iteration_1"]
    assert content["final"] == "iteration_1"
    assert len(content["images"]["ids"]) == 4
    mean = sum(content["images"]["values"]["dice"]) / 4
    assert content["summary"]["iteration_1"]["dice"] == pytest.approx(mean)
    assert 0.0 <= content["summary"]["source"]["valid"] <= 1.0


def test_pairs_know_the_actors_and_no_subject_is_in_two_parts(loop_run, tools):
    pairs = PairSet(tools.stage_of(loop_run, "pairs_1"))
    assert len(pairs) == 24
    assert {row.origin.maker for row in pairs.rows if row.origin.kind == "predicted"} == {"source", "style"}
    parts = {}
    for row in pairs.rows:
        assert parts.setdefault(row.subject, row.part) == row.part
    assert set(parts.values()) == {"train", "val"}


def test_a_finished_loop_does_nothing_again(loop_run, make_job, tmp_path):
    run = Path(shutil.copytree(loop_run, tmp_path / "run"))
    before, rows = finished_at(run), (run / "metrics.jsonl").read_text()
    loop.run(make_job(run))
    assert finished_at(run) == before
    assert (run / "metrics.jsonl").read_text() == rows


def test_what_changed_is_made_again_with_everything_that_reads_it(loop_run, make_job, tmp_path, tools):
    run = Path(shutil.copytree(loop_run, tmp_path / "run"))
    before = finished_at(run)
    shutil.rmtree(tools.stage_of(run, "reward_1"))
    loop.run(make_job(run))
    after = finished_at(run)
    again = [name for name in after if after[name] != before[name]]
    assert again[0] == "05_reward_1"
    assert set(again) <= {"05_reward_1", "06_ppo_1", "07_test"}
    assert set(done(run).values()) == {"done"}
    # Made again from the same inputs and seeds, it is the same to the last bit.
    assert tools.differences(tools.states(loop_run)["actor"], tools.states(run)["actor"]) == []


def test_a_damaged_pair_set_is_made_again_byte_for_byte(loop_run, make_job, tmp_path, tools):
    run = Path(shutil.copytree(loop_run, tmp_path / "run"))
    folder = tools.stage_of(run, "pairs_1")
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "manifest.json").write_text("{}")
    before = finished_at(run)
    loop.run(make_job(run))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    assert finished_at(run)["04_pairs_1"] != before["04_pairs_1"]
    assert finished_at(run)["05_reward_1"] == before["05_reward_1"]


def test_another_config_in_the_same_folder_is_refused(loop_run, make_job, tmp_path):
    run = Path(shutil.copytree(loop_run, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"ppo\.kl"):
        loop.run(make_job(run, {"ppo": {"kl": 0.5}}))


def test_stages_can_be_done_one_by_one(make_job, tmp_path, tools, loop_run):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="needs 01_source, which is not done"):
        loop.run(make_job(run, {"stage": "style"}))
    for stage in ("source", "style", "corrector", "pairs", "reward"):
        loop.run(make_job(run, {"stage": stage}))
    assert list(done(run)) == ["01_source", "02_style", "03_corrector", "04_pairs_1", "05_reward_1"]
    assert load_checkpoint(find_checkpoint(run)).meta["stages_done"] == 5
    loop.run(make_job(run))
    assert done(run)["07_test"] == "done"
    assert tools.differences(tools.states(run), tools.states(loop_run)) == []


def test_a_stage_that_the_config_does_not_have_is_named(make_job, tmp_path):
    with pytest.raises(ConfigError, match="only source, ppo, test"):
        loop.run(
            make_job(
                tmp_path / "run",
                {
                    "stage": "style",
                    "loop": {"start": "source"},
                    "reward": {"name": "rl4seg.pixelwise_accuracy"},
                    "target": {"allow_labels": True},
                },
            )
        )


def test_what_was_made_elsewhere_takes_the_place_of_a_stage(loop_run, make_job, tmp_path, tools):
    inputs = {kind: str(tools.stage_of(loop_run, kind)) for kind in ("source", "style", "corrector")}
    inputs["reward"] = str(tools.stage_of(loop_run, "reward_1"))
    run = tmp_path / "run"
    loop.run(make_job(run, {"inputs": inputs}))
    assert list(done(run)) == ["01_ppo_1", "02_test"]
    assert tools.differences(tools.states(loop_run)["actor"], tools.states(run)["actor"]) == []


def test_inputs_that_do_not_exist_or_hold_something_else_are_named(loop_run, make_job, tmp_path, tools):
    with pytest.raises(ConfigError, match=r"inputs\.source"):
        loop.run(make_job(tmp_path / "a", {"inputs": {"source": str(tmp_path / "nowhere")}}))
    inputs = {"source": str(tools.stage_of(loop_run, "corrector"))}
    with pytest.raises(CheckpointError, match="holds no actor"):
        loop.run(make_job(tmp_path / "b", {"inputs": inputs}))


def test_target_labels_of_training_images_are_never_opened(loop_run, make_job, tmp_path, echoes, tools):
    """Without any label file of target training images the loop ends at the same weights."""
    target = Path(shutil.copytree(echoes["target"], tmp_path / "target"))
    shutil.rmtree(target / "labelsTr")
    run = tmp_path / "run"
    loop.run(make_job(run, {"target": {"root": str(target)}}))
    assert tools.differences(tools.states(loop_run), tools.states(run)) == []


def test_scrambled_target_labels_change_no_weight(loop_run, make_job, tmp_path, echoes, tools):
    target = Path(shutil.copytree(echoes["target"], tmp_path / "target"))
    files = sorted((target / "labelsTr").iterdir())
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    run = tmp_path / "run"
    loop.run(make_job(run, {"target": {"root": str(target)}}))
    assert tools.differences(tools.states(loop_run), tools.states(run)) == []


def test_an_oracle_reads_target_labels_only_with_permission(make_job, tmp_path):
    oracle = {"reward": {"name": "rl4seg.pixelwise_accuracy"}, "loop": {"start": "source"}}
    with pytest.raises(ConfigError, match=r"target labels|allow_labels"):
        loop.run(make_job(tmp_path / "a", oracle))
    loop.run(make_job(tmp_path / "b", {**oracle, "target": {"allow_labels": True}}))
    assert list(done(tmp_path / "b")) == ["01_source", "02_ppo_1", "03_test"]


def test_without_a_target_the_message_says_what_to_give(make_job, tmp_path):
    with pytest.raises(ConfigError, match=r"target\.root") as error:
        loop.run(make_job(tmp_path / "run", {"target": {"root": None}}))
    assert error.value.do == "--target DIR"


def test_the_papers_way_runs_two_iterations_with_growing_pairs(paper_like, tools):
    assert set(done(paper_like).values()) == {"done"}
    first, second = (PairSet(tools.stage_of(paper_like, f"pairs_{number}")) for number in (1, 2))
    ids = [{row.id for row in pairs.rows} for pairs in (first, second)]
    assert ids[0].isdisjoint(ids[1])
    assert "weight_noise" in first.counts()
    meta = load_checkpoint(find_checkpoint(tools.stage_of(paper_like, "reward_2"))).meta
    assert [Path(path).name for path in meta["config"]["inputs"]["pairs"]] == ["02_pairs_1", "05_pairs_2"]
    critic = tools.states(tools.stage_of(paper_like, "ppo_2"))
    assert "critic" in critic
    assert (tools.stage_of(paper_like, "pairs_1") / "pseudo_labels.npz").is_file()


def test_the_second_iteration_starts_from_actor_and_critic_of_the_first(paper_like, tools):
    meta = load_checkpoint(find_checkpoint(tools.stage_of(paper_like, "ppo_2"), "last")).meta
    inputs = meta["config"]["inputs"]
    assert "ppo_1" in inputs["actor"]
    assert inputs["critic"] == inputs["actor"]
    assert "source" in inputs["source"]
    assert meta["config"]["iteration"] == 2


def test_the_release_shrinks_and_perturbs_before_the_second_iteration(
    make_job, tmp_path, loop_run, tools, monkeypatch
):
    inputs = {kind: str(tools.stage_of(loop_run, kind)) for kind in ("source", "style", "corrector")}
    inputs["reward"] = str(tools.stage_of(loop_run, "reward_1"))
    seen = []
    original = loop.train.loosen

    def spy(cfg, data, modules):
        before = {name: value.clone() for name, value in modules[0].network.state_dict().items()}
        original(cfg, data, modules)
        after = {name: value.clone() for name, value in modules[0].network.state_dict().items()}
        seen.append((before, after))

    monkeypatch.setattr(loop.train, "loosen", spy)
    over = {"iterations": 2, "shrink_perturb": True, "perturb": 0.0, "recalibrate_bn": True}
    loop.run(make_job(tmp_path / "run", {"inputs": inputs, "loop": over, "ppo": {"steps": 1}}))
    ((before, after),) = seen
    for name, value in before.items():
        if name.endswith("weight"):
            assert torch.equal(after[name], 0.5 * value), name
        elif name.endswith("bias"):
            assert torch.equal(after[name], value), name
    assert any(not torch.equal(after[name], before[name]) for name in before if name.endswith("running_mean"))


def test_the_best_iteration_can_be_the_result(loop_run, make_job, tmp_path, tools, monkeypatch):
    inputs = {kind: str(tools.stage_of(loop_run, kind)) for kind in ("source", "style", "corrector")}
    inputs["reward"] = str(tools.stage_of(loop_run, "reward_1"))
    original = loop.train.validate

    def worse_later(rt, cfg, *rest):
        return {**original(rt, cfg, *rest), "val_validity": 1.0 / cfg.iteration}

    monkeypatch.setattr(loop.train, "validate", worse_later)
    run = tmp_path / "run"
    loop.run(make_job(run, {"inputs": inputs, "loop": {"iterations": 2, "final": "best"}}))
    first, second = (tools.states(tools.stage_of(run, f"ppo_{number}"))["actor"] for number in (1, 2))
    assert tools.differences(tools.states(run)["actor"], first) == []
    assert tools.differences(first, second) != []
    assert json.loads((run / "test.json").read_text())["final"] == "iteration_1"


def test_too_few_target_images_for_new_pairs_are_told_of(make_job, tmp_path, one_rule, tools):
    over = {"pairs": {"images": 12}, "rules": str(one_rule), "ppo": {"steps": 1}}
    with pytest.raises(DataError, match="iteration 2 has none left"):
        loop.run(make_job(tmp_path / "run", tools.merged(PREDICTION, over)))


def test_no_plausible_prediction_is_a_clear_error(make_job, tmp_path, tools, caplog):
    over = {"source": {"steps": 1, "lr": 1e-6}, "corrector": {"kind": "morphology"}}
    with pytest.raises(DataError, match="plausible"):
        loop.run(make_job(tmp_path / "run", tools.merged(PREDICTION, over)))
    assert "of the predictions on target images are valid" in caplog.text


FOREIGN = """
from torch import nn

@hookimpl
def medrl_register_models(registry):
    registry.add("line", f"{__name__}:Line", summary="one layer on images")
    registry.add("solid", f"{__name__}:Solid", summary="one layer on volumes")

class Line(nn.Module):
    layer = nn.Conv2d

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.net = self.layer(in_channels, out_channels, 3, padding=1)

    def forward(self, image):
        return self.net(image)

class Solid(Line):
    layer = nn.Conv3d
"""


@pytest.fixture
def foreign_job(make_job, write_plugin):
    """Make a job whose networks are those of another plugin."""
    write_plugin("other", FOREIGN)
    manager = PluginManager.create()

    def make(run, name, **values):
        job = make_job(run)
        parts = {key: {"name": f"other.{name}"} for key in ("model", "critic", "reward_model")}
        values = {**job.resolved.values(), **parts, **values}
        return replace(job, manager=manager, resolved=resolve(Rl4segConfig, [Layer("test", values)]))

    return make


def test_any_2d_network_of_any_plugin_can_play_every_part(foreign_job, tmp_path):
    job = foreign_job(tmp_path / "run", "line")
    ppo = {**job.resolved.values()["ppo"], "baseline": "critic"}
    loop.run(foreign_job(tmp_path / "run", "line", ppo=ppo))
    assert set(done(tmp_path / "run").values()) == {"done"}


def test_a_network_on_volumes_is_one_clear_error(foreign_job, tmp_path):
    with pytest.raises(ConfigError, match=r"other\.solid: it does not take a 2D image"):
        loop.run(foreign_job(tmp_path / "run", "solid"))


def test_a_network_that_changes_its_size_with_the_config_is_not_given_channels(make_job, tmp_path):
    with pytest.raises(ConfigError, match="the data decide it"):
        loop.run(make_job(tmp_path / "run", {"model": {"out_channels": 4}}))


def test_a_reward_net_of_another_kind_than_the_actor_needs_a_random_start(make_job, tmp_path):
    over = {"reward_model": {"name": "rl4seg.unet_small", "channels": [4, 8, 8]}}
    with pytest.raises(ConfigError, match=r"reward\.init style") as error:
        loop.run(make_job(tmp_path / "run", over))
    assert "reward.init=random" in error.value.do


def test_stages_as_tasks_end_where_one_program_ends(loop_run, make_job, tmp_path, tools, in_this_process):
    job = replace(make_job(tmp_path / "run"), stage_executor=in_this_process)
    loop.run(job)
    names = sorted(path.name for path in (loop_run / "stages").iterdir() if path.is_dir())
    assert in_this_process.asked[: len(names)] == names
    states = {path: load_checkpoint(path).states for path in sorted(loop_run.rglob("last.pt"))}
    assert len(states) >= 5
    for path, wanted in states.items():
        found = load_checkpoint(tmp_path / "run" / path.relative_to(loop_run)).states
        assert tools.differences(wanted, found) == [], path.name
    asked = len(in_this_process.asked)
    loop.run(job)
    assert len(in_this_process.asked) == asked + 1, "the last stage looks whether all is as it was"
