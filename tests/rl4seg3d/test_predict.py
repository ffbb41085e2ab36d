"""Prediction of files: any input, its grid, isolation, reports, resuming, TorchScript packages."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medrl.core.errors import CheckpointError, ConfigError
from medrl.core.jobs import PredictJob
from medrl.plugins.rl4seg3d.models import UNet3d
from medrl.plugins.rl4seg3d.predict_config import PredictConfig, TTOConfig
from medrl.plugins.rl4seg3d.predicting import Segmenter, largest_blobs, run
from medrl.plugins.rl4seg3d.tta import views
from medrl.plugins.rl4seg3d.windows import window_starts

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """Logits that say 1 where the image is bright; counts how many windows it saw."""

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold, self.calls = threshold, 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += len(image)
        bright = (image - self.threshold) * 50
        return torch.cat([-bright, bright, torch.full_like(image, -100.0)], dim=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A Lightning checkpoint of small networks."""
    torch.manual_seed(0)
    nets = {
        "actor.actor.net.": UNet3d(base_filters=4),
        "rewardnet_0.": UNet3d(in_channels=2, out_channels=1, base_filters=4),
        "rewardnet_1.": UNet3d(in_channels=2, out_channels=1, base_filters=4),
    }
    state = {
        f"{prefix}{name}": value for prefix, net in nets.items() for name, value in net.state_dict().items()
    }
    path = tmp_path_factory.mktemp("weights") / "slim.ckpt"
    torch.save({"pytorch-lightning_version": "2.1", "state_dict": state}, path)
    return path


@pytest.fixture
def predict(tmp_path, weights, manager):
    """Predict a folder; further settings by name."""

    def go(inputs: Path, config: PredictConfig | None = None, output: Path | None = None, **values):
        given = {
            "method": "rl4seg3d",
            "inputs": inputs,
            "output": output or tmp_path / "out",
            "checkpoints": [weights],
            "manager": manager,
            "device": "cpu",
        }
        return run(PredictJob(**{**given, **values}), config or PredictConfig(equalise="off"))

    return go


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def report_of(folder, case):
    return json.loads((folder / "reports" / f"{case}.json").read_text())


# -- the grid of the file ----------------------------------------------------------------------------


def test_results_have_shape_and_affine_of_any_input(predict, tmp_path, tools):
    folder = tmp_path / "in"
    shapes = {
        "a": ((51, 47, 8), np.diag([0.30, 0.30, 1, 1])),
        "b": ((150, 130, 4), np.diag([0.20, 0.33, 1, 1])),
        "c": ((40, 33, 5), tools.OBLIQUE),
        "d": ((45, 38), np.diag([-0.37, 0.37, 1, 1])),
        "e": ((45, 38, 1, 3), np.diag([0.37, -0.37, 1, 1])),
    }
    for name, (shape, affine) in shapes.items():
        data = tools.speckle(shape[0], shape[1], shape[-1] if len(shape) > 2 else 1).reshape(shape)
        tools.save(folder / f"{name}.nii.gz", data, affine=affine)
    outcome = predict(folder, save_probabilities=True, save_uncertainty=True)
    assert outcome.failed == {}
    for name, (shape, _) in shapes.items():
        given, written = nib.load(folder / f"{name}.nii.gz"), nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert written.shape == shape
        assert np.array_equal(written.affine, given.affine)
        assert written.get_data_dtype() == np.uint8
        for kind in ("reward_anatomical", "reward_landmark", "reward_fused"):
            reward = nib.load(tmp_path / "out" / "rewards" / f"{name}_{kind}.nii.gz")
            assert (reward.shape, reward.get_data_dtype()) == (shape, np.float32)
            assert np.array_equal(reward.affine, given.affine)
        fused = voxels(tmp_path / "out" / "rewards" / f"{name}_reward_fused.nii.gz")
        uncertainty = voxels(tmp_path / "out" / "uncertainty" / f"{name}_uncertainty.nii.gz")
        assert np.allclose(uncertainty, 1.0 - fused, atol=1e-6)
        with np.load(tmp_path / "out" / "probabilities" / f"{name}.npz") as found:
            assert np.abs(found["probabilities"].sum(axis=0) - 1.0).max() < 1e-5


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_short_sequences_are_predicted(predict, tmp_path, tools, frames):
    path = tools.save(tmp_path / "in" / "x.nii.gz", tools.speckle(40, 36, frames))
    assert predict(path).failed == {}
    assert voxels(tmp_path / "out" / "x.nii.gz").shape == (40, 36, frames)
    assert len(report_of(tmp_path / "out", "x")["rewards"]["fused"]["frames"]) == frames


def test_a_centred_object_stays_centred_through_the_whole_prediction(predict, tmp_path, tools, monkeypatch):
    from medrl.plugins.rl4seg3d.predicting import model

    mask = tools.ellipse(101, 97, 4)
    path = tools.save(tmp_path / "in" / "x.nii.gz", mask, spacing=(0.30, 0.30, 1.0))
    monkeypatch.setattr(model, "read_weights", lambda *_a, **_k: _weights_of(Brightness()))
    assert predict(path).failed == {}
    found = voxels(tmp_path / "out" / "x.nii.gz")
    centres = [np.array([axis.mean() for axis in np.nonzero(m)]) for m in (found == 1, mask > 0)]
    assert np.abs(centres[0] - centres[1])[:2].max() <= 0.05
    assert 2 * ((found == 1) & (mask > 0)).sum() / ((found == 1).sum() + mask.sum()) > 0.98


def _weights_of(network):
    from medrl.plugins.rl4seg3d.foreign import Weights

    network.out_channels = 3
    return Weights(path=Path("stub"), digest="0", kind="bare", networks={"actor": network})


# -- segmenting --------------------------------------------------------------------------------------


def test_a_sequence_is_the_blend_of_its_windows():
    torch.manual_seed(0)
    network = UNet3d(base_filters=4).eval()
    images = torch.rand(64, 32, 9)
    found = torch.stack(
        [torch.from_numpy(p) for _, p in Segmenter(device=CPU).probabilities(network, images, tta=False)],
        dim=-1,
    )
    from medrl.plugins.rl4seg3d.windows import weight_map

    padded = torch.cat([images[..., 1:7].flip(-1), images, images[..., 2:8].flip(-1)], dim=-1)
    total, weight = torch.zeros(3, 64, 32, 21), torch.zeros(64, 32, 21)
    with torch.no_grad():
        for start in window_starts(21):
            part = slice(start, start + 4)
            total[..., part] += weight_map(64, 32) * network(padded[None, None, ..., part])[0]
            weight[..., part] += weight_map(64, 32)
    expected = (total / weight).softmax(dim=0)[..., 6:15]
    assert torch.allclose(found, expected, atol=1e-5)


def test_augmentation_calls_the_network_once_for_each_view_and_keeps_sums_at_one():
    images = torch.rand(128, 128, 4, generator=torch.Generator().manual_seed(0))
    plain, augmented = Brightness(), Brightness()
    list(Segmenter(device=CPU).probabilities(plain, images, tta=False))
    found = list(Segmenter(device=CPU, batch=4).probabilities(augmented, images, tta=True))
    assert augmented.calls == 25 * plain.calls
    assert len(views(128, 128)) == 25
    assert all(np.abs(p.sum(axis=0) - 1.0).max() < 1e-6 for _, p in found)
    assert [t for t, _ in found] == [0, 1, 2, 3]


def test_blobs_are_kept_by_frame_and_empty_frames_stay_empty():
    labels = np.zeros((8, 8, 3), dtype=np.uint8)
    labels[1:4, 1:4, 0], labels[6, 6, 0] = 1, 2
    labels[0, 0, 2] = 2
    before = labels.copy()
    kept = largest_blobs(labels)
    assert np.array_equal(labels, before)
    assert kept[..., 0].sum() == 9
    assert not kept[..., 1].any()
    assert kept[0, 0, 2] == 2


# -- runs --------------------------------------------------------------------------------------------


def test_blank_and_empty_sequences_finish_with_a_report(predict, tmp_path, tools, monkeypatch):
    from medrl.plugins.rl4seg3d.predicting import model

    monkeypatch.setattr(model, "read_weights", lambda *_a, **_k: _weights_of(Brightness(2.0)))
    tools.save(tmp_path / "in" / "blank.nii.gz", np.zeros((40, 36, 5), np.uint8))
    tools.save(tmp_path / "in" / "empty.nii.gz", tools.speckle(40, 36, 5))
    outcome = predict(tmp_path / "in", PredictConfig(equalise="on"), tta=True)
    assert outcome.failed == {}
    for name in ("blank", "empty"):
        assert not voxels(tmp_path / "out" / f"{name}.nii.gz").any()
        report = report_of(tmp_path / "out", name)
        assert report["empty_frames"] == [0, 1, 2, 3, 4]
        assert not report["valid"]
    assert "blank" in report_of(tmp_path / "out", "blank")["notes"][0]


def test_files_of_like_names_give_a_result_each_and_a_damaged_one_stops_nothing(predict, tmp_path, tools):
    pixels = tools.speckle(36, 40, 2).transpose(2, 1, 0)
    for name in ("a/1.2.3.dcm", "a/1.2.4.dcm"):
        tools.write_dicom(tmp_path / "in" / name, pixels, PixelSpacing=[0.37, 0.37])
    path = tools.save(tmp_path / "in" / "b" / "cut.nii.gz", tools.speckle(40, 36, 3))
    path.write_bytes(path.read_bytes()[:-100])
    outcome = predict(tmp_path / "in")
    assert sorted(outcome.done) == ["a/1.2.3", "a/1.2.4"]
    assert list(outcome.failed) == ["b/cut"]
    assert voxels(tmp_path / "out" / "a" / "1.2.3.nii.gz").shape == (36, 40, 2)
    assert voxels(tmp_path / "out" / "a" / "1.2.4.nii.gz").shape == (36, 40, 2)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["counts"] == {"done": 2, "failed": 1}
    assert "MUSTERMANN" not in (tmp_path / "out" / "report.json").read_text()


def test_results_are_replaced_only_when_asked_and_kept_where_they_are_finished(predict, tmp_path, tools):
    for name in ("x", "y"):
        tools.save(tmp_path / "in" / f"{name}.nii.gz", tools.speckle(40, 36, 2))
    predict(tmp_path / "in")
    first = (tmp_path / "out" / "x.nii.gz").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="2 results exist"):
        predict(tmp_path / "in")
    (tmp_path / "out" / "y.nii.gz").unlink()
    again = predict(tmp_path / "in", continue_=True)
    assert again.skipped == ("x",)
    assert sorted(again.done) == ["x", "y"]
    assert (tmp_path / "out" / "x.nii.gz").stat().st_mtime_ns == first
    over = predict(tmp_path / "in", PredictConfig(equalise="off", overwrite=True))
    assert over.skipped == ()
    other = predict(tmp_path / "in", PredictConfig(equalise="off", blend="uniform"), continue_=True)
    assert other.skipped == ()


def test_parts_share_the_work(predict, tmp_path, tools):
    for name in ("x", "y", "z"):
        tools.save(tmp_path / "in" / f"{name}.nii.gz", tools.speckle(40, 36, 1))
    assert predict(tmp_path / "in", part=(1, 2)).done == ("x", "z")
    assert predict(tmp_path / "in", part=(2, 2)).done == ("y",)
    assert (tmp_path / "out" / "report_part2of2.json").is_file()


def test_one_file_may_be_given_a_file_of_its_own_and_a_movie(predict, tmp_path, tools):
    path = tools.save(tmp_path / "in" / "x.nii.gz", tools.speckle(40, 36, 3), spacing=(0.37, 0.74, 1.0))
    config = PredictConfig(equalise="off", gif=True, rewards=False)
    outcome = predict(path, config, output=tmp_path / "there" / "seg.nii.gz")
    assert outcome.outputs == {"x": tmp_path / "there" / "seg.nii.gz"}
    assert not (tmp_path / "there" / "rewards").exists()
    from PIL import Image

    with Image.open(tmp_path / "there" / "previews" / "x.gif") as movie:
        assert (movie.n_frames, movie.size) == (3, (160, 288))


def test_the_report_says_what_was_found(predict, tmp_path, tools, monkeypatch):
    from medrl.plugins.rl4seg3d.predicting import model

    monkeypatch.setattr(model, "read_weights", lambda *_a, **_k: _weights_of(Brightness()))
    mask = tools.ellipse(64, 64, 6)
    path = tools.save(tmp_path / "in" / "x.nii.gz", mask[:, :, None], time_unit="sec", step=0.04)
    predict(path)
    report = report_of(tmp_path / "out", "x")
    assert report["frame_time_s"] == pytest.approx(0.04)
    assert report["anatomical"]["valid"] == [False] * 6
    assert len(report["cine"]["lv_area_mm2"]) == 6
    assert report["cine"]["lv_area_mm2"][2] == pytest.approx((mask[..., 0].sum()) * 0.37**2, rel=0.01)
    assert "ejection_fraction" in report["cine"]
    assert report["cine"]["limits"]
    assert set(report["seconds"]) == {"read", "prepare", "segment", "rewards", "optimise", "write"}


def test_what_a_model_cannot_give_is_refused_before_the_first_file(predict, tmp_path, tools, monkeypatch):
    from medrl.plugins.rl4seg3d.predicting import model

    monkeypatch.setattr(model, "read_weights", lambda *_a, **_k: _weights_of(Brightness()))
    path = tools.save(tmp_path / "in" / "x.nii.gz", tools.speckle(40, 36, 2))
    with pytest.raises(ConfigError, match="--save-uncertainty") as caught:
        predict(path, save_uncertainty=True)
    assert "--reward anatomical=FILE" in caught.value.do
    config = PredictConfig(equalise="off", tto=TTOConfig(mode="force"))
    predict(path, config)
    assert report_of(tmp_path / "out", "x")["tto"]["why"] == "the model has no reward nets"


def test_options_that_mean_nothing_here_are_said_to_do_nothing(predict, tmp_path, tools, monkeypatch, caplog):
    from medrl.plugins.rl4seg3d.predicting import model

    monkeypatch.setattr(model, "read_weights", lambda *_a, **_k: _weights_of(Brightness()))
    path = tools.save(tmp_path / "in" / "x.nii.gz", tools.speckle(40, 36, 2))
    predict(path, PredictConfig(equalise="off"), overlap=0.25, statistics=True)
    assert "--overlap does nothing" in caplog.text
    assert "--statistics adds nothing" in caplog.text
    caplog.clear()
    predict(path, PredictConfig(equalise="off", overwrite=True))
    assert "nothing" not in caplog.text


# -- TorchScript -------------------------------------------------------------------------------------


class Package(nn.Module):
    """The published contract; refuses images that it would have to crop."""

    def forward(self, x: Tensor, tta: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        if x.shape[2] % 32 != 0 or x.shape[3] % 32 != 0:
            raise RuntimeError("cropped")
        image = x[0, 0]
        stacked = torch.stack([image, 1.0 - image])
        return (image > 0.5).to(torch.int64), stacked.amin(dim=0), stacked


def test_a_package_gives_the_whole_width_and_named_rewards(predict, tmp_path, tools):
    torch.jit.script(Package()).save(str(tmp_path / "package.pt"))
    path = tools.save(tmp_path / "in" / "x.nii.gz", tools.ellipse(487, 60, 3))
    config = PredictConfig(trust=True)
    assert predict(path, config, checkpoints=[tmp_path / "package.pt"], save_uncertainty=True).failed == {}
    assert np.array_equal(voxels(tmp_path / "out" / "x.nii.gz") == 1, voxels(path) > 0)
    anatomical, landmark = (
        voxels(tmp_path / "out" / "rewards" / f"x_reward_{name}.nii.gz")
        for name in ("anatomical", "landmark")
    )
    assert anatomical.shape == (487, 60, 3)
    assert np.allclose(anatomical, 1.0 - landmark)
    assert not np.array_equal(anatomical, landmark)


def test_a_package_is_not_optimised_and_has_no_probabilities(predict, tmp_path, tools):
    torch.jit.script(Package()).save(str(tmp_path / "package.pt"))
    path = tools.save(tmp_path / "in" / "x.nii.gz", tools.ellipse(40, 40, 3))
    given = {"checkpoints": [tmp_path / "package.pt"]}
    for mode in ("auto", "force"):
        with pytest.raises(ConfigError, match=f"--tto {mode}"):
            predict(path, PredictConfig(trust=True, tto=TTOConfig(mode=mode)), **given)
    with pytest.raises(ConfigError, match="--save-probabilities"):
        predict(path, PredictConfig(trust=True), save_probabilities=True, **given)


# -- models trained here -----------------------------------------------------------------------------


def test_a_checkpoint_of_medrl_predicts_with_its_own_plan_and_reward_nets(predict, tmp_path, tools, manager):
    from medrl.core.checkpoint import write_checkpoint
    from medrl.plugins.rl4seg3d import parts
    from medrl.plugins.rl4seg3d.config import Rl4seg3dConfig
    from medrl.plugins.rl4seg3d.data.plan import make_plan

    small = {"name": "rl4seg3d.unet3d_small", "channels": [4, 8]}
    cfg = Rl4seg3dConfig.model_validate(
        {
            "medrl": 1,
            "method": "rl4seg3d",
            "model": small,
            "reward_model": small,
            "sample": {"spacing_mm": [0.5, 0.5], "equalise": "off", "multiple": 8},
        }
    )
    plan = make_plan(cfg.sample, {"background": 0, "LV": 1, "MYO": 2})
    actor = parts.actor_network(cfg, manager, channels=1, classes=3)
    net = parts.reward_net(cfg, manager, "anatomical", channels=1, classes=3)
    meta = {"method": "rl4seg3d", "config": cfg.model_dump(mode="json"), "plan": plan.to_meta()}
    states = {"actor": actor.state_dict(), "reward_anatomical": net.state_dict()}
    path = tmp_path / "best.pt"
    write_checkpoint(path, states, {**meta, "rewards_ready": ["anatomical"]})
    image = tools.save(tmp_path / "in" / "x.nii.gz", tools.speckle(40, 36, 3), spacing=(0.5, 0.5, 1.0))
    outcome = predict(image, PredictConfig(), checkpoints=[path], save_uncertainty=True)
    assert outcome.failed == {}
    report = report_of(tmp_path / "out", "x")
    assert report["network_grid"] == {"shape": [40, 40, 3], "spacing_mm": [0.5, 0.5], "equalised": False}
    assert sorted(report["rewards"]) == ["anatomical", "fused"]
    assert report["notes"] == []
    write_checkpoint(path, states, {**meta, "rewards_ready": [], "spacing": [0.9, 0.5]})
    predict(image, PredictConfig(overwrite=True), checkpoints=[path])
    assert report_of(tmp_path / "out", "x")["notes"] == [
        "the network sees pixels of 0.5,0.5 mm and was trained on 0.9,0.5 mm; --spacing 0.9,0.5 resamples"
    ]
    gone = {**meta, "config": {**meta["config"], "rules": "such_as_there_are_none"}}
    write_checkpoint(path, states, {**gone, "rewards_ready": []})
    with pytest.raises(ConfigError, match="such_as_there_are_none"):
        predict(image, PredictConfig(overwrite=True), checkpoints=[path])
    assert predict(image, PredictConfig(overwrite=True, rules="echo"), checkpoints=[path]).failed == {}
    write_checkpoint(path, states, {**meta, "rewards_ready": [], "stages_done": 0})
    with pytest.raises(CheckpointError, match="has learned nothing"):
        predict(image, PredictConfig(overwrite=True), checkpoints=[path])
