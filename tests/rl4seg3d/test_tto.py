"""Test-time optimisation: isolated for each file, seeded, never worse by its own reward."""

from __future__ import annotations

import copy

import nibabel as nib
import numpy as np
import pytest
import torch

from medrl.core.jobs import PredictJob
from medrl.plugins.rl4seg3d.models import SmallUNet3d, UNet3d
from medrl.plugins.rl4seg3d.predict_config import PredictConfig, TTOConfig
from medrl.plugins.rl4seg3d.predicting import run
from medrl.plugins.rl4seg3d.tto import _changed, content_seed, optimise

CPU = torch.device("cpu")
QUICK = TTOConfig(mode="force", passes=3, views=2, lr=5e-3)


def bright(images, labels):
    """Reward for label 1 on bright voxels and 0 on dark ones."""
    return ((images[:, 0] > 0.5).long() == labels).float()


@pytest.fixture
def actor():
    torch.manual_seed(3)
    return SmallUNet3d(channels=(4, 8)).eval()


@pytest.fixture
def images():
    return torch.rand(16, 16, 6, generator=torch.Generator().manual_seed(0))


def test_the_worst_frame_gets_a_better_reward_and_the_actor_stays_as_it_was(actor, images):
    before = copy.deepcopy(actor.state_dict())
    better, trace = optimise(actor, bright, images, QUICK, device=CPU)
    assert better is not None
    assert trace.worst[trace.best] == max(trace.worst) > trace.worst[0]
    assert all(torch.equal(before[name], value) for name, value in actor.state_dict().items())
    assert all(not parameter.requires_grad for parameter in better.parameters())


def test_the_same_seed_gives_the_same_result_and_another_seed_another(actor, images):
    first, one = optimise(actor, bright, images, QUICK, device=CPU)
    second, two = optimise(actor, bright, images, QUICK, device=CPU)
    assert one == two
    weights = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    _, other = optimise(actor, bright, images, QUICK.model_copy(update={"seed": 2}), device=CPU)
    assert other.mean[1:] != one.mean[1:]
    assert content_seed(1, images) != content_seed(1, images.flip(0))


def test_the_global_random_numbers_are_not_touched(actor, images):
    state = torch.random.get_rng_state()
    optimise(actor, bright, images, QUICK, device=CPU)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nothing_is_kept_where_no_pass_is_better_and_it_stops_early(actor, images):
    constant = QUICK.model_copy(update={"passes": 9, "patience": 2})
    better, trace = optimise(actor, lambda i, a: torch.full(a.shape, 0.5), images, constant, device=CPU)
    assert better is None
    assert (trace.best, len(trace.worst), trace.stopped_early) == (0, 3, True)


def test_changed_frames_are_those_of_the_specification():
    chunk = torch.rand(20, 20, 4)
    changed = _changed(chunk, torch.Generator().manual_seed(0))
    assert changed.min() >= 0.0
    assert changed.max() == 1.0
    assert torch.corrcoef(torch.stack([chunk.flatten(), changed.flatten()]))[0, 1] > 0.99
    assert not _changed(torch.zeros(4, 4, 4), torch.Generator().manual_seed(0)).isnan().any()


# -- on files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(5)
    nets = {
        "actor.actor.net.": UNet3d(base_filters=4),
        "rewardnet_0.": UNet3d(in_channels=2, out_channels=1, base_filters=4),
    }
    state = {
        f"{prefix}{name}": value for prefix, net in nets.items() for name, value in net.state_dict().items()
    }
    path = tmp_path_factory.mktemp("weights") / "slim.ckpt"
    torch.save({"state_dict": state}, path)
    return path


@pytest.fixture
def predict(weights, manager):
    def go(inputs, output, mode="force"):
        job = PredictJob(
            method="rl4seg3d",
            inputs=inputs,
            output=output,
            checkpoints=[weights],
            manager=manager,
            device="cpu",
        )
        config = PredictConfig(equalise="off", tto=QUICK.model_copy(update={"mode": mode, "passes": 2}))
        outcome = run(job, config)
        assert outcome.failed == {}
        return outcome

    return go


def test_a_result_does_not_depend_on_the_files_before_it(predict, tmp_path, tools):
    a, b = (tools.speckle(40, 36, 4, seed=k) for k in (1, 2))
    tools.save(tmp_path / "both" / "a.nii.gz", a)
    tools.save(tmp_path / "both" / "b.nii.gz", b)
    tools.save(tmp_path / "alone" / "b.nii.gz", b)
    predict(tmp_path / "both", tmp_path / "out_both")
    predict(tmp_path / "alone", tmp_path / "out_alone")
    for name in ("b.nii.gz", "rewards/b_reward_fused.nii.gz"):
        one, other = (nib.load(tmp_path / place / name) for place in ("out_both", "out_alone"))
        assert np.array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))


def test_the_result_is_never_worse_than_the_first_by_its_own_reward(predict, tmp_path, tools):
    import json

    tools.save(tmp_path / "in" / "a.nii.gz", tools.speckle(40, 36, 4, seed=1))
    predict(tmp_path / "in", tmp_path / "off", mode="off")
    predict(tmp_path / "in", tmp_path / "force")
    found = [json.loads((tmp_path / place / "reports" / "a.json").read_text()) for place in ("off", "force")]
    worst = [report["rewards"]["fused"]["worst_frame"] for report in found]
    assert worst[1] >= worst[0]
    trace = found[1]["tto"]
    assert len(trace["worst"]) >= 2
    assert trace["accepted"] == (worst[1] > worst[0])
    assert "tto" not in found[0]


def test_valid_sequences_are_left_alone_in_auto_mode(predict, tmp_path, tools, monkeypatch):
    import json

    from medrl.plugins.rl4seg3d.predicting import assessing

    monkeypatch.setattr(assessing.Assessment, "valid", True)
    tools.save(tmp_path / "in" / "a.nii.gz", tools.speckle(40, 36, 4, seed=1))
    predict(tmp_path / "in", tmp_path / "auto", mode="auto")
    report = json.loads((tmp_path / "auto" / "reports" / "a.json").read_text())
    assert report["tto"] == {
        "best": 0,
        "stopped_early": False,
        "accepted": False,
        "why": "the first prediction is valid",
    }
