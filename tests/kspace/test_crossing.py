"""Crossed reward models: who learns from whom, who judges whom, and that they travel with the policy."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import CheckpointError, ConfigError, DataError
from medrl.plugins.kspace import crossing, domain, running, study
from medrl.plugins.kspace.candidates import gains
from medrl.plugins.kspace.cases import Cases
from medrl.plugins.kspace.config import KspaceConfig
from medrl.plugins.kspace.imaging import Imaging
from medrl.plugins.kspace.models import CompactNet
from medrl.plugins.kspace.observer import CaseObserver
from medrl.plugins.kspace.restoring import open_run
from medrl.plugins.kspace.rewards import Quality

CROSSED = {"seg": {"crossed": 2}}


@pytest.fixture(scope="module")
def crossed_run(tmp_path_factory, make_job):
    """A policy with crossed reward models of its own, with little to do."""
    run = tmp_path_factory.mktemp("crossed") / "run"
    running.run(make_job(run, {**CROSSED, "warm": {"states": 8}, "ppo": {"updates": 1}}))
    return run


def patients(run, part="train"):
    return set(load_checkpoint(find_checkpoint(run, "last")).meta["patients"][part])


def test_every_training_patient_is_left_out_by_exactly_one_crossed_reward_model(crossed_run):
    everyone = patients(crossed_run)
    reward = crossed_run / "stages" / "reward"
    left_out = [everyone - patients(crossing.run_of(reward, part)) for part in (0, 1)]
    assert left_out[0] | left_out[1] == everyone == patients(reward)
    assert not left_out[0] & left_out[1]
    assert min(len(part) for part in left_out) >= 1
    assert {frozenset(patients(crossing.run_of(reward, part), "val")) for part in (0, 1)} == {
        frozenset(patients(reward, "val"))
    }
    dealt = load_checkpoint(find_checkpoint(crossed_run, "last")).meta["dealt"]
    assert all(dealt[name] == part for part, names in enumerate(left_out) for name in names)


def test_the_policy_run_holds_the_crossed_reward_models_unchanged(crossed_run, tools):
    held = tools.states(crossed_run)["crossed"]
    for part in (0, 1):
        run = crossing.run_of(crossed_run / "stages" / "reward", part)
        trained = tools.states(run, "best")["segmenter"]
        own = {name: value for name, value in held.items() if name.startswith(f"{part}.")}
        assert own.keys() == {f"{part}.{name}" for name in trained}
        assert all(torch.equal(own[f"{part}.{name}"], value) for name, value in trained.items())


def two_nets():
    return [Imaging(CompactNet(widths=(4, 6)).eval()) for _ in range(3)]


def many_cases(count=6):
    torch.manual_seed(4)
    image = torch.rand(count, 16, 16)
    possible = torch.ones(count, 16, dtype=torch.bool)
    initial = torch.zeros(count, 16, dtype=torch.bool)
    initial[:, 7:9] = True
    kspace = torch.fft.fftshift(
        torch.fft.fft2(torch.fft.ifftshift(image, dim=(-2, -1)), norm="ortho"), dim=(-2, -1)
    )
    return Cases(
        ids=tuple(f"case{number}" for number in range(count)),
        kspace=kspace.to(torch.complex64),
        target=image,
        labels=(image > 0.5).to(torch.uint8),
        possible=possible,
        initial=initial,
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_each_case_is_seen_with_the_model_of_its_part(gradient):
    cases, (whole, *crossed) = many_cases(), two_nets()
    part = torch.tensor([0, 1, -1, 1, 0, -1])
    eyes = crossing.CrossedObserver(cases, whole, None, crossed=crossed, part=part)
    case = torch.tensor([3, 0, 2, 5, 1, 4, 3])
    mask = cases.initial[case].clone()
    mask[:, 3] = True
    found = eyes.view(case, mask, gradient=gradient)
    for row, number in enumerate(case.tolist()):
        own = [whole, *crossed][int(part[number]) + 1]
        alone = CaseObserver(cases, own).view(case[row : row + 1], mask[row : row + 1], gradient=gradient)
        for name in ("image", "logits", "prediction", "deep", "gradient", "probabilities", "entropy"):
            left, right = getattr(found, name), getattr(alone, name)
            assert (left is None) == (right is None)
            if left is not None:
                assert torch.allclose(left[row : row + 1], right, atol=1e-5)
    assert not torch.allclose(
        found.logits[0], CaseObserver(cases, whole).view(case, mask).logits[0], atol=1e-3
    )


def test_gains_of_a_case_are_those_of_its_own_model():
    cases, (whole, *crossed) = many_cases(), two_nets()
    part = torch.tensor([0, 0, 0, 1, 1, 1])
    eyes = crossing.CrossedObserver(cases, whole, None, crossed=crossed, part=part)
    quality, case = Quality(image_weight=0.0, label_weight=1.0), torch.arange(6)
    found = gains(eyes, quality, case, cases.initial)
    for number, imaging in enumerate(crossed):
        own = gains(CaseObserver(cases, imaging), quality, case, cases.initial)
        rows = part == number
        assert torch.allclose(found[rows].nan_to_num(neginf=0), own[rows].nan_to_num(neginf=0), atol=1e-5)


def test_other_cases_are_seen_with_the_model_of_all():
    cases, (whole, *crossed) = many_cases(), two_nets()
    eyes = crossing.CrossedObserver(cases, whole, None, crossed=crossed, part=torch.zeros(6).long())
    held = eyes.on(many_cases(2))
    case = torch.arange(2)
    expected = CaseObserver(held.cases, whole).view(case, held.cases.initial)
    assert torch.equal(held.view(case, held.cases.initial).logits, expected.logits)


def test_more_parts_than_patients_are_refused(tiny):
    cfg = KspaceConfig.model_validate({"method": "kspace", **tiny({"seg": {"crossed": 9}})})
    with pytest.raises(DataError, match="4 training patients cannot be parted into 9"):
        crossing.part_of_patients(domain.load(cfg), cfg)


@pytest.mark.parametrize("seg", [{"crossed": 1}, {"crossed": 2, "part": 2}, {"part": 0}])
def test_parts_that_are_none_are_refused(tiny, seg):
    with pytest.raises(ValueError, match="crossed|part"):
        KspaceConfig.model_validate({"method": "kspace", **tiny({"seg": seg})})


def test_a_reward_run_without_crossed_models_is_refused(tmp_path, make_job, reward_run):
    with pytest.raises(ConfigError, match="no crossed reward model 0"):
        running.run(make_job(tmp_path / "run", {**CROSSED, "inputs": {"reward": str(reward_run)}}))


def test_crossed_models_that_know_whom_they_judge_are_refused(tmp_path, make_job, crossed_run):
    reward = shutil.copytree(crossed_run / "stages" / "reward", tmp_path / "reward")
    names = sorted(path.name for path in (reward / "crossed").iterdir() if path.is_dir())
    assert names == ["0", "1"]
    (reward / "crossed" / "0").rename(reward / "crossed" / "x")
    (reward / "crossed" / "1").rename(reward / "crossed" / "0")
    (reward / "crossed" / "x").rename(reward / "crossed" / "1")
    with pytest.raises(CheckpointError, match="whom it is to judge"):
        running.run(make_job(tmp_path / "run", {**CROSSED, "inputs": {"reward": str(reward)}}))


def test_fixed_masks_of_a_study_are_fitted_with_the_crossed_models(
    tmp_path, manager, crossed_run, monkeypatch
):
    asked = []
    original = study.evaluate.rivals

    def watched(names, training, *args, **kwargs):
        asked.append(training)
        return original(names, training, *args, **kwargs)

    monkeypatch.setattr(study.evaluate, "rivals", watched)
    study.run(manager, [crossed_run], tmp_path / "study", against=["fixed"], cases=2)
    (training,) = asked
    assert isinstance(training, crossing.CrossedObserver)
    assert sorted(set(training.part.tolist())) == [0, 1]


def test_a_restored_policy_sees_new_cases_with_the_model_of_all(crossed_run, manager):
    opened = open_run(crossed_run, manager, torch.device("cpu"))
    assert len(opened.crossed) == 2
    assert type(opened.observer(many_cases())) is CaseObserver


def test_a_reward_model_that_judges_its_own_patients_says_so(
    tmp_path, make_job, reward_run, crossed_run, caplog
):
    caplog.set_level(logging.INFO, logger="medrl.kspace")
    values = {"inputs": {"reward": str(reward_run)}, "warm": {"states": 8}, "ppo": {"updates": 1}}
    running.run(make_job(tmp_path / "shared", values))
    assert "learned from 4 of the policy's 4 training patients" in caplog.text
    caplog.clear()
    reward = crossed_run / "stages" / "reward"
    running.run(make_job(tmp_path / "crossed", {**values, **CROSSED, "inputs": {"reward": str(reward)}}))
    assert "flatters" not in caplog.text
