"""Beating echo phantoms: rules kept, motion as it should be, files, and noise that stays coherent."""

from __future__ import annotations

import hashlib
import json

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from medrl.cli.data import data
from medrl.core.dataset import check_dataset, load_case, open_dataset
from medrl.core.errors import ConfigError, DataError
from medrl.core.metrics.cine import describe
from medrl.core.phantoms.echo import (
    CoherentNormals,
    contraction,
    draw_beat,
    draw_heart,
    heart_at,
    make_sequence,
    write_echo_sequences,
)
from medrl.core.validity import check_stack, load_rules
from medrl.core.validity.temporal import check_sequence

SMALL = {"size": (40, 40), "frames": 6}


def digests(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def sequences():
    return [make_sequence(0, index, frames=26) for index in range(4)]


@pytest.mark.parametrize(
    "settings", [{}, {"shape_shift": 1.0, "shift": 0.85}, {"size": (32, 32)}, {"frames": 5, "size": (48, 40)}]
)
def test_every_sequence_keeps_the_anatomical_and_the_temporal_rules(settings):
    rules = load_rules("echo")
    for index in range(3):
        made = make_sequence(7, index, **{"frames": 20, **settings})
        spacing = np.diag(made.affine)[:2]
        assert [report.failed for report in check_stack(made.label, rules) if not report.valid] == []
        assert check_sequence(made.label, spacing).valid
        assert made.image.shape == made.label.shape
        assert made.image.dtype == made.label.dtype == np.uint8


def test_the_cavity_shrinks_by_a_plausible_fraction_and_its_base_comes_down(sequences):
    for made in sequences:
        report = describe(made.label, np.diag(made.affine)[:2], made.frame_time_s)
        assert 0.25 < report.ejection_fraction < 0.75
        depth = report.base_points[..., 1].mean(axis=1)
        assert depth[report.ed_frame] > depth[report.es_frame] + 1
        assert 30 < report.edv_ml < 250


def test_the_apex_stays_and_the_wall_thickens():
    heart, beat = (draw(np.random.default_rng(4)) for draw in (draw_heart, draw_beat))
    frames = [heart_at(heart, beat, number) for number in range(round(beat.period))]
    tips = [(h.centre[0] - h.long * np.sin(h.tilt), h.centre[1] - h.long * np.cos(h.tilt)) for h in frames]
    assert np.ptp(tips, axis=0).max() < 3 * beat.sway
    narrowest = min(frames, key=lambda h: h.wide)
    assert narrowest.walls[0] > 1.1 * heart.walls[0]
    assert max(h.wide for h in frames) <= heart.wide


def test_contraction_is_smooth_and_returns_to_its_start():
    curve = np.array([contraction(phase) for phase in np.linspace(0, 1, 401)])
    assert curve[0] == curve[-1] == 0
    assert curve.max() == pytest.approx(1)
    assert np.abs(np.diff(curve)).max() < 0.012
    assert contraction(1.3) == pytest.approx(contraction(0.3))


def test_the_same_arguments_give_the_same_bytes_and_other_seeds_others():
    first, again = (make_sequence(3, 1, **SMALL) for _ in range(2))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.label.tobytes() == again.label.tobytes()
    changes = [{"test": True}, {"shift": 0.5}, {"shape_shift": 0.5}]
    others = [make_sequence(3, 1, **SMALL, **change) for change in changes] + [make_sequence(4, 1, **SMALL)]
    assert len({made.label.tobytes() for made in [first, *others]}) == 5


def test_more_frames_continue_the_same_beat():
    short, long = (make_sequence(0, 2, size=(64, 64), frames=frames) for frames in (18, 20))
    assert short.beat == long.beat
    assert np.array_equal(short.label, long.label[..., :18])
    assert np.array_equal(short.image, long.image[..., :18])


def test_speckle_is_coherent_between_frames_and_more_so_if_asked_for():
    def flicker(coherence):
        made = make_sequence(0, 0, size=(48, 48), frames=6, coherence=coherence)
        still = (made.label == made.label[..., :1]).all(axis=-1) & (made.image > 0).all(axis=-1)
        return np.abs(np.diff(made.image[still].astype(float), axis=1)).mean()

    assert flicker(0.95) < 0.6 * flicker(0.0)


def test_coherent_numbers_have_the_statistics_of_independent_ones():
    normals = CoherentNormals(np.random.default_rng(0), 0.8)
    frames = []
    for _ in range(40):
        normals.next_frame()
        assert normals.normal(2.0, 0.0) == 2.0
        texture = normals.standard_normal((3, 3))
        frames.append(normals.standard_normal((2, 50, 50), dtype=np.float32))
    stack = np.stack(frames)
    assert stack.dtype == np.float32
    assert stack[20:].std() == pytest.approx(1.0, abs=0.01)
    assert np.corrcoef(stack[:-1].ravel(), stack[1:].ravel())[0, 1] == pytest.approx(0.8, abs=0.01)
    normals.next_frame()
    normals.normal(2.0, 0.0)
    assert np.array_equal(normals.standard_normal((3, 3)), texture)


def test_glitches_spoil_images_and_leave_labels_alone():
    clean, spoiled = (make_sequence(1, 0, size=(48, 48), frames=12, glitches=part) for part in (0.0, 0.4))
    assert np.array_equal(clean.label, spoiled.label)
    assert clean.glitches == ()
    assert 1 <= len(spoiled.glitches) <= 11
    for number in range(12):
        same = np.array_equal(clean.image[..., number], spoiled.image[..., number])
        assert same == (number not in spoiled.glitches)
    assert spoiled.image[..., spoiled.glitches].mean() < 0.7 * clean.image[..., spoiled.glitches].mean()


def test_the_files_are_nnunet_raw_with_time_as_third_axis(tmp_path):
    root = write_echo_sequences(tmp_path / "set", cases=2, test_cases=1, seed=5, glitches=0.2, **SMALL)
    assert check_dataset(root).ok
    dataset = open_dataset(root)
    volume, label = load_case(dataset, dataset.cases[0], with_label=True)
    assert volume.data.shape == label.data.shape == (1, 40, 40, 6)
    image = nib.load(root / "imagesTr" / "echo_001_0000.nii.gz")
    made = make_sequence(5, 1, glitches=0.2, **SMALL)
    assert np.array_equal(np.asanyarray(image.dataobj), made.image)
    assert image.header.get_zooms() == pytest.approx((3.85, 3.85, 1.0))
    facts = json.loads((root / "sequences.json").read_text())
    assert facts["echo_001"]["glitches"] == list(made.glitches)
    assert facts["echo_test_000"]["frame_time_s"] > 0
    assert write_echo_sequences(root, cases=2, test_cases=1, seed=5, glitches=0.2, **SMALL) == root
    with pytest.raises(DataError, match="something other"):
        write_echo_sequences(root, cases=1, test_cases=1, seed=5, **SMALL)


def test_two_writes_are_equal_and_a_case_does_not_depend_on_how_many_there_are(tmp_path):
    few = digests(write_echo_sequences(tmp_path / "few", cases=1, test_cases=0, seed=2, **SMALL))
    many = digests(write_echo_sequences(tmp_path / "many", cases=2, test_cases=1, seed=2, **SMALL))
    again = digests(write_echo_sequences(tmp_path / "again", cases=2, test_cases=1, seed=2, **SMALL))
    assert many == again
    images = [name for name in few if name.endswith(".nii.gz")]
    assert len(images) == 2
    assert all(few[name] == many[name] for name in images)


def test_the_command_line_writes_sequences(tmp_path):
    arguments = ["synth", "echo_sequences", str(tmp_path / "d"), "--cases", "1"]
    for setting in ("size=[40,40]", "frames=4", "test_cases=0", "shift=0.5"):
        arguments += ["--set", setting]
    done = CliRunner().invoke(data, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert nib.load(tmp_path / "d" / "imagesTr" / "echo_000_0000.nii.gz").shape == (40, 40, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"period": (30.0, 20.0)}, "period is"),
        ({"coherence": 1.5}, "coherence is 1.5"),
        ({"glitches": -0.1}, "glitches is -0.1"),
        ({"size": (8, 8)}, "smaller than"),
        ({"shift": 9.0}, "shift is 9.0"),
        ({"style": "hazy"}, "hazy"),
    ],
)
def test_settings_that_make_no_sequence_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        make_sequence(0, 0, **settings)
    assert message in str(caught.value)
