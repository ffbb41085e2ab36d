"""Prediction: masks, maps and paths on the grid of the file, the same for the same seed, for every policy."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medrl.core.checkpoint import find_checkpoint
from medrl.core.errors import ConfigError
from medrl.core.jobs import PredictJob
from medrl.plugins.spars import predict
from medrl.plugins.spars.predict import Options
from medrl.plugins.spars.restoring import open_run


@pytest.fixture
def job(manager, phantoms, play_run):
    def make(output, **kwargs):
        given = {"inputs": phantoms / "imagesTs", "checkpoints": [find_checkpoint(play_run)], **kwargs}
        return PredictJob(method="spars", output=output, manager=manager, device="cpu", threads=1, **given)

    return make


@pytest.mark.parametrize("policy", ["scan", "greedy", "self-play", "random", "tiles"])
def test_every_policy_writes_masks_maps_and_paths_on_the_grid_of_the_file(job, phantoms, tmp_path, policy):
    outcome = predict.run(job(tmp_path / "out"), Options(policy=policy, episodes=2, horizon=4))
    assert outcome.failed == {}
    assert len(outcome.done) == 3
    written_labels = json.loads((tmp_path / "out" / "labels.json").read_text())["labels"]
    assert written_labels == {"background": 0, "tumour": 2}
    for name in outcome.done:
        source = nib.load(phantoms / "imagesTs" / f"{name}_0000.nii.gz")
        for path in (tmp_path / "out" / f"{name}.nii.gz", tmp_path / "out" / "maps" / f"{name}.nii.gz"):
            written = nib.load(path)
            assert written.shape == source.shape
            assert np.allclose(written.affine, source.affine)
        # The values of the dataset, so that `medrl evaluate` finds the tumour.
        values = set(np.unique(np.asarray(nib.load(tmp_path / "out" / f"{name}.nii.gz").dataobj)).tolist())
        assert values <= {0, 2}
        told = json.loads((tmp_path / "out" / "paths" / f"{name}.json").read_text())
        assert told["policy"] == policy
        assert told["label_source"] == "image"
        assert len(told["visits"]["corner"]) == len(told["visits"]["score"])
        if policy in ("greedy", "self-play", "random"):
            assert len(told["visits"]["corner"]) == 2 * 2 * 4


def test_the_same_seed_gives_the_same_files(job, tmp_path):
    for folder in ("one", "two"):
        predict.run(job(tmp_path / folder), Options(policy="self-play", seed=5))
    for kind in ("", "maps", "paths"):
        for path in sorted((tmp_path / "one" / kind).glob("*.*")):
            if path.name.startswith(("report", "labels")):
                continue
            other = tmp_path / "two" / kind / path.name
            if path.suffix == ".json":
                assert path.read_text() == other.read_text()
            else:
                assert np.array_equal(np.asarray(nib.load(path).dataobj), np.asarray(nib.load(other).dataobj))


def test_turned_files_give_the_same_mask_turned(job, phantoms, tmp_path):
    name = "abdomen_test_000"
    source = nib.load(phantoms / "imagesTs" / f"{name}_0000.nii.gz")
    turned = source.as_reoriented(nib.orientations.axcodes2ornt(("P", "S", "L")))
    (tmp_path / "in").mkdir()
    nib.save(turned, tmp_path / "in" / f"{name}_0000.nii.gz")
    predict.run(job(tmp_path / "plain"), Options(policy="scan", threshold=0.1))
    predict.run(job(tmp_path / "turned", inputs=tmp_path / "in"), Options(policy="scan", threshold=0.1))
    plain = nib.load(tmp_path / "plain" / "maps" / f"{name}.nii.gz")
    other = nib.load(tmp_path / "turned" / "maps" / f"{name}.nii.gz")
    assert other.shape == turned.shape
    back = other.as_reoriented(
        nib.orientations.ornt_transform(
            nib.io_orientation(other.affine), nib.orientations.axcodes2ornt(("R", "A", "S"))
        )
    )
    assert np.array_equal(back.get_fdata(), plain.get_fdata())


def test_nothing_outside_the_organ_is_kept(job, tmp_path, phantoms):
    organ = tmp_path / "organ"
    organ.mkdir()
    for path in sorted((phantoms / "labelsTs").glob("*.nii.gz")):
        found = nib.load(path)
        half = np.zeros(found.shape, dtype=np.uint8)
        half[: found.shape[0] // 2] = 1
        nib.save(nib.Nifti1Image(half, found.affine), organ / path.name)
    predict.run(job(tmp_path / "out"), Options(policy="scan", organ=organ))
    for path in (tmp_path / "out" / "maps").glob("*.nii.gz"):
        found = nib.load(path).get_fdata()
        assert not found[found.shape[0] // 2 :].any()


def test_an_empty_map_gives_an_empty_mask(manager, play_run):
    opened = open_run(play_run, manager, torch.device("cpu"))
    predictor = predict.HuntPredictor(opened, Options(), {}, Path())
    empty = np.stack([np.ones((8, 8, 8)), np.zeros((8, 8, 8))]).astype(np.float32)
    assert not predictor.decode(empty).any()


def test_pictures_show_the_path(job, tmp_path):
    outcome = predict.run(job(tmp_path / "out", preview=True), Options(policy="self-play"))
    for name in outcome.done:
        assert (tmp_path / "out" / "paths" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / "previews" / f"{name}.png").is_file()


def test_self_play_needs_a_policy(job, make_job, tmp_path):
    from medrl.plugins.spars import running

    running.run(make_job(tmp_path / "classifier", {"stage": "classifier"}))
    checkpoints = [find_checkpoint(tmp_path / "classifier")]
    with pytest.raises(ConfigError, match="holds no policy"):
        predict.run(job(tmp_path / "out", checkpoints=checkpoints), Options(policy="self-play"))
    outcome = predict.run(job(tmp_path / "out", checkpoints=checkpoints), Options())
    assert len(outcome.done) == 3
