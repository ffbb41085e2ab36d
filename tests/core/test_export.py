"""Exported networks: each format says what the network says, by its own loader, and damage is found."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from medrl.core.errors import CheckpointError, ConfigError
from medrl.core.export import FORMATS, Network, format_of, phantom, verify
from medrl.core.export.exporting import _facts, _write, choose
from medrl.core.export.verifying import record

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'medrl[export]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'medrl[export]'")


class Small(nn.Module):
    """Convolution, normalisation and a sum, in two or three dimensions."""

    def __init__(self, dims=2, channels=2, classes=3):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        norm = nn.BatchNorm2d if dims == 2 else nn.InstanceNorm3d
        self.body = nn.Sequential(conv(channels, 4, 3, padding=1), norm(4), nn.LeakyReLU())
        self.head = conv(4, classes, 1)

    def forward(self, image):
        return self.head(self.body(image))


class TwoAnswers(nn.Module):
    """A policy: features of columns and of the whole, to logits and a value."""

    def __init__(self):
        super().__init__()
        self.logits, self.value = nn.Conv1d(3, 1, 1), nn.Linear(2, 1)

    def forward(self, columns, pooled):
        return self.logits(columns)[:, 0], self.value(pooled)[:, 0]


def network(dims=2, **changes):
    torch.manual_seed(dims)
    size = (8, 12) if dims == 2 else (4, 8, 8)
    values = {
        "module": Small(dims).eval(),
        "inputs": {"image": (2, *size)},
        "label_names": {"background": 0, "LV": 1, "MYO": 2},
        "windows": dims == 3,
    }
    return Network(**{**values, **changes})


def policy():
    torch.manual_seed(9)
    inputs = {"columns": (3, 7), "pooled": (2,)}
    return Network(module=TwoAnswers().eval(), inputs=inputs, outputs=("logits", "value"))


GIVEN = SimpleNamespace(meta={"method": "test", "step": 3}, digest="ab" * 32)


def write(made, name, folder):
    kind = FORMATS[name]
    path = folder / f"net{kind.suffix}"
    return path, _write(kind, made, path, _facts(GIVEN, "net", made, kind))


@pytest.mark.parametrize("made", [network(2), network(3), policy()], ids=["plane", "volume", "policy"])
@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_file_says_what_the_network_says(name, made, tmp_path):
    path, verdict = write(made, name, tmp_path)
    assert verdict.ok
    assert verdict.against == "checkpoint"
    assert verdict.numbers == sum(value.numel() for value in made.answers(made.phantoms(2)).values())
    assert max(verdict.deviations.values()) <= 1e-5
    assert format_of(path).name == name
    assert verify(path, made).ok
    alone = verify(path)
    assert alone.ok
    assert alone.against == ("weights" if name == "safetensors" else "record")
    assert alone.facts["inputs"] == {key: list(shape) for key, shape in made.inputs.items()}
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_other_weights_differs(name, tmp_path):
    made = network(2)
    path, _ = write(made, name, tmp_path)
    with torch.no_grad():
        made.module.head.bias[1] += 1e-2
    found = verify(path, made)
    assert not found.ok
    assert "192 of 576 numbers differ" in found.problems[0]
    assert found.deviations["logits"] == pytest.approx(1e-2, rel=1e-3)


def test_what_a_file_keeps_finds_changed_weights_without_the_checkpoint(tmp_path):
    import onnx
    from onnx import numpy_helper

    path, _ = write(network(2), "onnx", tmp_path)
    model = onnx.load(path)
    for item in model.graph.initializer:
        values = numpy_helper.to_array(item)
        if values.dtype == np.float32 and values.size > 4:
            item.CopyFrom(numpy_helper.from_array(values * np.float32(1.01), item.name))
    onnx.save(model, path)
    found = verify(path)
    assert not found.ok
    assert "numbers differ by more than the tolerance" in found.problems[0]


def test_safetensors_are_read_by_their_own_library_with_the_names_of_the_network(tmp_path):
    from safetensors.torch import load_file

    made = network(2, weights=None)
    path, _ = write(made, "safetensors", tmp_path)
    found = load_file(path)
    assert found.keys() == made.module.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in made.module.state_dict().items())


def test_an_onnx_file_takes_any_batch_and_tells_no_paths(tmp_path):
    import onnxruntime

    made = network(2)
    path, _ = write(made, "onnx", tmp_path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for samples in (1, 5):
        images = phantom((samples, 2, 8, 12), seed=4)
        (found,) = session.run(None, {"image": images.numpy()})
        assert np.abs(found - made.answers([images])["logits"].numpy()).max() < 1e-5
    assert session.get_inputs()[0].name == "image"
    assert b".py" not in path.read_bytes()


def test_a_bundle_passes_the_check_of_monai_and_needs_no_medrl(tmp_path):
    from monai.bundle import ConfigParser, verify_net_in_out

    made = network(3)
    path, _ = write(made, "monai-bundle", tmp_path)
    config, meta = path / "configs" / "inference.json", path / "configs" / "metadata.json"
    assert "medrl." not in config.read_text()
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(meta),
        config_file=str(config),
        device="cpu",
        bundle_root=str(path),
    )
    parser = ConfigParser()
    parser.read_config(str(config))
    parser["bundle_root"], parser["device"] = str(path), "$torch.device('cpu')"
    inferer, net = parser.get_parsed_content("inferer"), parser.get_parsed_content("network")
    window = phantom((1, 2, 4, 8, 8))
    with torch.no_grad():
        assert torch.allclose(inferer(window, net), made.answers([window])["logits"], atol=1e-5)
    assert json.loads(meta.read_text())["network_data_format"]["outputs"]["pred"]["channel_def"] == {
        "0": "background",
        "1": "LV",
        "2": "MYO",
    }


@pytest.mark.parametrize("name", FORMATS)
def test_damage_and_foreign_files_are_named(name, tmp_path):
    path, _ = write(network(2), name, tmp_path)
    file = path / "models" / "model.ts" if path.is_dir() else path
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="it cannot be read"):
        verify(path)


def test_a_flipped_bit_in_weights_is_found(tmp_path):
    path, _ = write(network(2), "safetensors", tmp_path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not those that were written"):
        verify(path)


def test_files_of_other_programs_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="medrl did not export it"):
        verify(tmp_path / "other.safetensors")
    script = torch.jit.script(nn.Identity())
    script.save(str(tmp_path / "other.ts"))
    with pytest.raises(CheckpointError, match="medrl did not export it"):
        verify(tmp_path / "other.ts")
    with pytest.raises(CheckpointError, match="no file of a known format"):
        verify(tmp_path)
    with pytest.raises(CheckpointError, match="it does not exist"):
        verify(tmp_path / "absent.bin")


def test_a_network_that_says_something_else_once_exported_leaves_no_file(tmp_path):
    class Moody(nn.Module):
        """Answers differently when it is traced."""

        def forward(self, image):
            return image * (2.0 if torch.jit.is_tracing() else 1.0)

    from medrl.core.errors import RuntimeFault

    made = network(2, module=Moody(), label_names={})
    with pytest.raises(RuntimeFault, match="numbers differ"):
        write(made, "torchscript", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    path, _ = write(network(2), "torchscript", tmp_path)
    other = network(2, inputs={"image": (2, 8, 8)})
    with pytest.raises(CheckpointError, match="name the checkpoint|it takes"):
        verify(path, other)


def test_phantoms_are_the_same_everywhere_and_fill_their_range():
    first = phantom((2, 1, 16, 16), seed=1, value_range=(-2.0, 4.0))
    assert torch.equal(first, phantom((2, 1, 16, 16), seed=1, value_range=(-2.0, 4.0)))
    assert not torch.equal(first[0], first[1])
    assert -2.0 <= float(first.min()) < -1.0
    assert 2.0 < float(first.max()) <= 4.0
    assert phantom((3, 5)).shape == (3, 5)


def test_a_record_about_other_phantoms_is_not_compared(tmp_path, monkeypatch):
    from medrl.core.export import verifying

    path, _ = write(network(2), "torchscript", tmp_path)
    monkeypatch.setattr(verifying, "PHANTOM", 2)
    with pytest.raises(CheckpointError, match="about phantoms of version 1"):
        verify(path)
    assert verify(path, network(2)).ok


def test_an_unknown_network_gives_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'student'"):
        choose({"student": network(2)}, "studnet")


def test_the_record_of_a_large_output_is_small():
    made = network(2)
    values = record(made)["outputs"]["logits"]["values"]
    assert len(values) == 64


def test_torchscript_keeps_its_facts_inside(tmp_path):
    path, _ = write(network(2), "torchscript", tmp_path)
    copy = shutil.copy(path, tmp_path / "elsewhere.ts")
    assert str(Path(__file__).parent).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()
    with zipfile.ZipFile(copy) as archive:
        (name,) = [item for item in archive.namelist() if item.endswith("medrl.json")]
        assert json.loads(archive.read(name))["method"] == "test"
