"""Volumes: preparation and the way back, labels of images, closed masks, splits."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from medrl.core.cache import Cache
from medrl.core.errors import ConfigError, DataError
from medrl.core.phantoms.abdomen import write_abdomen
from medrl.core.types import Volume
from medrl.plugins.spars.data import (
    VolumePlan,
    implant_lesions,
    load_volumes,
    open_volumes,
    prepare_mask,
    prepare_volume,
    read_presence,
    restore,
)
from medrl.plugins.spars.data_config import HuntDataConfig, SampleConfig


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("abdomen")
    return write_abdomen(folder / "ct", cases=8, test_cases=2, shape=(24, 24, 16), radius=(2.0, 3.0))


@pytest.fixture
def root(original, tmp_path):
    return shutil.copytree(original, tmp_path / "ct")


def loaded(root, tmp_path, sample=None, source="image", **data):
    config = HuntDataConfig(root=root, **{"folds": 4, **data})
    cache = Cache(tmp_path / "cache")
    return load_volumes(config, sample or SampleConfig(), label_source=source, cache=cache)


def volume(shape=(6, 5, 4), codes="RAS", spacing=(2.0, 3.0, 4.0), seed=0):
    data = np.random.default_rng(seed).uniform(-1000, 400, (1, *shape)).astype(np.float32)
    turn = nib.orientations.axcodes2ornt(codes)
    affine = nib.orientations.inv_ornt_aff(turn, shape) @ np.diag([*spacing, 1.0])
    size = np.linalg.norm(affine[:3, :3], axis=0)
    return Volume(data=data, affine=affine, spacing=tuple(float(value) for value in size))


def test_window_of_hounsfield_units_becomes_zero_to_one():
    image = volume((2, 2, 1))
    image.data[0] = np.array([[[-1000.0], [300.0]], [[25.0], [-200.0]]])
    found, _ = prepare_volume(image, SampleConfig(hu_window=(-200.0, 250.0)))
    torch.testing.assert_close(found, torch.tensor([[[0.0], [1.0]], [[0.5], [0.0]]]))
    assert found.dtype == torch.float32


def test_prepared_values_rise_with_hounsfield_units():
    image = volume((600, 1, 1))
    image.data[0, :, 0, 0] = np.linspace(-1100, 500, 600)
    found, _ = prepare_volume(image, SampleConfig())
    steps = found[:, 0, 0].diff()
    assert (steps >= 0).all()
    assert (steps > 0).sum() >= 160


def test_other_modalities_are_clipped_to_percentiles_of_the_foreground():
    image = volume((20, 20, 20))
    image.data[:] = 0
    inside = np.random.default_rng(0).uniform(100, 200, (10, 10, 10))
    image.data[0, 5:15, 5:15, 5:15] = inside
    found, plan = prepare_volume(image, SampleConfig(hu_window=None, percentiles=(10.0, 90.0)))
    assert plan.low == pytest.approx(np.percentile(inside.astype(np.float32), 10))
    assert plan.high == pytest.approx(np.percentile(inside.astype(np.float32), 90))
    assert found.min() == 0
    assert found.max() == 1
    again, _ = prepare_volume(
        Volume(data=image.data * 7 + 3, affine=image.affine, spacing=image.spacing),
        SampleConfig(hu_window=None, percentiles=(10.0, 90.0)),
    )
    torch.testing.assert_close(again, found, atol=1e-5, rtol=0)


def test_flat_volume_becomes_zero():
    image = volume()
    image.data[:] = 7
    found, _ = prepare_volume(image, SampleConfig(hu_window=None))
    assert found.abs().max() == 0


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "SRA", "PIL"])
def test_map_comes_back_onto_the_voxels_of_its_file(codes):
    image = volume(codes=codes)
    prepared, plan = prepare_volume(image, SampleConfig(hu_window=(-1000.0, 400.0)))
    back = restore(prepared, plan) * 1400 - 1000
    np.testing.assert_allclose(back, image.data[0], atol=1e-3)
    mask = np.random.default_rng(1).uniform(size=image.data[0].shape) > 0.5
    turned = prepare_mask(mask, image.affine, plan)
    assert np.array_equal(restore(turned, plan, "nearest"), mask)


def test_volumes_are_turned_to_ras():
    ras = volume((6, 5, 4))
    turned = nib.as_closest_canonical(nib.Nifti1Image(ras.data[0], ras.affine))
    lps = nib.Nifti1Image(np.flip(ras.data[0], (0, 1)), ras.affine @ np.diag([-1.0, -1.0, 1.0, 1.0]))
    stored = Volume(
        data=np.ascontiguousarray(lps.get_fdata(dtype=np.float32))[None],
        affine=lps.affine,
        spacing=ras.spacing,
    )
    first, _ = prepare_volume(ras, SampleConfig())
    second, _ = prepare_volume(stored, SampleConfig())
    assert turned.shape == first.shape
    assert torch.equal(first, second)


def test_volume_is_resized_and_comes_back_in_its_shape():
    image = volume((12, 10, 8))
    found, plan = prepare_volume(image, SampleConfig(volume_size=(24, 20, 16)))
    assert found.shape == (24, 20, 16)
    assert plan.spacing_mm == pytest.approx((1.0, 1.5, 2.0))
    assert restore(found, plan).shape == (12, 10, 8)
    mask = np.zeros((12, 10, 8), dtype=bool)
    mask[3:6, 2:7, 1:4] = True
    assert np.array_equal(restore(prepare_mask(mask, image.affine, plan), plan, "nearest"), mask)


def test_volume_is_resampled_to_a_spacing():
    found, plan = prepare_volume(volume((12, 10, 8)), SampleConfig(spacing_mm=(4.0, 3.0, 2.0)))
    assert found.shape == (6, 10, 16)
    assert plan.spacing_mm == pytest.approx((4.0, 3.0, 2.0))


def test_plan_survives_as_plain_values():
    _, plan = prepare_volume(volume(codes="PIL"), SampleConfig(volume_size=(8, 8, 8)))
    assert VolumePlan.from_meta(json.loads(json.dumps(plan.to_meta()))) == plan


def test_restoring_another_shape_is_refused():
    _, plan = prepare_volume(volume(), SampleConfig())
    with pytest.raises(DataError, match="shape"):
        restore(torch.zeros(3, 3, 3), plan)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("case,label\na,1\n", "no column case_id"),
        ("case_id,label\na,2\n", "neither 0 nor 1"),
        ("case_id,label\na,1\na,0\n", "twice"),
        ("case_id,label\n,1\n", "no name"),
        ("case_id,label\n", "no case"),
        ("", "no column case_id"),
    ],
)
def test_defective_labels_of_images_are_told(tmp_path, text, why):
    path = tmp_path / "presence.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=why):
        read_presence(path)


def test_labels_of_images_may_have_spaces_and_further_columns(tmp_path):
    path = tmp_path / "presence.csv"
    path.write_text("\ufeffcase_id, label,note\na, 1,x\n\nb,0,\n")
    assert read_presence(path) == {"a": 1, "b": 0}


def test_missing_labels_of_images_are_told(root, tmp_path):
    (root / "presence.csv").unlink()
    with pytest.raises(DataError, match="no such file"):
        loaded(root, tmp_path)
    (root / "presence.csv").write_text("case_id,label\nabdomen_000,1\n")
    with pytest.raises(DataError, match="7 training cases have no label"):
        loaded(root, tmp_path)


def test_no_mask_is_needed_or_opened_for_labels_of_images(root, tmp_path):
    whole = loaded(root, tmp_path)
    shutil.rmtree(root / "labelsTr")
    shutil.rmtree(root / "labelsTs")
    found = loaded(root, tmp_path)
    assert found.split() == whole.split()
    assert found.masks.opened == set()
    assert torch.equal(found.train.presence, whole.train.presence)
    assert len(found.train) + len(found.val) == 8


def test_masks_are_opened_one_by_one_and_counted(root, tmp_path):
    found = loaded(root, tmp_path)
    name = found.val.ids[0]
    (mask,) = found.val.open_masks([name])
    assert mask.dtype == torch.bool
    assert mask.any() == bool(found.val.presence[0])
    assert found.masks.opened == {name}
    (organ,) = found.val.open_masks([name], names=("liver", "tumour"))
    assert (organ | mask).sum() == organ.sum()
    assert organ.sum() > mask.sum()


def test_masks_label_images_for_crops_without_a_table(root, tmp_path):
    labels = read_presence(root / "presence.csv")
    (root / "presence.csv").unlink()
    found = loaded(root, tmp_path, source="crop")
    for part in (found.train, found.val):
        assert part.labels() == [labels[name] for name in part.ids]


def test_every_fold_holds_volumes_with_and_without_the_object(root, tmp_path):
    seen = []
    for fold in range(4):
        found = loaded(root, tmp_path, fold=fold)
        assert sorted(found.val.labels()) == [0, 1]
        assert not set(found.val.ids) & set(found.train.ids)
        seen += found.val.ids
    assert sorted(seen) == [f"abdomen_{index:03d}" for index in range(8)]


def test_own_folds_of_a_dataset_count_first(root, tmp_path):
    names = [f"abdomen_{index:03d}" for index in range(8)]
    (root / "splits_final.json").write_text(json.dumps([{"train": names[:6], "val": names[6:]}]))
    assert loaded(root, tmp_path).split()["val"] == names[6:]


def test_test_cases_are_set_aside_by_share(root, tmp_path):
    shutil.rmtree(root / "imagesTs")
    shutil.rmtree(root / "labelsTs")
    found = loaded(root, tmp_path, test_share=0.25, folds=3)
    parts = [set(part) for part in found.split().values()]
    assert [len(part) for part in parts] == [4, 2, 2]
    assert len(set.union(*parts)) == 8
    assert sorted(found.test.labels()) == [0, 1]


def test_test_cases_have_no_label_of_the_image(root, tmp_path):
    found = loaded(root, tmp_path)
    assert len(found.test) == 2
    assert found.test.presence is None
    with pytest.raises(DataError, match="there are none"):
        found.test.labels()


def test_volumes_come_from_the_cache_until_their_file_changes(root, tmp_path):
    first = loaded(root, tmp_path)
    again = loaded(root, tmp_path)
    assert again.train.digest == first.train.digest
    other = loaded(root, tmp_path, sample=SampleConfig(hu_window=(-100.0, 100.0)))
    assert other.train.digest != first.train.digest
    case = first.train.ids[0]
    path = root / "imagesTr" / f"{case}_0000.nii.gz"
    shutil.copy(root / "imagesTr" / f"{first.train.ids[1]}_0000.nii.gz", path)
    changed = loaded(root, tmp_path)
    assert changed.train.keys[0] != first.train.keys[0]
    assert changed.train.keys[1:] == first.train.keys[1:]
    assert torch.equal(changed.train.volumes[0], changed.train.volumes[1])


def test_unknown_label_is_told_when_masks_are_opened(root, tmp_path):
    found = loaded(root, tmp_path, target=("lesion",))
    with pytest.raises(DataError, match="no label 'lesion'"):
        found.val.open_masks()


def test_label_may_be_named_by_its_value(root, tmp_path):
    found = loaded(root, tmp_path, target=("2",))
    assert found.target == "tumour"
    assert found.label_names == {"background": 0, "tumour": 2}


def test_missing_image_channel_is_still_an_error(root):
    (root / "imagesTr" / "abdomen_001_0000.nii.gz").unlink()
    with pytest.raises(DataError):
        open_volumes(root)


def test_fold_that_does_not_exist_is_refused(root, tmp_path):
    with pytest.raises(ConfigError, match="fold 4"):
        loaded(root, tmp_path, fold=4)
    with pytest.raises(ConfigError, match="9 folds"):
        loaded(root, tmp_path, folds=9)


def test_split_is_written_as_json(root, tmp_path):
    found = loaded(root, tmp_path)
    written = json.loads(found.write_split(tmp_path).read_text())
    assert written == found.split()


def test_implanted_lesions_lie_inside_the_organ_and_are_darker():
    rng = np.random.default_rng(0)
    image = rng.normal(110.0, 5.0, (32, 32, 24)).astype(np.float32)
    organ = np.zeros(image.shape, dtype=bool)
    organ[6:26, 6:26, 4:20] = True
    found, mask = implant_lesions(image, organ, rng, radius=(3.0, 5.0), contrast=(-60.0, -60.0))
    assert mask.sum() >= 60
    assert not (mask & ~organ).any()
    assert np.array_equal(found[~organ], image[~organ])
    assert (found - image)[mask].mean() < -40
    assert np.array_equal(
        implant_lesions(image, organ, np.random.default_rng(3))[1],
        implant_lesions(image, organ, np.random.default_rng(3))[1],
    )


def test_empty_organ_is_refused():
    with pytest.raises(DataError, match="empty"):
        implant_lesions(np.zeros((8, 8, 8)), np.zeros((8, 8, 8)), np.random.default_rng(0))
