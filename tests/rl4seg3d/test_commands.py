"""The command line of prediction and of weights: light, explained, with the exit codes of every method."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import nibabel as nib
import pytest
import torch

from medrl.cli.main import run as run_command_line
from medrl.core.errors import ConfigError
from medrl.plugins.rl4seg3d import commands
from medrl.plugins.rl4seg3d.models import UNet3d

HEAVY = ("torch", "monai", "torchio", "nibabel", "numpy", "scipy", "pydantic")


@pytest.fixture
def medrl(monkeypatch, tmp_path, capsys):
    """Run one command line in an empty folder; return exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    for name in ("MEDRL_PLUGINS", "MEDRL_PLUGINS_STRICT"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments):
        capsys.readouterr()
        code = run_command_line([str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def actor(tmp_path):
    torch.manual_seed(0)
    torch.save(UNet3d(base_filters=4).state_dict(), tmp_path / "actor.ckpt")
    return tmp_path / "actor.ckpt"


def test_plugin_and_commands_import_nothing_heavy():
    modules = "medrl.plugins.rl4seg3d.plugin, medrl.plugins.rl4seg3d.commands"
    code = f"import sys, {modules}; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in HEAVY if f"'{name}'" in done.stdout] == []


def test_every_command_explains_itself_and_each_option():
    for command in (commands.predict, commands.convert):
        assert command.help
        for item in command.params:
            if isinstance(item, click.Option):
                assert item.help, f"{command.name} {item.opts}"


def test_a_folder_is_predicted_and_a_damaged_file_gives_exit_code_3(medrl, tmp_path, actor, tools):
    tools.save(tmp_path / "in" / "a" / "x.nii.gz", tools.speckle(40, 36, 1))
    (tmp_path / "in" / "y.nii.gz").write_bytes(b"no image")
    code, said = medrl("predict", "rl4seg3d", "in", "out", "--checkpoint", actor, "--no-tta")
    assert code == 3
    assert "failed" in said
    assert "case y" in said
    assert nib.load(tmp_path / "out" / "a" / "x.nii.gz").shape == (40, 36, 1)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["options"]["tta"] is False
    assert report["cases"]["y"]["status"] == "failed"
    again, said = medrl("predict", "rl4seg3d", "in", "out", "--checkpoint", actor)
    assert (again, "--overwrite" in said) == (2, True)


def test_augmentation_is_on_unless_it_is_switched_off(medrl, tmp_path, actor, tools, monkeypatch):
    from medrl.plugins.rl4seg3d import predicting

    seen = {}

    def note(job, config):
        seen.update(tta=job.tta, tto=config.tto.mode, equalise=config.equalise, spacing=config.spacing_mm)
        raise ConfigError("enough")

    monkeypatch.setattr(predicting, "run", note)
    tools.save(tmp_path / "x.nii.gz", tools.speckle(40, 36, 1))
    medrl("predict", "rl4seg3d", "x.nii.gz", "out", "--checkpoint", actor)
    assert seen == {"tta": True, "tto": "off", "equalise": None, "spacing": None}
    medrl("predict", "rl4seg3d", "x.nii.gz", "out", "--checkpoint", actor, "--no-tta", "--spacing", "0.4")
    assert (seen["tta"], seen["spacing"]) == (False, (0.4, 0.4))


@pytest.mark.parametrize(
    ("word", "mode"), [("on", "auto"), ("True", "auto"), ("false", "off"), ("force", "force"), (False, "off")]
)
def test_words_of_yaml_are_understood_as_modes(word, mode):
    assert commands.TTOType().convert(word, None, None) == mode


def test_wrong_values_are_usage_errors(medrl, tmp_path, actor, tools):
    tools.save(tmp_path / "x.nii.gz", tools.speckle(40, 36, 1))
    given = ("predict", "rl4seg3d", "x.nii.gz", "out", "--checkpoint", actor)
    for more in (("--tto", "maybe"), ("--spacing", "0"), ("--reward", "net.ckpt"), ("--reward", "fused=a")):
        assert medrl(*given, *more)[0] == 2
    (tmp_path / "lfs.ckpt").write_text("version https://git-lfs.github.com/spec/v1\n")
    code, said = medrl("predict", "rl4seg3d", "x.nii.gz", "out", "--checkpoint", "lfs.ckpt")
    assert (code, "git lfs pull" in said) == (4, True)


def test_reward_nets_may_come_in_files_of_their_own(medrl, tmp_path, actor, tools):
    torch.manual_seed(1)
    torch.save(UNet3d(in_channels=2, out_channels=1, base_filters=4).state_dict(), tmp_path / "net.ckpt")
    tools.save(tmp_path / "x.nii.gz", tools.speckle(40, 36, 1))
    given = ("predict", "rl4seg3d", "x.nii.gz", "out", "--checkpoint", actor, "--no-tta")
    assert medrl(*given, "--reward", "landmark=net.ckpt")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out" / "rewards").iterdir()) == [
        "x_reward_fused.nii.gz",
        "x_reward_landmark.nii.gz",
    ]


def test_convert_makes_a_file_that_predicts_the_same(medrl, tmp_path, actor, tools):
    tools.save(tmp_path / "x.nii.gz", tools.speckle(40, 36, 2))
    assert medrl("rl4seg3d", "convert", actor, "small.safetensors", "--parts", "actor")[0] == 0
    for name, out in ((actor, "one"), ("small.safetensors", "two")):
        assert medrl("predict", "rl4seg3d", "x.nii.gz", out, "--checkpoint", name, "--no-tta")[0] == 0
    one, two = ((tmp_path / out / "x.nii.gz").read_bytes() for out in ("one", "two"))
    assert one == two
    code, said = medrl("rl4seg3d", "convert", actor, "small.safetensors")
    assert (code, "it exists" in said) == (2, True)
