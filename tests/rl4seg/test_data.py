from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from skimage.exposure import equalize_adapthist

from medrl.core.errors import ConfigError, DataError
from medrl.core.phantoms.echo import write_echo
from medrl.core.types import Volume
from medrl.core.volume import read_volume
from medrl.plugins.rl4seg.data import (
    EchoDataset,
    ImageSet,
    SamplePlan,
    divide_target,
    join_labels,
    load_source,
    load_target,
    make_plan,
    open_camus,
    open_domain,
    open_esed,
    open_vital,
    place,
    plan_of,
    prepare_labels,
    prepare_volume,
    restore_labels,
    restore_volume,
)
from medrl.plugins.rl4seg.data_config import SampleConfig, SourceConfig, TargetConfig

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "camus_4ch"


@dataclass(frozen=True)
class Blocks:
    """The blocks of a config that data are loaded by."""

    data: SourceConfig
    target: TargetConfig
    sample: SampleConfig


def blocks(
    source: Path, target: Path | None = None, sample: dict[str, Any] | None = None, **values: Any
) -> Blocks:
    data = {"folds": 3, **{key: value for key, value in values.items() if key in SourceConfig.model_fields}}
    return Blocks(
        data=SourceConfig(root=source, **data),
        target=TargetConfig(root=target, **{"folds": 3, **values}),
        sample=SampleConfig(**{"clahe": False, **(sample or {})}),
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A source, and a target of another scanner whose images are larger."""
    root = tmp_path_factory.mktemp("phantoms")
    write_echo(root / "source", cases=9, test_cases=2, shape=(32, 32), seed=1)
    write_echo(root / "target", cases=12, test_cases=3, shape=(40, 36), shift=0.85, seed=2)
    return root


@pytest.fixture
def source(phantoms):
    return phantoms / "source"


@pytest.fixture
def target(phantoms, tmp_path):
    """A copy of the target that a test may spoil."""
    return Path(shutil.copytree(phantoms / "target", tmp_path / "target"))


def write_nifti(path: Path, data: np.ndarray, spacing: tuple[float, ...] = (0.5, 0.5, 1.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([*spacing, 1.0])), path)
    return path


def volume_of(data: np.ndarray, spacing: tuple[float, float, float] = (0.5, 0.25, 1.0)) -> Volume:
    return Volume(data=data.astype(np.float32), affine=np.diag([*spacing, 1.0]), spacing=spacing)


def plan(size: tuple[int, int], **changes: Any) -> SamplePlan:
    labels = {"background": 0, "LV": 1, "MYO": 2}
    made = make_plan(SampleConfig(clahe=False), labels=labels, channel_names=("echo",), size=size)
    return replace(made, **changes)


def spoil(folder: Path) -> None:
    """Make every file of labels unreadable."""
    paths = sorted(folder.rglob("*.nii.gz"))
    assert paths
    for path in paths:
        path.write_bytes(b"these are no labels")


def names(images: ImageSet | None) -> set[str]:
    return set() if images is None else set(images.ids)


# --- source --------------------------------------------------------------------------------------------


def test_the_source_is_divided_by_patient_and_has_labels(source):
    domain = load_source(blocks(source))
    assert (len(domain.train), len(domain.val), len(domain.test)) == (6, 3, 2)
    assert domain.train.images.shape == (6, 1, 32, 32)
    assert domain.train.images.dtype == torch.float32
    assert domain.train.labels.dtype == torch.uint8
    assert 0.0 <= float(domain.train.images.min()) < float(domain.train.images.max()) <= 1.0
    assert not set(domain.train.subjects) & set(domain.val.subjects)
    assert domain.train.label_names == {"background": 0, "LV": 1, "MYO": 2}
    assert domain.train.spacing_mm[0].tolist() == pytest.approx([154 / 32, 154 / 32], rel=1e-5)


def test_images_of_the_own_size_are_the_stored_ones_divided_by_255(source):
    domain = load_source(blocks(source))
    name = domain.train.ids[0]
    stored = np.asanyarray(nib.load(source / "imagesTr" / f"{name}_0000.nii.gz").dataobj)
    label = np.asanyarray(nib.load(source / "labelsTr" / f"{name}.nii.gz").dataobj)
    np.testing.assert_array_equal(domain.train.images[0, 0].numpy(), stored.astype(np.float32) / 255)
    np.testing.assert_array_equal(domain.train.labels[0].numpy(), label)


def test_clahe_is_that_of_scikit_image(source):
    plain = load_source(blocks(source)).train.images[0, 0].numpy()
    equal = load_source(blocks(source, sample={"clahe": True})).train.images[0, 0].numpy()
    expected = equalize_adapthist(plain.astype(np.float64), clip_limit=0.01)
    np.testing.assert_allclose(equal, expected, atol=1e-6)
    assert np.abs(equal - plain).max() > 0.1


def test_loading_twice_gives_the_same_and_leaves_the_global_random_numbers_alone(source):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = load_source(blocks(source)), load_source(blocks(source))
    assert torch.equal(first.train.images, second.train.images)
    assert first.train.ids == second.train.ids
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


def test_a_changed_image_is_not_taken_from_the_cache(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    domain = load_source(blocks(copy))
    path = copy / "imagesTr" / f"{domain.train.ids[0]}_0000.nii.gz"
    write_nifti(path, np.full((32, 32), 51, np.uint8), (4.8125, 4.8125, 1.0))
    label = copy / "labelsTr" / f"{domain.train.ids[0]}.nii.gz"
    write_nifti(label, np.asanyarray(nib.load(label).dataobj), (4.8125, 4.8125, 1.0))
    again = load_source(blocks(copy))
    assert again.train.images[0].unique().tolist() == pytest.approx([0.2])
    assert torch.equal(again.train.images[1:], domain.train.images[1:])


# --- target, and the wall around its labels -------------------------------------------------------------


def test_target_labels_are_not_opened_even_if_they_cannot_be_read(source, target):
    expected = load_target(blocks(source, target))
    for folder in ("labelsTr", "labelsTs"):
        spoil(target / folder)
    domain = load_target(blocks(source, target))
    assert domain.train.labels is domain.val.labels is domain.test.labels is None
    for part in ("train", "val", "test"):
        found, other = getattr(domain, part), getattr(expected, part)
        assert found.ids == other.ids
        assert torch.equal(found.images, other.images)


def test_scrambling_target_labels_changes_no_image_and_no_division(source, target):
    expected = load_target(blocks(source, target), labels="test")
    for path in (target / "labelsTr").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(2 - np.asanyarray(image.dataobj), image.affine), path)
    domain = load_target(blocks(source, target), labels="test")
    assert domain.train.labels is domain.val.labels is None
    assert torch.equal(domain.train.images, expected.train.images)
    assert torch.equal(domain.test.labels, expected.test.labels)


def test_a_target_without_label_folders_trains(source, target):
    shutil.rmtree(target / "labelsTr")
    shutil.rmtree(target / "labelsTs")
    domain = load_target(blocks(source, target))
    assert len(domain.train) + len(domain.val) == 12
    assert len(domain.test) == 3
    assert load_target(blocks(source, target), labels="test").test is None


def test_labels_of_the_test_part_are_read_for_scoring_alone(source, target):
    spoil(target / "labelsTr")
    domain = load_target(blocks(source, target), labels="test")
    assert domain.train.labels is None
    assert domain.test.labels.unique().tolist() == [0, 1, 2]


def test_training_labels_of_the_target_are_refused_unless_they_are_allowed(source, target):
    with pytest.raises(ConfigError, match="would read the labels of the target"):
        load_target(blocks(source, target), labels="train")
    domain = load_target(blocks(source, target, allow_labels=True), labels="train")
    assert domain.train.labels is not None
    assert domain.val.labels is not None


def test_missing_training_labels_of_the_target_are_named_where_they_are_asked_for(source, target):
    (target / "labelsTr" / "echo_004.nii.gz").unlink()
    with pytest.raises(DataError, match="1 target training images have no label"):
        load_target(blocks(source, target, allow_labels=True, val_fraction=0.0), labels="train")


def test_the_target_is_prepared_as_the_source(source, target):
    cfg = blocks(source, target)
    domain = load_target(cfg)
    assert domain.train.images.shape[1:] == (1, 32, 32)
    assert plan_of(None, cfg) == plan_of(load_source(cfg), cfg) == domain.plan


def test_the_parts_of_the_target_share_no_patient_and_all_modes_have_the_same(source, target):
    cfg = blocks(source, target, allow_labels=True, val_fraction=0.25)
    domains = [load_target(cfg, labels=mode) for mode in ("none", "test", "train")]
    assert len({(d.train.ids, d.val.ids, d.test.ids) for d in domains}) == 1
    domain = domains[0]
    assert len(domain.val) == 3
    assert not names(domain.train) & names(domain.val)
    assert len(names(domain.train) | names(domain.val) | names(domain.test)) == 15


def test_at_most_max_images_train_and_zero_takes_all(source, target):
    few = load_target(blocks(source, target, max_images=4, val_fraction=0.0))
    everything = load_target(blocks(source, target, max_images=0, val_fraction=0.0))
    assert (len(few.train), few.val, len(everything.train)) == (4, None, 12)
    assert set(few.train.ids) < set(everything.train.ids)
    assert few.train.ids == load_target(blocks(source, target, max_images=4, val_fraction=0.0)).train.ids


def test_a_target_without_test_images_tests_on_one_fold(source, target):
    shutil.rmtree(target / "imagesTs")
    shutil.rmtree(target / "labelsTs")
    spoil(target / "labelsTr")
    domain = load_target(blocks(source, target, val_fraction=0.0))
    assert (len(domain.train), len(domain.test)) == (8, 4)
    assert not set(domain.train.subjects) & set(domain.test.subjects)


def test_in_a_plain_folder_labelled_images_test_and_the_others_train(source, target, tmp_path):
    plain = tmp_path / "plain"
    for path in (target / "imagesTr").iterdir():
        shutil.copy(path, _made(plain / "images") / path.name.replace("_0000", ""))
    for name in ("echo_000", "echo_001"):
        shutil.copy(target / "labelsTr" / f"{name}.nii.gz", _made(plain / "labels") / f"{name}.nii.gz")
    domain = load_target(blocks(source, plain), labels="test")
    assert domain.test.ids == ("echo_000", "echo_001")
    assert len(domain.train) + len(domain.val) == 10
    shutil.rmtree(plain / "labels")
    bare = load_target(blocks(source, plain))
    assert bare.test is None
    assert len(bare.train) + len(bare.val) == 12


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_target_with_other_label_values_is_matched_by_name(source, target):
    expected = load_target(blocks(source, target), labels="test").test.labels
    for path in (target / "labelsTs").iterdir():
        image = nib.load(path)
        changed = np.asarray([0, 3, 1, 2], np.uint8)[np.asanyarray(image.dataobj)]
        nib.save(nib.Nifti1Image(changed, image.affine), path)
    record = (target / "dataset.json").read_text()
    renamed = record.replace('"LV": 1', '"LV": 3').replace('"MYO": 2', '"MYO": 1, "LA": 2')
    assert renamed != record
    (target / "dataset.json").write_text(renamed)
    assert torch.equal(load_target(blocks(source, target), labels="test").test.labels, expected)
    (target / "dataset.json").write_text(renamed.replace('"LA"', '"RV"'))
    with pytest.raises(DataError, match="the source has no such label"):
        load_target(blocks(source, target), labels="test")
    merged = blocks(source, target, sample={"merge": {"RV": "background"}})
    assert torch.equal(load_target(merged, labels="test").test.labels, expected)


def test_a_target_is_needed_and_must_exist(source, tmp_path):
    with pytest.raises(ConfigError, match="--target|no dataset is named"):
        load_target(blocks(source))
    with pytest.raises(DataError, match="no such dataset"):
        load_target(blocks(source, tmp_path / "nowhere"))


# --- preparation -----------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_comes_back_bit_for_bit():
    rng = np.random.default_rng(0)
    prepared = prepare_volume(volume_of(rng.integers(0, 256, (1, 100, 70, 3))), plan((100, 70)))
    assert prepared.images.shape == (3, 1, 100, 70)
    maps = rng.random((3, 4, 100, 70), dtype=np.float32)
    back = restore_volume(maps, prepared)
    assert back.shape == (4, 100, 70, 3)
    np.testing.assert_array_equal(back, np.moveaxis(maps, 0, -1))
    labels = rng.integers(0, 4, (3, 100, 70)).astype(np.uint8)
    np.testing.assert_array_equal(restore_labels(labels, prepared), np.moveaxis(labels, 0, -1))


@pytest.mark.parametrize("keep_aspect", [False, True])
@pytest.mark.parametrize("shape", [(90, 61, 2), (20, 33, 1), (1, 64, 50), (48, 1, 30)])
def test_maps_return_to_the_grid_of_the_file_whatever_its_shape(shape, keep_aspect):
    rng = np.random.default_rng(1)
    prepared = prepare_volume(volume_of(rng.random((1, *shape))), plan((48, 40), keep_aspect=keep_aspect))
    maps = rng.random((len(prepared.images), 3, 48, 40), dtype=np.float32)
    maps /= maps.sum(axis=1, keepdims=True)
    back = restore_volume(maps, prepared)
    assert back.shape == (3, *shape)
    np.testing.assert_allclose(back.sum(axis=0), 1.0, atol=1e-5)
    assert restore_labels(maps.argmax(axis=1), prepared).shape == shape


def test_a_smooth_shape_survives_the_way_there_and_back():
    x, y = np.meshgrid(np.arange(120), np.arange(80), indexing="ij")
    disc = ((x - 60) ** 2 + (y - 44) ** 2 < 25**2).astype(np.uint8)
    for keep_aspect in (False, True):
        at = place(volume_of(disc[None, :, :, None]), plan((64, 64), keep_aspect=keep_aspect))
        back = restore_labels(at.labels_to_network(disc[:, :, None]), at)[:, :, 0]
        assert 2 * (back & disc).sum() / (back.sum() + disc.sum()) > 0.97
        soft = at.labels_to_network(disc[:, :, None])[:, None].astype(np.float32)
        linear = restore_volume(soft, at)[0, :, :, 0] > 0.5
        assert 2 * (linear & (disc > 0)).sum() / (linear.sum() + disc.sum()) > 0.98


def test_the_spacing_follows_the_resize():
    stretched = place(volume_of(np.zeros((1, 100, 50, 1))), plan((50, 50)))
    assert stretched.spacing_mm == pytest.approx((1.0, 0.25))
    kept = place(volume_of(np.zeros((1, 100, 50, 1))), plan((50, 50), keep_aspect=True))
    assert kept.inner == (50, 25)
    assert kept.start == (0, 12)
    assert kept.spacing_mm == pytest.approx((1.0, 0.5))


def test_what_is_filled_up_is_black_and_background():
    prepared = prepare_volume(volume_of(np.full((1, 100, 50, 1), 255)), plan((50, 50), keep_aspect=True))
    image = prepared.images[0, 0]
    assert torch.equal(image[:, 12:37], torch.ones(50, 25))
    assert float(image[:, :12].sum() + image[:, 37:].sum()) == 0.0
    labels = prepared.labels_to_network(np.ones((100, 50, 1), np.uint8))
    assert labels[0, :, 12:37].all()
    assert labels.sum() == 50 * 25


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 1.0), (255.0, 1.0), (128.0, 128 / 255)])
def test_grey_values_become_0_to_1(factor, expected):
    data = np.linspace(0, factor, 64).reshape(1, 8, 8, 1)
    assert float(prepare_volume(volume_of(data), plan((8, 8))).images.max()) == pytest.approx(expected)


def test_values_beyond_grey_need_percentiles():
    data = np.arange(0, 4096, 4).reshape(1, 32, 32, 1)
    with pytest.raises(DataError, match="expected grey values"):
        prepare_volume(volume_of(data), plan((32, 32)))
    percentile = plan((32, 32), intensity="percentile", percentiles=(1.0, 99.0))
    images = prepare_volume(volume_of(data), percentile).images
    assert float(images.min()) == 0.0
    assert float(images.max()) == 1.0
    assert float(images.median()) == pytest.approx(0.5, abs=0.01)


def test_several_channels_are_prepared_one_by_one():
    rng = np.random.default_rng(0)
    data = np.concatenate([rng.random((1, 24, 24, 1)), np.zeros((1, 24, 24, 1))])
    both = plan((24, 24), channel_names=("b", "m"), clahe=0.01)
    images = prepare_volume(volume_of(data), both).images
    assert images.shape == (1, 2, 24, 24)
    expected = equalize_adapthist(data[0, :, :, 0].astype(np.float32).astype(np.float64), clip_limit=0.01)
    np.testing.assert_allclose(images[0, 0].numpy(), expected, atol=1e-6)
    assert float(images[0, 1].max()) == 0.0
    with pytest.raises(DataError, match="2 channels, expected 1"):
        prepare_volume(volume_of(data), plan((24, 24)))


def test_resized_labels_have_no_new_values_and_few_jags():
    label = np.zeros((64, 64, 1), np.uint8)
    label[16:48, 16:48] = 2
    label[24:40, 24:40] = 1
    at = place(volume_of(label[None]), plan((32, 32)))
    found = at.labels_to_network(label)
    expected = np.zeros((32, 32), np.uint8)
    expected[8:24, 8:24] = 2
    expected[12:20, 12:20] = 1
    np.testing.assert_array_equal(found[0], expected)


def test_labels_are_joined_and_numbered_anew():
    names_, labels, values = join_labels(
        {"background": 0, "LV": 1, "MYO": 2, "LA": 3}, {"LA": "background", "RV": "background"}
    )
    assert labels == {"background": 0, "LV": 1, "MYO": 2}
    assert values == {0: 0, 1: 1, 2: 2, 3: 0}
    assert names_ == {"LA": "background", "RV": "background"}
    _, labels, values = join_labels({"BG": 0, "a": 1, "b": 2, "c": 3, "d": 4}, {"1": "background", "c": "4"})
    assert labels == {"BG": 0, "b": 1, "d": 2}
    assert values == {0: 0, 1: 0, 2: 1, 3: 2, 4: 2}
    assert join_labels({"background": 0, "LA": 1}, {"LA": "LA"})[1] == {"background": 0, "LA": 1}


@pytest.mark.parametrize(
    ("merge", "why"),
    [
        ({"LV": "MYOO"}, "no label 'MYOO'"),
        ({"background": "LV"}, "the background cannot be joined"),
        ({"LV": "MYO", "MYO": "background"}, "which is itself joined"),
    ],
)
def test_labels_that_cannot_be_joined_are_refused(merge, why):
    with pytest.raises(ConfigError, match=why):
        join_labels({"background": 0, "LV": 1, "MYO": 2}, merge)


def test_an_unknown_label_value_is_named():
    label = volume_of(np.full((1, 8, 8, 1), 7))
    label = replace(label, data=label.data.astype(np.uint8))
    with pytest.raises(DataError, match=r"label values \[7\] are unknown"):
        prepare_labels(label, place(label, plan((8, 8))), {0: 0, 1: 1}, "case")


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_any_number_of_classes_is_read(tmp_path, classes):
    rng = np.random.default_rng(0)
    for number in range(4):
        write_nifti(
            tmp_path / "d" / "images" / f"c{number}.nii.gz", rng.integers(0, 255, (20, 14)).astype(np.uint8)
        )
        label = rng.integers(0, classes, (20, 14)).astype(np.uint8)
        write_nifti(tmp_path / "d" / "labels" / f"c{number}.nii.gz", label)
    domain = load_source(blocks(tmp_path / "d", folds=2))
    assert domain.train.classes == classes
    assert domain.train.labels.unique().tolist() == list(range(classes))
    assert domain.train.images.shape[1:] == (1, 20, 14)


def test_slices_of_a_volume_are_images_of_one_patient(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        write_nifti(
            tmp_path / "d" / "images" / f"c{number}.nii.gz",
            rng.integers(0, 255, (16, 18, 3)).astype(np.uint8),
        )
        write_nifti(
            tmp_path / "d" / "labels" / f"c{number}.nii.gz", rng.integers(0, 2, (16, 18, 3)).astype(np.uint8)
        )
    domain = load_source(blocks(tmp_path / "d", folds=2))
    assert domain.train.images.shape == (6, 1, 16, 18)
    assert domain.train.ids[:3] == tuple(f"{domain.train.subjects[0]}_z00{z}" for z in range(3))
    assert len(set(domain.train.subjects)) == 2


def test_sizes_that_differ_are_brought_to_256_unless_one_is_asked_for(tmp_path):
    for number, shape in enumerate([(20, 14), (22, 18), (20, 14)]):
        write_nifti(tmp_path / "d" / "images" / f"c{number}.nii.gz", np.full(shape, 9, np.uint8))
        write_nifti(tmp_path / "d" / "labels" / f"c{number}.nii.gz", np.ones(shape, np.uint8))
    assert load_source(blocks(tmp_path / "d", folds=3)).train.images.shape[2:] == (256, 256)
    asked = blocks(tmp_path / "d", folds=3, sample={"size": (24, 16)})
    assert load_source(asked).train.images.shape[2:] == (24, 16)


def test_the_plan_survives_the_checkpoint(source):
    domain = load_source(blocks(source, sample={"clahe": True, "keep_aspect": True, "size": (24, 40)}))
    meta = domain.plan.to_meta()
    assert SamplePlan.from_meta(meta) == domain.plan
    assert SamplePlan.from_meta(json.loads(json.dumps(meta))) == domain.plan


def test_a_subset_keeps_images_labels_and_names_together(source):
    train = load_source(blocks(source)).train
    part = train.subset([4, 1])
    assert part.ids == (train.ids[4], train.ids[1])
    assert torch.equal(part.images, train.images[[4, 1]])
    assert torch.equal(part.labels, train.labels[[4, 1]])
    assert part.without_labels().labels is None
    with pytest.raises(DataError, match="differ in number"):
        replace(part, ids=("one",))


@pytest.mark.parametrize(
    "wrong", [{"size": (0, 64)}, {"size": (-1, 4)}, {"percentiles": (60.0, 40.0)}, {"clahe_clip": 0.0}]
)
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=r"size|percentiles|clahe_clip"):
        SampleConfig(**wrong)


# --- the datasets of the original -------------------------------------------------------------------------


def image(seed: int, shape: tuple[int, int] = (16, 12)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def label(seed: int, shape: tuple[int, int] = (16, 12)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["", *rows[0]])
        writer.writeheader()
        for number, row in enumerate(rows):
            writer.writerow({"": number, **row})
    return path


@pytest.fixture
def esed(tmp_path):
    """Six studies of two frames, as the original lists them; no column says who tests but split_0."""
    rows = []
    for study in range(6):
        for instant in ("ED", "ES"):
            row = {"study": f"s{study}", "view": "A4C", "dicom_uuid": f"1.2.{study}", "instant": instant}
            row["split_0"] = ["train", "pred", "pred", "val", "test", "pred"][study]
            place_ = f"s{study}/a4c/1.2.{study}_{instant}.nii.gz"
            write_nifti(tmp_path / "esed" / "img" / place_, image(len(rows)))
            if study == 4:
                write_nifti(tmp_path / "esed" / "gt" / place_, np.minimum(label(len(rows)), 2))
            rows.append(row)
    write_csv(tmp_path / "esed" / "subset.csv", rows)
    return tmp_path / "esed"


def test_frames_listed_in_a_csv_keep_its_split_and_the_file_is_not_written(esed, source):
    before = (esed / "subset.csv").read_bytes(), (esed / "subset.csv").stat().st_mtime_ns
    domain = load_target(blocks(source, esed), labels="test")
    assert set(domain.train.subjects) == {"s0", "s1", "s2", "s5"}
    assert set(domain.val.subjects) == {"s3"}
    assert domain.test.ids == ("1.2.4_ED", "1.2.4_ES")
    assert domain.train.labels is None
    assert ((esed / "subset.csv").read_bytes(), (esed / "subset.csv").stat().st_mtime_ns) == before
    assert sorted(path.name for path in esed.iterdir()) == ["gt", "img", "subset.csv"]


def test_a_csv_without_split_is_divided_by_patient_and_stays_as_it_is(esed, source):
    text = (esed / "subset.csv").read_text()
    (esed / "subset.csv").write_text(text.replace("split_0", "notes"))
    shutil.copytree(esed / "img", esed / "gt", dirs_exist_ok=True)
    before = (esed / "subset.csv").read_bytes()
    dataset = open_esed(esed)
    division = divide_target(TargetConfig(root=esed, folds=3), dataset)
    patients = [{case.patient for case in part} for part in (division.train, division.val, division.test)]
    assert [len(part) for part in patients] == [3, 1, 2]
    assert len(set.union(*patients)) == 6
    assert (esed / "subset.csv").read_bytes() == before


def test_a_csv_that_deals_one_patient_to_two_parts_is_refused(esed, source):
    text = (esed / "subset.csv").read_text().splitlines()
    text[1] = text[1].replace("train", "val")
    (esed / "subset.csv").write_text("\n".join(text))
    with pytest.raises(DataError, match="1 patients have cases in training and validation: s0"):
        load_target(blocks(source, esed))
    assert len(load_target(blocks(source, esed, group_by="case")).val) == 3


def test_a_csv_names_what_is_wrong_with_it(esed):
    with pytest.raises(ConfigError, match="no column 'split_1'|has no column"):
        open_esed(esed, split_column="split_one")
    (esed / "img" / "s1" / "a4c" / "1.2.1_ED.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1\.2\.1_ED: no image"):
        open_esed(esed)
    (esed / "subset.csv").write_text(",study,view\n0,s0,A4C\n")
    with pytest.raises(DataError, match="no column dicom_uuid, instant"):
        open_esed(esed)


def test_a_csv_cannot_lead_out_of_its_folder(esed):
    text = (esed / "subset.csv").read_text()
    (esed / "subset.csv").write_text(text.replace("s1,A4C", "../../s1,A4C"))
    with pytest.raises(DataError, match="leads out of"):
        open_esed(esed)


def test_camus_of_the_original_is_found_by_its_ids(tmp_path):
    rows = []
    for patient in range(1, 7):
        for view in ("2CH", "4CH"):
            name = f"patient{patient:04d}_{view}_ED"
            place_ = f"patient{patient:04d}/{view.lower()}/{name}"
            write_nifti(tmp_path / "img" / f"{place_}.nii.gz", image(patient))
            write_nifti(tmp_path / "gt" / f"{place_}.nii.gz", label(patient))
            split = ["train", "train", "train", "val", "test", "test"][patient - 1]
            rows.append({"id": place_, "split_0": "train", "split_5": split, "view": view})
    write_csv(tmp_path / "camus.csv", rows)
    domain = load_source(blocks(tmp_path, fold=5))
    assert [len(part) for part in (domain.train, domain.val, domain.test)] == [6, 2, 4]
    assert set(domain.val.subjects) == {"patient0004"}
    assert domain.plan.label_names == {"background": 0, "LV": 1, "MYO": 2}
    assert domain.train.labels.unique().tolist() == [0, 1, 2]
    named = load_source(blocks(tmp_path / "camus.csv", fold=5))
    assert named.train.ids == domain.train.ids


def test_camus_as_it_is_published_keeps_its_subgroups(tmp_path):
    for patient in range(1, 5):
        for instant in ("ED", "ES"):
            stem = f"patient{patient:04d}_4CH_{instant}"
            folder = tmp_path / "database_nifti" / f"patient{patient:04d}"
            write_nifti(folder / f"{stem}.nii.gz", image(patient))
            write_nifti(folder / f"{stem}_gt.nii.gz", label(patient))
            write_nifti(
                folder / f"patient{patient:04d}_4CH_half_sequence.nii.gz", np.zeros((16, 12, 3), np.uint8)
            )
    _made(tmp_path / "database_split")
    lists = {"training": "patient0001\npatient0002", "validation": "patient0003", "testing": "patient0004"}
    for name, text in lists.items():
        (tmp_path / "database_split" / f"subgroup_{name}.txt").write_text(text + "\n")
    dataset = open_camus(tmp_path)
    assert len(dataset.images) == 8
    domain = load_source(blocks(tmp_path))
    assert [len(part) for part in (domain.train, domain.val, domain.test)] == [4, 2, 2]
    assert load_source(blocks(tmp_path, exclude=("patient0001_4CH_ED",))).train.ids[0] == "patient0001_4CH_ES"
    with pytest.raises(ConfigError, match="no case 'patient0009_4CH_ED'"):
        open_camus(tmp_path, exclude=("patient0009_4CH_ED",))


def write_vital(path: Path, *, channel: bool = True) -> Path:
    with h5py.File(path, "w") as file:
        fold = file.create_group("cross_validation/fold_5")
        for part, patients in (("train", [1, 2]), ("val", [3]), ("test", [4])):
            fold.create_dataset(part, data=np.array([f"patient{p:04d}" for p in patients], dtype="S"))
        for patient in range(1, 5):
            group = file.create_group(f"patient{patient:04d}/4CH")
            frames = np.stack([image(10 * patient + t, (10, 16)) for t in range(3)])
            group.create_dataset("img_proc", data=frames[..., np.newaxis] if channel else frames)
            group.create_dataset(
                "gt_proc", data=np.stack([label(10 * patient + t, (10, 16)) for t in range(3)])
            )
            group.create_dataset("gt", data=np.zeros((3, 40, 32), np.uint8))
            group.attrs["instants"] = ["ED", "ES"]
            group.attrs.update({"ED": 0, "ES": 2, "voxelspacing": [1.0, 0.2, 0.3]})
    return path


@pytest.mark.parametrize("channel", [True, False])
def test_the_hdf5_file_of_vital_is_read_frame_by_frame(tmp_path, channel):
    path = write_vital(tmp_path / "camus.h5", channel=channel)
    domain = load_source(blocks(path, fold=5))
    assert domain.train.ids == tuple(f"patient000{p}_4CH_{t}" for p in (1, 2) for t in ("ED", "ES"))
    assert set(domain.val.subjects) == {"patient0003"}
    assert set(domain.test.subjects) == {"patient0004"}
    # Rows of the array are the second axis here: files of CAMUS are stored (x, y).
    np.testing.assert_array_equal(domain.train.images[1, 0].numpy(), image(12, (10, 16)).T / np.float32(255))
    expected = np.where(label(12, (10, 16)).T == 3, 0, label(12, (10, 16)).T)
    np.testing.assert_array_equal(domain.train.labels[1].numpy(), expected)
    assert domain.train.spacing_mm[0].tolist() == pytest.approx([0.3 * 32 / 16, 0.2 * 40 / 10])


def test_the_labels_in_an_hdf5_target_are_not_opened(tmp_path, source):
    path = write_vital(tmp_path / "camus.h5")
    expected = load_target(blocks(source, path))
    with h5py.File(path, "a") as file:
        for patient in range(1, 5):
            file[f"patient{patient:04d}/4CH/gt_proc"][...] = 77
    domain = load_target(blocks(source, path))
    assert torch.equal(domain.train.images, expected.train.images)
    assert domain.train.labels is None
    with pytest.raises(DataError, match="77"):
        load_target(blocks(source, path), labels="test")


def test_a_file_that_is_no_hdf5_and_a_missing_fold_are_named(tmp_path):
    (tmp_path / "camus.h5").write_bytes(b"not hdf5")
    with pytest.raises(DataError, match="damaged, or no file of vital"):
        open_vital(tmp_path / "camus.h5")
    path = write_vital(tmp_path / "good.h5")
    with pytest.raises(ConfigError, match="has no fold_7"):
        open_vital(path, split_column="fold_7")
    assert isinstance(open_domain(SourceConfig(root=path), "data"), EchoDataset)


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no dataset is named"):
        load_source(Blocks(SourceConfig(), TargetConfig(), SampleConfig()))
    with pytest.raises(DataError, match="no such dataset"):
        load_source(blocks(tmp_path / "nowhere"))


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real images are not here: {REAL} does not exist")
def test_real_camus_is_recognised_divided_by_patient_and_keeps_the_anatomical_rules():
    from medrl.core.validity import load_rules, validity_rate

    cfg = blocks(REAL, REAL, sample={"size": (128, 128), "clahe": True})
    domain = load_source(replace(cfg, data=SourceConfig(root=REAL, folds=4)))
    assert len(domain.train) + len(domain.val) == 64
    assert domain.plan.label_names == {"background": 0, "LV": 1, "MYO": 2}
    assert not set(domain.train.subjects) & set(domain.val.subjects)
    assert len(set(domain.train.subjects)) == 24
    assert validity_rate(domain.train.labels, load_rules("echo")) > 0.95
    volume = read_volume(REAL / "images" / "patient0001_4CH_ED.nii.gz")
    prepared = prepare_volume(volume, domain.plan)
    maps = np.random.default_rng(0).random((1, 3, 128, 128), dtype=np.float32)
    assert restore_volume(maps, prepared).shape == (3, *volume.data.shape[1:])
