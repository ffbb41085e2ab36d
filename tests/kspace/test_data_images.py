"""Readers of images: ACDC as NIfTI, PNG and HDF5, and phantoms."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medrl.core.errors import ConfigError, DataError
from medrl.core.phantoms._files import write_nifti
from medrl.core.phantoms.cardiac import make_patient, write_cardiac
from medrl.plugins.kspace.data import export_png, find_reader, open_scans, read_scan
from medrl.plugins.kspace.data.images import open_acdc_h5, open_acdc_nifti, open_folder
from medrl.plugins.kspace.data.png import decode_labels, open_acdc_png, read_png

h5py = pytest.importorskip("h5py")

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
real = [
    pytest.mark.realdata,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the real images are not here: {DATA} does not exist"),
]

SHAPE = (12, 10, 3)


def case(dataset, name):
    return next(one for one in dataset.scans if one.id == name)


def scan(seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 900, SHAPE).astype(np.float32), rng.integers(0, 4, SHAPE).astype(np.uint8)


def write_acdc(root: Path, numbers=(1, 2, 21), *, info=True, labels=True):
    """Patients in ACDC's layout: two frames with labels, and the whole sequence."""
    for number in numbers:
        part = "testing" if number > 100 else "training"
        patient = f"patient{number:03d}"
        folder = root / part / patient
        folder.mkdir(parents=True)
        affine = np.diag([1.5, 1.4, 8.0, 1.0])
        for index, frame in enumerate((1, 12)):
            image, label = scan(10 * number + index)
            write_nifti(folder / f"{patient}_frame{frame:02d}.nii.gz", image, affine)
            if labels:
                write_nifti(folder / f"{patient}_frame{frame:02d}_gt.nii.gz", label, affine)
        sequence = np.stack([scan(k)[0] for k in range(4)], axis=-1)
        write_nifti(folder / f"{patient}_4d.nii.gz", sequence, affine)
        if info:
            (folder / "Info.cfg").write_text(
                "ED: 12\nES: 1\nGroup: HCM\nHeight: 170.0\nNbFrame: 4\nWeight: 70.0\n"
            )
    return root


def test_acdc_is_read_frame_by_frame_with_rows_along_y(tmp_path):
    dataset = open_acdc_nifti(write_acdc(tmp_path, (1, 2, 101)))
    assert [one.id for one in dataset.scans][:2] == ["patient001_frame01", "patient001_frame12"]
    assert {one.patient for one in dataset.scans} == {"patient001", "patient002", "patient101"}
    assert dataset.apart == {"patient101_frame01", "patient101_frame12"}
    assert dataset.groups["patient001"] == "HCM"
    raw = dataset.read(case(dataset, "patient001_frame12"), with_label=True)
    image, label = scan(11)
    assert raw.images.shape == (3, 10, 12)
    assert np.array_equal(raw.images, image.transpose(2, 1, 0))
    assert np.array_equal(raw.labels, label.transpose(2, 1, 0))
    assert raw.spacing_mm == pytest.approx((1.4, 1.5, 8.0))
    assert raw.slices == (0, 1, 2)
    # Info.cfg has the last word on which frame is which.
    assert set(raw.frames) == {"ED"}
    assert set(dataset.read(case(dataset, "patient001_frame01"), with_label=False).frames) == {"ES"}


def test_without_info_the_earlier_frame_is_end_diastole_and_groups_follow_the_numbers(tmp_path):
    dataset = open_acdc_nifti(write_acdc(tmp_path, (1, 41), info=False))
    frames = {one.id: dataset.read(one, with_label=False).frames[0] for one in dataset.scans}
    assert frames["patient001_frame01"] == "ED"
    assert frames["patient041_frame12"] == "ES"
    assert dataset.groups == {"patient001": "DCM", "patient041": "MINF"}


def test_labels_are_not_opened_unless_asked_for(tmp_path):
    root = write_acdc(tmp_path, (1,))
    broken = root / "training" / "patient001" / "patient001_frame01_gt.nii.gz"
    broken.write_bytes(b"no image")
    dataset = open_acdc_nifti(root)
    first = case(dataset, "patient001_frame01")
    assert dataset.read(first, with_label=False).labels is None
    assert broken not in dataset.files(first, with_label=False)
    with pytest.raises(DataError, match=r"patient001_frame01.*patient001_frame01_gt"):
        dataset.read(first, with_label=True)


def test_the_whole_sequence_is_never_labelled(tmp_path):
    root = write_acdc(tmp_path, (1, 2))
    dataset = open_acdc_nifti(root, frames="all")
    assert [one.id for one in dataset.scans] == ["patient001_4d", "patient002_4d"]
    assert all(one.label is None for one in dataset.scans)
    assert dataset.cases == ()
    raw = dataset.read(dataset.scans[0], with_label=True)
    assert raw.labels is None
    assert raw.images.shape == (12, 10, 12)
    assert raw.frames[:4] == ("t00", "t00", "t00", "t01")
    assert np.array_equal(raw.images[3:6], scan(1)[0].transpose(2, 1, 0))
    # A sequence with labels beside it is not found among the labelled frames either.
    folder = root / "training" / "patient001"
    write_nifti(folder / "patient001_4d_gt.nii.gz", scan()[1], np.eye(4))
    assert all("4d" not in one.id for one in open_acdc_nifti(root).scans)


def test_frames_without_labels_are_cases_without_labels(tmp_path):
    dataset = open_acdc_nifti(write_acdc(tmp_path, (1,), labels=False))
    assert dataset.cases == ()
    assert [one.label for one in dataset.scans] == [None, None]


def test_labels_on_another_grid_are_refused(tmp_path):
    root = write_acdc(tmp_path, (1,))
    path = root / "training" / "patient001" / "patient001_frame01_gt.nii.gz"
    write_nifti(path, np.zeros((5, 5, 3), np.uint8), np.diag([1.5, 1.4, 8.0, 1.0]))
    dataset = open_acdc_nifti(root)
    with pytest.raises(DataError, match="does not lie on its image"):
        dataset.read(dataset.scans[0], with_label=True)


def test_cases_can_be_left_out_and_unknown_ones_are_named(tmp_path):
    root = write_acdc(tmp_path, (1,))
    assert [one.id for one in open_acdc_nifti(root, exclude=["patient001_frame01"]).scans] == [
        "patient001_frame12"
    ]
    with pytest.raises(ConfigError, match="no case 'patient009_frame01'"):
        open_acdc_nifti(root, exclude=["patient009_frame01"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no scan"):
        open_acdc_nifti(tmp_path / "empty")


def write_h5(path: Path, seed=0, shape=(3, 10, 12), label=True):
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file["image"] = rng.uniform(0, 1, shape).astype(np.float32)
        if label:
            file["label"] = rng.integers(0, 4, shape).astype(np.uint8)
        file["scribble"] = np.full(shape, 4, np.uint16)


def test_hdf5_slices_are_read_as_they_are_stored(tmp_path):
    write_h5(tmp_path / "patient021_frame01.h5", 1)
    write_h5(tmp_path / "patient021_frame09.h5", 2)
    dataset = open_acdc_h5(tmp_path)
    raw = dataset.read(dataset.scans[1], with_label=True)
    with h5py.File(tmp_path / "patient021_frame09.h5") as file:
        assert np.array_equal(raw.images, file["image"][()])
        assert np.array_equal(raw.labels, file["label"][()])
    assert set(raw.frames) == {"ES"}
    assert np.isnan(raw.spacing_mm).all()
    assert dataset.groups == {"patient021": "HCM"}
    known = open_acdc_h5(tmp_path, spacing=(1.4, 1.5, 9.0))
    assert known.read(known.scans[0], with_label=False).spacing_mm == (1.4, 1.5, 9.0)
    with pytest.raises(DataError, match="three positive numbers"):
        open_acdc_h5(tmp_path, spacing=(1.0, 2.0))


def test_hdf5_files_of_single_slices_belong_to_their_frame(tmp_path):
    for number in (1, 2, 10):
        write_h5(tmp_path / f"patient021_frame01_slice_{number}.h5", number, shape=(10, 12))
    dataset = open_acdc_h5(tmp_path)
    assert {one.patient for one in dataset.scans} == {"patient021"}
    last = dataset.read(case(dataset, "patient021_frame01_slice_10"), with_label=True)
    assert last.slices == (10,)
    assert last.images.shape == (1, 10, 12)


def test_hdf5_without_labels_or_with_unknown_ones_is_named(tmp_path):
    write_h5(tmp_path / "patient001_frame01.h5", label=False)
    dataset = open_acdc_h5(tmp_path)
    with pytest.raises(DataError, match=r"patient001_frame01.*no array 'label'"):
        dataset.read(dataset.scans[0], with_label=True)
    with h5py.File(tmp_path / "patient001_frame01.h5", "a") as file:
        file["label"] = np.full((3, 10, 12), 7, np.uint8)
    with pytest.raises(DataError, match=r"label values \[7\] are unknown"):
        dataset.read(dataset.scans[0], with_label=True)


def test_phantoms_are_read_with_frames_and_displacements(tmp_path):
    root = write_cardiac(tmp_path / "d", cases=2, test_cases=1, shape=(24, 16), slices=2, shift_k=3.0)
    dataset = open_folder(root)
    assert len(dataset.scans) == 6
    assert dataset.apart == {"cardiac_test_000_ED", "cardiac_test_000_ES"}
    raw = dataset.read(case(dataset, "cardiac_001_ES"), with_label=True)
    patient = make_patient(0, 1, shape=(24, 16), slices=2, shift_k=3.0)
    assert set(raw.frames) == {"ES"}
    assert raw.shift_k == patient.shift_k["ES"] != 0
    assert np.array_equal(raw.images, patient.images["ES"].transpose(2, 1, 0))
    assert root / "kspace.json" in dataset.files(dataset.scans[0], with_label=False)
    (root / "kspace.json").write_text('{"cardiac_000_ED": {"shift_k": "far"}}')
    with pytest.raises(DataError, match="shift_k"):
        open_folder(root)


def test_png_export_and_reader_give_images_labels_and_geometry_back(tmp_path):
    source = open_acdc_nifti(write_acdc(tmp_path / "acdc", (1, 2)))
    for bits, error in ((16, 900 / 131070 + 1e-3), (8, 900 / 510 + 1e-3)):
        root = export_png(source, tmp_path / f"png{bits}", bits=bits)
        assert sorted(path.name for path in root.iterdir()) == ["patient001", "patient002"]
        assert len(list((root / "patient001" / "images").iterdir())) == 6
        dataset = open_acdc_png(root)
        raw = dataset.read(dataset.scans[1], with_label=True)
        # Info.cfg calls frame 12 end-diastole; the cases of the source come in order of their names.
        assert raw.frames == ("ES",) * 3 + ("ED",) * 3
        assert raw.slices == (0, 1, 2) * 2
        assert raw.spacing_mm == pytest.approx((1.4, 1.5, 8.0))
        image, label = scan(20)
        assert np.abs(raw.images[:3] - image.transpose(2, 1, 0)).max() < error
        assert np.array_equal(raw.labels[:3], label.transpose(2, 1, 0))
        meta = json.loads((root / "patient001" / "meta.json").read_text())
        assert np.allclose(meta["0"]["affine"], np.diag([1.5, 1.4, 8.0, 1.0]))


def test_png_slices_are_sorted_by_number_and_labels_of_both_encodings_are_read(tmp_path):
    folder = tmp_path / "patient003"
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(11):
        Image.fromarray(np.full((4, 5), number, np.uint8)).save(folder / "images" / f"{number}.png")
        spread = np.array([0, 85, 170, 255, 0], np.uint8) if number == 2 else np.zeros(5, np.uint8)
        Image.fromarray(np.tile(spread, (4, 1))).save(folder / "labels" / f"{number}.png")
    dataset = open_acdc_png(tmp_path)
    raw = dataset.read(dataset.scans[0], with_label=True)
    assert raw.images[:, 0, 0].tolist() == list(range(11))
    assert raw.labels[2, 0].tolist() == [0, 1, 2, 3, 0]
    assert raw.slices == (-1,) * 11
    assert raw.names[10] == "i0010"
    assert np.isnan(raw.spacing_mm).all()


@pytest.mark.parametrize("values", [[0, 1, 2, 3], [0, 85, 170, 255]])
def test_both_label_alphabets_give_the_same_labels(values):
    assert decode_labels(np.array(values), "x").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("values", [[0, 4], [0, 85, 171], [1, 255], [0, 2, 85]])
def test_other_label_alphabets_are_refused(values):
    with pytest.raises(DataError, match="label values"):
        decode_labels(np.array(values), "x")


def test_png_of_colour_damaged_or_misnamed_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match="mode RGB"):
        read_png(tmp_path / "colour.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40)).astype(np.uint8)).save(
        tmp_path / "1.png"
    )
    whole = (tmp_path / "1.png").read_bytes()
    assert read_png(tmp_path / "1.png").shape == (40, 40)
    for damaged in (whole[:400], whole[:200] + b"\x00\x01" + whole[202:], b"", b"text"):
        (tmp_path / "2.png").write_bytes(damaged)
        with pytest.raises(DataError, match=r"2\.png"):
            read_png(tmp_path / "2.png")
    folder = tmp_path / "d" / "patient001" / "images"
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "first.png")
    with pytest.raises(DataError, match="named by their number"):
        open_acdc_png(tmp_path / "d")
    (folder / "first.png").rename(folder / "1.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "01.png")
    with pytest.raises(DataError, match="there twice"):
        open_acdc_png(tmp_path / "d")


def test_png_sidecars_that_do_not_fit_are_refused(tmp_path):
    root = export_png(open_acdc_nifti(write_acdc(tmp_path / "acdc", (1,))), tmp_path / "png")
    path = root / "patient001" / "meta.json"
    meta = json.loads(path.read_text())
    for change in ({"5": None}, {"0": meta["0"] | {"spacing": [0, 1, 1]}}, {"0": meta["0"] | {"max": "x"}}):
        path.write_text(json.dumps({key: value for key, value in (meta | change).items() if value}))
        dataset = open_acdc_png(root)
        with pytest.raises(DataError, match=r"meta\.json"):
            dataset.read(dataset.scans[0], with_label=False)


def test_png_export_writes_to_new_folders_alone(tmp_path):
    source = open_acdc_nifti(write_acdc(tmp_path / "acdc", (1,)))
    with pytest.raises(ConfigError, match="something already"):
        export_png(source, tmp_path)


def test_readers_are_recognised_by_what_lies_there(tmp_path):
    write_acdc(tmp_path / "acdc", (1,))
    export_png(open_acdc_nifti(tmp_path / "acdc"), tmp_path / "png")
    (tmp_path / "h5").mkdir()
    write_h5(tmp_path / "h5" / "patient001_frame01.h5")
    write_cardiac(tmp_path / "core", cases=1, test_cases=0, shape=(16, 16), slices=1)
    found = {name: find_reader(tmp_path / name) for name in ("acdc", "png", "h5", "core")}
    assert found == {"acdc": "acdc-nifti", "png": "acdc-png", "h5": "acdc-h5", "core": "core"}
    for name, reader in found.items():
        assert open_scans(tmp_path / name).layout == reader
    with pytest.raises(ConfigError, match="did you mean 'acdc-png'"):
        open_scans(tmp_path / "png", reader="acdc-pgn")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match="no scan known here"):
        find_reader(tmp_path / "x.txt")


def test_one_file_of_any_kind_is_read_for_prediction(tmp_path):
    write_h5(tmp_path / "patient001_frame01.h5")
    assert read_scan(tmp_path / "patient001_frame01.h5").images.shape == (3, 10, 12)
    image, _ = scan()
    write_nifti(tmp_path / "x_ED.nii.gz", image, np.diag([1.5, 1.4, 8.0, 1.0]))
    raw = read_scan(tmp_path / "x_ED.nii.gz")
    assert raw.frames == ("ED",) * 3
    assert raw.volume.data.shape == (1, *SHAPE)
    assert nib.load(tmp_path / "x_ED.nii.gz").shape == SHAPE


class TestReal:
    pytestmark = real

    def test_all_twelve_patients_of_acdc_are_read_in_both_phases(self):
        dataset = open_acdc_h5(DATA / "acdc_h5")
        patients = {one.patient for one in dataset.scans}
        assert (len(dataset.scans), len(patients)) == (24, 12)
        assert {dataset.groups[name] for name in patients} == {"DCM", "HCM", "MINF", "NOR", "RV"}
        sizes = {}
        for one in dataset.scans:
            raw = dataset.read(one, with_label=True)
            assert raw.images.min() >= 0.0
            assert raw.images.max() <= 1.0
            assert set(np.unique(raw.labels)) == {0, 1, 2, 3}
            sizes.setdefault(one.patient, {})[raw.frames[0]] = int((raw.labels == 3).sum())
        assert all(set(phases) == {"ED", "ES"} for phases in sizes.values())
        # The cavity is smaller at end-systole in every patient, so the frames are not mixed up.
        assert all(phases["ES"] < phases["ED"] for phases in sizes.values())
