"""Moving pictures of predictions."""

import shutil
import sys

import nibabel as nib
import numpy as np
import pytest

from medrl.core.errors import ConfigError
from medrl.plugins.rl4seg3d.io import read_sequence
from medrl.plugins.rl4seg3d.preview import require_ffmpeg, write_movie

NAMES = {"background": 0, "LV": 1, "MYO": 2}


@pytest.fixture
def sequence(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (33, 40, 6), dtype=np.uint8)
    image = nib.Nifti1Image(values, np.diag([0.5, 0.5, 1.0, 1.0]))
    nib.save(image, tmp_path / "a.nii.gz")
    return read_sequence(tmp_path / "a.nii.gz")


def labels_of(sequence):
    labels = np.zeros(sequence.frames.shape, dtype=np.uint8)
    labels[8:24, 8:30] = 2
    labels[12:20, 12:26] = 1
    return labels


def test_an_mp4_has_a_frame_for_each_of_the_sequence_and_even_sides(sequence, tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    write_movie(tmp_path / "a.mp4", sequence, labels_of(sequence), NAMES, kind="mp4")
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "a.mp4"))
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    assert (frames, next(reader)["size"]) == (6, (164, 200))
    reader.close()


def test_ffmpeg_of_the_machine_goes_before_that_of_the_extra(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    assert require_ffmpeg() == "/opt/ffmpeg"


def test_without_ffmpeg_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ConfigError, match=r"ffmpeg is not installed") as error:
        require_ffmpeg()
    assert "medrl[video]" in str(error.value.do)
