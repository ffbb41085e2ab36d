"""The comparison: its statistics, its claims, and that shared stages are made once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from medrl.core.checkpoint import load_checkpoint
from medrl.core.config import Layer, resolve_method
from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.jobs import PredictJob
from medrl.core.runlog import RunLock
from medrl.plugins.rl4seg import commands_study, predict
from medrl.plugins.rl4seg.compare import catalogue, judging
from medrl.plugins.rl4seg.compare.elsewhere import tasks_of
from medrl.plugins.rl4seg.compare.outcome import Outcome
from medrl.plugins.rl4seg.compare.running import Study, collect, ts_it
from medrl.plugins.rl4seg.compare.statistics import gain, level_of, two_level
from medrl.plugins.rl4seg.scoring import Scores


def scores(dice: list[float], valid: float = 1.0, subjects: list[str] | None = None) -> Scores:
    names = subjects or [f"p{k}" for k in range(len(dice))]
    return Scores(
        ids=tuple(f"{name}_{k}" for k, name in enumerate(names)),
        subjects=tuple(names),
        values={
            "dice": tuple(dice),
            "hd": tuple(2.0 for _ in dice),
            "hd95": tuple(1.0 for _ in dice),
            "valid": tuple(valid for _ in dice),
        },
    )


def many(mean: float, seeds: int = 5, patients: int = 40, spread: float = 0.01, stream: int = 0) -> dict:
    rng = np.random.default_rng(stream)
    return {
        seed: scores((mean + spread * rng.normal(size=patients)).clip(0, 1).tolist()) for seed in range(seeds)
    }


def test_the_mean_counts_seeds_equally_and_patients_within_a_seed():
    found = two_level({0: {"a": 1.0, "b": 0.0}, 1: {"c": 1.0}})
    assert found.mean == 0.75


def test_the_interval_of_one_seed_is_that_over_patients():
    values = np.random.default_rng(0).normal(0.5, 0.1, 200)
    found = two_level({3: {str(k): float(v) for k, v in enumerate(values)}})
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    assert found.low == pytest.approx(values.mean() - half, abs=0.002)
    assert found.high == pytest.approx(values.mean() + half, abs=0.002)


def test_seeds_that_differ_widen_the_interval_where_patients_agree():
    same = {seed: {str(k): 0.5 + 0.1 * seed for k in range(20)} for seed in range(5)}
    found = two_level(same)
    assert found.mean == pytest.approx(0.7)
    assert found.high - found.low > 0.15
    nested = {seed: {f"{seed}_{k}": 0.5 + 0.1 * seed for k in range(20)} for seed in range(5)}
    other = two_level(nested)
    assert other.high - other.low == pytest.approx(found.high - found.low, abs=0.03)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(150):
        seeds, patients = rng.normal(0, 0.02, 6), rng.normal(0, 0.1, 30)
        table = 0.3 + seeds[:, None] + patients[None] + rng.normal(0, 0.05, (6, 30))
        values = {s: {str(p): float(table[s, p]) for p in range(30)} for s in range(6)}
        found = two_level(values, n=800, seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 132 <= covered <= 150


def test_intervals_repeat_and_are_undefined_without_values():
    values = {0: {"a": 0.1, "b": 0.4}, 1: {"a": 0.3, "b": 0.2}}
    assert two_level(values) == two_level(values)
    assert math.isnan(two_level({}).mean)
    assert math.isnan(two_level({0: {"a": 0.5}}).low)


def test_a_gain_pairs_patients_and_leaves_out_infinite_distances():
    one = {0: Scores(("a", "b"), ("p", "q"), {"hd": (3.0, math.inf)})}
    two = {0: Scores(("a", "b"), ("p", "q"), {"hd": (1.0, 5.0)})}
    found = gain(one, two, "hd")
    assert found.interval.mean == 2.0
    assert (found.better, found.seeds) == (1, 1)


def test_a_gain_counts_the_seeds_that_both_have():
    one, two = many(0.9, seeds=3), many(0.8, seeds=5, stream=1)
    found = gain(one, two)
    assert (found.better, found.seeds) == (3, 3)
    assert found.clear
    assert found.interval.mean == pytest.approx(0.1, abs=0.01)
    assert gain(two, one).lost
    assert not gain(one, one).clear


def test_patients_with_several_images_count_once():
    found = level_of({0: scores([1.0, 0.0, 0.5], subjects=["p", "p", "q"])})
    assert found.mean == 0.5
    assert found.n == 2


def outcome(**means: float) -> Outcome:
    found = Outcome()
    for number, (key, mean) in enumerate(means.items()):
        found.scores[key.replace("_", "-")] = many(mean, stream=number)
    return found


def test_a_claim_is_met_only_if_every_rival_with_the_same_knowledge_is_beaten():
    all_three = outcome(
        source=0.7, style_ppo=0.9, style_steps=0.85, style_self_refined=0.86, style_posthoc_both=0.87
    )
    words = all_three.claims()
    assert words[-1].endswith("it beats 3: met.")
    tie = outcome(
        source=0.7, style_ppo=0.87, style_steps=0.85, style_self_refined=0.86, style_posthoc_both=0.87
    )
    assert tie.claims()[-1].endswith("it beats 2: not met.")
    assert any("against source-only (source): Dice +0.1" in line for line in tie.claims())
    assert any("no clear difference" in line for line in tie.claims())


def test_a_claim_stays_open_where_a_rival_did_not_take_part():
    found = outcome(source=0.7, style_ppo=0.9, style_steps=0.85)
    assert found.claims()[-1].endswith("it beats 1: open, because not all of them took part.")


def test_a_method_that_loses_is_said_to_be_worse():
    found = outcome(ppo=0.7, source=0.8)
    assert ": worse" in found.claims()[0]


def test_rows_come_in_the_order_of_the_catalogue_with_iterations_before_the_final_result():
    found = outcome(target=0.9, style_ppo=0.9, source=0.7)
    found.scores["style-ppo@1"] = many(0.88, stream=7)
    found.scores["style-ppo@2"] = many(0.9, stream=8)
    rows = found.rows()
    assert [row.key for row in rows] == ["source", "style-ppo@1", "style-ppo@2", "style-ppo", "target"]
    assert rows[1].title == "rl4seg, iteration 1"
    assert rows[0].gains == {}
    assert set(rows[3].gains) == {"source"}


def test_results_are_written_as_strict_json(tmp_path):
    found = outcome(source=0.7, style_ppo=0.9)
    found.trust["reward"] = {0: {"ece": 0.1, "nmi": math.nan}}
    content = json.loads(found.write(tmp_path / "results.json").read_text())
    assert content["methods"]["style-ppo"]["gains"]["source"]["dice"]["of"] == 5
    assert content["confidence"]["reward"]["by_seed"]["0"]["nmi"] is None
    assert content["methods"]["source"]["valid"]["mean"] == 1.0


def test_methods_are_chosen_by_name_and_group_in_the_order_of_the_tables():
    assert [m.key for m in catalogue.chosen(["style", "source"])] == ["source", "style"]
    assert {m.key for m in catalogue.chosen(["core"])} == set(catalogue.CORE)
    assert len(catalogue.chosen(["all"])) == len(catalogue.METHODS)
    assert not [m for m in catalogue.chosen(["unlabelled"]) if m.role == "bound"]
    with pytest.raises(ConfigError, match="did you mean 'style-ppo'"):
        catalogue.chosen(["style-pp0"])
    with pytest.raises(ConfigError, match="none is named"):
        catalogue.chosen([])


def test_only_the_upper_bounds_ask_for_target_labels():
    for method in catalogue.METHODS:
        asks = bool(method.values.get("target", {}).get("allow_labels")) or method.kind == "supervised"
        assert asks == (method.role == "bound"), method.key


# --- the whole comparison, on images of 32² pixels ---------------------------------------------------------

QUICK = ["source", "bn", "entropy", "self-refined", "posthoc-both", "style", "style-steps", "style-ppo"]


@pytest.fixture(scope="module")
def make_study(manager, small):
    """Make a comparison of the small config in a folder."""

    def make(
        folder: Path, methods: Sequence[str], values: dict[str, Any] | None = None, **more: Any
    ) -> Study:
        def resolve(layers: Sequence[Layer]) -> Any:
            return resolve_method(manager, "rl4seg", layers=[Layer("test", small(values)), *layers])

        return Study(manager, resolve, folder, catalogue.chosen(methods), **{"judge": False, **more})

    return make


@pytest.fixture(scope="module")
def finished(make_study, tmp_path_factory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("study")
    return folder, make_study(folder, QUICK, judge=True, members=2).run()


def test_a_comparison_scores_every_method_on_the_same_images(finished):
    folder, outcome = finished
    assert [row.key for row in outcome.rows()] == QUICK
    ids = {scores[1].ids for scores in outcome.scores.values()}
    assert len(ids) == 1
    assert len(next(iter(ids))) == 4
    assert (folder / "results.json").is_file()
    page = (folder / "report.html").read_text()
    for words in (
        "What the method may claim",
        "Who finds the errors",
        "Test images",
        "style tuning, more steps",
    ):
        assert words in page


def test_rewards_and_confidences_are_judged_beside_their_rivals(finished):
    _, outcome = finished
    assert set(outcome.finding) == {
        "source actor's probability",
        "style actor's probability",
        "reward net, class head",
        "full reward (class head and corrector)",
    }
    assert "source-only, ensemble of 2" in outcome.trust
    assert "rl4seg, full reward" in outcome.trust
    assert all(0.0 <= by[1]["ece"] <= 1.0 for by in outcome.trust.values())


def test_what_is_finished_is_not_made_again_and_further_methods_join_it(finished, make_study, tmp_path):
    folder, outcome = finished
    shutil.copytree(folder, tmp_path / "copy")
    said: list[str] = []
    study = make_study(tmp_path / "copy", [*QUICK, "posthoc-reward"], judge=True, members=2, say=said.append)
    again = study.run()
    assert [line for line in said if "post-hoc" not in line and "confidence" not in line] == []
    assert again.scores["style-ppo"] == outcome.scores["style-ppo"]
    assert "posthoc-reward" in again.scores


def test_methods_made_as_tasks_equal_those_made_together_and_only_what_is_left_is_asked_for(
    finished, make_study, tmp_path, in_this_process
):
    _, outcome = finished
    study = make_study(tmp_path, ["self-refined", "style-ppo"])
    alone = study.run(in_this_process)
    made = ["seed_1_shared", "seed_1_self-refined", "seed_1_style-ppo"]
    assert in_this_process.asked == made
    assert alone.scores["self-refined"] == outcome.scores["self-refined"]
    assert alone.scores["style-ppo"] == outcome.scores["style-ppo"]
    assert (tmp_path / "report.html").is_file()

    # Made here, or not at all: nothing is left. What lost its scores is made again, and nothing else.
    records = {path: path.read_bytes() for path in (tmp_path / "seed_1" / "records").iterdir()}
    study.run()
    study.run(in_this_process)
    assert in_this_process.asked == made
    (tmp_path / "seed_1" / "scores" / "self-refined.json").unlink()
    study.run(in_this_process)
    assert in_this_process.asked == [*made, "seed_1_self-refined"]
    changed = [path.name for path, content in records.items() if path.read_bytes() != content]
    assert changed == ["self-refined.json"]


def test_methods_of_all_seeds_wait_for_nothing_but_what_their_seed_shares(make_study, tmp_path):
    tasks = tasks_of(make_study(tmp_path, ["source", "bn"], judge=True, seeds=2))
    after = {task.name: task.after for task in tasks}
    assert after == {
        name: value
        for seed in (1, 2)
        for name, value in {
            f"seed_{seed}_shared": (),
            f"seed_{seed}_source": (f"seed_{seed}_shared",),
            f"seed_{seed}_bn": (f"seed_{seed}_shared",),
            f"seed_{seed}_confidence": tuple(f"seed_{seed}_{name}" for name in ("shared", "source", "bn")),
        }.items()
    }
    assert tasks[-1].arguments[-4:] == ("--seed", "2", "--only", "confidence")


def test_a_finished_comparison_is_not_asked_for_and_one_with_a_record_for_all_is_known(
    finished, make_study, tmp_path
):
    folder, _ = finished
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    study = make_study(copy, QUICK, judge=True, members=2)
    assert tasks_of(study) == []
    stages: dict[str, Any] = {}
    for path in (copy / "seed_1" / "records").iterdir():
        stages |= json.loads(path.read_text())["stages"]
    shutil.rmtree(copy / "seed_1" / "records")
    assert len(tasks_of(study)) == len(QUICK) + 1
    (copy / "seed_1" / "stages.json").write_text(json.dumps({"schema": 1, "stages": stages}))
    assert tasks_of(study) == []


def test_two_comparisons_in_one_folder_and_a_failed_task_are_told(make_study, tmp_path, in_this_process):
    values = {"target": {"root": str(tmp_path)}}
    study = make_study(tmp_path / "study", ["source"])
    lock = RunLock(tmp_path / "study" / "jobs" / "lock")
    lock.path.parent.mkdir()
    lock.acquire()
    with pytest.raises(RuntimeFault, match="in use"):
        study.run(in_this_process)
    lock.release()
    assert in_this_process.asked == []
    study.resolved = make_study(tmp_path / "study", ["source"], values).resolved
    with pytest.raises(RuntimeFault, match="seed_1_shared: .*exit code"):
        study.run(in_this_process)
    assert not (tmp_path / "study" / "results.json").exists()


def test_target_training_labels_decide_nothing_but_the_upper_bounds(echoes, finished, make_study, tmp_path):
    target = tmp_path / "scrambled"
    shutil.copytree(echoes["target"], target)
    names = sorted((target / "labelsTr").iterdir())
    contents = [path.read_bytes() for path in names]
    for path, content in zip(names, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    values = {"target": {"root": str(target)}}
    methods = ["source", "bn", "self-refined", "style-ppo"]
    scrambled = make_study(tmp_path / "one", [*methods, "target"], values).run()
    _, outcome = finished
    for key in methods:
        assert scrambled.scores[key] == outcome.scores[key], key
    plain = make_study(tmp_path / "two", ["target"]).run()
    assert scrambled.scores["target"] != plain.scores["target"]


def test_upper_bounds_are_left_out_with_a_note_where_the_target_has_no_training_labels(
    echoes, make_study, tmp_path
):
    target = tmp_path / "unlabelled"
    shutil.copytree(echoes["target"], target)
    shutil.rmtree(target / "labelsTr")
    study = make_study(tmp_path / "study", ["source", "target"], {"target": {"root": str(target)}})
    outcome = study.run()
    assert set(outcome.scores) == {"source"}
    assert outcome.notes == ["target-supervised was left out: the target has no training labels."]


def test_a_loop_of_two_iterations_has_a_row_for_the_first(make_study, tmp_path):
    outcome = make_study(tmp_path, ["source", "style-ppo-twice"]).run()
    assert [row.key for row in outcome.rows()] == ["source", "style-ppo-twice@1", "style-ppo-twice"]


def test_controls_and_oracle_run_from_the_shared_start(make_study, tmp_path):
    outcome = make_study(tmp_path, ["style", "style-ppo-random", "style-ppo-oracle"]).run()
    assert set(outcome.scores) == {"style", "style-ppo-random", "style-ppo-oracle"}
    runs = sorted(path.name for path in (tmp_path / "seed_1" / "runs").iterdir())
    assert runs == ["style-ppo", "style-ppo-oracle", "style-ppo-random"]
    assert not (tmp_path / "seed_1" / "runs" / "style-ppo-random" / "stages" / "01_source").exists()


def test_networks_of_baselines_are_checkpoints_that_predict_knows(finished, manager, echoes, tmp_path):
    folder, _ = finished
    path = folder / "seed_1" / "networks" / "bn.pt"
    outcome = predict.run(
        PredictJob(
            method="rl4seg",
            inputs=echoes["target"] / "imagesTs",
            output=tmp_path / "out",
            checkpoints=[path],
            manager=manager,
            device="cpu",
        )
    )
    assert len(outcome.done) == 4
    assert not outcome.failed


def test_two_seeds_differ_and_are_read_together(make_study, tmp_path):
    make_study(tmp_path, ["source"], seeds=[1]).run()
    make_study(tmp_path, ["source"], seeds=[2]).run()
    both = collect(tmp_path)
    assert set(both.scores["source"]) == {1, 2}
    assert both.scores["source"][1] != both.scores["source"][2]
    assert set(collect(tmp_path, seeds=[2]).scores["source"]) == {2}


def test_a_comparison_without_target_is_refused(make_study, tmp_path):
    with pytest.raises(ConfigError, match="source or target is missing"):
        make_study(tmp_path, ["source"], {"target": {"root": None}})


def test_the_command_lists_methods_and_refuses_unknown_ones(manager, tmp_path):
    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(commands_study.compare, list(arguments), obj=manager)

    listed = invoke("--list")
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == list(catalogue.BY_KEY)
    assert "-o DIR" in str(invoke().exception.do)
    wrong = invoke("-o", str(tmp_path), "--methods", "nothing").exception
    assert isinstance(wrong, ConfigError)
    assert "'nothing' is unknown" in str(wrong)


def test_ts_it_alone_keeps_its_networks_and_scores(manager, small, tmp_path):
    def resolve(layers: Sequence[Layer]) -> Any:
        return resolve_method(manager, "rl4seg", layers=[Layer("test", small()), *layers])

    found = ts_it(manager, resolve, tmp_path, steps=4)
    assert found["dice"] == json.loads((tmp_path / "scores.json").read_text())["dice"]
    assert set(load_checkpoint(tmp_path / "tsit.pt").states) == {"tsit"}


def test_the_uncertainty_of_a_run_is_measured_and_its_maps_are_kept(loop_run, manager, tmp_path):
    lines = judging.run(
        manager,
        loop_run,
        tmp_path,
        ensemble=[loop_run],
        save=tmp_path / "maps.h5",
        device="cpu",
    )
    names = {"reward", "probability", "Monte Carlo dropout", "test-time augmentation", "ensemble of 2"}
    content = json.loads((tmp_path / "uncertainty.json").read_text())
    assert set(content) == names
    assert len(lines) == 1 + len(names)
    assert content["probability"] == content["ensemble of 2"]
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "maps.h5").is_file()
