"""Checkpoints: what is stored, kept, restored and loaded."""

import os
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medrl.core.checkpoint import (
    CheckpointStore,
    config_difference,
    find_checkpoint,
    load_checkpoint,
    load_foreign,
    load_into,
    read_meta,
    write_checkpoint,
)
from medrl.core.checkpoint.state import pack, size_of, unpack
from medrl.core.errors import CheckpointError, RuntimeFault

FACTS = {
    "method": "toy",
    "api": 1,
    "distribution": "",
    "plugin_version": "",
    "config": {"train": {"lr": 0.1}},
}


def store_at(folder, **options):
    folder.mkdir(exist_ok=True)
    return CheckpointStore(folder, options.pop("facts", FACTS), **options)


def with_net(folder, **options):
    torch.manual_seed(0)
    store, net = store_at(folder, **options), nn.Linear(2, 1)
    store.register(net=net)
    return store, net


# -- states -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float64).reshape(2, 3),
        np.array([1, 2], dtype=np.uint16),
        np.array([True, False]),
        np.array(3.5, dtype=np.float32),
        np.zeros((0, 3), dtype=np.int32),
        np.arange(6).reshape(2, 3).T,
        np.array([1.0, 2.0], dtype=">f4"),
        np.array([2**62], dtype=np.uint64),
        np.array([255], dtype=np.uint8),
    ],
)
def test_numpy_arrays_come_back_with_type_shape_and_values(tmp_path, array):
    write_checkpoint(tmp_path / "a.pt", {"x": array}, FACTS)
    found = load_checkpoint(tmp_path / "a.pt").states["x"]
    assert (found.dtype.kind, found.itemsize, found.shape) == (array.dtype.kind, array.itemsize, array.shape)
    np.testing.assert_array_equal(found, array)


def test_plain_values_come_back_equal(tmp_path):
    value = {"a": [1, 2.5, None, True, "text", b"bytes"], "b": (1, (2, 3)), 3: {"deep": -1}, "big": 2**200}
    write_checkpoint(tmp_path / "a.pt", {"x": value}, FACTS)
    assert load_checkpoint(tmp_path / "a.pt").states["x"] == value


def test_numpy_scalars_and_paths_become_plain():
    packed = pack({"a": np.float32(0.5), "b": np.int64(3), "c": Path("x/y"), np.int64(4): np.bool_(True)})
    assert packed == {"a": 0.5, "b": 3, "c": "x/y", 4: True}
    assert {type(item) for item in packed.values()} == {float, int, str, bool}


@pytest.mark.parametrize(
    "value", [object(), lambda: 0, {1, 2}, np.array(["a"]), np.array([2**63], dtype=np.uint64)]
)
def test_what_cannot_be_stored_is_named(value):
    with pytest.raises(CheckpointError, match=r"state\.deep\[1\] cannot be stored"):
        pack({"deep": [0, value]})


def test_a_view_is_stored_without_the_rest_of_its_storage(tmp_path):
    whole = torch.zeros(1_000_000)
    found = write_checkpoint(tmp_path / "a.pt", {"x": whole[:10]}, FACTS)
    assert found.size < 20_000


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    tensor = torch.ones(100_000)
    written = write_checkpoint(tmp_path / "a.pt", {"x": tensor, "y": tensor}, FACTS)
    found = load_checkpoint(tmp_path / "a.pt").states
    assert written.size < 600_000
    assert found["x"].data_ptr() == found["y"].data_ptr()


def test_layer_versions_of_a_module_survive(tmp_path):
    net = nn.BatchNorm1d(2)
    write_checkpoint(tmp_path / "a.pt", {"x": net.state_dict()}, FACTS)
    assert load_checkpoint(tmp_path / "a.pt").states["x"]._metadata[""]["version"] == 2


def test_the_size_estimate_is_never_too_small(tmp_path):
    net = nn.Sequential(*[nn.Linear(17, 31) for _ in range(30)])
    optimizer = torch.optim.Adam(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    written = write_checkpoint(tmp_path / "a.pt", states, FACTS)
    estimate = size_of(pack(states)) + 4096
    assert written.size <= estimate < 3 * written.size


def test_unpacking_leaves_ordinary_dicts_alone():
    assert unpack({"data": 1, "shape": [2]}) == {"data": 1, "shape": [2]}


# -- one file -----------------------------------------------------------------------------------------


def test_meta_is_read_without_unpickling(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "a.pt", {"x": torch.ones(2)}, {**FACTS, "step": 7, "label_names": {"ü": 1}})

    def refuse(*_args, **_options):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    meta = read_meta(tmp_path / "a.pt")
    assert (meta["step"], meta["label_names"], meta["schema"], meta["method"]) == (7, {"ü": 1}, 1, "toy")


def test_torch_itself_can_open_the_file(tmp_path):
    write_checkpoint(tmp_path / "a.pt", {"x": torch.arange(3)}, FACTS)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["states"]["x"].tolist() == [0, 1, 2]


def test_the_digest_is_that_of_the_bytes(tmp_path):
    import hashlib

    written = write_checkpoint(tmp_path / "a.pt", {"x": torch.arange(3)}, FACTS)
    content = (tmp_path / "a.pt").read_bytes()
    assert hashlib.sha256(content[:-32]).digest() == content[-32:]
    assert load_checkpoint(tmp_path / "a.pt").digest == written.digest == content[-32:].hex()
    assert written.size == len(content)


def test_nothing_but_the_checkpoint_is_left_in_the_folder(tmp_path):
    write_checkpoint(tmp_path / "a.pt", {"x": torch.arange(3)}, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_the_best_checkpoint_is_found_else_the_last_else_the_newest(tmp_path):
    store, _ = with_net(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_checkpoint(tmp_path)
    store.save(1)
    assert find_checkpoint(tmp_path).name == "last.pt"
    store.save(2, kind="best", metric=0.5)
    assert find_checkpoint(tmp_path).name == "best.pt"
    assert find_checkpoint(tmp_path / "checkpoints", "last").name == "last.pt"
    assert find_checkpoint(tmp_path, "step_000001").name == "step_000001.pt"
    assert find_checkpoint(tmp_path / "checkpoints" / "best.pt").name == "best.pt"
    for name in ("best.pt", "last.pt"):
        (tmp_path / "checkpoints" / name).unlink()
    assert find_checkpoint(tmp_path).name == "step_000001.pt"
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")


# -- the store ----------------------------------------------------------------------------------------


def test_registered_objects_come_back(tmp_path):
    def objects():
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        return {
            "net": net,
            "optimizer": optimizer,
            "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
            "numpy_rng": np.random.default_rng(1),
            "torch_rng": torch.Generator().manual_seed(1),
            "python_rng": random.Random(1),
        }

    def draws(found):
        return (
            found["numpy_rng"].random(2).tolist(),
            torch.rand(2, generator=found["torch_rng"]).tolist(),
            found["python_rng"].random(),
        )

    first = objects()
    first["net"](torch.randn(4, 2)).sum().backward()
    first["optimizer"].step()
    first["scheduler"].step()
    draws(first)
    store = store_at(tmp_path / "c")
    store.register(**first)
    store.save(5)
    expected = draws(first)

    second = objects()
    store = store_at(tmp_path / "c")
    store.register(**second)
    assert store.resume() == 5
    assert draws(second) == expected
    assert second["scheduler"].last_epoch == 1
    for name, tensor in first["net"].state_dict().items():
        assert torch.equal(tensor, second["net"].state_dict()[name])
    a, b = first["optimizer"].state_dict(), second["optimizer"].state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert torch.equal(a["state"][0]["exp_avg"], b["state"][0]["exp_avg"])


def test_the_newest_states_are_kept_and_last_is_the_newest(tmp_path):
    store, _ = with_net(tmp_path / "c", keep=2)
    for step in (1, 2, 3, 4):
        store.save(step)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["last.pt", "step_000003.pt", "step_000004.pt"]
    assert (tmp_path / "c" / "last.pt").samefile(tmp_path / "c" / "step_000004.pt")


def test_fewer_than_two_states_are_never_kept(tmp_path):
    store, _ = with_net(tmp_path / "c", keep=0)
    for step in (1, 2, 3):
        store.save(step)
    assert len(list((tmp_path / "c").glob("step_*.pt"))) == 2


def test_permanent_steps_stay_also_after_a_resume(tmp_path):
    store, _ = with_net(tmp_path / "c")
    store.save(1, kind="step")
    store.save(2)
    store, _ = with_net(tmp_path / "c")
    store.resume()
    for step in (3, 4, 5):
        store.save(step)
    names = sorted(path.name for path in (tmp_path / "c").glob("step_*"))
    assert names == ["step_000001.pt", "step_000004.pt", "step_000005.pt"]


def test_without_links_the_last_checkpoint_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_args):
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "link", refuse)
    store, _ = with_net(tmp_path / "c")
    path = store.save(1)
    last = tmp_path / "c" / "last.pt"
    assert not last.samefile(path)
    assert last.read_bytes() == path.read_bytes()


def test_left_over_temporary_files_are_removed(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".step_000003.pt.123.tmp").write_bytes(b"half")
    with_net(tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_a_run_without_checkpoints_begins_at_zero(tmp_path):
    store, _ = with_net(tmp_path / "c")
    assert store.resume() == 0


def test_registration_problems_are_named(tmp_path):
    store, net = with_net(tmp_path / "c")
    with pytest.raises(RuntimeFault, match="two objects are registered in the checkpoint as 'net'"):
        store.register(net=nn.Linear(1, 1))
    with pytest.raises(RuntimeFault, match="dict has no state_dict"):
        store.register(table={})
    store.register(net=net)
    store.resume()
    with pytest.raises(RuntimeFault, match="'late' was registered after the run was resumed"):
        store.register(late=nn.Linear(1, 1))


def test_the_difference_of_configs_leaves_out_the_machine_and_a_longer_run():
    before = {"train": {"lr": 0.1, "device": "cpu", "max_steps": 5}, "old": 1, "same": [1, (2, 3)]}
    after = {
        "train": {"lr": 0.2, "device": "cuda", "max_steps": 9},
        "new": {"deep": True},
        "same": (1, [2, 3]),
    }
    assert config_difference(before, after, {"train.device"}) == [
        "new.deep: absent → True",
        "old: 1 → absent",
        "train.lr: 0.1 → 0.2",
    ]
    assert config_difference({"train": {"max_steps": 9}}, {"train": {"max_steps": 5}}) == [
        "train.max_steps: 9 → 5"
    ]


# -- weights of others --------------------------------------------------------------------------------


def test_weights_fit_or_the_first_differences_are_listed():
    net = nn.Linear(2, 3)
    load_into(net, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    assert net.weight.sum().item() == 6
    before = net.weight.clone()
    with pytest.raises(CheckpointError) as caught:
        load_into(net, {"weight": torch.zeros(4, 2), "extra": torch.zeros(1)})
    text = str(caught.value)
    assert "weight: (4, 2) in the checkpoint, (3, 2) in the model" in text
    assert "1 missing (bias)" in text
    assert "1 unknown (extra)" in text
    assert torch.equal(net.weight, before), "nothing is copied unless everything fits"


def test_long_lists_of_differences_are_shortened():
    state = {f"layer{index}.weight": torch.zeros(1) for index in range(12)}
    with pytest.raises(CheckpointError, match="and 7 more"):
        load_into(nn.Linear(2, 3), state)


def test_without_strictness_missing_and_unknown_names_are_returned():
    net = nn.Linear(2, 3)
    assert load_into(net, {"weight": torch.ones(3, 2), "extra": torch.ones(1)}, strict=False) == [
        "bias",
        "extra",
    ]
    assert net.weight.sum().item() == 6


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("trust", [True, False])
def test_foreign_weights_load_in_both_formats(tmp_path, new_format, trust):
    state = OrderedDict(weight=torch.arange(4.0).reshape(2, 2), bias=torch.ones(2, dtype=torch.bfloat16))
    content = {"network_weights": state, "epoch": 3, "shape": torch.Size([1, 2]), "dtype": torch.float16}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    found = load_foreign(tmp_path / "a.pth", trust=trust)
    assert found["network_weights"]["weight"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert found["network_weights"]["bias"].dtype is torch.bfloat16
    assert (found["epoch"], found["shape"], found["dtype"]) == (3, torch.Size([1, 2]), torch.float16)


class Logger:
    """Stands for an object of a training program that is not installed here."""

    def __init__(self):
        self.history = {"loss": [1.0]}


@pytest.mark.parametrize("new_format", [True, False])
def test_trusted_files_give_their_tensors_and_lose_their_objects(tmp_path, new_format):
    content = {
        "weights": {"w": torch.ones(2)},
        "logger": Logger(),
        "best": np.float64(0.5),
        "list": [1, Logger()],
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match="cannot be loaded as weights") as caught:
        load_foreign(tmp_path / "a.pth")
    assert "--trust-checkpoint" in caught.value.do
    found = load_foreign(tmp_path / "a.pth", trust=True)
    assert found["weights"]["w"].tolist() == [1.0, 1.0]
    assert "logger" not in found
    assert found["list"] == [1, None]


def test_a_pickled_module_gives_its_state(tmp_path):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save({"model": net}, tmp_path / "a.pth")
    found = load_foreign(tmp_path / "a.pth", trust=True)["model"]
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


def test_files_that_hold_no_weights_are_errors(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # what marks an archive of TorchScript
        archive.writestr("script/constants.pkl", b"")
    for trust in (True, False):
        with pytest.raises(CheckpointError, match="cannot be loaded as weights"):
            load_foreign(tmp_path / "text.pth", trust=trust)
        with pytest.raises(CheckpointError, match="a dict is expected, found Tensor"):
            load_foreign(tmp_path / "tensor.pth", trust=trust)
        with pytest.raises(CheckpointError, match="is a TorchScript archive"):
            load_foreign(tmp_path / "script.pt", trust=trust)
        with pytest.raises(CheckpointError, match="does not exist"):
            load_foreign(tmp_path / "none.pt", trust=trust)
