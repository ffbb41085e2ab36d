"""Windows, normalisation, splits by duty, samples."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from medrl.core.cache import Cache
from medrl.core.errors import ConfigError, DataError
from medrl.plugins.graft import data, duties, planning
from medrl.plugins.graft.augment import jitter
from medrl.plugins.graft.config_data import AugmentConfig
from medrl.plugins.graft.plans import SamplePlan, read_statistics
from medrl.plugins.graft.samples import collate
from medrl.plugins.graft.windows import Window, centre_window, mask_window, rounded_up


def mask_of(depth, first, last):
    mask = np.zeros((depth, 6, 6), dtype=np.uint8)
    mask[first : last + 1, 2:4, 2:4] = 1
    return mask


def test_a_deep_mask_gives_the_middle_slices_of_the_mask():
    window = mask_window(mask_of(30, 3, 26), (20, 6, 6))  # Z = 24, z0 = 3
    assert (window.low[0], window.high[0] - 1) == (5, 24)
    assert window.start[0] == 5


def test_a_shallow_mask_is_padded_three_before_and_four_after():
    mask = mask_of(30, 5, 17)  # Z = 13
    window = mask_window(mask, (20, 6, 6))
    box = window.cut(np.ones((30, 6, 6)))
    inside = np.flatnonzero(box.any(axis=(1, 2)))
    assert (inside[0], 19 - inside[-1]) == (3, 4)
    assert window.low[0] == 5
    assert window.high[0] == 18


def test_an_empty_mask_counts_as_full():
    window = mask_window(np.zeros((26, 6, 6)), (20, 6, 6))
    assert (window.low[0], window.high[0]) == (3, 23)


@pytest.mark.parametrize("shape", [(9, 7, 11), (4, 5, 6), (12, 3, 8)])
def test_what_is_cut_comes_back_to_its_place(shape):
    volume = np.random.default_rng(0).normal(size=(2, *shape))
    window = centre_window(shape, (8, 6, 8))
    back = window.put_back(window.cut(volume), shape, fill=np.nan)
    seen = ~np.isnan(back)
    assert np.array_equal(back[seen], volume[seen])
    expected = [min(have, want) for have, want in zip(shape, (8, 6, 8), strict=True)]
    assert seen.sum() == 2 * np.prod(expected)
    assert Window.from_meta(json.loads(json.dumps(window.to_meta()))) == window


def test_sizes_are_rounded_up_to_what_the_network_halves():
    assert rounded_up((19, 64, 65), (2, 8, 8)) == (20, 64, 72)


def plan(**changes):
    values = {
        "window": "centre",
        "size": (4, 4, 4),
        "mask": "prostate",
        "normalization": "volume",
        "target_kind": "classes",
        "labels": {"background": 0, "organ": 1},
        "channel_names": ("a", "b"),
    }
    return SamplePlan(**{**values, **changes})


def test_mask_normalisation_uses_the_voxels_of_the_organ_only():
    image = np.random.default_rng(1).normal(5.0, 2.0, size=(2, 6, 6, 6))
    mask = mask_of(6, 1, 4)
    scaled = plan(normalization="mask").normalise(image, mask, "case")
    assert np.allclose(scaled[:, mask > 0].mean(axis=1), 0.0, atol=1e-5)
    assert np.allclose(scaled[:, mask > 0].std(axis=1), 1.0, atol=1e-5)


def test_a_constant_channel_becomes_zero_and_not_nan():
    image = np.full((2, 4, 4, 4), 7.0)
    assert not plan().normalise(image, None, "case").any()


def test_padding_is_zero_after_normalisation():
    image = np.random.default_rng(2).normal(50.0, 3.0, size=(2, 2, 4, 4))
    window = centre_window((2, 4, 4), (6, 4, 4))
    box = window.cut(plan().normalise(image, None, "case"))
    assert not box[:, 0].any()
    assert not box[:, -1].any()


@pytest.mark.parametrize(
    "content",
    [
        {"mean": [1.0, 2.0], "std": [3.0, 4.0]},
        {"T2": {"mean": 1.0, "std": 3.0}, "adc": {"mean": 2.0, "std": 4.0}},
        [1.0, 3.0, 2.0, 4.0],
        {"case": {"mean": [1.0, 2.0], "std": [3.0, 4.0]}},
        {"case": [1.0, 3.0, 2.0, 4.0]},
        {"case": {"t2": {"mean": 1.0, "std": 3.0}, "adc": {"mean": 2.0, "std": 4.0}}},
    ],
)
def test_all_forms_of_the_statistics_file_mean_the_same(tmp_path, content):
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(content))
    found = read_statistics(path, ("t2", "adc"))
    assert list(found.values()) == [((1.0, 2.0), (3.0, 4.0))]


def test_a_statistics_file_of_another_form_is_refused(tmp_path):
    path = tmp_path / "stats.json"
    path.write_text(json.dumps({"case": {"average": 3}}))
    with pytest.raises(DataError, match="case case has none of the known forms"):
        read_statistics(path, ("t2",))


def test_a_plan_survives_a_checkpoint():
    before = plan(statistics={"*": ((1.0, 2.0), (3.0, 4.0))}, spacing=(0.5, 0.5, 3.0))
    assert SamplePlan.from_meta(json.loads(json.dumps(before.to_meta()))) == before


def gather(make_job, tmp_path, values):
    job = make_job(tmp_path / "run", values)
    return data.gather_data(job.config, job.manager, Cache(tmp_path / "cache"))


def test_auto_finds_mask_window_regions_and_size_of_a_prostate_dataset(make_job, tmp_path):
    found = gather(make_job, tmp_path, {"sample": {"size": [0, 0, 0]}})
    assert (found.plan.window, found.plan.normalization, found.plan.target_kind) == ("mask", "mask", "binary")
    assert found.plan.size == (20, 32, 32)


def test_no_case_has_two_duties(make_job, tmp_path):
    found = gather(make_job, tmp_path, {"split": {"labelled": 2}})
    groups = [found.labelled, found.unlabelled, found.reward, found.val]
    names = [case.id for group in groups for case in group]
    assert len(names) == len(set(names))
    assert len(found.labelled) == 2


def test_labelled_cases_keep_the_mixture_of_lesions(make_job, tmp_path):
    found = gather(make_job, tmp_path, {})
    chosen = duties.stratified(found.labelled, 2, 1, "labelled", found.store)
    present = {tuple(np.unique(found.store.get(case).label)) for case in chosen}
    assert len(present) == 2
    assert chosen == duties.stratified(found.labelled, 2, 1, "labelled", found.store)


def test_more_labelled_cases_than_there_are_is_an_error(make_job, tmp_path):
    with pytest.raises(ConfigError, match="9 of 4 labelled"):
        gather(make_job, tmp_path, {"split": {"labelled": 9}})


def test_a_window_that_the_network_cannot_halve_is_refused_with_a_better_one(make_job, tmp_path):
    with pytest.raises(ConfigError, match="multiples of") as error:
        gather(make_job, tmp_path, {"sample": {"size": [8, 32, 33]}})
    assert "[8,32,34]" in error.value.do


def test_prostate_regions_of_other_labels_are_refused(make_job, tmp_path, phantoms):
    job = make_job(tmp_path / "run", {"target": {"kind": "binary"}})
    dataset, split = duties.open_split(job.config)
    dataset.labels = {**dataset.labels, "stone": 4}
    with pytest.raises(ConfigError, match="prostate labels 0 to 3"):
        planning.resolve_plan(job.config, dataset, split.train, (1, 1, 1), None)


def test_a_sample_is_the_window_of_the_stored_image(make_job, tmp_path):
    found = gather(make_job, tmp_path, {"sample": {"normalization": "volume", "window": "centre"}})
    case = found.labelled[0]
    sample = found.samples([case], teachers=False)[0]
    stored = nib.load(case.label).get_fdata().transpose(2, 1, 0)
    assert np.array_equal(sample["label"].numpy(), stored)
    assert sample["image"].shape == (3, 8, 32, 32)
    assert abs(float(sample["image"].mean())) < 1e-4


def test_an_unlabelled_sample_does_not_show_its_label(make_job, tmp_path):
    found = gather(make_job, tmp_path, {})
    sample = found.samples(found.labelled[:1], teachers=False, labelled=False)[0]
    assert not sample["label"].any()
    assert not sample["labelled"]


def test_a_missing_organ_mask_names_the_case(make_job, tmp_path, phantoms):
    found = gather(make_job, tmp_path, {})
    case = found.labelled[0]
    bare = type(case)(id=case.id, images=case.images, label=case.label)
    with pytest.raises(DataError, match=f"case {case.id}.*no organ mask"):
        found.store.get(bare)


def test_prepared_cases_change_when_a_file_changes(make_job, tmp_path, phantoms):
    found = gather(make_job, tmp_path, {})
    case = found.labelled[0]
    before = found.store.get(case)
    other = data.CaseStore(found.dataset, found.plan, found.store.cache)
    assert other.get(case).image_hash == before.image_hash
    moved = type(case)(id=case.id, images=case.images[::-1], label=case.label, masks=case.masks)
    third = data.CaseStore(found.dataset, found.plan, found.store.cache)
    assert third.get(moved).image_hash != before.image_hash
    assert not np.array_equal(third.get(moved).image, before.image)


def test_jitter_changes_each_channel_by_gain_and_offset_only():
    torch.manual_seed(0)
    image = torch.randn(2, 4, 5, 6)
    (changed,) = jitter([image], AugmentConfig(scale=0.2, shift=0.3, noise=0.0))
    for before, after in zip(image, changed, strict=True):
        gain = (after.max() - after.min()) / (before.max() - before.min())
        assert 0.8 <= float(gain) <= 1.2
        assert torch.allclose(after, before * gain + (after - before * gain).mean(), atol=1e-5)


def test_samples_are_stacked_in_order(make_job, tmp_path):
    found = gather(make_job, tmp_path, {})
    samples = found.samples(found.labelled[:2], teachers=False)
    batch = collate([samples[0], samples[1]])
    assert batch.case_ids == tuple(case.id for case in found.labelled[:2])
    assert torch.equal(batch.image[1], samples[1]["image"])
    assert batch.labelled.all()


# -- images of the test list ------------------------------------------------------------------------


@pytest.fixture
def hospital(phantoms, tmp_path):
    """The phantoms with two test images, one of which has no label."""
    import shutil

    root = tmp_path / "hospital"
    shutil.copytree(phantoms, root)
    labels = sorted((root / "labelsTs").iterdir())
    labels[0].unlink()
    return root


def taught(root, teacher_runs, **split):
    teachers = {"features": [str(teacher_runs)], "source": "live"}
    return {"data": {"root": str(root)}, "teachers": teachers, "train": {"batch_size": 2}, "split": split}


def test_test_images_without_label_train_only_when_asked(make_job, tmp_path, hospital, teacher_runs, caplog):
    plain = gather(make_job, tmp_path, taught(hospital, teacher_runs))
    assert plain.unlabelled == ()
    assert "TESTING" not in caplog.text
    asked = gather(make_job, tmp_path, taught(hospital, teacher_runs, unlabelled_from_test=True))
    bare = [case for case in asked.dataset.test_cases if case.label is None]
    assert len(bare) == 1
    assert [case.id for case in asked.unlabelled] == [bare[0].id]
    assert asked.labelled == plain.labelled
    assert asked.val == plain.val
    assert "TESTING" in caplog.text
    assert "NOT test cases" in caplog.text
    assert bare[0].id in caplog.text


def test_a_run_says_which_test_images_it_trained_on(make_job, tmp_path, hospital, teacher_runs):
    from medrl.plugins.graft import train

    job = make_job(tmp_path / "run", taught(hospital, teacher_runs, unlabelled_from_test=True))
    with job.runtime() as rt:
        found = data.load(rt, job.config)
        train.fit(rt, job.config, found)
    manifest = json.loads((job.run_dir / "manifest.json").read_text())
    assert manifest["no_test_cases"] == [case.id for case in found.unlabelled]
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("loss_features", 0) > 0] == [1, 2, 3]
    assert "NOT test cases" in (job.run_dir / "log.txt").read_text()


def test_features_are_extracted_for_test_images_that_train(
    make_job, manager, tmp_path, hospital, teacher_runs
):
    from medrl.plugins.graft import teachers

    over = {"data": {"root": str(hospital)}, "split": {"unlabelled_from_test": True}}
    config = make_job(tmp_path / "run", over).config
    done = teachers.extract(manager, config, teachers.find_teachers(teacher_runs), tmp_path / "f")
    student = taught(hospital, teacher_runs, unlabelled_from_test=True)
    student["teachers"] = {"features": [str(tmp_path / "f")]}
    found = gather(make_job, tmp_path, student)
    found.check_features()
    assert done.written == 2 * (len(found.labelled) + 1)


def test_a_dataset_whose_test_images_all_have_labels_offers_none(make_job, tmp_path, phantoms, teacher_runs):
    over = taught(phantoms, teacher_runs, unlabelled_from_test=True)
    with pytest.raises(ConfigError, match="no test image without label"):
        gather(make_job, tmp_path, over)


def test_without_teachers_there_is_nothing_to_learn_from_test_images(make_job, tmp_path, hospital):
    over = {"data": {"root": str(hospital)}, "split": {"unlabelled_from_test": True}}
    with pytest.raises(ConfigError, match="learn from teachers"):
        gather(make_job, tmp_path, over)


def test_a_patient_of_the_validation_is_not_trained_on_from_the_test_list(
    make_job, tmp_path, hospital, teacher_runs, monkeypatch
):
    from dataclasses import replace

    over = taught(hospital, teacher_runs, unlabelled_from_test=True)
    original = duties.open_split

    def same_patient(cfg):
        dataset, split = original(cfg)
        patient = split.val[0].patient or split.val[0].id
        dataset.test_cases = tuple(replace(case, patient=patient) for case in dataset.test_cases)
        return dataset, split

    monkeypatch.setattr(data, "open_split", same_patient)
    with pytest.raises(DataError, match="patients of the validation"):
        gather(make_job, tmp_path, over)
