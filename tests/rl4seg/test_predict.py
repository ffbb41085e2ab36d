"""Prediction: any size, back onto the grid of the input, the largest blob, 1 - reward as uncertainty."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import CheckpointError, ConfigError
from medrl.core.jobs import PredictJob
from medrl.core.types import Volume
from medrl.plugins.rl4seg import predict

AFFINE = np.diag([0.4, 0.5, 1.0, 1.0])


@pytest.fixture
def images(tmp_path):
    """Images of other sizes than in training, one of them with several frames."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, shape in (("large", (100, 70)), ("odd", (33, 47)), ("cine", (32, 32, 5))):
        image = nib.Nifti1Image(generator.integers(0, 256, shape).astype(np.uint8), AFFINE)
        nib.save(image, folder / f"{name}.nii.gz")
    return folder


@pytest.fixture
def job_of(images, tmp_path, manager, loop_run):
    def make(run=None, **values):
        given = {
            "method": "rl4seg",
            "inputs": images,
            "output": tmp_path / "out",
            "checkpoints": [find_checkpoint(run or loop_run)],
            "manager": manager,
            "device": "cpu",
        }
        return PredictJob(**{**given, **values})

    return make


def image_of(path):
    return np.asarray(nib.load(path).dataobj)


def volume(shape, seed=0):
    data = np.random.default_rng(seed).random((1, *shape), dtype=np.float32) * 255
    return Volume(data=data, affine=AFFINE, spacing=(0.4, 0.5, 1.0))


def predictor_of(job, **values):
    return predict.load(load_checkpoint(job.checkpoints[0]), job=job, **values)


def test_every_size_comes_back_on_its_own_grid(job_of, tmp_path, images):
    outcome = predict.run(job_of(save_probabilities=True))
    assert sorted(outcome.done) == ["cine", "large", "odd"]
    assert outcome.failed == {}
    for name, shape in (("large", (100, 70)), ("odd", (33, 47)), ("cine", (32, 32, 5))):
        labels = nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert labels.shape[: len(shape)] == shape
        assert np.allclose(labels.affine, AFFINE)
        assert set(np.unique(image_of(tmp_path / "out" / f"{name}.nii.gz"))) <= {0, 1, 2}
        with np.load(tmp_path / "out" / "probabilities" / f"{name}.npz") as found:
            sums = found["probabilities"].sum(axis=0)
        assert np.abs(sums - 1.0).max() < 1e-5
    assert json.loads((tmp_path / "out" / "labels.json").read_text())["labels"] == {
        "background": 0,
        "LV": 1,
        "MYO": 2,
    }


def test_an_image_of_the_training_size_gets_the_networks_own_answer(job_of, loop_run, tools):
    predictor = predictor_of(job_of())
    given = volume((32, 32, 1))
    found = predictor.probabilities(given, tta=False, overlap=0.5)
    seen = torch.from_numpy(np.moveaxis(given.data, -1, 0) / np.float32(255))
    with torch.no_grad():
        expected = predictor.actor.probabilities(seen)[0].numpy()
    assert np.array_equal(found[..., 0], expected)


def test_only_the_largest_blob_is_kept_unless_asked_otherwise(job_of):
    labels = np.zeros((8, 8, 2), dtype=np.int64)
    labels[1:4, 1:4, :] = 1
    labels[4:6, 4:6, 0] = 2  # touches only at a corner
    probabilities = np.eye(3, dtype=np.float32)[labels].transpose(3, 0, 1, 2)
    kept = predictor_of(job_of()).decode(probabilities)
    assert np.array_equal(kept != 0, labels == 1)
    every = predictor_of(job_of(), largest_blob=False).decode(probabilities)
    assert np.array_equal(every, labels)


def test_uncertainty_is_one_minus_the_calibrated_reward(job_of, tmp_path, loop_run, tools):
    predict.run(job_of(save_uncertainty=True))
    for name in ("large", "odd", "cine"):
        found = image_of(tmp_path / "out" / "uncertainty" / f"{name}.nii.gz")
        assert found.shape == image_of(tmp_path / "out" / f"{name}.nii.gz").shape
        assert 0.0 <= found.min() <= found.max() <= 1.0
        assert found.std() > 0.0
    predictor = predictor_of(job_of(save_uncertainty=True))
    fitted = tools.states(tools.stage_of(loop_run, "reward_1"))["reward"]["temperature"]
    assert torch.equal(predictor.net.temperature, fitted)
    given = volume((32, 32, 1), seed=3)
    labels = np.random.default_rng(4).integers(0, 3, (32, 32, 1))
    found = predictor.uncertainty(given, labels)
    seen = torch.from_numpy(np.moveaxis(given.data, -1, 0) / np.float32(255))
    reward = predictor.net.reward(torch.from_numpy(np.moveaxis(labels, -1, 0)), seen)
    assert np.allclose(found[..., 0], 1.0 - reward[0].numpy(), atol=1e-6)


def test_a_ppo_stage_finds_the_reward_net_beside_it_and_a_source_stage_has_none(job_of, loop_run, tools):
    ppo = tools.stage_of(loop_run, "ppo_1")
    assert predictor_of(job_of(run=ppo, save_uncertainty=True)).net is not None
    source = tools.stage_of(loop_run, "source")
    assert predictor_of(job_of(run=source)).net is None
    with pytest.raises(CheckpointError, match="no reward net"):
        predictor_of(job_of(run=source, save_uncertainty=True))


def test_a_stage_without_an_actor_and_a_loop_without_a_stage_are_refused(
    job_of, loop_run, tools, make_job, tmp_path
):
    from medrl.plugins.rl4seg import loop

    with pytest.raises(CheckpointError, match="holds no actor"):
        predictor_of(job_of(run=tools.stage_of(loop_run, "corrector")))
    with pytest.raises(ConfigError, match="not done"):
        loop.run(make_job(tmp_path / "begun", {"stage": "ppo"}))
    with pytest.raises(CheckpointError, match="no stage of this run is finished"):
        predictor_of(job_of(run=tmp_path / "begun"))


def test_mirroring_needs_an_axis_and_averages_over_its_views(job_of):
    with pytest.raises(ConfigError, match="no axis is named"):
        predictor_of(job_of(tta=True))
    with pytest.raises(ConfigError, match="neither x nor y"):
        predictor_of(job_of(tta=True), tta_axes="x,z")
    predictor = predictor_of(job_of(tta=True), tta_axes="x")
    given = volume((32, 32, 1))
    mirrored = Volume(data=given.data[:, ::-1].copy(), affine=AFFINE, spacing=given.spacing)
    plain, other = (predictor.probabilities(item, tta=False, overlap=0.5) for item in (given, mirrored))
    both = predictor.probabilities(given, tta=True, overlap=0.5)
    assert np.allclose(both, (plain + other[:, ::-1]) / 2, atol=1e-6)
    assert not np.allclose(both, plain, atol=1e-4)


def test_the_precision_of_the_job_is_used(job_of):
    given = volume((32, 32, 1))
    exact, coarse = (
        predictor_of(job_of(precision=precision)).probabilities(given, tta=False, overlap=0.5)
        for precision in ("fp32", "bf16")
    )
    assert not np.array_equal(exact, coarse)
    assert np.abs(exact - coarse).max() < 0.05
