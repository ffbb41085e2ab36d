from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medrl.core.cache import Cache
from medrl.core.config import dump_yaml
from medrl.core.errors import ConfigError, DataError
from medrl.core.registry import Registry
from medrl.core.runtime import ResumableLoader
from medrl.plugins.graft import planning
from medrl.plugins.graft.cohorts import is_cohort_file, open_cohorts, read_folds, read_settings, read_test
from medrl.plugins.graft.plans import read_statistics
from medrl.plugins.graft.samples import CaseStore
from medrl.plugins.graft.subsets import fixed_loader, fixed_subset
from medrl.plugins.graft.upstream import UpstreamTeacher
from medrl.plugins.graft.upstream.importing import open_training


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def add_case(root: Path, case: str, *, label: bool = True, mask: bool = True) -> None:
    touch(root / "imagesTr", *(f"{case}_{k:04d}.nii.gz" for k in range(3)))
    if mask:
        touch(root / "masksTr", f"{case}.nii.gz")
    if label:
        touch(root / "labelsTr", f"{case}.nii.gz")


def folds_of(cases: list[str], keys: tuple[str, str], folds: int = 5) -> list[dict[str, list[str]]]:
    return [
        {
            keys[0]: [c for i, c in enumerate(cases) if i % folds != k],
            keys[1]: [c for i, c in enumerate(cases) if i % folds == k],
        }
        for k in range(folds)
    ]


STANFORD = [f"st{k:02d}" for k in range(10)]
PICAI = [f"{10000 + k}_{1000000 + k}" for k in range(10)]
UCLA = [f"uc{k:02d}" for k in range(5)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three cohorts in the layout of the original; the images are empty files."""
    for case in (*STANFORD, *PICAI, *UCLA, "stest", "ptest"):
        add_case(tmp_path, case)
    write_json(tmp_path / "stanford.json", folds_of(STANFORD, ("train", "val")))
    write_json(tmp_path / "picai.json", folds_of(PICAI, ("inner_train", "inner_val")))
    write_json(tmp_path / "ucla.json", folds_of(UCLA, ("inner_train", "inner_val")))
    write_json(tmp_path / "stanford_test.json", {"bx_test": [{"Anon_ID": "stest", "age": 60}]})
    write_json(tmp_path / "picai_test.json", ["ptest"])
    return tmp_path


def settings_of(**changes: object) -> dict[str, object]:
    """The published file with real paths; None removes a key."""
    files = {f"{name}_dir": "imagesTr" for name in ("T2", "ADC", "DWI")}
    values: dict[str, object] = {
        "picai_fold_json": "picai.json",
        "stanford_fold_json": "stanford.json",
        "ucla_fold_json": "ucla.json",
        "stats_per_case_file": "stats.json",
        "picai_test_json": "picai_test.json",
        "stanford_test_json": "stanford_test.json",
        "dynamic_case_loading": False,
        "teacher_names": ["fold0", "fold1"],
        "features_format": "pt",
        "pred_type": "binary",
        "train_picai": True,
        "train_stanford": True,
        "train_ucla": True,
        "use_T2": True,
        "use_ADC": True,
        "use_DWI": True,
        "fold_num": -1,
        "gpu_device": 0,
        "load_checkpoint": False,
        "load_cp_no": None,
        "model_weights_path": None,
        "region_based": True,
        "remove_cases": [],
        "image_dirs": {
            "file_paths": {**files, "mask_dir": "masksTr", "lesions_dir": "labelsTr"},
            "teachers_features_paths": {
                "nnunet": "features/fold0",
                "fold0": "features/fold0",
                "fold1": ["features/a", "features/b"],
            },
        },
    }
    return {key: value for key, value in (values | changes).items() if changes.get(key, "") is not None}


def write(root: Path, **changes: object) -> Path:
    path = root / "cohorts.yaml"
    path.write_text("---\n" + dump_yaml(settings_of(**changes)))
    return path


def ids(cases: object) -> list[str]:
    return sorted(case.id for case in cases)  # type: ignore[attr-defined]


# -- the YAML file -----------------------------------------------------------------------------------------


def test_every_key_of_the_published_file_is_read(root):
    found = read_settings(write(root))
    assert [cohort.name for cohort in found.cohorts] == ["picai", "stanford", "ucla"]
    assert found.cohorts[0].folds == root / "picai.json"
    assert [cohort.test and cohort.test.name for cohort in found.cohorts] == [
        "picai_test.json",
        "stanford_test.json",
        None,
    ]
    assert found.cohorts[0].folders.images == (root / "imagesTr",) * 3
    assert (found.cohorts[0].folders.mask, found.cohorts[0].folders.labels) == (
        root / "masksTr",
        root / "labelsTr",
    )
    assert (found.pred_type, found.region_based, found.fold_num) == ("binary", True, -1)
    assert found.stats == root / "stats.json"
    assert found.teachers == (
        UpstreamTeacher("fold0", (root / "features/fold0",), "nnunet", "pt"),
        UpstreamTeacher("fold1", (root / "features/a", root / "features/b"), "nnunet", "pt"),
    )
    assert set(found.without_effect) == {
        "gpu_device",
        "load_checkpoint",
        "load_cp_no",
        "model_weights_path",
    }


def test_teachers_may_share_a_root_and_have_formats_of_their_own(root):
    values = settings_of()
    dirs = values["image_dirs"] | {"teachers_features_paths": "features"}  # type: ignore[operator]
    path = write(
        root,
        image_dirs=dirs,
        teacher_names=["nnunet", "provicnet", "prostatlasdiff"],
        features_format={"provicnet": "pt"},
    )
    found = read_settings(path).teachers
    assert [(t.family, t.format, t.folders[0].name) for t in found] == [
        ("nnunet", "npz", "nnunet"),
        ("provicnet", "pt", "provicnet"),
        ("prostatlasdiff", "npz", "prostatlasdiff"),
    ]


def test_all_problems_of_a_file_are_told_at_once(root):
    path = write(
        root,
        pred_typ="binary",
        pred_type="4class",
        stats_per_case_file="<PATH_TO_PER_CASE_NORMALIZATION_STATS>.json",
        region_based="yes",
        fold_num=1.5,
        train_other=True,
        dynamic_case_loading=True,
        teacher_names=["fold0", "fold7"],
    )
    with pytest.raises(ConfigError) as caught:
        read_settings(path)
    text = str(caught.value)
    for part in (
        "pred_typ: unknown key, did you mean 'pred_type'",
        "'4class' is neither binary nor 3class",
        "still the placeholder",
        "region_based: 'yes' is neither true nor false",
        "fold_num: 1.5",
        "train_other: there is no other_fold_json",
        "dynamic_case_loading",
        "teachers_features_paths.fold7: missing",
    ):
        assert part in text, part


def test_a_folder_or_json_manifest_is_no_cohort_file(root):
    assert is_cohort_file(Path("x/cohorts.YAML"))
    assert not is_cohort_file(Path("x/cases.json"))
    assert not is_cohort_file(root)


# -- folds -------------------------------------------------------------------------------------------------


def test_each_cohort_is_read_with_its_own_pair_of_keys(root):
    dataset = open_cohorts(write(root, fold_num=None))
    split = dataset.fold(2)
    assert ids(split.val) == sorted([STANFORD[2], STANFORD[7], PICAI[2], PICAI[7], UCLA[2]])
    assert ids(split.train) == sorted({*STANFORD, *PICAI, *UCLA} - set(ids(split.val)))
    assert dataset.cohort_of[PICAI[0]] == "picai"


def test_minus_one_trains_on_the_validation_lists_of_the_other_folds(root):
    folds = folds_of(STANFORD, ("train", "val"))
    folds[0]["train"].append("extra")  # a training list may hold more than the validation lists of the others
    add_case(root, "extra")
    write_json(root / "stanford.json", folds)
    path = write(root, train_picai=False, train_ucla=False)
    split = open_cohorts(path).fold(0)
    assert ids(split.val) == [STANFORD[0], STANFORD[5]]
    assert ids(split.train) == sorted(set(STANFORD) - {STANFORD[0], STANFORD[5]})
    path = write(root, train_picai=False, train_ucla=False, fold_num=0)
    assert "extra" in ids(open_cohorts(path).fold(0).train)


def test_a_fold_number_of_the_file_must_be_the_one_of_the_run(root):
    dataset = open_cohorts(write(root, fold_num=3))
    assert UCLA[3] in ids(dataset.fold(3).val)
    with pytest.raises(ConfigError, match="fold 0, cohorts.yaml for fold_num: 3"):
        dataset.fold(0)


def test_a_fold_that_does_not_exist_is_an_error(root):
    with pytest.raises(ConfigError, match="fold 5 does not exist, cohort picai has 5"):
        open_cohorts(write(root)).fold(5)


def test_splits_final_of_nnunet_is_a_fold_file(root):
    write_json(root / "splits_final.json", folds_of(STANFORD, ("train", "val"), folds=2))
    path = write(root, stanford_fold_json="splits_final.json", train_picai=False, train_ucla=False)
    assert ids(open_cohorts(path).fold(1).val) == STANFORD[1::2]


def test_any_pair_of_keys_is_found_and_numbers_are_case_names(tmp_path):
    content = {"fold_1": {"tr_train": [1], "my_val": [2]}, "fold_0": {"tr_train": [2], "my_val": [1]}}
    path = write_json(tmp_path / "f.json", content)
    folds = read_folds(path, cohort="x")
    assert [(fold.train, fold.val) for fold in folds] == [(("2",), ("1",)), (("1",), ("2",))]


def test_of_two_pairs_the_original_takes_outer_for_stanford_and_inner_for_the_others(tmp_path):
    entry = {"train": ["a"], "val": ["b"], "inner_train": ["c"], "inner_val": ["d"]}
    path = write_json(tmp_path / "f.json", [entry])
    assert read_folds(path, cohort="stanford")[0].val == ("b",)
    assert read_folds(path, cohort="picai")[0].val == ("d",)
    with pytest.raises(DataError, match="several pairs"):
        read_folds(path, cohort="other")
    assert read_folds(path, cohort="other", keys=("train", "inner_val"))[0].val == ("d",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([{"train": ["a", "b"], "val": ["b"]}], "1 cases are in train and val: b"),
        ([{"train": ["a", "a"], "val": ["b"]}], "lists cases twice: a"),
        ([{"train": ["a"], "val": ["../b"]}], "not safe as a file name"),
        ([{"train": ["a"], "val": [None]}], "None is no case identifier"),
        ([{"train": ["a"], "val": ["b"]}, {"train": ["a"]}], "fold 1 has no list 'val'"),
        ([{"training": ["a"]}], "no pair of training and validation lists"),
        ([], "expected a list of folds"),
    ],
)
def test_a_damaged_fold_file_says_what_is_wrong(tmp_path, content, why):
    with pytest.raises(DataError, match=why):
        read_folds(write_json(tmp_path / "f.json", content), cohort="x")


def test_test_lists_are_plain_or_of_stanfords_form(tmp_path):
    plain = write_json(tmp_path / "a.json", ["x", 12])
    assert read_test(plain) == ("x", "12")
    stanford = write_json(tmp_path / "b.json", {"note": "t", "bx_test": [{"Anon_ID": "y"}], "rp_test": ["z"]})
    assert read_test(stanford) == ("y",)
    with pytest.raises(DataError, match="expected one list"):
        read_test(write_json(tmp_path / "c.json", {"one": [], "two": []}))


def test_test_cases_are_set_aside(root):
    dataset = open_cohorts(write(root))
    assert ids(dataset.test_cases) == ["ptest", "stest"]
    assert dataset.case("stest").label is not None


def test_a_test_case_in_a_fold_is_an_error(root):
    write_json(root / "picai_test.json", [PICAI[3]])
    with pytest.raises(DataError, match=f"test list and in training: {PICAI[3]}"):
        open_cohorts(write(root)).fold(0)


def test_a_patient_in_training_and_validation_is_an_error_unless_cases_are_grouped_alone(root):
    other = f"{PICAI[0].split('_')[0]}_2000000"
    add_case(root, other)
    folds = folds_of([*PICAI, other], ("inner_train", "inner_val"), folds=3)
    write_json(root / "picai.json", folds)
    path = write(root, train_stanford=False, train_ucla=False, fold_num=None)
    with pytest.raises(DataError, match="patients have cases in training and validation"):
        open_cohorts(path).fold(0)
    assert open_cohorts(path).fold(0, group_by="case").val


def test_a_case_of_two_cohorts_is_an_error(root):
    write_json(root / "ucla.json", folds_of([*UCLA, STANFORD[0]], ("inner_train", "inner_val")))
    with pytest.raises(DataError, match=f"case {STANFORD[0]}: it is listed in the cohorts stanford and ucla"):
        open_cohorts(write(root))


# -- files of a case ---------------------------------------------------------------------------------------


def test_a_case_never_takes_the_files_of_one_whose_name_begins_alike(root):
    add_case(root, "10")
    add_case(root, "100")
    (root / "masksTr" / "10.nii.gz").unlink()
    write_json(root / "ucla.json", [{"inner_train": ["100", *UCLA[1:]], "inner_val": ["10", UCLA[0]]}] * 5)
    with pytest.raises(DataError, match=r"case 10: no prostate mask 10.nii.gz in .*similar there: 100.nii"):
        open_cohorts(write(root, fold_num=None))
    touch(root / "masksTr", "10_prostate.nii.gz")
    case = open_cohorts(write(root, fold_num=None)).case("10")
    assert [path.name for path in case.images] == [f"10_000{k}.nii.gz" for k in range(3)]
    assert case.masks["prostate"].name == "10_prostate.nii.gz"


def test_two_files_for_one_thing_are_an_error(root):
    touch(root / "imagesTr", f"{UCLA[0]}_0001.nii")
    with pytest.raises(DataError, match=f"case {UCLA[0]}: several files for its ADC"):
        open_cohorts(write(root))


def test_missing_files_are_counted_and_the_first_is_named(root):
    for case in STANFORD[:3]:
        (root / "imagesTr" / f"{case}_0002.nii.gz").unlink()
    with pytest.raises(DataError, match=rf"case {STANFORD[0]}: no DWI .*and 2 more problems"):
        open_cohorts(write(root))


def test_a_training_case_without_label_is_unlabelled_and_a_validation_case_without_one_an_error(root):
    (root / "labelsTr" / f"{UCLA[1]}.nii.gz").unlink()
    dataset = open_cohorts(write(root))
    assert ids(dataset.unlabelled) == [UCLA[1]]
    assert UCLA[1] not in ids(dataset.cases)
    assert [case.label for case in dataset.fold(0).train if case.id == UCLA[1]] == [None]
    with pytest.raises(DataError, match=f"case {UCLA[1]}: 1 validation cases have no label"):
        dataset.fold(1)


def test_removed_and_excluded_cases_are_left_out_and_need_no_files(root):
    (root / "imagesTr" / f"{UCLA[0]}_0000.nii.gz").unlink()
    dataset = open_cohorts(write(root, remove_cases=[UCLA[0]]), exclude=[PICAI[0]])
    everything = ids((*dataset.fold(0).train, *dataset.fold(0).val))
    assert UCLA[0] not in everything
    assert PICAI[0] not in everything
    with pytest.raises(ConfigError, match="no such case: nobody"):
        open_cohorts(write(root), exclude=["nobody"])


def test_channels_may_be_left_out(root):
    dataset = open_cohorts(write(root, use_ADC=False))
    assert dataset.channel_names == ("T2", "DWI")
    assert [path.name for path in dataset.case(UCLA[0]).images] == [
        f"{UCLA[0]}_0000.nii.gz",
        f"{UCLA[0]}_0002.nii.gz",
    ]


def test_a_cohort_may_have_folders_of_its_own_with_names_of_their_own(root):
    place = {
        "T2_dir": "u/t2",
        "ADC_dir": "u/adc",
        "DWI_dir": "u/dwi",
        "mask_dir": "u/m",
        "lesions_dir": "u/l",
    }
    for case in UCLA:
        touch(root / "u/t2", f"{case}_t2.nii.gz")
        touch(root / "u/adc", f"{case}.nii.gz")
        touch(root / "u/dwi", f"{case}_DWI.nii.gz")
        touch(root / "u/m", f"{case}_mask.nii.gz")
        touch(root / "u/l", f"{case}_lesion.nii.gz")
    dirs = settings_of()["image_dirs"] | {"ucla_paths": place}  # type: ignore[operator]
    case = open_cohorts(write(root, image_dirs=dirs)).case(UCLA[0])
    assert [path.name for path in case.images] == [
        f"{UCLA[0]}_t2.nii.gz",
        f"{UCLA[0]}.nii.gz",
        f"{UCLA[0]}_DWI.nii.gz",
    ]
    assert case.label == root / "u/l" / f"{UCLA[0]}_lesion.nii.gz"


def test_the_reader_is_a_registered_part(root):
    registry = Registry("datasets")
    registry.recorder("graft").add(
        "cohorts", "medrl.plugins.graft.cohorts:open_cohorts", summary="several cohorts"
    )
    assert len(registry.build("graft.cohorts", path=write(root)).cases) == 25


# -- with real files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pred_type", "region_based", "kind"),
    [
        ("binary", True, "binary"),
        ("3class", True, "3class"),
        ("binary", False, "binary_classes"),
        ("3class", False, "classes"),
    ],
)
def test_cases_of_a_cohort_file_become_samples(
    make_job, manager, phantoms, tmp_path, pred_type, region_based, kind
):
    for name in ("imagesTr", "masksTr", "labelsTr"):
        shutil.copytree(phantoms / name, tmp_path / name)
    cases = [f"prostate_{k:03d}" for k in range(6)]
    write_json(tmp_path / "ucla.json", folds_of(cases, ("inner_train", "inner_val"), folds=3))
    statistics = {case: [100.0, 10.0, 1000.0, 100.0, 50.0, 5.0] for case in cases}
    write_json(tmp_path / "stats.json", statistics)
    masks = sorted((tmp_path / "masksTr").rglob("*.nii.gz"))[0].parent
    dirs = settings_of()["image_dirs"]
    dirs["file_paths"]["mask_dir"] = str(masks)  # type: ignore[index]
    path = write(
        tmp_path,
        train_picai=False,
        train_stanford=False,
        image_dirs=dirs,
        pred_type=pred_type,
        region_based=region_based,
        picai_test_json=None,
        stanford_test_json=None,
    )
    job = make_job(tmp_path / "run", {"data": {"root": str(path)}})
    cfg, dataset, split = open_training(job.config)
    assert ids(split.val) == [cases[0], cases[3]]
    plan = planning.resolve_plan(cfg, dataset, split.train, (1, 1, 1), None)
    assert (plan.target_kind, plan.normalization, plan.window) == (kind, "stats", "mask")
    store = CaseStore(dataset, plan, None)
    prepared = store.get(split.train[0])
    raw = nib.load(split.train[0].images[0]).get_fdata().transpose(2, 1, 0)
    assert np.allclose(prepared.image[0], (raw - 100.0) / 10.0, atol=1e-5)
    labels = next(found for case in split.train if np.any((found := store.get(case).label) == 3))
    voxels = torch.from_numpy(np.array(labels)).long()
    target = dict(zip(plan.target.names, plan.target.encode(voxels[None])[0].bool(), strict=True))
    expected = {
        "binary": {"prostate": voxels >= 1, "cancer": voxels >= 2},
        "3class": {"prostate": voxels >= 1, "cancer": voxels >= 2, "significant_cancer": voxels == 3},
        "binary_classes": {"background": voxels == 0, "prostate": voxels == 1, "cancer": voxels >= 2},
        "classes": {
            "background": voxels == 0,
            "prostate": voxels == 1,
            "PCa": voxels == 2,
            "csPCa": voxels == 3,
        },
    }[kind]
    assert target.keys() == expected.keys()
    assert all(torch.equal(target[name], expected[name]) for name in expected)


def test_one_mean_and_deviation_of_a_case_hold_for_all_its_channels(tmp_path):
    path = write_json(tmp_path / "s.json", {"a": {"mean": 4, "std": 2.0}, "b": {"mean": 1, "std": 1}})
    assert read_statistics(path, ("T2", "ADC", "DWI"))["a"] == ((4.0,) * 3, (2.0,) * 3)


# -- sharing and caching (specification §10, test 13) -------------------------------------------------------


def test_ten_cases_on_four_ranks_are_three_each():
    shares = [fixed_subset(range(10), rank, 4) for rank in range(4)]
    assert [len(share) for share in shares] == [3, 3, 3, 3]
    assert set().union(*shares) == set(range(10))


def test_nine_cases_on_eight_ranks_are_two_each_where_the_original_gives_negative_lengths():
    shares = [fixed_subset(range(9), rank, 8) for rank in range(8)]
    assert [len(share) for share in shares] == [2] * 8
    assert set().union(*shares) == set(range(9))


@pytest.mark.parametrize(("cases", "ranks", "batch"), [(10, 4, 1), (10, 4, 2), (9, 8, 1), (20, 3, 4)])
def test_the_loader_gives_every_rank_the_same_number_of_samples(cases, ranks, batch):
    for epoch in range(2):
        seen: list[int] = []
        for rank in range(ranks):
            loader = ResumableLoader(
                list(range(cases)), batch_size=batch, shuffle=True, seed=1, rank=rank, world_size=ranks
            )
            own = [int(value) for values in loader.epoch(epoch) for value in values]
            assert len(own) == -(-cases // ranks)
            seen += own
        assert set(seen) == set(range(cases))


def test_a_fixed_loader_sees_its_own_cases_in_a_new_order_each_epoch(make_job, tmp_path):
    job = make_job(tmp_path / "run")
    with job.runtime() as rt:
        rt.rank, rt.world_size = 1, 2
        loader = fixed_loader(rt, list(range(9)), 9, batch_size=1, name="train")  # type: ignore[arg-type]
        epochs = [[int(next(loader)) for _ in range(5)] for _ in range(3)]
        state = loader.state_dict()
        rt.rank, rt.world_size = 0, 1
    assert all(sorted(epoch) == [0, 5, 6, 7, 8] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert state["done"] == 15


def test_of_two_places_the_one_used_least_recently_is_freed(tmp_path):
    array = np.zeros(4096, dtype=np.uint8)
    cache = Cache(tmp_path)
    keys = {name: name * 64 for name in "abc"}
    cache.put(keys["a"], {"x": array}, {})
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    cache = Cache(tmp_path, max_bytes=int(2.5 * size))
    cache.put(keys["b"], {"x": array}, {})
    assert cache.get(keys["a"]) is not None
    fresh = Cache(tmp_path, max_bytes=int(2.5 * size))
    fresh.put(keys["c"], {"x": array}, {})
    assert [fresh.get(keys[name]) is not None for name in "abc"] == [True, False, True]
