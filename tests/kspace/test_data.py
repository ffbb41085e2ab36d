"""Splits, preparation, sets, cache, and what environments are given."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from medrl.core.cache import Cache
from medrl.core.dataset import make_splits, open_dataset, write_splits
from medrl.core.errors import ConfigError, DataError
from medrl.core.phantoms.cardiac import write_cardiac
from medrl.core.types import Case
from medrl.plugins.kspace.coils import combine
from medrl.plugins.kspace.data import (
    RawScan,
    SamplePlan,
    ScanDataset,
    SliceSet,
    Stacked,
    as_cases,
    load_data,
    load_parts,
    load_set,
    open_scans,
    prepare,
)
from medrl.plugins.kspace.data.loading import scan_key
from medrl.plugins.kspace.data.plan import make_plan
from medrl.plugins.kspace.data.splits import stratified_folds
from medrl.plugins.kspace.data_config import SampleConfig, ScanConfig
from medrl.plugins.kspace.fourier import fft2c, ifft2c, ifft3c
from medrl.plugins.kspace.simulate import Simulation, simulate_scan

LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def plan(shape=(16, 16), **changes):
    return SamplePlan(shape=shape, label_names=LABELS, **changes)


def raw_images(*shape, seed=0, spacing=(1.5, 1.5, 8.0), labels=True, **changes):
    rng = np.random.default_rng(seed)
    count = shape[0]
    settings = {
        "names": tuple(f"z{k:03d}" for k in range(count)),
        "frames": ("ED",) * count,
        "slices": tuple(range(count)),
    }
    return RawScan(
        images=rng.uniform(10, 900, shape).astype(np.float32),
        labels=rng.integers(0, 4, shape).astype(np.uint8) if labels else None,
        spacing_mm=spacing,
        **(settings | changes),
    )


def raw_kspace(*shape, seed=0, **changes):
    rng = np.random.default_rng(seed)
    return RawScan(
        names=tuple(f"z{k:03d}" for k in range(shape[0])),
        frames=("",) * shape[0],
        slices=tuple(range(shape[0])),
        kspace=(rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64),
        spacing_mm=(1.0, 2.0, 5.0),
        **changes,
    )


def dataset_of(scans, *, patients=None, labelled=True, groups=None, root=Path(__file__), **settings):
    """A dataset of scans in memory, by case."""
    cases = [
        Case(
            id=name,
            images=(Path(__file__),),
            label=Path(__file__) if labelled is True or name in (labelled or ()) else None,
            patient=(patients or {}).get(name, name),
        )
        for name in scans
    ]
    settings |= {"root": root, "layout": "test", "scans": cases, "groups": groups}
    return ScanDataset(read=lambda case, with_label: scans[case.id], **settings)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms") / "d"
    return write_cardiac(root, cases=5, test_cases=2, shape=(24, 20), slices=3)


# --- splits --------------------------------------------------------------------------------------------


def test_folds_hold_every_group_in_equal_number_and_every_patient_once():
    patients = [f"patient{number:03d}" for number in range(1, 101)]
    groups = {name: f"g{(int(name[-3:]) - 1) // 20}" for name in patients}
    folds = stratified_folds(patients, groups)
    assert sorted(name for fold in folds for name in fold) == patients
    assert [len(fold) for fold in folds] == [20] * 5
    for fold in folds:
        assert Counter(groups[name] for name in fold) == {f"g{number}": 4 for number in range(5)}
    assert folds == stratified_folds(patients[::-1], groups)
    assert folds != stratified_folds(patients, groups, seed=1)


def test_folds_of_groups_that_do_not_divide_differ_by_one_patient_at_most():
    patients = [f"p{number:02d}" for number in range(12)]
    groups = {name: "abcde"[int(name[1:]) * 5 // 12] for name in patients}
    folds = stratified_folds(patients, groups, folds=3)
    assert sorted(map(len, folds)) == [4, 4, 4]
    for group in "abcde":
        counts = [sum(groups[name] == group for name in fold) for fold in folds]
        assert max(counts) - min(counts) <= 1
    with pytest.raises(ConfigError, match="13 folds of 12 patients"):
        stratified_folds(patients, groups, folds=13)


def test_no_patient_lies_in_two_parts(phantoms):
    parts = load_parts(open_scans(phantoms), plan(), fold=1)
    sets = [set(part.patients) for part in (parts.train, parts.val, parts.test)]
    assert [len(one) for one in sets] == [4, 1, 2]
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]
    # Both frames of a patient went the same way.
    assert Counter(zip(parts.val.patients, parts.val.frames, strict=True)) == {
        (parts.val.patients[0], "ED"): 3,
        (parts.val.patients[0], "ES"): 3,
    }


def test_every_patient_is_tested_once_when_folds_take_turns():
    scans = {f"p{k}": raw_images(1, 8, 8, seed=k) for k in range(6)}
    dataset = dataset_of(scans)
    tested = []
    for fold in range(3):
        parts = load_parts(dataset, plan((8, 8)), fold=(fold + 1) % 3, folds=3, test_fold=fold)
        assert not set(parts.train.patients) & (set(parts.val.patients) | set(parts.test.patients))
        assert len(parts.train) == len(parts.val) == len(parts.test) == 2
        tested += parts.test.patients
    assert sorted(tested) == sorted(scans)


def test_a_dataset_with_test_patients_of_its_own_gives_no_fold_for_testing(phantoms):
    with pytest.raises(ConfigError, match="own test patients"):
        load_parts(open_scans(phantoms), plan(), fold=0, test_fold=1)


def test_splits_of_the_dataset_come_before_stratified_ones(tmp_path):
    root = write_cardiac(tmp_path / "d", cases=4, test_cases=0, shape=(16, 16), slices=1, frames=1)
    write_splits(root, make_splits(open_dataset(root), 2, seed=3))
    expected = open_dataset(root).fold(1)
    found = open_scans(root).fold(1)
    assert [one.id for one in found.val] == [one.id for one in expected.val]


def test_measured_scans_without_labels_are_split_as_well():
    scans = {f"s{k}": raw_kspace(1, 8, 8, seed=k) for k in range(4)}
    parts = load_parts(dataset_of(scans, labelled=None), plan(None), folds=4)
    assert len(parts.train) == 3
    assert parts.train.labels is None
    assert parts.train.simulation is None
    assert "measured" in parts.train.caveats[0]


# --- preparation ---------------------------------------------------------------------------------------


def test_images_are_padded_and_cropped_about_their_centre():
    image = np.zeros((1, 9, 20), np.float32)
    image[0, 4, 10] = 1.0  # at half of each size
    raw = raw_images(1, 9, 20)
    raw = RawScan(names=raw.names, frames=raw.frames, slices=raw.slices, images=image)
    for shape in ((16, 16), (7, 30), (8, 9)):
        target = prepare(raw, plan(shape, simulation=Simulation(phase="none")), "c").target[0]
        assert tuple(target.shape) == shape
        assert target.nonzero().tolist() == [[shape[0] // 2, shape[1] // 2]]


def test_each_slice_is_scaled_to_the_unit_interval_and_a_constant_one_to_zero():
    raw = raw_images(3, 16, 16)
    raw.images[1] = 42.0
    found = prepare(raw, plan(), "c")
    assert found.target[[0, 2]].flatten(1).amin(dim=1).tolist() == [0.0, 0.0]
    assert found.target[[0, 2]].flatten(1).amax(dim=1).tolist() == [1.0, 1.0]
    assert (found.target[1] == 0).all()
    assert torch.isfinite(torch.view_as_real(found.kspace)).all()
    back = found.target * found.scale.view(-1, 1, 1) + found.offset.view(-1, 1, 1)
    assert np.allclose(back.numpy(), raw.images, atol=1e-3)


def test_volumes_can_be_scaled_by_their_99th_percentile():
    raw = raw_images(4, 16, 16, frames=("ED", "ED", "ES", "ES"), slices=(0, 1, 0, 1))
    raw.images[2:] *= 3.0
    found = prepare(raw, plan(norm="volume_p99"), "c")
    for part in (slice(0, 2), slice(2, 4)):
        expected = raw.images[part] / np.percentile(raw.images[part], 99)
        assert np.allclose(found.target[part].numpy(), expected, atol=1e-5)


def test_images_are_resampled_and_labels_keep_their_values():
    raw = raw_images(2, 20, 16, spacing=(1.0, 2.0, 8.0))
    found = prepare(raw, plan((10, 16), spacing=(2.0, 2.0)), "c")
    assert found.spacing_mm == (2.0, 2.0, 8.0)
    assert found.placed.inner == (10, 16)
    assert set(found.labels.unique().tolist()) == {0, 1, 2, 3}
    flat = RawScan(
        names=("z",), frames=("",), slices=(0,), spacing_mm=(1.0, 1.0, 8.0),
        images=np.linspace(0, 1, 32, dtype=np.float32)[None, None, :].repeat(8, axis=1),
    )  # fmt: skip
    ramp = prepare(flat, plan((4, 16), spacing=(2.0, 2.0)), "c").target[0, 1]
    assert torch.allclose(ramp.diff(), ramp.diff().mean().expand(15), atol=0.02)
    with pytest.raises(DataError, match=r"case c: spacing.*unknown"):
        prepare(raw_images(1, 8, 8, spacing=(float("nan"),) * 3), plan(spacing=(1.0, 1.0)), "c")


def test_averaging_keeps_the_mean_and_the_most_frequent_label():
    raw = raw_images(1, 8, 8)
    raw.labels[0, :2, :2] = [[3, 1], [1, 2]]
    found = prepare(raw, plan((4, 4), downsample=2), "c")
    expected = raw.images[0].reshape(4, 2, 4, 2).mean(axis=(1, 3))
    assert np.allclose((found.target[0] * found.scale + found.offset).numpy(), expected, atol=1e-3)
    assert int(found.labels[0, 0, 0]) == 1
    assert found.spacing_mm == (3.0, 3.0, 8.0)


def test_kspace_is_the_simulated_one_of_the_prepared_image():
    raw = raw_images(2, 16, 16, frames=("ED", "ES"), slices=(0, 0), shift_k=2.0)
    simulation = Simulation(noise_std=0.01, shift_k=1.0)
    found = prepare(raw, plan(simulation=simulation, seed=5), "c")
    clean = (raw.images - raw.images.min(axis=(1, 2), keepdims=True)) / np.ptp(
        raw.images, axis=(1, 2), keepdims=True
    )
    expected = simulate_scan(
        torch.from_numpy(clean), simulation, seed=5, case="c", frames=("ED", "ES"), slices=(0, 0), shift=2.0
    )
    assert torch.allclose(found.kspace, expected, atol=1e-5)
    # The target is what all columns give, noise included.
    assert torch.allclose(found.target, ifft2c(found.kspace).abs(), atol=1e-6)


@pytest.mark.parametrize(("spacing", "downsample"), [(None, 1), ((1.5, 1.0), 1), (None, 2), ((2.0, 2.0), 2)])
def test_results_go_back_onto_the_grid_of_the_file(spacing, downsample):
    raw = raw_images(2, 20, 26, spacing=(1.0, 1.0, 8.0))
    found = prepare(raw, plan((8, 8), spacing=spacing, downsample=downsample), "c")
    logits = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    probabilities = torch.softmax(logits, dim=1)
    back = found.placed.restored_probabilities(probabilities)
    assert back.shape == (2, 4, 20, 26)
    assert torch.allclose(back.sum(dim=1), torch.ones(2, 20, 26), atol=1e-5)
    if found.placed.inner[0] > found.placed.grid[0]:  # rows were cropped
        assert back[:, :, 0, 0].tolist() == [[1.0, 0.0, 0.0, 0.0]] * 2
    labels = found.placed.restored_labels(found.labels)
    assert labels.dtype == torch.uint8
    if spacing is None and downsample == 1:
        assert np.array_equal(labels[:, 6:14, 9:17].numpy(), raw.labels[:, 6:14, 9:17])
        assert not labels[:, :6].any()


def test_padded_images_go_back_without_their_padding():
    raw = raw_images(1, 10, 12)
    found = prepare(raw, plan((16, 16)), "c")
    back = found.placed.restored(found.target[:, None])[0, 0]
    unit = (raw.images[0] - found.offset.numpy()) / found.scale.numpy()
    assert np.allclose(back.numpy(), unit, atol=1e-5)
    assert np.array_equal(found.placed.restored_labels(found.labels).numpy(), raw.labels)


@pytest.mark.parametrize("coils", [(), (3,)])
def test_measured_kspace_keeps_its_image_when_rows_are_cropped_and_columns_filled_up(coils):
    raw = raw_kspace(2, *coils, 12, 8)
    same = prepare(raw, plan(None), "c")
    image = ifft2c(same.kspace)
    cropped = prepare(raw, plan((6, 8)), "c")
    ratio = cropped.scale / same.scale
    found = ifft2c(cropped.kspace) * ratio.view(-1, *[1] * (image.ndim - 1))
    assert torch.allclose(found, image[..., 3:9, :], atol=1e-5)
    filled = prepare(raw, plan((12, 12)), "c")
    assert filled.padding.nonzero().flatten().tolist() == [0, 1, 10, 11]
    measured = filled.kspace[..., 2:10] * (filled.scale / same.scale).view(-1, *[1] * (image.ndim - 1))
    assert torch.allclose(measured, same.kspace, atol=1e-5)
    assert filled.spacing_mm == pytest.approx((1.0, 2.0 * 8 / 12, 5.0))
    narrow = prepare(raw, plan((12, 6)), "c")
    assert narrow.kspace.shape[-1] == 6
    assert not narrow.padding.any()
    assert same.target.flatten(1).amax(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_sensitivities_need_the_measured_columns():
    maps = np.ones((1, 2, 8, 8), np.complex64)
    raw = raw_kspace(1, 2, 8, 8, sensitivities=maps)
    assert prepare(raw, plan((6, 8)), "c").sensitivities.shape == (1, 2, 6, 8)
    with pytest.raises(DataError, match="8 columns cannot become 10"):
        prepare(raw, plan((8, 10)), "c")


def test_plans_survive_being_stored():
    resolved = make_plan(
        SampleConfig(shape=(32, 48), spacing=(1.5, 1.5), noise_std=0.1, phase_scope="scan", downsample=2),
        LABELS,
    )
    assert SamplePlan.from_meta(resolved.to_meta()) == resolved
    free = make_plan(SampleConfig(shape=(0, 0)), LABELS)
    assert free.shape is None
    assert SamplePlan.from_meta(free.to_meta()) == free


@pytest.mark.parametrize(
    "wrong",
    [{"shape": (0, 8)}, {"shape": (-1, 8)}, {"spacing": (0.0, 1.0)}, {"phase": "rough"}, {"x": 1}],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        SampleConfig(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"fold": 1, "test_fold": 1}, {"test_fold": 5}, {"spacing_mm": (1.0,)}, {"reader": "dicom"}]
)
def test_scan_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        ScanConfig(**wrong)


# --- sets ----------------------------------------------------------------------------------------------


def test_stacked_arrays_behave_as_one_tensor():
    parts = [torch.arange(6.0).view(2, 3), torch.arange(6.0, 15.0).view(3, 3)]
    whole, stacked = torch.cat(parts), Stacked(parts)
    assert stacked.shape == whole.shape
    assert (len(stacked), stacked.ndim, stacked.dtype) == (5, 2, torch.float32)
    assert torch.equal(stacked.tensor(), whole)
    assert torch.equal(stacked[3], whole[3])
    assert torch.equal(stacked[1:4], whole[1:4])
    assert torch.equal(stacked[[4, 0, 4]], whole[[4, 0, 4]])
    assert torch.equal(stacked[torch.tensor([[0, 1], [3, 2]])], whole[torch.tensor([[0, 1], [3, 2]])])
    chosen = torch.tensor([True, False, True, False, False])
    assert torch.equal(stacked[chosen], whole[chosen])
    assert torch.equal(stacked.subset([3, 1])[[1, 0]], whole[[1, 3]])
    assert Stacked(parts[:1]).tensor().data_ptr() == parts[0].data_ptr()


def test_scans_of_fewer_coils_are_filled_up_with_coils_of_zeros():
    parts = [torch.ones(1, 2, 4, 4), torch.ones(1, 3, 4, 4)]
    stacked = Stacked(parts)
    assert stacked.shape == (2, 3, 4, 4)
    assert stacked[[0]][0].sum(dim=(1, 2)).tolist() == [16.0, 16.0, 0.0]
    assert stacked[0].shape == (2, 4, 4)
    with pytest.raises(DataError, match=r"set|shapes"):
        Stacked([torch.ones(1, 4, 4), torch.ones(1, 5, 4)])


def test_a_set_knows_its_volumes_whatever_the_order_of_its_slices(phantoms):
    dataset = open_scans(phantoms)
    whole = load_set(dataset, dataset.scans[:4], plan())
    assert len(whole) == 12
    assert whole.ids[0] == "cardiac_000_ED_z000"
    mixed = whole.subset([5, 0, 4, 2, 1, 3, 11, 10, 9])
    assert [[mixed.ids[index] for index in volume] for volume in mixed.volumes] == [
        [f"cardiac_000_ES_z00{k}" for k in range(3)],
        [f"cardiac_000_ED_z00{k}" for k in range(3)],
        [f"cardiac_001_ES_z00{k}" for k in range(3)],
    ]
    assert mixed.volume_name(mixed.volumes[0]) == "cardiac_000_ES"
    assert torch.equal(mixed.kspace[0], whole.kspace[5])
    assert torch.equal(mixed.labels[[3]], whole.labels[[2]])
    only = whole.of_patients(["cardiac_001"])
    assert set(only.patients) == {"cardiac_001"}
    assert len(only) == 6
    with pytest.raises(DataError, match="no patient 'x'"):
        whole.of_patients(["x"])


def test_slices_of_unknown_place_make_no_volumes():
    raw = raw_images(2, 8, 8, slices=(-1, -1), frames=("", ""))
    found = load_set(dataset_of({"p": raw}), dataset_of({"p": raw}).scans, plan((8, 8)))
    assert not found.volumetric
    with pytest.raises(DataError, match="frames and slices of these scans are unknown"):
        _ = found.volumes


def test_labels_are_there_for_all_scans_of_a_set_or_for_none():
    scans = {"a": raw_images(1, 8, 8), "b": raw_images(1, 8, 8, labels=False)}
    dataset = dataset_of(scans, labelled=("a",))
    with pytest.raises(DataError, match=r"case b.*no reference"):
        load_set(dataset, dataset.scans, plan((8, 8)))
    assert load_set(dataset, dataset.scans, plan((8, 8)), labels=False).labels is None
    assert load_set(dataset, dataset.scans[:1], plan((8, 8))).labels is not None


def test_images_and_measured_kspace_are_not_mixed():
    dataset = dataset_of({"a": raw_images(1, 8, 8, labels=False), "b": raw_kspace(1, 8, 8)}, labelled=None)
    with pytest.raises(DataError, match="images and measured k-space"):
        load_set(dataset, dataset.scans, plan((8, 8)))


def test_prepared_scans_are_mapped_from_the_cache_and_equal_what_is_made_anew(
    phantoms, tmp_path, monkeypatch
):
    dataset = open_scans(phantoms)
    cache = Cache(tmp_path / "cache")
    fresh = load_set(dataset, dataset.scans[:2], plan())
    first = load_set(dataset, dataset.scans[:2], plan(), cache=cache)
    monkeypatch.setattr(ScanDataset, "read", None)  # nothing is read again
    second = load_set(dataset, dataset.scans[:2], plan(), cache=cache)
    for other in (first, second):
        assert torch.equal(other.kspace.tensor(), fresh.kspace.tensor())
        assert torch.equal(other.target.tensor(), fresh.target.tensor())
        assert torch.equal(other.labels.tensor(), fresh.labels.tensor())
        assert torch.equal(other.padding, fresh.padding)
        assert torch.equal(other.spacing_mm, fresh.spacing_mm)
        assert other.ids == fresh.ids
        assert other.digest == fresh.digest
    assert second.kspace.dtype == torch.complex64
    assert cache.info().entries == 2


def test_the_key_of_a_scan_depends_on_everything_that_makes_it(phantoms):
    dataset = open_scans(phantoms)
    first, second = dataset.scans[:2]
    base = scan_key(dataset, first, plan(), labels=True)
    assert base == scan_key(open_scans(phantoms), first, plan(), labels=True)
    others = [
        scan_key(dataset, second, plan(), labels=True),
        scan_key(dataset, first, plan(), labels=False),
        scan_key(dataset, first, plan((16, 8)), labels=True),
        scan_key(dataset, first, plan(seed=1), labels=True),
        scan_key(dataset, first, plan(simulation=Simulation(noise_std=0.1)), labels=True),
    ]
    assert len({base, *others}) == 6


def test_a_set_with_other_slices_has_another_digest(phantoms):
    dataset = open_scans(phantoms)
    whole = load_set(dataset, dataset.scans[:2], plan())
    assert whole.digest != whole.subset(range(5)).digest
    assert whole.digest != whole.subset([1, 0, 2, 3, 4, 5]).digest
    assert whole.subset(range(6)).digest == whole.digest


def test_a_config_names_everything_that_is_loaded(phantoms, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path / "cache"))
    parts = load_data(ScanConfig(root=phantoms, fold=2), SampleConfig(shape=(16, 24)))
    assert isinstance(parts.train, SliceSet)
    assert parts.train.shape == (16, 24)
    assert parts.train.classes == 4
    assert len(parts.train) + len(parts.val) + len(parts.test) == 7 * 6
    assert parts.plan.simulation.phase == "smooth"
    assert (
        load_data(ScanConfig(root=phantoms), SampleConfig(shape=(16, 24)), labels=False).train.labels is None
    )
    with pytest.raises(ConfigError, match="no scans are named"):
        load_data(ScanConfig(), SampleConfig())


# --- what environments play ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slices(phantoms):
    dataset = open_scans(phantoms)
    shared = plan(simulation=Simulation(scope="scan"))
    return load_set(dataset, dataset.scans[:2], shared).subset([0, 1, 2, 3, 4])


@pytest.mark.parametrize("mapped", [False, True])
def test_slices_are_cases_of_their_own(slices, mapped):
    cases = as_cases(slices, initial=4, indices=(2, 13), mapped=mapped)
    assert cases.ids == slices.ids
    assert torch.equal(cases.rows("kspace", torch.tensor([3, 1])), slices.kspace[[3, 1]])
    assert torch.equal(cases.rows("labels", torch.tensor([2])), slices.labels[[2]])
    assert cases.initial[0].nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert cases.possible[0].nonzero().flatten().tolist() == list(range(2, 14))
    assert cases.fewest == 8
    energy = slices.kspace.tensor().abs().square().sum(dim=1)
    assert torch.allclose(cases.line_energy, energy, rtol=1e-4)


def test_stacks_hold_the_slices_of_a_volume_under_one_mask(slices):
    cases = as_cases(slices, geometry="stack", initial=2)
    assert cases.ids == ("cardiac_000_ED", "cardiac_000_ES")
    assert cases.kspace.shape == (2, 3, 16, 16)
    assert torch.equal(cases.kspace[0], slices.kspace[:3])
    assert cases.slices.tolist() == [[True, True, True], [True, True, False]]
    assert not cases.kspace[1, 2].any()
    assert not cases.labels[1, 2].any()


@pytest.mark.parametrize("points", [False, True])
def test_volumes_are_transformed_along_depth(slices, points):
    cases = as_cases(slices, geometry="volume3d", points=points, initial=2)
    volume = ifft3c(cases.kspace).abs()
    assert torch.allclose(volume, cases.target, atol=1e-5)
    assert cases.actions == (48 if points else 16)
    assert int(cases.initial[0].sum()) == (6 if points else 2)


def test_volumes_of_slices_with_phases_of_their_own_are_refused(phantoms):
    dataset = open_scans(phantoms)
    own = load_set(dataset, dataset.scans[:1], plan())
    with pytest.raises(DataError, match="phase of its own"):
        as_cases(own, geometry="volume3d")


@pytest.mark.parametrize("geometry", ["slice", "stack"])
def test_sensitivities_are_given_or_estimated(geometry):
    maps = np.random.default_rng(3).normal(size=(2, 3, 16, 16)).astype(np.complex64)
    image = np.random.default_rng(4).normal(size=(2, 1, 16, 16))
    kspace = fft2c(torch.from_numpy((maps * image).astype(np.complex64))).numpy()
    given = raw_kspace(2, 3, 16, 16, sensitivities=maps)
    scans = {
        "given": replace(given, kspace=kspace),
        "bare": replace(given, kspace=kspace, sensitivities=None),
    }
    dataset = dataset_of(scans, labelled=None)
    sets = {case.id: load_set(dataset, [case], plan(None)) for case in dataset.scans}
    every = torch.arange(2 if geometry == "slice" else 1)
    for name, lines in (("given", 0), ("bare", 8)):
        cases = as_cases(sets[name], geometry=geometry, sensitivity_lines=lines)
        assert cases.coils
        images = ifft2c(cases.kspace)
        found = combine(images, cases.rows("sensitivities", every)).abs()
        assert torch.allclose(found, cases.target, atol=1e-4)
    assert as_cases(sets["bare"], geometry=geometry).sensitivities is None


def test_padding_is_never_possible():
    missing = np.zeros(8, np.bool_)
    missing[:2] = True
    scans = {"s": raw_kspace(2, 8, 8, missing=missing)}
    dataset = dataset_of(scans, labelled=None)
    found = load_set(dataset, dataset.scans, plan(None))
    for geometry in ("slice", "stack"):
        cases = as_cases(found, geometry=geometry, initial=6)
        assert not cases.possible[:, :2].any()
        assert not cases.initial[:, :2].any()
        assert int(cases.initial[0].sum()) == 5  # columns 1 to 6, without padding column 1


@pytest.mark.realdata
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real images are not here: {DATA} does not exist")
def test_real_cardiac_slices_are_prepared_in_stratified_folds(tmp_path):
    dataset = open_scans(DATA / "acdc_h5")
    parts = load_parts(
        dataset, plan((64, 64), downsample=2), folds=3, fold=1, test_fold=0, cache=Cache(tmp_path)
    )
    sets = (parts.train, parts.val, parts.test)
    assert [len(set(part.patients)) for part in sets] == [4, 4, 4]
    assert sum(len(part) for part in sets) == 252
    assert set(parts.train.labels[torch.arange(20)].unique().tolist()) == {0, 1, 2, 3}
    assert len(parts.test.volumes) == 8
    kspace = parts.test.kspace[[0]]
    energy = kspace.abs().square().sum(dim=(0, 1))
    assert float(energy[28:36].sum() / energy.sum()) > 0.7
