from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from medrl.core.dataset import open_dataset
from medrl.core.errors import ConfigError, DataError
from medrl.core.jobs import PredictJob
from medrl.core.metrics import LesionMatch
from medrl.plugins.graft import data, data_commands, predict, train
from medrl.plugins.graft.lesions import (
    CaseResult,
    Lesion,
    LesionEvaluation,
    Rules,
    Scored,
    bootstrap,
    evaluate_case,
    evaluate_folders,
    find_lesion,
    lines,
    measure,
    score_sextants,
    sextants,
    summarise_results,
    write_results,
)
from medrl.plugins.graft.regions import BINARY, BINARY_CLASSES, THREE_CLASS, make_target

LABELS = {"background": 0, "prostate": 1, "PCa": 2, "csPCa": 3}
EYE = np.eye(4)


def binary(prostate: np.ndarray, cancer: np.ndarray) -> np.ndarray:
    return np.stack((prostate, cancer)).astype(np.float32)


def case(name: str, probability: np.ndarray, labels: np.ndarray, **options) -> CaseResult:
    """Evaluate cancer probabilities of a case whose prostate is predicted perfectly."""
    options.setdefault("protocols", ("picai",))
    return evaluate_case(
        name,
        binary(labels > 0, probability),
        labels,
        BINARY,
        find_lesion(BINARY),
        spacing=(1.0, 1.0, 1.0),
        affine=EYE,
        **options,
    )


def empty() -> tuple[np.ndarray, np.ndarray]:
    labels = np.ones((12, 12, 6), dtype=np.uint8)
    return np.zeros(labels.shape, dtype=np.float32), labels


# -- what a lesion is --------------------------------------------------------------------------------------


def test_cancer_and_significant_cancer_are_found_in_every_target_of_the_prostate():
    four = make_target("classes", LABELS)
    assert find_lesion(BINARY) == Lesion("cancer", (1,), (2, 3))
    assert find_lesion(THREE_CLASS) == Lesion("cancer", (1,), (2, 3))
    assert find_lesion(THREE_CLASS, "significant") == Lesion("significant_cancer", (2,), (3,))
    assert find_lesion(BINARY_CLASSES) == Lesion("cancer", (2,), (2, 3))
    assert find_lesion(four) == Lesion("cancer", (2, 3), (2, 3))
    assert find_lesion(four, "significant") == Lesion("csPCa", (3,), (3,))
    assert find_lesion(make_target("nested", {"background": 0, "liver": 1, "tumour": 2})).values == (2,)
    with pytest.raises(ConfigError, match="did you mean 'cancer'"):
        find_lesion(BINARY, "cancr")


# -- picai -------------------------------------------------------------------------------------------------


def picai_cases() -> list[CaseResult]:
    """A lesion found at 0.9, a false alarm at 0.6, a lesion without candidate, an empty case."""
    found, labels = empty()
    labels[2:5, 2:5, 2:4] = 3
    found[2:5, 2:5, 2:4] = 0.8
    found[3, 3, 3] = 0.9
    alarm, clear = empty()
    alarm[8:10, 8:10, 1] = 0.6
    missed, hidden = empty()
    hidden[6:8, 6:8, 2] = 2
    missed[0, 0, 0] = 0.5  # no candidate: not above the threshold
    return [
        case("a", found, labels),
        case("b", alarm, clear),
        case("c", missed, hidden),
        case("d", *empty()),
    ]


def test_picai_numbers_of_four_cases():
    values = measure(picai_cases(), ("picai",))
    # Candidates .9 (hit) and .6 (false alarm), two lesions: recall 1/2 at precision 1, then no more.
    assert values["picai.ap"] == pytest.approx(0.5)
    # Positive cases score .9 and 0, negative ones .6 and 0: 2 + (0 + ½) of 4 pairs.
    assert values["picai.auroc"] == pytest.approx(2.5 / 4)
    assert values["picai.score"] == pytest.approx((0.5 + 2.5 / 4) / 2)
    assert values["picai.sensitivity"] == 0.5
    assert values["picai.precision"] == 0.5
    assert values["picai.false_alarms_per_case"] == 0.25
    # The case protocol scores by the largest probability, threshold or not: .9, .5 against .6, 0.
    assert values["case.auroc"] == pytest.approx(3 / 4)
    # At .9: recall ½, precision 1; at .6 no new hit; at .5: recall 1, precision 2/3.
    assert values["case.ap"] == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_five_hits_four_false_alarms_five_misses_give_the_published_lesion_ap():
    match = LesionMatch(hits=(0.6,) * 5, false_alarms=(0.6,) * 4, misses=5)
    result = CaseResult("a", "a", (), {}, True, 0.6, match, 0.6)
    assert measure([result], ("picai",))["picai.ap"] == pytest.approx(5 / 18)


def test_a_candidate_that_overlaps_too_little_is_a_false_alarm():
    found, labels = empty()
    labels[2:6, 2:6, 2:6] = 3  # 64 voxels
    found[2, 2:5, 2:4] = 0.9  # 6 of them: IoU 0.094
    assert case("a", found, labels).match == LesionMatch((), (pytest.approx(0.9),), 1)
    found[2, 5, 2] = 0.9  # 7: IoU 0.109
    assert len(case("a", found, labels).match.hits) == 1
    assert case("a", found, labels, rules=Rules(min_overlap=0.2)).match.misses == 1


# -- sextants ----------------------------------------------------------------------------------------------


def test_a_mask_is_divided_into_left_and_right_thirds_from_below():
    organ = np.zeros((6, 5, 9), dtype=bool)
    organ[1:5, 1:4, 1:8] = True  # seven slices: three, two, two
    numbers, names = sextants(organ, EYE)
    assert names == ("left apex", "right apex", "left mid", "right mid", "left base", "right base")
    assert [int(numbers[1, 2, z]) for z in range(9)] == [0, 1, 1, 1, 3, 3, 5, 5, 0]
    assert [int(numbers[x, 2, 1]) for x in range(6)] == [0, 1, 1, 2, 2, 0]


@pytest.mark.parametrize("turn", [(-1, 1, 1), (1, 1, -1), (-1, -1, -1)])
def test_sextants_follow_the_patient_and_not_the_order_of_the_voxels(turn):
    organ = np.zeros((6, 5, 9), dtype=bool)
    organ[1:5, 1:4, 1:7] = True
    organ[1, 1, 7] = True
    numbers, _ = sextants(organ, EYE)
    flipped, _ = sextants(organ[:: turn[0], :: turn[1], :: turn[2]], np.diag([*turn, 1.0]))
    assert np.array_equal(flipped[:: turn[0], :: turn[1], :: turn[2]], numbers)
    moved = np.moveaxis(organ, 2, 0)  # stored with z first
    affine = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)
    assert np.array_equal(np.moveaxis(sextants(moved, affine)[0], 0, 2), numbers)


def test_lesions_and_lesion_free_sextants_are_scored_by_their_90th_percentile():
    organ = np.ones((4, 10, 3), dtype=bool)
    truth = np.zeros(organ.shape, dtype=bool)
    truth[0, :5, 0] = True  # in left apex
    truth[3, 9, 2] = True  # in right base
    p = np.zeros(organ.shape)
    p[0, :5, 0] = [0.1, 0.2, 0.3, 0.4, 0.5]
    p[:2, :, 1] = np.linspace(0, 0.95, 20).reshape(2, 10)
    p[3, 9, 2] = 0.7
    found = score_sextants(p, truth, organ, EYE)
    assert [item.name for item in found] == [
        "lesion 1",
        "lesion 2",
        "right apex",
        "left mid",
        "right mid",
        "left base",
    ]
    assert [item.positive for item in found] == [True, True, False, False, False, False]
    assert found[0].score == pytest.approx(0.46)
    assert found[1].score == pytest.approx(0.7)
    assert found[3].score == pytest.approx(np.percentile(np.linspace(0, 0.95, 20), 90))


def test_sextant_numbers_over_cases():
    items = (Scored("l", 0.9, True), Scored("m", 0.5, True), Scored("x", 0.6, False), Scored("y", 0.1, False))
    result = CaseResult("a", "a", (), {}, True, 0.9, scored=items)
    values = measure([result], ("sextant",))
    assert values["sextant.auroc"] == pytest.approx(3 / 4)
    assert values["sextant.ap"] == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert values["sextant.sensitivity"] == 0.5  # 0.5 is not above 0.5
    assert values["sextant.specificity"] == 0.5


def test_an_empty_organ_has_no_sextants_and_a_missing_one_is_an_error():
    labels = np.zeros((4, 4, 4), dtype=np.uint8)
    found = case("a", np.zeros(labels.shape), labels, protocols=("sextant",), organ=labels)
    assert found.scored == ()
    with pytest.raises(DataError, match="case a: the sextant protocol needs an organ mask"):
        case("a", np.zeros(labels.shape), labels, protocols=("sextant",))


# -- overlap and intervals ---------------------------------------------------------------------------------


def test_pooled_dice_counts_voxels_and_mean_dice_counts_cases():
    first, labels = empty()
    labels[0:2, 0, 0] = 2
    first[0:2, 0, 0] = 1.0  # 2 of 2
    second, more = empty()
    more[0:8, 0, 0] = 3
    second[0:2, 0, 0] = 1.0  # 2 of 8
    third, none = empty()  # neither
    values = measure([case("a", first, labels), case("b", second, more), case("c", third, none)], ("picai",))
    assert values["pooled.cancer.dice"] == pytest.approx(2 * 4 / (2 * 4 + 6))
    assert values["pooled.cancer.iou"] == pytest.approx(4 / 10)
    assert values["mean.cancer.dice"] == pytest.approx((1.0 + 2 * 2 / 10) / 2)
    assert values["mean.cancer.hd95"] == pytest.approx((0.0 + 5.65) / 2, abs=0.1)
    assert values["pooled.prostate.dice"] == 1.0


def test_what_nobody_holds_is_not_defined():
    values = measure([case("a", *empty())], ("picai",))
    assert all(
        math.isnan(values[name])
        for name in ("pooled.cancer.dice", "mean.cancer.dice", "case.auroc", "picai.ap", "picai.score")
    )


def test_exclusive_classes_are_decided_by_the_largest():
    labels = np.array([[[0, 1, 2, 3]]], dtype=np.uint8)
    p = np.zeros((3, 1, 1, 4), dtype=np.float32)
    p[:, 0, 0] = np.array([[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4], [0.45, 0.1, 0.45]]).T
    lesion = find_lesion(BINARY_CLASSES)
    found = evaluate_case("a", p, labels, BINARY_CLASSES, lesion, spacing=(1, 1, 1), affine=EYE, protocols=())
    assert (found.counts["cancer"].tp, found.counts["cancer"].fn) == (1, 1)
    assert found.score == pytest.approx(0.45)


def test_intervals_draw_patients_with_all_their_cases():
    cases = [
        CaseResult(f"{patient}{k}", patient, (), {}, True, value)
        for patient, value in (("p", 0.0), ("q", 1.0))
        for k in range(5)
    ]

    def mean(results):
        return {"mean": sum(result.score for result in results) / len(results), "none": math.nan}

    ends = bootstrap(cases, mean, n=400, seed=1)
    assert ends["mean"][:2] == (0.0, 1.0)  # a quarter of the draws holds one patient only
    assert ends == bootstrap(cases, mean, n=400, seed=1)
    assert math.isnan(ends["none"][0])
    assert ends["none"][2] == 0
    alone = [CaseResult(f"c{k}", f"c{k}", (), {}, True, float(k >= 5)) for k in range(10)]
    low, high, count = bootstrap(alone, mean, n=400, seed=1)["mean"]
    assert count == 400
    assert 0.1 <= low < 0.5 < high <= 0.9
    assert math.isnan(bootstrap(cases[:5], mean)["mean"][0])


def test_shapes_that_do_not_fit_name_the_case():
    labels = np.ones((4, 4, 4), dtype=np.uint8)
    options = {"spacing": (1, 1, 1), "affine": EYE, "protocols": ()}
    with pytest.raises(DataError, match=r"case x: probabilities have shape \(2, 4, 4, 3\)"):
        evaluate_case("x", np.zeros((2, 4, 4, 3)), labels, BINARY, find_lesion(BINARY), **options)


# -- folders -----------------------------------------------------------------------------------------------


def save(folder: Path, name: str, probabilities: np.ndarray, affine: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{name}.npz", probabilities=probabilities.astype(np.float32), affine=affine)


def perfect(root: Path, folder: Path, cases, *, flip: bool = False) -> None:
    """Predictions equal to the references; `flip` stores them with x the other way round."""
    for item in cases:
        image = nib.load(item.label)
        labels = np.asarray(image.dataobj)
        p, affine = binary(labels >= 1, labels >= 2), image.affine
        if flip:
            p = p[:, ::-1]
            affine = affine @ np.array(
                [[-1, 0, 0, labels.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
            )
        save(folder / "probabilities", item.id, p, affine)


@pytest.mark.parametrize("flip", [False, True])
def test_perfect_predictions_of_a_dataset_reach_every_best_value(phantoms, tmp_path, flip):
    dataset = open_dataset(phantoms)
    perfect(phantoms, tmp_path, dataset.cases, flip=flip)
    found = evaluate_folders(tmp_path, phantoms, resamples=20)
    summary = found.summary
    assert (summary["target"], summary["protocols"], summary["cases"]) == ("binary", ["picai", "sextant"], 6)
    for name in ("prostate", "cancer"):
        assert summary["structures"][name]["pooled"]["dice"]["value"] == 1.0
        assert summary["structures"][name]["per_case"]["hd95"]["mean"] == 0.0
    assert 0 < summary["positive_cases"] < 6
    assert summary["case"]["auroc"]["value"] == summary["picai"]["score"]["value"] == 1.0
    assert summary["picai"]["lesions"] > 0
    assert summary["sextant"]["auroc"]["value"] == 1.0
    assert summary["sextant"]["sextants"] + summary["sextant"]["lesions"] > 12
    empty = summary["structures"]["cancer"]["per_case"]["dice"]["excluded"]
    assert empty == 6 - summary["positive_cases"]


def test_the_other_way_round_left_and_right_change_places(phantoms, tmp_path):
    """The organ of the reference decides, so a prediction stored flipped is scored in the same sextants."""
    dataset = open_dataset(phantoms)
    for part, flip in (("a", False), ("b", True)):
        perfect(phantoms, tmp_path / part, dataset.cases, flip=flip)
    a, b = (evaluate_folders(tmp_path / part, phantoms, resamples=0).results for part in "ab")
    assert [result.scored for result in a] == [result.scored for result in b]


def test_a_folder_of_label_maps_is_a_reference_too_and_must_be_complete(phantoms, tmp_path):
    dataset = open_dataset(phantoms)
    perfect(phantoms, tmp_path, dataset.cases[1:])
    with pytest.raises(DataError, match=f"1 references have no prediction: {dataset.cases[0].id}"):
        evaluate_folders(tmp_path, phantoms / "labelsTr", resamples=0)
    found = evaluate_folders(tmp_path, phantoms / "labelsTr", resamples=0, allow_missing=True).summary
    assert found["missing"] == [dataset.cases[0].id]
    assert found["cases"] == 5
    # Of a dataset any selection of training cases may be evaluated, of its test cases all are expected.
    assert evaluate_folders(tmp_path, phantoms, resamples=0).summary["missing"] == []
    tests = open_dataset(phantoms).test_cases
    perfect(phantoms, tmp_path / "t", tests[:1])
    with pytest.raises(DataError, match=f"no prediction: {tests[1].id}"):
        evaluate_folders(tmp_path / "t", phantoms, resamples=0)


def test_a_prediction_without_reference_off_its_grid_or_damaged_is_named(phantoms, tmp_path):
    item = open_dataset(phantoms).cases[0]
    perfect(phantoms, tmp_path, [item])
    path = tmp_path / "probabilities" / f"{item.id}.npz"
    content = path.read_bytes()
    save(tmp_path / "probabilities", "stranger", np.zeros((2, 2, 2, 2)), EYE)
    with pytest.raises(DataError, match="case stranger: 1 predictions have no reference"):
        evaluate_folders(tmp_path, phantoms)
    (tmp_path / "probabilities" / "stranger.npz").unlink()
    image = nib.load(item.label)
    moved = image.affine.copy()
    moved[0, 3] += 3.0
    save(tmp_path / "probabilities", item.id, np.zeros((2, *image.shape)), moved)
    with pytest.raises(DataError, match=f"case {item.id}: .*does not lie on its reference"):
        evaluate_folders(tmp_path, phantoms)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"case {item.id}: {item.id}.npz: it cannot be read"):
        evaluate_folders(tmp_path, phantoms)
    np.savez(path, probabilities=np.array([None], dtype=object), affine=EYE)
    with pytest.raises(DataError, match="cannot be read"):
        evaluate_folders(tmp_path, phantoms)
    with pytest.raises(DataError, match="no probabilities"):
        evaluate_folders(tmp_path / "nowhere", phantoms)


@pytest.mark.parametrize(
    ("channels", "exclusive", "kind"),
    [(2, False, "binary"), (3, False, "3class"), (3, True, "binary_classes"), (4, True, "classes")],
)
def test_the_meaning_of_the_channels_is_told_by_their_number_and_sum(
    phantoms, tmp_path, channels, exclusive, kind
):
    item = open_dataset(phantoms).cases[0]
    image = nib.load(item.label)
    p = np.random.default_rng(0).random((channels, *image.shape))
    save(tmp_path, item.id, p / p.sum(0) if exclusive else p, image.affine)
    assert evaluate_folders(tmp_path, phantoms, resamples=0).summary["target"] == kind


def test_channels_that_may_mean_several_things_must_be_told(tmp_path):
    labels = np.zeros((6, 6, 6), dtype=np.int16)
    labels[1:3, 1:3, 1:3], labels[4, 4, 4] = 1, 2
    (tmp_path / "ref").mkdir()
    nib.save(nib.Nifti1Image(labels, EYE), tmp_path / "ref" / "a.nii.gz")
    save(tmp_path / "p" / "probabilities", "a", np.stack((labels == 1, labels == 2)), EYE)
    (tmp_path / "p" / "labels.json").write_text(
        json.dumps({"labels": {"background": 0, "front": 1, "back": 2}})
    )
    with pytest.raises(ConfigError, match="2 channels .* may mean several things"):
        evaluate_folders(tmp_path / "p", tmp_path / "ref")
    found = evaluate_folders(tmp_path / "p", tmp_path / "ref", target="separate", lesion="front", resamples=0)
    assert found.summary["protocols"] == ["picai"]  # no organ is known
    assert found.summary["structures"]["back"]["pooled"]["dice"]["value"] == 1.0
    assert found.summary["lesion"]["values"] == (1,)
    masks = tmp_path / "masks"
    masks.mkdir()
    with pytest.raises(DataError, match="case a: 0 organ masks named a"):
        evaluate_folders(tmp_path / "p", tmp_path / "ref", target="separate", masks=masks)
    nib.save(nib.Nifti1Image(np.ones_like(labels), EYE), masks / "a.nii.gz")
    nib.save(nib.Nifti1Image(np.ones_like(labels), EYE), masks / "ab.nii.gz")
    found = evaluate_folders(tmp_path / "p", tmp_path / "ref", target="separate", masks=masks, resamples=0)
    assert found.summary["sextant"]["lesions"] == 1


def test_results_are_written_as_tables_and_json_without_nan(tmp_path):
    results = picai_cases()
    facts = {"target": "binary", "lesion": {"name": "cancer"}, "resamples": 50, "level": 0.95, "seed": 0}
    summary = summarise_results(results, ("picai",), Rules(), facts)
    write_results(LesionEvaluation(tuple(results), summary), tmp_path)
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    auroc = written["picai"]["auroc"]
    assert auroc["low"] <= auroc["value"] == 0.625 <= auroc["high"]
    with (tmp_path / "structures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert [row["dice"] for row in rows if row["label"] == "cancer"] == ["1", "0", "0", ""]
    with (tmp_path / "lesions.csv").open() as file:
        rows = [(row["case"], row["kind"], row["score"]) for row in csv.DictReader(file)]
    assert rows == [("a", "hit", "0.9"), ("b", "false alarm", "0.6"), ("c", "miss", "")]
    with (tmp_path / "cases.csv").open() as file:
        assert [row["candidate_score"] for row in csv.DictReader(file)] == ["0.9", "0.6", "0", "0"]
    text = "\n".join(lines(summary))
    assert "4 cases, 2 with cancer" in text
    assert "auroc 0.625 [" in text


def test_the_command_evaluates_what_predict_wrote(make_job, manager, phantoms, tmp_path):
    job = make_job(tmp_path / "run", {"train": {"max_steps": 1, "checkpoint_every": 1}})
    with job.runtime() as rt:
        train.fit(rt, job.config, data.load(rt, job.config))
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("best*.pt"))
    prediction = PredictJob(
        method="graft",
        inputs=phantoms / "imagesTs",
        output=tmp_path / "out",
        checkpoints=[checkpoint],
        manager=manager,
        device="cpu",
        save_probabilities=True,
    )
    assert not predict.run(prediction).failed
    options = ["-p", str(tmp_path / "out"), "-r", str(phantoms), "--resamples", "10", "--json"]
    result = CliRunner().invoke(data_commands.evaluate, options)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["cases"] == 2
    assert summary["target"] == "binary"
    assert {path.name for path in (tmp_path / "out" / "evaluation").iterdir()} == {
        "summary.json",
        "structures.csv",
        "cases.csv",
        "lesions.csv",
    }
    assert "2 cases" in result.stderr
