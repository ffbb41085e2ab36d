"""Two real examinations whose channels lie on different grids; skipped where they are absent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medrl.core.config import dump_yaml
from medrl.core.dataset import load_case
from medrl.core.preview import preview_case
from medrl.core.volume import read_volume, write_volume
from medrl.plugins.graft import planning
from medrl.plugins.graft.cohorts import CohortDataset, open_cohorts
from medrl.plugins.graft.samples import CaseStore, SampleSet
from medrl.plugins.graft.upstream.importing import open_training

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "prostate_bpmri"
LESION, CLEAR = "11373_1001396", "10795_1000811"

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the real images are not here: {DATA} does not exist"),
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multi-cohort file over the images where they lie; labels and masks are put together beside it."""
    root = tmp_path_factory.mktemp("bpmri")
    for case in (LESION, CLEAR):
        gland = read_volume(DATA / f"{case}_gland_ai.nii.gz", kind="label")
        lesion = read_volume(DATA / f"{case}_lesion_human.nii.gz", kind="label")
        labels = np.maximum(
            (gland.data > 0).astype(np.uint8), np.where(lesion.data > 0, 3, 0).astype(np.uint8)
        )
        write_volume(root / "labels" / f"{case}.nii.gz", labels, gland, kind="label")
        write_volume(
            root / "masks" / f"{case}.nii.gz", (gland.data > 0).astype(np.uint8), gland, kind="label"
        )
    (root / "folds.json").write_text(json.dumps([{"inner_train": [LESION], "inner_val": [CLEAR]}]))
    files = {f"{name}_dir": str(DATA) for name in ("T2", "ADC", "DWI")}
    settings = {
        "picai_fold_json": "folds.json",
        "pred_type": "binary",
        "region_based": True,
        "image_dirs": {"file_paths": {**files, "mask_dir": "masks", "lesions_dir": "labels"}},
    }
    path = root / "cohorts.yaml"
    path.write_text(dump_yaml(settings))
    return path


@pytest.fixture(scope="module")
def dataset(cohort: Path) -> CohortDataset:
    return open_cohorts(cohort)


@pytest.mark.parametrize("case", [LESION, CLEAR])
def test_every_channel_is_resampled_onto_the_first_as_simpleitk_does_it(dataset, case):
    sitk = pytest.importorskip("SimpleITK")
    image, label = load_case(dataset, dataset.case(case), with_label=True)
    assert image.data.shape == (3, 384, 384, 19)
    assert image.spacing == pytest.approx((0.5, 0.5, 3.0), abs=1e-3)
    assert label is not None
    assert set(np.unique(label.data)) == ({0, 1, 3} if case == LESION else {0, 1})
    first = sitk.ReadImage(str(DATA / f"{case}_t2w.nii.gz"), sitk.sitkFloat32)
    assert np.array_equal(image.data[0], sitk.GetArrayFromImage(first).transpose(2, 1, 0))
    gland = label.data[0] > 0
    for channel, name in ((1, "adc"), (2, "hbv")):
        moving = sitk.ReadImage(str(DATA / f"{case}_{name}.nii.gz"), sitk.sitkFloat32)
        assert moving.GetSize() != first.GetSize()
        moved = sitk.Resample(moving, first, sitk.Transform(), sitk.sitkLinear, 0.0)
        wanted = sitk.GetArrayFromImage(moved).transpose(2, 1, 0)
        assert np.allclose(image.data[channel][gland], wanted[gland], rtol=1e-3, atol=1.0)
        assert np.corrcoef(image.data[channel].ravel(), wanted.ravel())[0, 1] > 0.999


def test_the_lesion_is_dark_on_adc_and_bright_on_high_b_once_the_grids_agree(dataset):
    image, label = load_case(dataset, dataset.case(LESION), with_label=True)
    assert label is not None
    lesion, benign = label.data[0] == 3, label.data[0] == 1
    _, adc, high_b = image.data
    assert adc[lesion].mean() < 0.8 * adc[benign].mean()
    assert high_b[lesion].mean() > 1.1 * high_b[benign].mean()


def test_a_sample_of_a_real_case_has_all_channels_in_one_window(make_job, cohort, tmp_path):
    values = {"data": {"root": str(cohort)}, "sample": {"size": [20, 256, 256]}}
    cfg, dataset, split = open_training(make_job(tmp_path / "run", values).config)
    plan = planning.resolve_plan(cfg, dataset, split.train, (1, 8, 8), None)
    assert (plan.target_kind, plan.window, plan.normalization) == ("binary", "mask", "mask")
    sample = SampleSet(CaseStore(dataset, plan, None), split.train)[0]
    inside = sample["mask"] > 0
    assert sample["image"].shape == (3, 20, 256, 256)
    assert inside.sum() > 10_000
    for channel in sample["image"]:
        assert abs(float(channel[inside].mean())) < 1e-2
        assert float(channel[inside].std()) == pytest.approx(1.0, abs=1e-2)
    assert (sample["label"] == 3).sum() > 100


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_every_channel_can_be_previewed(dataset, channel):
    assert preview_case(dataset, LESION, channel=channel).startswith(b"\x89PNG")
