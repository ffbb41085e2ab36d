"""Teachers trained by nnU-Net v2: own normalisation, own axes, label sets turned into the student's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from medrl.core.errors import CheckpointError, DataError
from medrl.plugins.graft import teachers
from medrl.plugins.graft.features import open_teacher
from medrl.plugins.graft.models import PlainConvUNet
from medrl.plugins.graft.regions import BINARY, BINARY_CLASSES, THREE_CLASS, converted, make_target
from medrl.plugins.graft.teachers.nnunet import NnUNetPlan, Scheme, read_teacher, target_of

REGIONS = {"background": 0, "prostate": [1, 2, 3], "PCa": [2, 3], "csPCa": [3]}
CT = {"mean": 80.0, "std": 30.0, "percentile_00_5": 10.0, "percentile_99_5": 150.0}


def network(out_channels=3, strides=((1, 1, 1), (1, 2, 2))):
    torch.manual_seed(7)
    return PlainConvUNet(
        in_channels=3,
        out_channels=out_channels,
        features=[4, 6],
        kernels=[(1, 3, 3), (3, 3, 3)],
        strides=strides,
    ).eval()


def plans(**over):
    settings = {
        "spacing": [3.0, 1.0, 1.0],
        "patch_size": [8, 32, 32],
        "normalization_schemes": ["ZScoreNormalization"] * 3,
        "use_mask_for_norm": [False] * 3,
        **over,
    }
    return {"transpose_forward": [0, 1, 2], "configurations": {"3d_fullres": settings}}


def write(path, model, *, labels=REGIONS, fold=1, plan=None, **over):
    dataset = {"channel_names": {"0": "T2", "1": "ADC", "2": "DWI"}, "labels": labels}
    init = {"plans": plan or plans(), "configuration": "3d_fullres", "fold": fold, "dataset_json": dataset}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"network_weights": model.state_dict(), "init_args": init, **over}, path)
    return path


# -- reading ---------------------------------------------------------------------------------------


def test_a_checkpoint_gives_network_plan_labels_and_the_fold_it_never_saw(tmp_path):
    model = network()
    found = read_teacher(write(tmp_path / "fold_1" / "checkpoint_best.pth", model))
    assert found.target.sets == ((1, 2, 3), (2, 3), (3,))
    assert (found.fold, found.order, found.spacing) == (1, (0, 1, 2), (1.0, 1.0, 3.0))
    image = torch.randn(1, 3, 8, 16, 16)
    assert torch.equal(found.network(image).main, model(image).main)
    assert read_teacher(write(tmp_path / "a" / "checkpoint_best.pth", model, fold="all")).fold == "all"


def test_plans_and_labels_may_lie_in_the_folder_above_the_fold(tmp_path):
    path = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_0" / "checkpoint_final.pth"
    path.parent.mkdir(parents=True)
    torch.save({"network_weights": network().state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"plans.json"):
        read_teacher(path)
    (path.parent.parent / "plans.json").write_text(json.dumps(plans()))
    dataset = {"channel_names": {"0": "T2", "1": "ADC", "2": "DWI"}, "labels": REGIONS}
    (path.parent.parent / "dataset.json").write_text(json.dumps(dataset))
    assert read_teacher(path).target.names == ("prostate", "PCa", "csPCa")


@pytest.mark.parametrize(
    ("over", "why"),
    [
        ({"plan": plans(normalization_schemes=["Zscore"] * 3)}, "ZScoreNormalization"),
        ({"plan": plans(normalization_schemes=["CTNormalization"] * 3)}, "incomplete"),
        ({"plan": plans(spacing=[1.0, 1.0])}, "incomplete"),
        (
            {"labels": {"background": 0, "prostate": 1, "cancer": 2, "more": 3}},
            "gives 3, its labels want 3 and 4",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused_with_the_file(tmp_path, over, why):
    path = write(tmp_path / "checkpoint_best.pth", network(), **over)
    with pytest.raises(CheckpointError) as error:
        read_teacher(path)
    assert str(path) in str(error.value)
    assert why.rpartition(", ")[2] in str(error.value)


def test_folds_of_nnunet_are_found_in_the_order_of_their_numbers(tmp_path):
    for k in (10, 2):
        write(tmp_path / f"fold_{k}" / "checkpoint_best.pth", network())
    write(tmp_path / "fold_2" / "checkpoint_final.pth", network())
    found = teachers.find_teachers(tmp_path)
    assert [path.parent.name for path in found] == ["fold_2", "fold_10"]
    assert {path.name for path in found} == {"checkpoint_best.pth"}
    assert teachers.find_teachers(found[0]) == [found[0]]


# -- normalisation ---------------------------------------------------------------------------------


def test_each_channel_is_normalised_by_its_scheme_over_the_non_zero_box():
    """The same arithmetic gave the numbers of nnunetv2 2.8.1 to the last bit."""
    rng = np.random.default_rng(0)
    image = np.zeros((4, 6, 12, 12), dtype=np.float32)
    image[:, 1:5, 2:10, 3:11] = rng.uniform(1, 200, (4, 4, 8, 8))
    image[:, 1, 2:4, 3:5] = 0.0
    names = ("ZScoreNormalization", "ZScoreNormalization", "CTNormalization", "RescaleTo01Normalization")
    schemes = tuple(Scheme(name, k == 1, CT if k == 2 else {}) for k, name in enumerate(names))
    base = {"window": "centre", "size": (0, 0, 0), "mask": "", "target_kind": "", "labels": {}}
    plan = NnUNetPlan(normalization="nnunet", channel_names=tuple("abcd"), schemes=schemes, **base)
    found = plan.normalise(image, None, "case")
    box = image[:, 1:5, 2:10, 3:11]
    inside = (image != 0).any(axis=0)
    assert np.allclose(found[0], (image[0] - box[0].mean()) / box[0].std(), atol=1e-5)
    values = image[1][inside]
    assert np.allclose(found[1][inside], (values - values.mean()) / values.std(), atol=1e-5)
    assert not found[1][~inside].any()
    assert np.allclose(found[2], (np.clip(image[2], 10, 150) - 80) / 30, atol=1e-5)
    assert found[3][1:5, 2:10, 3:11].min() == 0.0
    assert found[3].max() == pytest.approx(1.0)


def test_an_empty_image_is_normalised_without_nan():
    plan = NnUNetPlan(
        window="centre",
        size=(0, 0, 0),
        mask="",
        normalization="nnunet",
        target_kind="",
        labels={},
        channel_names=("a",),
        schemes=(Scheme("ZScoreNormalization", True),),
    )
    assert np.isfinite(plan.normalise(np.zeros((1, 2, 3, 3)), None, "case")).all()


# -- labels ----------------------------------------------------------------------------------------


def test_classes_become_regions_with_the_probability_of_their_sum():
    logits = torch.randn(2, 4, 2, 3, 3) * 5
    have = target_of({"labels": {"background": 0, "prostate": 1, "PCa": 2, "csPCa": 3}})
    p = torch.softmax(logits, dim=1)
    regions = torch.sigmoid(converted(logits, have, THREE_CLASS))
    assert torch.allclose(regions[:, 0], 1 - p[:, 0], atol=1e-6)
    assert torch.allclose(regions[:, 1], p[:, 2] + p[:, 3], atol=1e-6)
    assert torch.allclose(regions[:, 2], p[:, 3], atol=1e-6)
    joined = torch.softmax(converted(logits, have, BINARY_CLASSES), dim=1)
    assert torch.allclose(joined, torch.stack([p[:, 0], p[:, 1], p[:, 2] + p[:, 3]], dim=1), atol=1e-6)


def test_regions_become_regions_of_the_same_labels_or_the_largest_that_make_them_up():
    logits = torch.randn(1, 3, 2, 3, 3)
    have = target_of({"labels": REGIONS})
    assert torch.equal(converted(logits, have, THREE_CLASS), logits)
    assert torch.equal(converted(logits, have, BINARY), logits[:, :2])
    apart = target_of({"labels": {"background": 0, "prostate": [1, 2, 3], "PCa": 2, "csPCa": 3}})
    expected = torch.stack([logits[:, 0], logits[:, 1:].amax(dim=1)], dim=1)
    assert torch.equal(converted(logits, apart, BINARY), expected)


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        ({"background": 0, "prostate": 1, "cancer": 2}, BINARY),
        (REGIONS, BINARY_CLASSES),
        ({"background": 0, "gland": [1, 2, 3], "csPCa": 3}, BINARY),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(labels, want):
    have = target_of({"labels": labels})
    with pytest.raises(DataError, match="apart"):
        converted(torch.zeros(1, have.channels, 1, 1, 1), have, want)


def test_the_same_classes_under_other_names_are_the_same():
    have = target_of({"labels": {"background": 0, "a": 1, "b": 2}})
    want = make_target("classes", {"background": 0, "anterior": 1, "posterior": 2})
    logits = torch.randn(1, 3, 1, 2, 2)
    assert converted(logits, have, want) is logits


# -- extraction ------------------------------------------------------------------------------------


def test_features_are_extracted_with_the_teachers_own_normalisation(tmp_path, manager, resolve):
    path = write(tmp_path / "fold_1" / "checkpoint_best.pth", network())
    done = teachers.extract(manager, resolve([]).config, [path], tmp_path / "f", taps=["neg1"], dtype="fp32")
    folder = open_teacher(done.folders[0])
    assert folder.trained_on == {"fold": 1}
    assert folder.channels == {"neg1": 4, "logits": 2}

    from medrl.core.cache import Cache
    from medrl.core.dataset import load_case
    from medrl.plugins.graft import data
    from medrl.plugins.graft.samples import to_network

    student = data.gather_data(resolve([]).config, manager, Cache(tmp_path / "cache"))
    case = student.labelled[0]
    expected = student.store.expected(student.store.get(case))
    stored = folder.read(expected, ["neg1", "logits"])
    raw = to_network(load_case(student.dataset, case, with_label=False)[0].data)
    image = np.stack([(c - c.mean()) / c.std() for c in raw])
    live = network()(torch.from_numpy(expected.window.cut(image.astype(np.float32)))[None])
    assert torch.allclose(stored["neg1"], live.features["neg1"][0], atol=2e-4)
    assert torch.allclose(stored["logits"], live.main[0, :2], atol=2e-4)


def test_a_network_of_other_axes_gets_them_turned_and_gives_them_back(tmp_path, manager):
    model = network(strides=((1, 1, 1), (2, 1, 2)))
    path = write(
        tmp_path / "checkpoint_best.pth",
        model,
        plan={**plans(spacing=[1.0, 3.0, 1.0]), "transpose_forward": [1, 0, 2]},
    )
    teacher = teachers.open_network(path, manager, torch.device("cpu"))
    assert teacher.spacing == (1.0, 1.0, 3.0)
    image = torch.randn(3, 6, 8, 10)
    found = teacher.read(image, ["neg1"])
    turned = model(image.permute(0, 2, 1, 3)[None])
    assert found["logits"].shape[1:] == (6, 8, 10)
    assert torch.allclose(found["logits"], turned.main[0].permute(0, 2, 1, 3), atol=1e-6)
    assert torch.allclose(found["neg1"], turned.features["neg1"][0].permute(0, 2, 1, 3), atol=1e-6)


def test_a_dataset_of_another_spacing_is_refused_by_case(tmp_path, manager, resolve):
    path = write(tmp_path / "checkpoint_best.pth", network(), plan=plans(spacing=[3.0, 0.5, 0.5]))
    with pytest.raises(CheckpointError, match=r"case prostate_\d+, teacher .*0.5 × 0.5 × 3 mm"):
        teachers.extract(manager, resolve([]).config, [path], tmp_path / "f")


def test_a_teacher_of_other_channels_or_labels_is_refused(tmp_path, manager, resolve):
    labels = {"background": 0, "prostate": 1, "cancer": 2}
    path = write(tmp_path / "checkpoint_best.pth", network(), labels=labels)
    with pytest.raises(CheckpointError, match="apart"):
        teachers.extract(manager, resolve([]).config, [path], tmp_path / "f")


def test_pickled_numbers_in_a_teacher_need_trust(tmp_path, manager, resolve):
    path = write(tmp_path / "checkpoint_best.pth", network(), _best_ema=np.float64(0.9))
    with pytest.raises(CheckpointError, match="trust"):
        teachers.extract(manager, resolve([]).config, [path], tmp_path / "f")
    done = teachers.extract(manager, resolve([]).config, [path], tmp_path / "f", trust=True)
    assert done.written == 4
