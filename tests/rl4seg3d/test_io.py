"""Reading sequences, the grid of the network, the exact way back, and names of results."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest

from medrl.core.errors import ConfigError, DataError
from medrl.core.volume import read_volume, write_volume
from medrl.core.volume.ultrasound import read_cine
from medrl.plugins.rl4seg3d.io import (
    Plan,
    equalise,
    list_sequences,
    plan_sequences,
    prepare,
    read_sequence,
    restore,
    scaled,
    to_grid,
)

OFF = Plan(equalise="off")


def centroid(mask):
    return np.array([axis.mean() for axis in np.nonzero(mask)])


# -- reading -----------------------------------------------------------------------------------------


def test_frames_along_the_third_or_the_fourth_axis_and_single_frames_are_read(tmp_path, tools):
    data = tools.speckle(20, 24, 5)
    three = read_sequence(tools.save(tmp_path / "a.nii.gz", data))
    four = read_sequence(tools.save(tmp_path / "b.nii.gz", data[:, :, None]))
    one = read_sequence(tools.save(tmp_path / "c.nii.gz", data[..., 0]))
    assert np.array_equal(three.frames, data.astype(np.float32))
    assert np.array_equal(four.frames, three.frames)
    assert one.frames.shape == (20, 24, 1)
    assert three.spacing_mm == pytest.approx((0.37, 0.37))


def test_another_axis_may_be_time_and_results_return_to_it(tmp_path, tools):
    data = np.moveaxis(tools.speckle(20, 24, 5), -1, 0)
    path = tools.save(tmp_path / "a.nii.gz", data, spacing=(1.0, 0.2, 0.3))
    sequence = read_sequence(path, time_axis=0)
    assert sequence.frames.shape == (20, 24, 5)
    assert sequence.spacing_mm == pytest.approx((0.2, 0.3))
    assert np.array_equal(to_grid(sequence.frames, sequence)[0], data)
    with pytest.raises(ConfigError, match="--time-axis 5"):
        read_sequence(path, time_axis=5)


def test_results_have_the_axes_of_four_dimensional_files(tmp_path, tools):
    data = tools.speckle(20, 24, 5)
    sequence = read_sequence(tools.save(tmp_path / "b.nii.gz", data[:, :, None], time_unit="sec", step=0.02))
    labels = (data > 40).astype(np.uint8)
    write_volume(tmp_path / "out.nii.gz", to_grid(labels, sequence), sequence.volume, kind="image")
    written = nib.load(tmp_path / "out.nii.gz")
    assert written.shape == (20, 24, 1, 5)
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(written.dataobj)[:, :, 0], labels)
    assert written.header["pixdim"][4] == pytest.approx(0.02)
    assert sequence.frame_time_s == pytest.approx(0.02)


def test_more_frames_than_pixels_make_a_note(tmp_path, tools):
    assert "--time-axis" in read_sequence(tools.save(tmp_path / "a.nii", tools.speckle(8, 9, 20))).notes[0]
    assert read_sequence(tools.save(tmp_path / "b.nii", tools.speckle(8, 30, 20))).notes == ()


def test_a_volume_over_time_is_refused(tmp_path, tools):
    path = tools.save(tmp_path / "a.nii.gz", np.zeros((8, 9, 3, 4), dtype=np.uint8))
    with pytest.raises(DataError, match=r"\(8, 9, 3, 4\)"):
        read_sequence(path)


@pytest.mark.parametrize("step", [0.02, 1.0, 2.0])
def test_the_step_of_time_changes_no_frame(tmp_path, step, tools):
    sequence = read_sequence(
        tools.save(tmp_path / "a.nii.gz", tools.speckle(40, 40, 6), spacing=(0.37, 0.37, step))
    )
    assert prepare(sequence, OFF).images.shape == (64, 64, 6)


# -- DICOM -------------------------------------------------------------------------------------------


def test_frames_of_dicom_are_turned_to_x_y_t(tmp_path, tools):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7)).astype(np.uint8)
    path = tools.write_dicom(tmp_path / "a.dcm", pixels, PixelSpacing=[0.2, 0.3], FrameTime=25.0)
    sequence = read_sequence(path)
    assert np.array_equal(sequence.frames, np.transpose(pixels, (2, 1, 0)))
    assert sequence.spacing_mm == (0.3, 0.2)
    assert sequence.frame_time_s == pytest.approx(0.025)
    assert np.array_equal(np.diag(sequence.volume.affine), [0.3, 0.2, 1.0, 1.0])


def test_colours_become_grey_and_inverted_grey_is_turned_round(tmp_path, tools):
    colours = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    rgb = read_cine(tools.write_dicom(tmp_path / "rgb.dcm", colours, kind="RGB"))
    assert np.allclose(rgb.frames, np.transpose(colours.mean(axis=-1), (2, 1, 0)), atol=1e-4)
    assert rgb.spacing_mm is None
    grey = np.full((2, 4, 6, 3), 128, dtype=np.uint8)
    grey[..., 0] = np.arange(6) * 40  # luminance; 128 is no colour
    ybr = read_cine(tools.write_dicom(tmp_path / "ybr.dcm", grey, kind="YBR_FULL"))
    assert np.abs(ybr.frames[:, 0, 0] - np.arange(6) * 40).max() <= 1.0
    inverted = read_cine(tools.write_dicom(tmp_path / "inv.dcm", grey[0, ..., 0], kind="MONOCHROME1"))
    assert np.array_equal(inverted.frames[:, 0, 0], 255 - np.arange(6) * 40)
    assert inverted.frames.shape == (6, 4, 1)


def test_the_largest_region_in_centimetres_gives_the_pixel_size(tmp_path, tools):
    regions = [
        (0, 0.5, 0.5, (0, 0, 100, 100)),
        (3, 0.01, 0.02, (0, 0, 3, 3)),
        (3, 0.04, 0.05, (0, 0, 6, 4)),
    ]
    path = tools.write_dicom(tmp_path / "a.dcm", np.zeros((2, 4, 6), np.uint8), regions=regions)
    assert read_cine(path).spacing_mm == pytest.approx((0.4, 0.5))
    box = [(4, 1, 1, (0, 0, 6, 4))]
    seconds = tools.write_dicom(tmp_path / "b.dcm", np.zeros((2, 4, 6), np.uint8), regions=box)
    with pytest.raises(DataError, match="how large a pixel is") as caught:
        read_sequence(seconds)
    assert "--pixel-size" in caught.value.do
    assert read_sequence(seconds, pixel_size_mm=(0.3, 0.4)).spacing_mm == (0.3, 0.4)


def test_damaged_dicom_files_are_named_without_header_texts(tmp_path, tools):
    path = tools.write_dicom(tmp_path / "a.dcm", np.zeros((4, 32, 32), np.uint8), PixelSpacing=[1, 1])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"a\.dcm") as caught:
        read_sequence(path)
    assert "MUSTERMANN" not in str(caught.value)
    (tmp_path / "b.dcm").write_bytes(b"no DICOM at all")
    with pytest.raises(DataError, match="no readable DICOM file"):
        read_sequence(tmp_path / "b.dcm")


# -- preparing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((101, 97, 3), (0.30, 0.30)),
        ((487, 480, 1), (0.37, 0.37)),
        ((150, 130, 2), (0.20, 0.33)),
        ((33, 20, 2), (1.1, 0.9)),
    ],
)
def test_an_ellipse_comes_back_with_its_centre(tmp_path, shape, spacing, tools):
    mask = tools.ellipse(*shape)
    sequence = read_sequence(tools.save(tmp_path / "a.nii.gz", mask, spacing=(*spacing, 1.0)))
    prepared = prepare(sequence, OFF)
    assert all(size % 32 == 0 for size in prepared.images.shape[:2])
    assert prepared.images.shape[2] == shape[2]
    back = restore(np.moveaxis(prepared.images, -1, 0), prepared)
    assert back.shape == (shape[2], *shape[:2])
    assert np.abs(centroid(back[0] >= 0.5) - centroid(mask[..., 0])).max() <= 0.05


def test_frames_of_the_networks_pixel_size_come_through_unchanged(tmp_path, tools):
    data = tools.speckle(50, 41, 3)
    sequence = read_sequence(tools.save(tmp_path / "a.nii.gz", data))
    prepared = prepare(sequence, OFF)
    assert np.array_equal(prepared.images[prepared.inner], data / np.float32(data.max()))
    assert np.array_equal(
        restore(np.moveaxis(prepared.images, -1, 0), prepared)[1], scaled(sequence.frames)[..., 1]
    )
    kept = prepare(sequence, Plan(spacing_mm=None, equalise="off"))
    assert np.array_equal(kept.images, prepared.images)


def test_probabilities_that_sum_to_one_do_so_on_the_way_back(tmp_path, tools):
    sequence = read_sequence(
        tools.save(tmp_path / "a.nii.gz", tools.speckle(61, 47, 1), spacing=(0.51, 0.23, 1.0))
    )
    prepared = prepare(sequence, OFF)
    values = np.random.default_rng(0).random((3, *prepared.images.shape[:2]), dtype=np.float32)
    values /= values.sum(axis=0)
    assert np.abs(restore(values, prepared).sum(axis=0) - 1.0).max() < 1e-6


def test_pixels_that_would_be_millions_are_refused(tmp_path, tools):
    sequence = read_sequence(
        tools.save(tmp_path / "a.nii.gz", tools.speckle(30, 30, 1), spacing=(900, 900, 1.0))
    )
    with pytest.raises(ConfigError, match="--spacing"):
        prepare(sequence, OFF)


def test_images_are_equalised_once_and_blank_frames_stay_blank(tmp_path, tools):
    data = tools.speckle(40, 40, 2)
    data[..., 1] = 0
    raw = prepare(read_sequence(tools.save(tmp_path / "raw.nii.gz", data)), Plan())
    assert raw.equalised
    assert not raw.images[..., 1].any()
    done = raw.images[(*raw.inner, slice(0, 1))]
    again = prepare(read_sequence(tools.save(tmp_path / "done.nii.gz", done)), Plan())
    assert not again.equalised
    assert np.allclose(again.images[again.inner], done / done.max(), atol=1e-6)
    forced = prepare(read_sequence(tools.save(tmp_path / "done.nii.gz", done)), Plan(equalise="on"))
    assert forced.equalised
    constant = np.full((16, 16), 0.5, dtype=np.float32)
    assert np.array_equal(equalise(constant), constant)


def test_equalising_is_that_of_the_original(tmp_path, tools):
    from skimage.exposure import equalize_adapthist

    data = tools.speckle(64, 64, 1)
    prepared = prepare(read_sequence(tools.save(tmp_path / "a.nii.gz", data)), Plan())
    expected = equalize_adapthist(data[..., 0] / np.float32(data.max()), clip_limit=0.01)
    assert np.allclose(prepared.images[..., 0], expected, atol=1e-6)


def test_any_grid_is_written_as_it_was_read(tmp_path, tools):
    for number, (shape, affine) in enumerate(
        itertools.product([(20, 17, 4), (20, 17)], [tools.OBLIQUE, np.diag([0.2, 0.33, 1, 1])])
    ):
        path = tools.save(tmp_path / f"{number}.nii.gz", np.zeros(shape, np.uint8), affine=affine)
        sequence = read_sequence(path)
        labels = np.ones(sequence.frames.shape, dtype=np.uint8)
        out = tmp_path / f"out{number}.nii.gz"
        write_volume(out, to_grid(labels, sequence), sequence.volume, kind="image")
        given, written = nib.load(path), nib.load(out)
        assert written.shape == given.shape
        assert np.array_equal(written.affine, given.affine)
        assert written.header["sform_code"] == given.header["sform_code"]
        assert read_volume(out).data.min() == 1


# -- listing -----------------------------------------------------------------------------------------


def test_results_keep_the_tree_and_the_whole_name(tmp_path):
    for name in ("a/1.2.3.dcm", "a/1.2.4.dcm", "b/x_0000.nii.gz", "b/c/x.nii", ".hidden/y.nii", "notes.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    cases = list_sequences(tmp_path / "in")
    assert [case.id for case in cases] == ["a/1.2.3", "a/1.2.4", "b/c/x", "b/x"]
    folder, outputs = plan_sequences(tmp_path / "out", cases)
    assert folder == tmp_path / "out"
    assert outputs["a/1.2.4"] == tmp_path / "out/a/1.2.4.nii.gz"


def test_results_inside_the_input_folder_are_no_inputs(tmp_path):
    for name in ("x.nii.gz", "out/x.nii.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert [case.id for case in list_sequences(tmp_path, leave_out=tmp_path / "out")] == ["x"]


def test_results_that_would_collide_are_refused_before_work(tmp_path):
    (tmp_path / "x.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match="overwrite an input"):
        plan_sequences(tmp_path, list_sequences(tmp_path / "x.nii.gz"))
    (tmp_path / "X.dcm").write_bytes(b"")
    with pytest.raises(DataError, match="two inputs"):
        list_sequences(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no sequence"):
        list_sequences(tmp_path / "empty")
