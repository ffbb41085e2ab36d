"""Opening datasets of every layout, folds by patient, loading a case, what predict accepts."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.core import volume as volume_module
from medrl.core.dataset import (
    Dataset,
    Split,
    check_dataset,
    content_hash,
    fingerprint,
    list_inputs,
    load_case,
    make_splits,
    open_dataset,
    patient_of,
    plan_outputs,
    read_splits,
    write_splits,
)
from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Case

LABELS = {"background": 0, "liver": 1, "tumour": 2}


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def picture(seed: int, shape=(5, 6, 7)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def segmentation(shape=(5, 6, 7), dtype=np.uint8) -> np.ndarray:
    label = np.zeros(shape, dtype=dtype)
    label[1:3], label[3] = 1, 2
    return label


def nnunet(
    root: Path, cases=("c1", "c2", "c3", "c4", "c5"), *, channels=("T2", "ADC"), tests=("t1",), **meta
) -> Path:
    for number, case in enumerate(cases):
        for k in range(len(channels)):
            save(root / "imagesTr" / f"{case}_{k:04d}.nii.gz", picture(10 * number + k))
        save(root / "labelsTr" / f"{case}.nii.gz", segmentation())
    for number, case in enumerate(tests):
        for k in range(len(channels)):
            save(root / "imagesTs" / f"{case}_{k:04d}.nii.gz", picture(1000 + 10 * number + k))
    content = {
        "channel_names": {str(k): name for k, name in enumerate(channels)},
        "labels": LABELS,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content | meta))
    return root


# --- layouts -------------------------------------------------------------------------------------------


def test_nnunet_raw_is_recognised_with_channels_labels_tests_and_masks(tmp_path):
    root = nnunet(tmp_path / "Dataset001_Liver")
    save(root / "masksTr" / "c2.nii.gz", segmentation())
    save(root / "masksTr" / "c2_prostate.nii.gz", segmentation())
    dataset = open_dataset(root)
    assert (dataset.layout, dataset.name) == ("nnunet", "Dataset001_Liver")
    assert dataset.channel_names == ("T2", "ADC")
    assert dataset.labels == LABELS
    assert [case.id for case in dataset.cases] == ["c1", "c2", "c3", "c4", "c5"]
    assert [case.id for case in dataset.test_cases] == ["t1"]
    case = dataset.case("c2")
    assert [path.name for path in case.images] == ["c2_0000.nii.gz", "c2_0001.nii.gz"]
    assert set(case.masks) == {"mask", "prostate"}
    assert case.label == root / "labelsTr" / "c2.nii.gz"


def test_msd_is_recognised_and_hidden_files_are_skipped(tmp_path):
    root = tmp_path / "Task04"
    save(root / "imagesTr" / "a.nii.gz", picture(0))
    save(root / "labelsTr" / "a.nii.gz", segmentation(dtype=np.float32))
    save(root / "imagesTs" / "b.nii.gz", picture(1))
    (root / "imagesTr" / "._a.nii.gz").write_bytes(b"resource fork")
    meta = {
        "name": "Hippo",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "liver", "2": "tumour"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        "test": ["./imagesTs/b.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(meta))
    dataset = open_dataset(root)
    assert (dataset.layout, dataset.name, dataset.labels) == ("msd", "Hippo", LABELS)
    assert ([c.id for c in dataset.cases], [c.id for c in dataset.test_cases]) == (["a"], ["b"])
    _, label = load_case(dataset, dataset.cases[0], with_label=True)
    assert label is not None
    assert label.data.dtype == np.uint8
    assert check_dataset(root).ok


def test_msd_images_with_channels_on_the_fourth_axis_are_stacked(tmp_path):
    root = tmp_path / "Task01"
    save(root / "imagesTr" / "a.nii.gz", picture(0, (5, 6, 7, 2)))
    save(root / "labelsTr" / "a.nii.gz", segmentation())
    meta = {
        "modality": {"0": "FLAIR", "1": "T1"},
        "labels": {"0": "background", "1": "liver", "2": "tumour"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    }
    (root / "dataset.json").write_text(json.dumps(meta))
    dataset = open_dataset(root)
    image, _ = load_case(dataset, dataset.cases[0], with_label=True)
    assert image.data.shape == (2, 5, 6, 7)


def test_plain_folders_are_recognised_and_labels_found_in_the_files(tmp_path):
    for number, case in enumerate(("patient01_ED", "patient01_ES", "patient02_ED")):
        save(tmp_path / "images" / f"{case}.nii.gz", picture(number))
    save(tmp_path / "labels" / "patient01_ED_gt.nii.gz", segmentation())
    save(tmp_path / "labels" / "patient01_ES_gt.nii.gz", segmentation(dtype=np.float64))
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "folder"
    assert [case.id for case in dataset.cases] == ["patient01_ED", "patient01_ES"]
    assert [case.id for case in dataset.test_cases] == ["patient02_ED"]
    assert {case.patient for case in dataset.cases} == {"patient01"}
    assert dataset.labels == {"background": 0, "label_1": 1, "label_2": 2}
    assert dataset.channel_names == ("image",)


def test_a_manifest_names_files_patients_and_masks(tmp_path):
    save(tmp_path / "data" / "x" / "t2.nii.gz", picture(0))
    save(tmp_path / "data" / "x" / "lesion.nii.gz", segmentation())
    manifest = {
        "name": "Mine",
        "root": "data",
        "channel_names": ["T2"],
        "labels": LABELS,
        "cases": [
            {
                "id": "x",
                "images": ["x/t2.nii.gz"],
                "label": "x/lesion.nii.gz",
                "patient": "p7",
                "masks": {"gland": "x/lesion.nii.gz"},
            }
        ],
    }
    (tmp_path / "cases.json").write_text(json.dumps(manifest))
    for root in (tmp_path, tmp_path / "cases.json"):
        dataset = open_dataset(root)
        assert (dataset.layout, dataset.cases[0].patient) == ("manifest", "p7")
        assert set(dataset.cases[0].masks) == {"gland"}
        load_case(dataset, dataset.cases[0], with_label=True)


def test_opening_a_dataset_reads_no_image(tmp_path, monkeypatch):
    root = nnunet(tmp_path / "d")
    for path in root.rglob("*.nii.gz"):
        path.write_bytes(b"not an image at all")

    def forbidden(*_args: object, **_more: object) -> None:
        raise RuntimeError("an image was read")

    monkeypatch.setattr(volume_module, "read_volume", forbidden)
    dataset = open_dataset(root)
    assert len(dataset.fold(0).train) == 4
    assert dataset.labels == LABELS
    assert len(list_inputs(root / "imagesTs", ("T2", "ADC"))) == 1
    assert dataset.signature()


def test_regions_become_plain_labels_and_are_kept(tmp_path):
    root = nnunet(tmp_path / "d", labels={"background": 0, "whole": [1, 2], "core": [2]})
    dataset = open_dataset(root)
    assert dataset.labels == {"background": 0, "label_1": 1, "core": 2}
    assert dataset.info["regions"] == {"whole": [1, 2]}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"labels": {}}, "labels must be"),
        ({"labels": {"background": 0, "x": "one"}}, "whole number"),
        ({"labels": {"background": 0, "x": 1, "y": 1}}, "same value"),
        ({"labels": {"background": 0, "x": 1, "ignore": 2}}, "ignore"),
        ({"channel_names": "T2"}, "channel_names"),
        ({"channel_names": {"1": "T2"}}, "channel_names"),
        ({"file_ending": ".png"}, "file_ending"),
    ],
)
def test_a_mistaken_dataset_json_is_explained(tmp_path, change, why):
    root = nnunet(tmp_path / "d", **change)
    with pytest.raises(DataError, match=why) as caught:
        open_dataset(root)
    assert "dataset.json" in str(caught.value)
    report = check_dataset(root)
    assert not report.ok


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_dataset_json_is_a_data_error(tmp_path, content):
    root = nnunet(tmp_path / "d")
    (root / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset\.json"):
        open_dataset(root)


def test_label_values_with_gaps_are_refused_with_advice(tmp_path):
    dataset = open_dataset(nnunet(tmp_path / "d", labels={"background": 0, "liver": 1, "tumour": 5}))
    with pytest.raises(DataError, match="without gaps") as caught:
        _ = dataset.labels
    assert "medrl data convert" in caught.value.do


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda root: (root / "imagesTr" / "c2_0001.nii.gz").unlink(), r"c2.*channels \[1\] missing"),
        (lambda root: (root / "labelsTr" / "c2.nii.gz").unlink(), "c2.*reference segmentation is missing"),
        (lambda root: (root / "imagesTr" / "c2_0001.nii.gz").rename(root / "imagesTr" / "c2.nii.gz"), "c2"),
        (lambda root: save(root / "labelsTr" / "zz.nii.gz", segmentation()), "zz.*without image"),
        (lambda root: save(root / "imagesTr" / "c 2_0000.nii.gz", picture(0)), "not safe"),
        (
            lambda root: [save(root / "imagesTs" / f"c2_000{k}.nii.gz", picture(k)) for k in (0, 1)],
            "used twice",
        ),
    ],
)
def test_a_case_with_missing_or_ambiguous_files_is_named_and_can_be_excluded(tmp_path, spoil, why):
    root = nnunet(tmp_path / "d")
    spoil(root)
    with pytest.raises(DataError, match=why) as caught:
        open_dataset(root)
    assert caught.value.case
    assert not check_dataset(root).ok
    rest = open_dataset(root, exclude=[caught.value.case])
    assert caught.value.case not in {case.id for case in rest.cases}


def test_an_excluded_case_that_does_not_exist_is_an_error_with_a_near_match(tmp_path):
    with pytest.raises(ConfigError) as caught:
        open_dataset(nnunet(tmp_path / "d", ("prostate_017", "prostate_018")), exclude=["prostate_17"])
    assert "prostate_017" in caught.value.do


def test_an_unknown_layout_or_folder_is_explained(tmp_path):
    with pytest.raises(ConfigError, match="nnunett"):
        open_dataset(tmp_path, layout="nnunett")
    with pytest.raises(DataError, match="no dataset is recognised"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="no such dataset folder"):
        open_dataset(tmp_path / "gone")


def test_an_unknown_case_gives_the_nearest(tmp_path):
    dataset = open_dataset(nnunet(tmp_path / "d", ("prostate_017", "liver_001")))
    with pytest.raises(DataError) as caught:
        dataset.case("prostate_0017")
    assert "prostate_017" in caught.value.do


# --- splits --------------------------------------------------------------------------------------------


def listed(names: list[str]) -> Dataset:
    return Dataset(root=Path("nowhere"), cases=[Case(id=n, images=(), patient=patient_of(n)) for n in names])


@settings(max_examples=60, deadline=None)
@given(
    visits=st.lists(st.integers(1, 4), min_size=5, max_size=20),
    folds=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
def test_folds_partition_the_cases_and_never_share_a_patient(visits, folds, seed):
    names = [f"p{p:03d}_frame{v:02d}" for p, count in enumerate(visits) for v in range(count)]
    dataset = listed(names)
    splits = make_splits(dataset, folds, seed)
    assert sorted(case.id for split in splits for case in split.val) == sorted(names)
    for split in splits:
        assert sorted(case.id for case in (*split.train, *split.val)) == sorted(names)
        assert not {case.patient for case in split.train} & {case.patient for case in split.val}
        assert split.val
    sizes = [len(split.val) for split in splits]
    assert max(sizes) - min(sizes) <= max(visits)


def test_folds_depend_on_the_seed_and_on_nothing_else():
    names = [f"c{k:02d}" for k in range(20)]
    assert make_splits(listed(names), 5, 3) == make_splits(listed(names[::-1]), 5, 3)
    assert make_splits(listed(names), 5, 3) != make_splits(listed(names), 5, 4)
    assert [case.id for case in make_splits(listed(names), 5, 0)[0].val] == ["c00", "c04", "c16", "c17"]


def test_an_overlap_by_case_or_by_patient_is_an_error():
    a, b = Case(id="a", images=(), patient="p"), Case(id="b", images=(), patient="p")
    with pytest.raises(DataError, match="1 cases are in training and validation: a"):
        Split((a,), (a,))
    with pytest.raises(DataError, match="1 patients have cases in training and validation: p"):
        Split((a,), (b,))
    assert Split((a,), (b,), grouped=False).val == (b,)


def test_splits_final_is_written_and_read_back(tmp_path):
    dataset = open_dataset(nnunet(tmp_path / "d"))
    splits = make_splits(dataset, 3, 1)
    path = write_splits(dataset.root, splits)
    assert path.name == "splits_final.json"
    assert read_splits(path, dataset) == splits
    assert dataset.fold(2, folds=5) == splits[2]
    with pytest.raises(ConfigError, match="there are 3"):
        dataset.fold(3)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([{"train": ["c1", "c2"], "val": ["c2"]}], "c2"),
        ([{"train": ["c1"], "val": ["nobody"]}], "nobody"),
        ([{"train": ["../c1"], "val": ["c2"]}], "not safe"),
        ([{"train": [], "val": ["c2"]}], "no training case"),
        ([{"train": "c1", "val": ["c2"]}], "expected a list"),
        ([], "expected a list"),
        ({"train": []}, "expected a list"),
    ],
)
def test_a_mistaken_splits_file_is_explained(tmp_path, content, why):
    dataset = open_dataset(nnunet(tmp_path / "d"))
    (dataset.root / "splits_final.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=why):
        dataset.fold(0)


def test_splits_that_part_a_patient_are_refused_unless_cases_are_independent(tmp_path):
    dataset = open_dataset(nnunet(tmp_path / "d", ("p1_ED", "p1_ES", "p2_ED", "p2_ES")))
    content = [{"train": ["p1_ED", "p2_ED"], "val": ["p1_ES", "p2_ES"]}]
    (dataset.root / "splits_final.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="2 patients"):
        dataset.fold(0)
    assert len(dataset.fold(0, group_by="case").val) == 2


def test_patients_are_grouped_by_a_pattern_or_by_the_dataset(tmp_path):
    dataset = listed(["siteA-1", "siteA-2", "siteB-1", "siteB-2", "siteC-1"])
    for split in make_splits(dataset, 3, 0, r"site(\w)"):
        assert len({case.patient for case in split.val}) == 1
    for wrong in ("site", "(", r"x(\d)"):
        with pytest.raises(ConfigError, match="group_by"):
            make_splits(dataset, 2, 0, wrong)
    root = nnunet(tmp_path / "d", patients={"c1": "same", "c2": "same"})
    assert [case.patient for case in open_dataset(root).cases] == ["same", "same", "c3", "c4", "c5"]


def test_more_folds_than_patients_is_an_error():
    with pytest.raises(ConfigError, match="3 folds of 2 patients"):
        make_splits(listed(["p1_ED", "p1_ES", "p2_ED"]), 3)


def test_an_excluded_case_drops_out_of_the_splits_file(tmp_path):
    root = nnunet(tmp_path / "d")
    write_splits(root, make_splits(open_dataset(root), 5, 0))
    dataset = open_dataset(root, exclude=["c1"])
    assert all("c1" not in {case.id for case in dataset.fold(k).train} for k in range(5))


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("patient0001_4CH_ED", "patient0001"),
        ("patient001_frame12", "patient001"),
        ("11373_1001396", "11373"),
        ("sub-01_ses-02", "sub-01"),
        ("hippocampus_003", "hippocampus_003"),
        ("liver_12", "liver_12"),
        ("ED", "ED"),
    ],
)
def test_the_patient_is_guessed_from_the_identifier(case, patient):
    assert patient_of(case) == patient


# --- loading -------------------------------------------------------------------------------------------


def test_channels_on_another_grid_are_resampled_onto_the_first_and_recorded(tmp_path, caplog):
    caplog.set_level("INFO")
    root = nnunet(tmp_path / "d")
    save(root / "imagesTr" / "c3_0001.nii.gz", picture(7, (4, 4, 4)), np.diag([2.0, 2.0, 2.0, 1.0]))
    dataset = open_dataset(root)
    image, label = load_case(dataset, dataset.case("c3"), with_label=True)
    assert image.data.shape == (2, 5, 6, 7)
    assert label is not None
    assert "c3_0001.nii.gz resampled" in caplog.text
    report = check_dataset(root)
    assert report.ok
    assert any("c3_0001.nii.gz is resampled" in note for note in report.notes)


def test_a_channel_of_another_place_is_refused(tmp_path):
    root = nnunet(tmp_path / "d")
    far = np.eye(4)
    far[2, 3] = 500.0
    save(root / "imagesTr" / "c3_0001.nii.gz", picture(7), far)
    dataset = open_dataset(root)
    with pytest.raises(DataError, match=r"c3_0001\.nii\.gz: covers only 0%"):
        load_case(dataset, dataset.case("c3"), with_label=False)


def test_a_label_stored_with_flipped_axes_is_turned_onto_its_image(tmp_path):
    root = nnunet(tmp_path / "d", channels=("T2",))
    flip = np.diag([1.0, -1.0, 1.0, 1.0])
    flip[1, 3] = 5.0
    save(root / "labelsTr" / "c1.nii.gz", segmentation()[:, ::-1].copy(), flip)
    dataset = open_dataset(root)
    _, label = load_case(dataset, dataset.case("c1"), with_label=True)
    assert label is not None
    assert np.array_equal(label.data[0], segmentation())


def test_the_same_image_under_two_names_is_reported(tmp_path):
    root = nnunet(tmp_path / "d", channels=("T2",))
    save(root / "imagesTr" / "c4_0000.nii.gz", picture(0))
    report = check_dataset(root)
    assert [(p.case, p.why) for p in report.problems] == [("c4", "the same voxels as case c1")]


def test_a_wrong_number_of_channels_names_the_case(tmp_path):
    root = nnunet(tmp_path / "d", channels=("T2",))
    save(root / "imagesTr" / "c1_0000.nii.gz", picture(0, (5, 6, 7, 3)))
    dataset = open_dataset(root)
    with pytest.raises(DataError, match="case c1: 3 channels, expected 1"):
        load_case(dataset, dataset.case("c1"), with_label=False)


def test_the_fingerprint_describes_and_the_hash_follows_the_content(tmp_path):
    root = nnunet(tmp_path / "d")
    dataset = open_dataset(root)
    found = fingerprint(dataset)
    assert found["shape_median"] == [5, 6, 7]
    assert found["spacing_median_mm"] == [1, 1, 1]
    assert found["cases"]["c1"]["label_ml"] == {"liver": 0.084, "tumour": 0.042}
    voxels = np.concatenate([picture(10 * k)[segmentation() > 0] for k in range(5)])
    assert found["intensities"]["T2"]["mean"] == pytest.approx(float(voxels.mean()), abs=1e-6)
    assert found["intensities"]["T2"]["p50"] == pytest.approx(float(np.median(voxels)), abs=1e-6)
    json.dumps(found)
    before = content_hash(dataset)
    assert before == found["content_hash"] == content_hash(open_dataset(root))
    save(root / "labelsTr" / "c1.nii.gz", np.zeros((5, 6, 7), np.uint8))
    assert content_hash(dataset) != before


# --- inputs of predict ---------------------------------------------------------------------------------


def ids(cases: list[Case]) -> list[str]:
    return [case.id for case in cases]


def test_one_file_and_a_folder_of_files_are_inputs(tmp_path):
    save(tmp_path / "in" / "a.nii.gz", picture(0))
    save(tmp_path / "in" / "b.nii", picture(1))
    assert ids(list_inputs(tmp_path / "in" / "a.nii.gz")) == ["a"]
    assert ids(list_inputs(tmp_path / "in")) == ["a", "b"]


def test_numbered_channels_are_grouped_and_a_missing_one_is_named(tmp_path):
    root = nnunet(tmp_path / "d")
    cases = list_inputs(root / "imagesTr", ("T2", "ADC"))
    assert ids(cases) == ["c1", "c2", "c3", "c4", "c5"]
    assert len(cases[0].images) == 2
    one = list_inputs(root / "imagesTr" / "c2_0000.nii.gz", ("T2", "ADC"))
    assert (ids(one), len(one[0].images)) == (["c2"], 2)
    (root / "imagesTr" / "c2_0001.nii.gz").unlink()
    with pytest.raises(DataError, match="c2_0001"):
        list_inputs(root / "imagesTr" / "c2_0000.nii.gz", ("T2", "ADC"))
    with pytest.raises(DataError, match="c2"):
        list_inputs(root / "imagesTr", ("T2", "ADC"))


def test_a_dataset_gives_its_test_cases_or_all(tmp_path):
    assert ids(list_inputs(nnunet(tmp_path / "a"), ("T2", "ADC"))) == ["t1"]
    assert ids(list_inputs(nnunet(tmp_path / "b", tests=()), ("T2", "ADC"))) == ["c1", "c2", "c3", "c4", "c5"]


def test_a_folder_for_each_case_with_files_named_after_channels(tmp_path):
    for case in ("p1", "p2"):
        for channel in ("T2", "ADC"):
            save(tmp_path / case / f"{case}_{channel.lower()}.nii.gz", picture(0))
    cases = list_inputs(tmp_path, ("T2", "ADC"))
    assert ids(cases) == ["p1", "p2"]
    assert [path.name for path in cases[0].images] == ["p1_t2.nii.gz", "p1_adc.nii.gz"]
    with pytest.raises(DataError, match="channel DWI is missing"):
        list_inputs(tmp_path, ("T2", "ADC", "DWI"))


def test_an_input_without_image_is_explained(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "gone"):
        with pytest.raises(DataError):
            list_inputs(path)


def test_outputs_are_named_after_cases(tmp_path):
    save(tmp_path / "in" / "a.nii.gz", picture(0))
    assert plan_outputs(list_inputs(tmp_path / "in"), tmp_path / "out") == {
        "a": tmp_path / "out" / "a.nii.gz"
    }
