"""Starting from nnU-Net: 344 keys to 128 tensors, class counts, misfits, rebuilt networks, hostile files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medrl.core.errors import CheckpointError, ConfigError
from medrl.plugins.graft.init_from import (
    apply_weights,
    clean_weights,
    configuration_of,
    init_student,
    network_of,
    read_nnunet,
)
from medrl.plugins.graft.models import FullResUNet, PlainConvUNet, TinyUNet, UNet3D

SMALL = (2, 3, 4, 5, 6, 6, 6)


def nnunet_keys(network: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """The state of a network under all names that nnU-Net gives it, aliases included."""
    found = {}
    for name, tensor in network.state_dict().items():
        found[name] = tensor
        alias = name.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
        if alias != name:
            found[alias] = tensor
    for name in list(found):
        if name.startswith("encoder."):
            found[f"decoder.{name}"] = found[name]
    return {prefix + name: tensor for name, tensor in found.items()}


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return FullResUNet(features=SMALL, out_channels=3)


def test_344_keys_hold_128_tensors(teacher):
    keys = nnunet_keys(teacher)
    assert len(keys) == 344
    assert len(clean_weights(keys)) == 128
    assert set(clean_weights(keys)) == set(teacher.state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_everything_is_copied_from_a_checkpoint_of_equal_shape(teacher, prefix, tmp_path):
    path = tmp_path / "checkpoint_best.pth"
    torch.save({"network_weights": nnunet_keys(teacher, prefix), "current_epoch": 3}, path)
    student = FullResUNet(features=SMALL, out_channels=3)
    report = init_student(student, path, scope="all")
    assert len(report.copied) == 128
    assert not report.skipped
    assert not report.unused
    image = torch.randn(1, 3, 8, 64, 64)
    assert torch.equal(student(image).main, teacher(image).main)


def test_the_encoder_alone_is_56_tensors(teacher):
    student = FullResUNet(features=SMALL)
    before = student.decoder.transpconvs[0].weight.detach().clone()
    report = apply_weights(student, nnunet_keys(teacher))
    assert len(report.copied) == 56
    assert all(name.startswith("encoder.") for name in report.copied)
    assert torch.equal(student.decoder.transpconvs[0].weight, before)
    assert "outside the scope" in report.summary


def test_three_regions_start_two_only_where_their_rows_mean_the_same(teacher):
    heads = [name for name in teacher.state_dict() if name.startswith("decoder.seg_layers.")]
    student = FullResUNet(features=SMALL)
    report = apply_weights(student, teacher.state_dict(), scope="all", regions=True)
    assert len(report.copied) == 128
    assert torch.equal(student.decoder.seg_layers[5].weight, teacher.decoder.seg_layers[5].weight[:2])
    other = FullResUNet(features=SMALL)
    report = apply_weights(other, teacher.state_dict(), scope="all")
    assert set(report.skipped) == set(heads)
    assert set(report.skipped.values()) == {"another number of classes"}


def test_another_number_of_input_channels_still_fits_and_is_reported(teacher):
    student = FullResUNet(features=SMALL, in_channels=1)
    report = apply_weights(student, teacher.state_dict())
    assert report.skipped["encoder.stages.0.0.convs.0.conv.weight"] == "another shape"
    assert len(report.copied) == 55


def test_a_checkpoint_of_another_network_is_refused_and_changes_nothing(teacher):
    student = TinyUNet()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"0 of 32 encoder tensors|of 32 encoder tensors fit"):
        apply_weights(student, teacher.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_only_plain_u_nets_can_start_from_nnunet(teacher):
    with pytest.raises(ConfigError, match="UNet3D"):
        apply_weights(UNet3D(features=(2, 2, 2, 2, 2)), teacher.state_dict())
    with pytest.raises(ConfigError, match="encoder"):
        apply_weights(FullResUNet(features=SMALL), teacher.state_dict(), scope="encodr")


def test_the_network_is_rebuilt_from_its_weights_alone():
    torch.manual_seed(0)
    odd = PlainConvUNet(
        in_channels=2,
        out_channels=4,
        features=[3, 5, 7],
        kernels=[(1, 3, 3), (3, 3, 3), (3, 1, 3)],
        strides=[(1, 1, 1), (1, 2, 2), (2, 2, 1)],
        convs=[2, 3, 1],
        convs_decoder=[2, 1],
    )
    weights = clean_weights(nnunet_keys(odd))
    rebuilt = network_of(weights, deep_supervision=True)
    rebuilt.load_state_dict(weights)
    image = torch.randn(1, 2, 4, 8, 8)
    assert rebuilt.divisor == odd.divisor == (2, 4, 2)
    assert torch.equal(rebuilt(image).main, odd(image).main)


def test_other_architectures_are_refused_by_name(teacher):
    residual = {name.replace("convs.0", "blocks.0"): t for name, t in teacher.state_dict().items()}
    with pytest.raises(CheckpointError, match="residual"):
        network_of(residual)
    flat = {name: t[:, :, 0] if t.dim() == 5 else t for name, t in teacher.state_dict().items()}
    with pytest.raises(CheckpointError, match="2D"):
        network_of(flat)
    extra = {**teacher.state_dict(), "decoder.attention.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="attention"):
        network_of(extra)


def test_plans_fold_and_mirroring_of_a_teacher_are_read(teacher, tmp_path):
    plans = {
        "configurations": {
            "3d_fullres": {"patch_size": [20, 256, 256], "spacing": [3.0, 0.5, 0.5]},
            "wide": {"inherits_from": "3d_fullres", "patch_size": [20, 320, 320]},
        }
    }
    path = tmp_path / "checkpoint_best.pth"
    init = {"plans": plans, "configuration": "wide", "fold": 2, "dataset_json": {"labels": {"background": 0}}}
    content = {
        "network_weights": nnunet_keys(teacher),
        "init_args": init,
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(content, path)
    read = read_nnunet(path)
    assert (read.configuration, read.fold, read.mirroring) == ("wide", "2", (0, 1, 2))
    assert read.settings["patch_size"] == [20, 320, 320]
    assert read.settings["spacing"] == [3.0, 0.5, 0.5]
    assert read.dataset == {"labels": {"background": 0}}
    image = torch.randn(1, 3, 8, 64, 64)
    assert torch.equal(read.network()(image).main, teacher(image).main)
    with pytest.raises(CheckpointError, match="itself"):
        configuration_of({"configurations": {"a": {"inherits_from": "a"}}}, "a")
    with pytest.raises(CheckpointError, match="3d_fullres"):
        configuration_of(plans, "3d_fulres")


def test_pickled_numbers_need_trust_and_then_give_the_same_weights(teacher, tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": nnunet_keys(teacher), "_best_ema": np.float64(0.9)}, path)
    with pytest.raises(CheckpointError, match="weights"):
        read_nnunet(path)
    read = read_nnunet(path, trust=True)
    assert all(torch.equal(read.weights[name], t) for name, t in teacher.state_dict().items())


class Canary:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize("trust", [False, True])
def test_nothing_of_a_hostile_checkpoint_is_executed(teacher, tmp_path, trust):
    path = tmp_path / "checkpoint_best.pth"
    torch.save({"network_weights": nnunet_keys(teacher), "init_args": {"plans": Canary()}}, path)
    if not trust:
        with pytest.raises(CheckpointError):
            read_nnunet(path)
        return
    assert len(read_nnunet(path, trust=True).weights) == 128


def test_a_file_without_weights_says_what_it_holds(tmp_path):
    path = tmp_path / "empty.pth"
    torch.save({"epoch": 1}, path)
    with pytest.raises(CheckpointError, match="epoch"):
        read_nnunet(path)
