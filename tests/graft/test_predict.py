"""Prediction: exact return to the grid of the input, masks, classes and regions."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.dataset import load_case, open_dataset
from medrl.core.errors import DataError
from medrl.core.jobs import PredictJob
from medrl.core.types import Volume
from medrl.plugins.graft import predict
from medrl.plugins.graft.plans import SamplePlan

LABELS = {"background": 0, "prostate": 1, "PCa": 2, "csPCa": 3}


class Copy(torch.nn.Module):
    """Logits that are large where the first channel is above zero, for every channel but a background."""

    def __init__(self, channels, softmax):
        super().__init__()
        self.channels, self.softmax = channels, softmax

    def forward(self, image):
        logits = [20.0 * (image[:, :1] - 0.0)] * self.channels
        if self.softmax:
            logits[0] = -logits[0]
        return torch.cat(logits, dim=1)


def plan(**changes):
    values = {
        "window": "centre",
        "size": (4, 8, 8),
        "mask": "prostate",
        "normalization": "volume",
        "target_kind": "binary",
        "labels": LABELS,
        "channel_names": ("T2",),
    }
    return SamplePlan(**{**values, **changes})


def predictor(**changes):
    chosen = plan(**changes)
    network = Copy(chosen.target.channels, chosen.target.softmax)
    return predict.GraftPredictor(chosen, network, device=torch.device("cpu"))


def volume(shape, seed=0, source=None):
    data = np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)
    return Volume(data=data, affine=np.eye(4), spacing=(1.0, 1.0, 1.0), source=source)


@pytest.mark.parametrize("shape", [(8, 8, 4), (11, 13, 9), (5, 6, 3), (20, 5, 4)])
@pytest.mark.parametrize("kind", ["binary", "3class", "classes"])
def test_every_voxel_comes_back_to_its_place_whatever_the_size(shape, kind):
    image = volume(shape)
    found = predictor(target_kind=kind).probabilities(image, tta=False, overlap=0.5)
    above = image.data[0] > image.data[0].mean()
    far = np.abs(image.data[0] - image.data[0].mean()) > 0.2
    assert found.shape[1:] == shape
    assert np.array_equal((found[-1] > 0.5 if kind != "classes" else found[0] < 0.5)[far], above[far])


def test_mirrored_views_of_a_symmetric_network_give_the_same(tmp_path):
    image = volume((9, 10, 5))
    plain = predictor().probabilities(image, tta=False, overlap=0.25)
    views = predictor().probabilities(image, tta=True, overlap=0.25)
    assert np.allclose(plain, views, atol=1e-5)


def test_regions_are_decoded_in_order_and_classes_by_the_largest():
    found = np.zeros((3, 1, 1, 4))
    found[:, 0, 0] = [[0.9, 0.9, 0.9, 0.1], [0.1, 0.9, 0.9, 0.1], [0.1, 0.1, 0.9, 0.9]]
    labels = predictor(target_kind="3class").decode(found)
    assert labels.tolist() == [[[1, 2, 3, 3]]]
    found = np.array([[[[0.6, 0.2]]], [[[0.3, 0.3]]], [[[0.1, 0.5]]]])
    assert predictor(target_kind="classes", labels={"b": 0, "x": 1, "y": 2}).decode(found).tolist() == [
        [[0, 2]]
    ]


def masked_case(tmp_path, depth=9):
    folder = tmp_path / "imagesTs"
    (tmp_path / "masksTs").mkdir()
    folder.mkdir()
    image = volume((8, 8, depth), source=folder / "case_0000.nii.gz")
    nib.save(nib.Nifti1Image(image.data[0], np.eye(4)), image.source)
    mask = np.zeros((8, 8, depth), dtype=np.uint8)
    mask[2:6, 2:6, 3:6] = 1
    nib.save(nib.Nifti1Image(mask, np.eye(4)), tmp_path / "masksTs" / "case.nii.gz")
    return image, mask


def test_a_network_of_mask_windows_is_asked_about_the_slices_of_the_mask_only(tmp_path):
    image, mask = masked_case(tmp_path)
    found = predictor(window="mask", normalization="mask").probabilities(image, tta=False, overlap=0.5)
    inside = image.data[0][mask > 0]
    scaled = (image.data[0] - inside.mean()) / inside.std()
    assert not found[..., :3].any()
    assert not found[..., 6:].any()
    assert np.allclose(found[0][..., 3:6], 1 / (1 + np.exp(-20 * scaled[..., 3:6])), atol=1e-4)


def test_outside_the_mask_slices_classes_are_background(tmp_path):
    image, _ = masked_case(tmp_path)
    changes = {"target_kind": "classes", "labels": {"background": 0, "organ": 1}}
    found = predictor(window="mask", normalization="mask", **changes).probabilities(
        image, tta=False, overlap=0.5
    )
    assert np.all(found[0][..., :3] == 1.0)
    assert np.allclose(found.sum(axis=0), 1.0, atol=1e-5)


def test_a_missing_mask_names_the_case_and_the_option(tmp_path):
    image, _ = masked_case(tmp_path)
    (tmp_path / "masksTs" / "case.nii.gz").unlink()
    with pytest.raises(DataError, match="case case: ") as error:
        predictor(normalization="mask").probabilities(image, tta=False, overlap=0.5)
    assert "--masks" in error.value.do


def test_an_image_of_other_channels_is_refused():
    with pytest.raises(DataError, match="1 channels, the model needs T2, ADC"):
        predictor(channel_names=("T2", "ADC")).probabilities(volume((8, 8, 4)), tta=False, overlap=0.5)


def test_a_teacher_and_the_mean_of_teachers_are_predicted_like_any_run(
    teacher_runs, manager, phantoms, tmp_path
):
    runs = [find_checkpoint(teacher_runs / f"teacher_{k}") for k in range(2)]
    results = {}
    for name, chosen in (("one", runs[:1]), ("mean", runs)):
        job = PredictJob(
            method="graft",
            inputs=phantoms,
            output=tmp_path / name,
            checkpoints=chosen,
            manager=manager,
            save_probabilities=True,
        )
        outcome = predict.run(job)
        assert outcome.failed == {}
        assert sorted(outcome.done) == ["prostate_test_000", "prostate_test_001"]
        results[name] = outcome
    dataset = open_dataset(phantoms)
    case = dataset.test_cases[1]
    image, _ = load_case(dataset, case, with_label=False)
    written = nib.load(results["mean"].outputs[case.id])
    given = nib.load(case.images[0])
    assert written.shape == given.shape
    assert np.array_equal(written.affine, given.affine)
    assert int(written.header["qform_code"]) == int(given.header["qform_code"])
    separate = [
        predict.load(load_checkpoint(path), job=job).probabilities(image, tta=False, overlap=0.5)
        for path in runs
    ]
    expected = predict.load(load_checkpoint(runs[0]), job=job).decode(np.mean(separate, axis=0))
    assert np.array_equal(np.asarray(written.dataobj), expected)
