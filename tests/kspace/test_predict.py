"""Prediction: a policy acquires scans; lines, reconstruction and segmentation are written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from medrl.core.checkpoint import find_checkpoint
from medrl.core.errors import ConfigError
from medrl.core.jobs import PredictJob
from medrl.core.volume import read_volume
from medrl.plugins.kspace import predict


@pytest.fixture
def make_predict(manager, policy_run, phantoms, tmp_path):
    """Make a prediction job of the policy run on the test patients."""

    def make(**kwargs):
        values = {"inputs": phantoms, "output": tmp_path / "out", **kwargs}
        checkpoints = values.pop("checkpoints", [find_checkpoint(policy_run, "last")])
        return PredictJob(method="kspace", checkpoints=checkpoints, manager=manager, device="cpu", **values)

    return make


def test_labels_reconstruction_and_lines_of_every_scan_are_written(make_predict, phantoms, tmp_path):
    found = predict.run(make_predict(), lines=3)
    assert len(found.done) == 4
    assert found.failed == {}
    for case in found.done:
        image = read_volume(phantoms / "imagesTs" / f"{case}_0000.nii.gz")
        labels = read_volume(tmp_path / "out" / f"{case}.nii.gz", kind="label")
        rebuilt = read_volume(tmp_path / "out" / "reconstructions" / f"{case}.nii.gz")
        assert labels.data.shape == rebuilt.data.shape == image.data.shape
        np.testing.assert_array_equal(rebuilt.affine, image.affine)
        content = json.loads((tmp_path / "out" / "lines" / f"{case}.json").read_text())
        for record in content["acquisitions"]:
            assert record["initial"] == [7, 8]
            assert len(set(record["lines"])) == 3
            assert not set(record["lines"]) & set(record["initial"])
            assert record["acceleration"] == pytest.approx(16 / 5)


def test_a_reconstruction_from_all_lines_is_the_image_itself(make_predict, phantoms, tmp_path):
    # The fourteen columns beyond the two initial ones.
    found = predict.run(make_predict(), lines=14)
    case = found.done[0]
    image = read_volume(phantoms / "imagesTs" / f"{case}_0000.nii.gz").data.astype(np.float64)
    rebuilt = read_volume(tmp_path / "out" / "reconstructions" / f"{case}.nii.gz").data
    assert np.abs(rebuilt - image).max() < 1e-4 * np.abs(image).max()


def test_an_acquisition_may_stop_early(make_predict, tmp_path):
    found = predict.run(make_predict(), lines=3, stop_below=10.0)
    content = json.loads((tmp_path / "out" / "lines" / f"{found.done[0]}.json").read_text())
    assert {len(record["lines"]) for record in content["acquisitions"]} == {1}
    never = predict.run(make_predict(output=tmp_path / "never"), lines=3, stop_below=0.0)
    content = json.loads((tmp_path / "never" / "lines" / f"{never.done[0]}.json").read_text())
    assert {len(record["lines"]) for record in content["acquisitions"]} == {3}


def test_measured_kspace_is_acquired_and_written_without_an_image_file(make_predict, tmp_path):
    import h5py

    from medrl.plugins.kspace.fourier import fft2c

    images = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
    with h5py.File(tmp_path / "brain.h5", "w") as file:
        file["kspace"] = fft2c(images).numpy()
    found = predict.run(make_predict(inputs=tmp_path / "brain.h5"), lines=14)
    assert found.done == ("brain",)
    rebuilt = read_volume(tmp_path / "out" / "reconstructions" / "brain.nii.gz").data[0]
    assert rebuilt.shape == (16, 16, 2)
    np.testing.assert_allclose(rebuilt, images.numpy().transpose(2, 1, 0), atol=1e-4)
    assert read_volume(tmp_path / "out" / "brain.nii.gz", kind="label").data.shape == (1, 16, 16, 2)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["cases"]["brain"]["status"] == "done"


def test_a_damaged_file_of_kspace_does_not_stop_the_others(make_predict, tmp_path):
    import h5py

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bad.h5").write_bytes(b"no HDF5")
    with h5py.File(folder / "good.h5", "w") as file:
        file["kspace"] = np.ones((1, 16, 16), dtype=np.complex64)
    found = predict.run(make_predict(inputs=folder), lines=2)
    assert found.done == ("good",)
    assert list(found.failed) == ["bad"]


def test_several_policies_and_views_are_refused(make_predict, policy_run):
    both = [find_checkpoint(policy_run, "last"), find_checkpoint(policy_run, "best")]
    with pytest.raises(ConfigError, match="one scan"):
        predict.run(make_predict(checkpoints=both))
    with pytest.raises(ConfigError, match="repeated"):
        predict.run(make_predict(tta=True))


def test_a_budget_above_what_the_scan_has_is_a_failure_of_the_case(make_predict):
    found = predict.run(make_predict(), lines=15)
    assert found.done == ()
    assert all("1 to 14 are possible" in reason for reason in found.failed.values())
