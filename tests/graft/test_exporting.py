"""The student for other programs: the same logits, and as a MONAI bundle the same segmentations of files."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from medrl.core.checkpoint import find_checkpoint
from medrl.core.export import checkpoint_of, export, networks_of
from medrl.core.jobs import PredictJob
from medrl.plugins.graft import data, predict, train


def trained(make_job, folder, values):
    job = make_job(folder, {"train": {"max_steps": 1, "checkpoint_every": 1}, **values})
    with job.runtime() as runtime:
        train.fit(runtime, job.config, data.load(runtime, job.config))
    return folder


@pytest.fixture
def run(make_job, tmp_path):
    """A student of classes whose images need no organ mask."""
    values = {
        "sample": {"size": [8, 32, 32], "normalization": "volume", "window": "centre"},
        "target": {"kind": "classes"},
    }
    return trained(make_job, tmp_path / "run", values)


def test_a_bundle_segments_files_as_medrl_does(run, manager, phantoms, tmp_path):
    from monai.bundle import ConfigParser

    made = export(run, manager, format="monai-bundle")
    images = tmp_path / "images"
    images.mkdir()
    case = "prostate_test_001"
    sources = sorted((phantoms / "imagesTs").glob("*_0000.nii.gz"))
    channels = sorted((phantoms / "imagesTs").glob(sources[0].name.replace("_0000", "_00*")))
    first = nib.load(channels[0])
    stacked = np.stack([np.asarray(nib.load(path).dataobj, dtype=np.float32) for path in channels], axis=-1)
    nib.save(nib.Nifti1Image(stacked, first.affine), images / f"{case}.nii.gz")

    parser = ConfigParser()
    parser.read_config(str(made.path / "configs" / "inference.json"))
    parser["bundle_root"], parser["device"] = str(made.path), "$torch.device('cpu')"
    parser["dataset_dir"], parser["output_dir"] = str(images), str(tmp_path / "bundle")
    parser.get_parsed_content("run")
    (written,) = (tmp_path / "bundle").glob("*.nii.gz")
    found = nib.load(written)

    job = PredictJob(
        method="graft",
        inputs=phantoms,
        output=tmp_path / "medrl",
        checkpoints=[find_checkpoint(run)],
        manager=manager,
        device="cpu",
    )
    predict.run(job)
    expected = nib.load(tmp_path / "medrl" / channels[0].name.replace("_0000", ""))
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
    same = np.asarray(found.dataobj).squeeze() == np.asarray(expected.dataobj)
    assert len(np.unique(np.asarray(expected.dataobj))) > 1
    assert same.mean() > 0.999


def test_the_exported_student_gives_the_logits_of_the_predictor(run, manager):
    checkpoint = checkpoint_of(run)
    (network,) = networks_of(checkpoint, manager).values()
    job = PredictJob(method="graft", inputs=run, output=run, checkpoints=[], manager=manager, device="cpu")
    predictor = predict.load(checkpoint, job=job)
    window = network.phantoms(1)
    with torch.no_grad():
        assert torch.equal(network.answers(window)["logits"], predictor.network(*window))
    assert list(network.label_names) == ["background", "prostate", "PCa", "csPCa"]


def test_an_image_that_needs_an_organ_mask_is_described_but_not_prepared(make_job, manager, tmp_path):
    run = trained(make_job, tmp_path / "masked", {})
    (network,) = networks_of(checkpoint_of(run), manager).values()
    assert "organ mask" in network.preparation
    assert list(network.before) == []
