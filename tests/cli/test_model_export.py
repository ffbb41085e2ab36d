"""``medrl model export`` and ``medrl model verify`` of what it wrote."""

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def run(toy):
    from medrl.core.checkpoint import write_checkpoint

    folder = toy / "run" / "checkpoints"
    folder.mkdir(parents=True)
    states = {"student": {"weight": torch.tensor([[2.0, -1.0]]), "bias": torch.tensor([0.5])}}
    write_checkpoint(folder / "last.pt", states, {"method": "toy", "step": 7})
    return toy / "run"


@pytest.mark.parametrize(
    ("format", "name"), [("torchscript", "line.ts"), ("safetensors", "line.safetensors")]
)
def test_a_network_is_written_into_the_run_and_verified(medrl, run, format, name):
    answer = medrl("model", "export", "run", "--format", format)
    assert answer.code == 0, answer.err
    assert "line of toy, step 7" in answer.err
    assert "equals the checkpoint in 2 numbers" in answer.err
    assert f"written: run/export/{name}" in answer.err
    assert medrl("model", "verify", f"run/export/{name}").code == 0
    facts = json.loads(medrl("model", "verify", f"run/export/{name}", "--model", "run", "--json").out)
    assert [(item["ok"], item["compared"], item["numbers"]) for item in facts] == [(True, "checkpoint", 2)]


def test_an_export_is_not_replaced_unasked(medrl, run):
    call = ("model", "export", "run", "--format", "torchscript", "-o", "out.ts")
    assert medrl(*call).code == 0
    again = medrl(*call)
    assert (again.code, "it exists" in again.err, "--overwrite" in again.err) == (2, True, True)
    assert medrl(*call, "--overwrite").code == 0


def test_an_export_of_other_weights_differs_and_is_exit_code_4(medrl, run):
    from medrl.core.checkpoint import write_checkpoint

    assert medrl("model", "export", "run", "--format", "torchscript", "-o", "out.ts").code == 0
    states = {"student": {"weight": torch.tensor([[2.0, -1.0]]), "bias": torch.tensor([0.6])}}
    write_checkpoint(run / "checkpoints" / "last.pt", states, {"method": "toy", "step": 8})
    answer = medrl("model", "verify", "out.ts", "--model", "run")
    assert (answer.code, "differs" in answer.err, "by up to 0.1" in answer.err) == (4, True, True)


def test_a_run_is_verified_with_what_was_exported_of_it(medrl, run):
    assert medrl("model", "export", "run", "--format", "torchscript").code == 0
    found = json.loads(medrl("model", "verify", "run", "--json").out)
    assert [Path(item["file"]).name for item in found] == ["last.pt", "line.ts"]
    found = json.loads(medrl("model", "verify", "run/export", "--json").out)
    assert [Path(item["file"]).name for item in found] == ["line.ts"]


def test_mistakes_are_one_line(medrl, run, toy):
    answer = medrl("model", "export", "run", "--format", "onxn")
    assert (answer.code, "Traceback" in answer.err) == (2, False)
    answer = medrl("model", "export", "run", "--format", "torchscript", "--network", "lime")
    assert (answer.code, "did you mean 'line'?" in answer.err) == (2, True)
    answer = medrl("model", "export", "run", "--format", "torchscript", "-o", "out.onnx")
    assert (answer.code, "a torchscript file ends with .ts" in answer.err) == (2, True)
    answer = medrl("model", "export", "nowhere", "--format", "torchscript")
    assert answer.code == 4
    (toy / "text.onnx").write_text("no network")
    answer = medrl("model", "verify", "text.onnx")
    assert (answer.code, "it cannot be read" in answer.err) == (4, True)


def test_a_plugin_without_networks_says_so(medrl, run, monkeypatch):
    import dataclasses

    from medrl.core.manager import PluginManager

    info = PluginManager.info
    monkeypatch.setattr(
        PluginManager, "info", lambda self, name: dataclasses.replace(info(self, name), networks="")
    )
    answer = medrl("model", "export", "run", "--format", "torchscript")
    assert (answer.code, "the plugin does not say how to rebuild them" in answer.err) == (5, True)


def test_missing_packages_are_named_with_the_way_to_get_them(medrl, run, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name)
    )
    answer = medrl("model", "export", "run", "--format", "onnx")
    assert answer.code == 2
    assert "onnxruntime not installed" in answer.err
    assert "pip install 'medrl[export]'" in answer.err
