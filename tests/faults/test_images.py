"""Damaged, hostile and mistaken images: each is refused by name, or changes nothing."""

from __future__ import annotations

import ast
import gzip
import itertools
import logging
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medrl.core.dataset import check_dataset, list_inputs, load_case, open_dataset, plan_outputs
from medrl.core.dataset.names import safe_case_id, safe_path
from medrl.core.errors import EXIT_DATA, DataError
from medrl.core.types import Case
from medrl.core.volume import check_header, read_volume, write_volume

ROOT = Path(__file__).resolve().parents[2]
AFFINE = np.array([[-0.5, 0, 0, 57.0], [0, -0.48, -0.9, 82.0], [0, -0.15, 2.8, -27.0], [0, 0, 0, 1.0]])


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    data = np.random.default_rng(0).normal(100, 20, (12, 13, 14)).astype(np.float32)
    return save(tmp_path / "case.nii.gz", data, np.diag([0.5, 0.5, 3.0, 1.0]))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.25, 0.5, 0.9, 0.9995])
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, suffix, keep):
    data = np.random.default_rng(0).normal(size=(12, 13, 14)).astype(np.float32)
    path = save(tmp_path / f"cut{suffix}", data)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(DataError, match=rf"cut\{suffix}") as caught:
        read_volume(path)
    assert caught.value.exit_code == EXIT_DATA
    assert caught.value.why


def test_a_stream_that_lacks_only_its_checksum_is_refused(image):
    image.write_bytes(image.read_bytes()[:-8])
    with pytest.raises(DataError, match="truncated"):
        read_volume(image)


def test_a_cut_file_says_how_much_of_it_is_there(tmp_path):
    path = save(tmp_path / "x.nii", np.zeros((10, 10, 10), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: 352 + 610])
    with pytest.raises(DataError, match="ends after 61% of its voxels"):
        read_volume(path)


def test_fifty_flipped_bits_are_each_detected_or_harmless(image):
    raw = image.read_bytes()
    truth = read_volume(image)
    rng = np.random.default_rng(1)
    detected = 0
    for position in rng.choice(len(raw) * 8, 50, replace=False):
        damaged = bytearray(raw)
        damaged[position // 8] ^= 1 << (position % 8)
        image.write_bytes(damaged)
        try:
            volume = read_volume(image)
        except DataError as error:
            detected += image.name in str(error)
            continue
        assert np.array_equal(volume.data, truth.data)
        assert np.array_equal(volume.affine, truth.affine)
    assert detected >= 45


def test_every_flipped_bit_of_the_gzip_frame_is_detected_or_harmless(tmp_path):
    path = save(tmp_path / "x.nii.gz", np.arange(8, dtype=np.uint8).reshape(2, 2, 2))
    raw = path.read_bytes()
    truth = read_volume(path)
    for byte in (*range(12), *range(len(raw) - 8, len(raw))):
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[byte] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                volume = read_volume(path)
            except DataError:
                continue
            assert np.array_equal(volume.data, truth.data), (byte, bit)


def test_nibabel_alone_would_have_missed_a_damaged_voxel(image):
    """The reason for an own reader: nibabel stops before the checksum."""
    raw = image.read_bytes()
    truth = nib.load(image).get_fdata()
    missed = 0
    for position in np.random.default_rng(2).choice(np.arange(2000, len(raw) - 8), 40, replace=False):
        damaged = bytearray(raw)
        damaged[position] ^= 1
        image.write_bytes(damaged)
        with pytest.raises(DataError):
            read_volume(image)
        try:
            missed += not np.array_equal(nib.load(image).get_fdata(), truth)
        except (zlib.error, OSError, EOFError):
            continue
    assert missed > 0


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty.nii.gz", b"", "empty"),
        ("empty.nii", b"", "empty"),
        ("text.nii", b"this is a text file, long enough to hold a header " * 20, "no NIfTI"),
        ("text.nii.gz", gzip.compress(b"this is a text file " * 50, mtime=0), "no NIfTI"),
        ("plain.nii.gz", b"\x5c\x01\x00\x00" + bytes(400), "not compressed"),
        ("packed.nii", gzip.compress(b"\x5c\x01\x00\x00" + bytes(400), mtime=0), "lacks .gz"),
        ("zeros.nii", bytes(4000), "no NIfTI"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_empty_and_misnamed_files_are_refused_by_name(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=why) as caught:
        read_volume(tmp_path / name)
    assert name in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.nii\.gz: no such file"):
        read_volume(tmp_path / "gone.nii.gz")


# offset, struct format, value: one damaged field of a NIfTI-1 header each
FIELDS = {
    "sizeof_hdr": (0, "<i", 347),
    "dim[0] zero": (40, "<h", 0),
    "dim[0] large": (40, "<h", 8),
    "dim[1] zero": (42, "<h", 0),
    "dim[1] negative": (42, "<h", -4),
    "dim[1] smaller": (42, "<h", 3),
    "dim[1] larger": (42, "<h", 5),
    "dim[3] huge": (46, "<h", 32767),
    "datatype complex": (70, "<h", 32),
    "datatype unknown": (70, "<h", 77),
    "datatype other": (70, "<h", 8),
    "bitpix": (72, "<h", 8),
    "qfac": (76, "<f", 0.3),
    "pixdim[1] zero": (80, "<f", 0.0),
    "pixdim[1] negative": (80, "<f", -1.0),
    "pixdim[1] nan": (80, "<f", np.nan),
    "pixdim[2] inf": (84, "<f", np.inf),
    "pixdim[3] huge": (88, "<f", 1e30),
    "pixdim[3] other than affine": (88, "<f", 2.0),
    "vox_offset zero": (108, "<f", 0.0),
    "vox_offset early": (108, "<f", 340.0),
    "vox_offset nan": (108, "<f", np.nan),
    "vox_offset half": (108, "<f", 352.5),
    "vox_offset beyond": (108, "<f", 1e9),
    "scl_slope inf": (112, "<f", np.inf),
    "units metres": (123, "<B", 1),
    "units unknown code": (123, "<B", 7),
    "qform_code": (252, "<h", 77),
    "sform_code": (254, "<h", -3),
    "quatern_b nan": (256, "<f", np.nan),
    "quatern_c large": (260, "<f", 4.0),
    "qoffset_x nan": (268, "<f", np.nan),
    "srow_x nan": (280, "<f", np.nan),
    "srow_x zero": (280, "<f", 0.0),
    "srow_y inf": (296 + 4, "<f", np.inf),
    "srow_z far": (312 + 12, "<f", 1e20),
    "magic": (344, "<4s", b"abc\0"),
    "magic of two files": (344, "<4s", b"ni1\0"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_each_damaged_header_field_is_refused_by_name(tmp_path, field):
    image = nib.Nifti1Image(np.ones((4, 5, 6), dtype=np.int16), np.eye(4))
    image.set_qform(np.eye(4), 1)
    image.set_sform(np.eye(4), 1)
    nib.save(image, tmp_path / "x.nii")
    raw = bytearray((tmp_path / "x.nii").read_bytes())
    offset, form, value = FIELDS[field]
    struct.pack_into(form, raw, offset, value)
    for name, content in (("x.nii", bytes(raw)), ("x.nii.gz", gzip.compress(bytes(raw)))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name) as caught:
            read_volume(tmp_path / name)
        assert caught.value.why


def test_all_problems_of_a_header_are_reported_together():
    header = nib.Nifti1Image(np.ones((4, 5, 6), dtype=np.int16), np.eye(4)).header
    header["pixdim"][1] = -1
    header["bitpix"] = 3
    header["xyzt_units"] = 1
    problems = check_header(header)
    assert len(problems) == 3
    assert [
        word for word in ("voxel size", "bitpix", "metres") if any(word in text for text in problems)
    ] == [
        "voxel size",
        "bitpix",
        "metres",
    ]


def test_random_header_bytes_never_escape_as_another_error(tmp_path):
    path = save(tmp_path / "x.nii", np.ones((4, 5, 6), dtype=np.int16), AFFINE)
    raw = path.read_bytes()
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        damaged = bytearray(raw)
        for position in rng.integers(0, 348, 6):
            damaged[position] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            volume = read_volume(path)
        except DataError:
            refused += 1
            continue
        assert np.isfinite(volume.data).all()
        assert np.isfinite(volume.affine).all()
        assert min(volume.spacing) > 0
    assert refused > 100


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_counted_and_refused(tmp_path, bad):
    data = np.zeros((4, 4, 4), dtype=np.float32)
    data[1, 2, 3] = bad
    with pytest.raises(DataError, match="1 of 64 voxels are NaN or infinite"):
        read_volume(save(tmp_path / "x.nii.gz", data))


def bomb(path: Path, shape: tuple[int, int, int], body: int) -> Path:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float64)
    header["dim"][:4] = (3, *shape)
    header["pixdim"][1:4] = 1
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    content = header.binaryblock + bytes(4 + body)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["bomb.nii", "bomb.nii.gz"])
def test_a_tiny_file_that_claims_terabytes_is_refused_before_reading(tmp_path, name):
    path = bomb(tmp_path / name, (32767, 32767, 32767), 0)
    with pytest.raises(DataError, match="GiB of voxels"):
        read_volume(path)


def test_a_stream_that_goes_on_beyond_its_header_is_not_inflated(tmp_path):
    path = bomb(tmp_path / "x.nii.gz", (2, 2, 2), 200_000_000)
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="more than its header"):
            read_volume(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000


def test_the_limit_is_the_callers_to_lower(image):
    with pytest.raises(DataError, match="limit"):
        read_volume(image, max_bytes=1000)


def test_a_file_larger_than_the_limit_is_not_even_read(tmp_path):
    path = tmp_path / "sparse.nii"
    with path.open("wb") as file:
        file.truncate(2**40)  # a terabyte that takes no space
    with pytest.raises(DataError, match="a file of 1024.0 GiB"):
        read_volume(path)


def labelled(root: Path, label: np.ndarray, *, affine: np.ndarray | None = None) -> Path:
    """Write an nnU-Net dataset of two good cases and case_b with the given label."""
    for number, name in enumerate(("case_a", "case_b", "case_c")):
        image = np.random.default_rng(number).normal(size=(4, 4, 4)).astype(np.float32)
        save(root / "imagesTr" / f"{name}_0000.nii.gz", image)
        good = np.zeros((4, 4, 4), dtype=np.uint8)
        good[1:3] = 1
        bad = name == "case_b"
        save(root / "labelsTr" / f"{name}.nii.gz", label if bad else good, affine if bad else None)
    (root / "dataset.json").write_text(
        '{"channel_names": {"0": "T2"}, "labels": {"background": 0, "lesion": 1}, "numTraining": 3,'
        ' "file_ending": ".nii.gz"}'
    )
    return root


@pytest.mark.parametrize(
    ("value", "why"), [(7, "label values 7 are unknown"), (0.5, "whole numbers"), (-1, "between 0 and")]
)
def test_unknown_fractional_and_negative_labels_name_the_case(tmp_path, value, why):
    label = np.zeros((4, 4, 4), dtype=np.float32)
    label[2, 2, 2] = value
    dataset = open_dataset(labelled(tmp_path / "d", label))
    with pytest.raises(DataError, match=why) as caught:
        load_case(dataset, dataset.case("case_b"), with_label=True)
    assert caught.value.case == "case_b"
    assert "labelsTr/case_b.nii.gz" in str(caught.value)
    report = check_dataset(tmp_path / "d")
    assert [problem.case for problem in report.problems] == ["case_b"]
    load_case(dataset, dataset.case("case_a"), with_label=True)


def test_an_empty_foreground_is_allowed_and_counted(tmp_path):
    report = check_dataset(labelled(tmp_path / "d", np.zeros((4, 4, 4), dtype=np.uint8)))
    assert report.ok
    assert report.empty == ("case_b",)


def test_a_label_on_another_grid_is_refused(tmp_path):
    shifted = np.eye(4)
    shifted[0, 3] = 5.0
    root = labelled(tmp_path / "d", np.ones((4, 4, 4), dtype=np.uint8), affine=shifted)
    dataset = open_dataset(root)
    with pytest.raises(DataError, match=r"case_b.*does not lie on its image.*5 mm"):
        load_case(dataset, dataset.case("case_b"), with_label=True)


def test_check_reports_every_damaged_case_and_reads_the_others(tmp_path):
    root = labelled(tmp_path / "d", np.ones((4, 4, 4), dtype=np.uint8))
    for name in ("case_a", "case_c"):
        path = root / "imagesTr" / f"{name}_0000.nii.gz"
        path.write_bytes(path.read_bytes()[:100])
    report = check_dataset(root)
    assert sorted((problem.case, problem.path) for problem in report.problems) == [
        ("case_a", "imagesTr/case_a_0000.nii.gz"),
        ("case_c", "imagesTr/case_c_0000.nii.gz"),
    ]
    assert report.cases == 3


def test_an_oblique_affine_and_its_codes_survive_prediction_and_rereading(tmp_path):
    source = nib.Nifti1Image(np.zeros((5, 6, 7), dtype=np.int16), AFFINE)
    source.set_sform(AFFINE, 3)
    source.set_qform(AFFINE, 1, strip_shears=True)
    nib.save(source, tmp_path / "x.nii.gz")
    volume = read_volume(tmp_path / "x.nii.gz")
    write_volume(tmp_path / "y.nii.gz", np.ones((5, 6, 7)), volume, kind="label")
    result = nib.load(tmp_path / "y.nii.gz")
    assert np.array_equal(result.affine, nib.load(tmp_path / "x.nii.gz").affine)
    assert (int(result.header["qform_code"]), int(result.header["sform_code"])) == (1, 3)


def test_names_that_differ_after_a_dot_stay_apart_and_equal_ones_are_refused(tmp_path):
    image = np.ones((2, 2, 2), dtype=np.uint8)
    cases = [
        *list_inputs(save(tmp_path / "a" / "x.1.nii", image)),
        *list_inputs(save(tmp_path / "b" / "x.2.nii", image)),
    ]
    planned = plan_outputs(cases, tmp_path / "out")
    assert [path.name for path in planned.values()] == ["x.1.nii.gz", "x.2.nii.gz"]
    twice = [*cases, *list_inputs(save(tmp_path / "c" / "X.1.nii.gz", image))]
    with pytest.raises(DataError, match="two inputs would be written to"):
        plan_outputs(twice, tmp_path / "out")
    save(tmp_path / "a" / "x.1.nii.gz", image)
    with pytest.raises(DataError, match="two files"):
        list_inputs(tmp_path / "a")


def test_an_output_never_overwrites_an_input(tmp_path):
    save(tmp_path / "x.nii.gz", np.ones((2, 2, 2), dtype=np.uint8))
    with pytest.raises(DataError, match="overwrite an input"):
        plan_outputs(list_inputs(tmp_path), tmp_path)


HOSTILE = [
    "../../x",
    "/x",
    "x\0y",
    "a" * 300,
    "",
    ".",
    "..",
    ".hidden",
    "a/b",
    "a\\b",
    "con",
    "x\n",
    "-rf",
    "a..b",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_case_identifiers_are_refused(name, tmp_path):
    with pytest.raises(DataError, match="case identifier"):
        safe_case_id(name)
    case = Case(id=name, images=(tmp_path / "x.nii.gz",))
    with pytest.raises(DataError):
        plan_outputs([case], tmp_path / "out")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "x\0", "a" * 5000])
def test_paths_that_leave_their_folder_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="leads out of"):
        safe_path(tmp_path, name)


def test_a_link_that_leaves_the_dataset_is_refused(tmp_path):
    root = labelled(tmp_path / "d", np.ones((4, 4, 4), dtype=np.uint8))
    outside = save(tmp_path / "outside.nii.gz", np.ones((4, 4, 4), dtype=np.uint8))
    (root / "labelsTr" / "case_b.nii.gz").unlink()
    (root / "labelsTr" / "case_b.nii.gz").symlink_to(outside)
    with pytest.raises(DataError, match=r"case_b.*leads out of"):
        open_dataset(root)


@pytest.mark.parametrize("image", ["../outside.nii.gz", "/etc/passwd", "imagesTr/../../outside.nii.gz"])
def test_a_dataset_json_that_names_files_outside_is_refused(tmp_path, image):
    save(tmp_path / "outside.nii.gz", np.ones((4, 4, 4), dtype=np.uint8))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "dataset.json").write_text(
        '{"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "x"},'
        f' "training": [{{"image": "{image}", "label": "{image}"}}]}}'
    )
    with pytest.raises(DataError, match="leads out of"):
        open_dataset(tmp_path / "d")


def test_no_code_of_medrl_extracts_archives():
    seen = 0
    for path in itertools.chain.from_iterable(
        (ROOT / name).rglob("*.py") for name in ("core", "cli", "plugins")
    ):
        seen += 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute | ast.Name):
                name = node.attr if isinstance(node, ast.Attribute) else node.id
                assert name not in {"extractall", "unpack_archive"}, f"{path}:{node.lineno}"
    assert seen > 20


def test_readers_and_datasets_import_neither_archives_nor_pickles():
    forbidden = {"tarfile", "zipfile", "pickle", "shelve", "marshal"}
    files = [*(ROOT / "core" / "volume").glob("*.py"), *(ROOT / "core" / "dataset").glob("*.py")]
    assert len(files) > 15
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & forbidden, f"{path}:{node.lineno}"


def test_header_text_reaches_no_output_no_log_and_no_message(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    root = labelled(tmp_path / "d", np.full((4, 4, 4), 7, dtype=np.uint8))
    for path in (*root.glob("imagesTr/*.gz"), *root.glob("labelsTr/*.gz")):
        image = nib.load(path)
        header = image.header
        for field in ("descrip", "aux_file", "intent_name", "db_name"):
            header[field] = b"PLANTED^NAME"
        header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"PLANTED^NAME"))
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, header), path)
        assert b"PLANTED" in gzip.decompress(path.read_bytes())
    dataset = open_dataset(root)
    report = check_dataset(root)
    volume, label = load_case(dataset, dataset.case("case_a"), with_label=True)
    write_volume(tmp_path / "y.nii.gz", label.data, volume, kind="label")
    assert b"PLANTED" not in gzip.decompress((tmp_path / "y.nii.gz").read_bytes())
    assert b"PLANTED" not in volume.header.binaryblock
    assert "PLANTED" not in caplog.text + str(report.to_dict())
