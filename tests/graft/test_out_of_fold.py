"""Cases that a teacher was trained on: known, told to the policy, kept out of quality and of teaching."""

from __future__ import annotations

import json

import pytest
import torch

from medrl.core.cache import Cache
from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.config import Layer, resolve_method
from medrl.core.errors import ConfigError
from medrl.core.types import Case
from medrl.plugins.graft import data, priors, teachers, train
from medrl.plugins.graft.features import open_teacher
from medrl.plugins.graft.teachers import TrainedOn, seen_cases, unseen_means, unseen_only

CASES = [Case(id=f"c{k}", images=()) for k in range(4)]


class Fold:
    def __init__(self, train):
        self.train = [CASES[k] for k in train]


def table(known, given=()):
    return seen_cases(
        [f"t{k}" for k in range(len(known))],
        known,
        given,
        CASES,
        image_hash=lambda case: f"hash of {case.id}",
        fold=lambda k: Fold([j for j in range(4) if j != k]),
    )


# -- what is known ---------------------------------------------------------------------------------


def test_a_teacher_has_seen_the_images_of_its_digests_and_no_others_of_the_same_name():
    known = [TrainedOn(images=frozenset({"hash of c1", "hash of another c2"})), TrainedOn(fold=0)]
    assert table(known) == {
        "c0": (False, False),
        "c1": (True, True),
        "c2": (False, True),
        "c3": (False, True),
    }


def test_all_and_none_say_it_for_every_case():
    assert set(table([TrainedOn(fold="all"), TrainedOn(fold="none")]).values()) == {(True, False)}


def test_given_folds_replace_what_the_files_say():
    known = [TrainedOn(fold="all"), TrainedOn()]
    assert [name for name, row in table(known, given=[2, "none"]).items() if row[0]] == ["c0", "c1", "c3"]


def test_a_teacher_of_whom_nothing_is_known_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="t1 does not say"):
        table([TrainedOn(fold=0), TrainedOn()])
    with pytest.raises(ConfigError, match="1 folds for 2 teachers"):
        table([TrainedOn(), TrainedOn()], given=[0])


@pytest.mark.parametrize(
    "known", [TrainedOn(), TrainedOn(fold=3), TrainedOn(fold="all"), TrainedOn(images=frozenset({"a", "b"}))]
)
def test_what_is_known_survives_a_file(known):
    assert TrainedOn.from_record(json.loads(json.dumps(known.to_record()))) == known


@pytest.mark.parametrize("record", [None, 3, {"fold": -1}, {"fold": True}, {"images": "abc"}])
def test_a_record_without_sense_says_nothing(record):
    assert TrainedOn.from_record(record) == TrainedOn()


def test_checkpoints_and_feature_files_say_what_a_teacher_saw(
    make_job, manager, teacher_runs, features, tmp_path
):
    found = data.gather_data(make_job(tmp_path / "run").config, manager, Cache(tmp_path / "cache"))
    hashes = {case.id: found.store.get(case).image_hash for case in (*found.labelled, *found.val)}
    for k in range(2):
        meta = load_checkpoint(find_checkpoint(teacher_runs / f"teacher_{k}", "last")).meta
        seen = set(meta["trained_on"]["images"])
        assert set(open_teacher(features / f"teacher_{k}").trained_on["images"]) == seen
        assert len(seen) == 3
        assert seen < set(hashes.values())
    one, two = (set(open_teacher(features / f"teacher_{k}").trained_on["images"]) for k in range(2))
    assert not one & two


# -- arithmetic ------------------------------------------------------------------------------------


def test_weights_go_to_the_teachers_that_did_not_see_the_sample():
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    seen = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    found = unseen_only({"neg1": weights}, seen)["neg1"]
    assert torch.allclose(found[0], torch.tensor([0.0, 0.6, 0.4]))
    assert torch.equal(found[1], weights[1])
    assert torch.equal(found[2], weights[2])
    ones = unseen_only({"neg1": torch.ones(3, 3)}, seen)["neg1"]
    assert torch.allclose(ones.sum(dim=1), torch.full((3,), 3.0))
    nobody = unseen_only({"neg1": torch.tensor([[1.0, 0.0]])}, torch.tensor([[True, False]]))["neg1"]
    assert torch.equal(nobody, torch.tensor([[1.0, 0.0]]))


def test_quality_is_the_mean_over_cases_that_a_teacher_did_not_see():
    quality = torch.tensor([[0.9, 0.2, 0.8], [0.5, 0.4, 0.7], [float("nan"), 0.9, 0.6]])
    seen = torch.tensor([[True, False, True], [False, False, True], [False, True, True]])
    # Teacher 0 has one case left (0.5), teacher 1 two (0.3), teacher 2 none: the mean of the others.
    assert torch.allclose(unseen_means(quality, seen), torch.tensor([0.5, 0.3, 0.4]))
    with pytest.raises(ConfigError, match="every teacher was trained on every labelled case"):
        unseen_means(quality, torch.ones(3, 3, dtype=torch.bool))


# -- in a run --------------------------------------------------------------------------------------


def distilled(features, oof, **over):
    found = {"teachers": {"features": [str(features)], "oof": oof}, "weighting": {"mode": "uniform"}}
    return {**found, **over}


def fit(job, change=None):
    with job.runtime() as rt:
        found = data.load(rt, job.config)
        if change is not None:
            change(found)
        train.fit(rt, job.config, found)
    return job.run_dir


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def gathered(job, tmp_path):
    return data.gather_data(job.config, job.manager, Cache(tmp_path / "cache"))


def test_a_teacher_that_saw_a_case_does_not_teach_it(make_job, tmp_path, features, monkeypatch):
    """The two teachers saw complementary cases, so each case has exactly one that may teach it."""
    over = distilled(features, "unseen", distill={"taps": ["neg1"], "logit_weight": 1.0})
    seen_weights, original = [], train.Objective.__call__

    def spy(self, output, batch, projections, weights):
        seen_weights.append((batch.case_ids, {kind: w.clone() for kind, w in weights.items()}))
        return original(self, output, batch, projections, weights)

    monkeypatch.setattr(train.Objective, "__call__", spy)
    kept = []
    run = fit(make_job(tmp_path / "run", over), kept.append)
    assert set(kept[0].seen.values()) <= {(True, False), (False, True)}
    assert len(seen_weights) == 3
    for case_ids, weights in seen_weights:
        assert set(weights) == {"neg1", "logits"}
        for name, row in zip(case_ids, weights["neg1"].tolist(), strict=True):
            assert row == [0.0 if trained else 1.0 for trained in kept[0].seen[name]]
    assert all(row["loss_features"] > 0 for row in records(run) if "loss" in row)


@pytest.mark.parametrize("oof", ["mean", "unseen"])
def test_quality_is_measured_out_of_fold(make_job, tmp_path, features, oof):
    over = distilled(features, oof, weighting={"mode": "quality"})
    found = gathered(make_job(tmp_path / "a", over), tmp_path)
    cfg = make_job(tmp_path / "b", over).config
    measured = priors.measure(cfg, found, ("neg1",))
    samples = found.samples(found.labelled, teachers=True)
    from medrl.plugins.graft.samples import collate

    each = torch.stack([priors.batch_quality(collate([samples[k]]), found)[0] for k in range(len(samples))])
    for teacher in range(2):
        rows = [k for k, case in enumerate(found.labelled) if not found.seen[case.id][teacher]]
        assert 0 < len(rows) < len(samples)
        assert float(measured.quality[teacher]) == pytest.approx(float(each[rows, teacher].mean()), abs=1e-6)


def test_the_probe_scores_unseen_cases_only(make_job, tmp_path, features):
    over = distilled(features, "mean", weighting={"mode": "probe"})
    found = gathered(make_job(tmp_path / "a", over), tmp_path)
    cfg = make_job(tmp_path / "b", over).config
    measured = priors.measure(cfg, found, ("neg1",)).get_buffer("quality_neg1")
    samples = found.samples(found.labelled, teachers=True)
    from medrl.plugins.graft.weighting import probe_scores

    scores = probe_scores(
        [lambda k, t=t: samples[k]["features"]["neg1"][t].float() for t in range(2)],
        [samples[k]["label"] for k in range(len(samples))],
    )
    seen = found.in_sample([case.id for case in found.labelled])
    assert torch.allclose(measured, unseen_means(scores, seen).float(), atol=1e-6)
    assert not torch.allclose(measured, scores.nanmean(dim=0).float(), atol=1e-6)


def test_the_policy_is_told_who_was_trained_on_the_sample(make_job, tmp_path, features, monkeypatch):
    over = distilled(features, "flag", weighting={"mode": "reinforce", "prior": "uniform"})
    over |= {"agent": {"policy": "state", "interval": 1}, "split": {"reward": 0.4}}
    from medrl.plugins.graft.steering import scene

    states, original = [], scene.make_state

    def spy(*args, **kwargs):
        state = original(*args, **kwargs)
        states.append(state.scalars)
        return state

    monkeypatch.setattr(scene, "make_state", spy)
    kept = []
    run = fit(make_job(tmp_path / "run", over), kept.append)
    # Likeness, quality, disagreement, and the flag.
    assert {tuple(state.shape) for state in states} == {(1, 2, 4)}
    rows = {tuple(bool(flag) for flag in state[0, :, 3].tolist()) for state in states}
    assert rows <= set(kept[0].seen.values())
    trunk = load_checkpoint(find_checkpoint(run, "last")).states["policy"]["trunk.weight"]
    assert trunk.shape[1] == 2 * (64 + 4)


def test_a_flag_without_a_policy_that_looks_is_refused(manager, features):
    with pytest.raises(ConfigError) as error:
        resolve_method(manager, "graft", layers=[Layer("test", distilled(features, "flag"))])
    assert "agent.policy=state" in "\n".join(error.value.problems)


def test_off_asks_nothing_of_the_files(make_job, tmp_path, features):
    found = gathered(make_job(tmp_path / "run", distilled(features, "off")), tmp_path)
    assert found.in_sample(["prostate_000"]) is None


def test_live_teachers_know_what_they_saw_too(make_job, tmp_path, teacher_runs, features):
    over = {"features": [str(teacher_runs)], "source": "live", "oof": "unseen"}
    asked = gathered(make_job(tmp_path / "a", {"teachers": over}), tmp_path)
    read = gathered(make_job(tmp_path / "b", distilled(features, "unseen")), tmp_path)
    assert asked.seen == read.seen
    assert len(asked.seen) == 4


def test_given_folds_count_for_more_than_the_files(make_job, tmp_path, features):
    over = distilled(features, "unseen")
    over["teachers"]["folds"] = [0, "none"]
    found = gathered(make_job(tmp_path / "run", over), tmp_path)
    # The student learns from everything but fold 0, and so did a teacher that did not see fold 0.
    assert set(found.seen.values()) == {(True, False)}


def test_teachers_of_the_tool_leave_a_teacher_for_each_case(manager, resolve, teacher_runs):
    runs = teachers.find_teachers(teacher_runs)
    found = [teachers.open_network(path, manager, torch.device("cpu")).trained_on for path in runs]
    assert all(known.images and len(known.images) == 3 for known in found)
