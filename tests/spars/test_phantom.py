"""The abdominal phantom: what is in it, and what is not."""

import csv
import hashlib

import numpy as np
import pytest
from scipy import ndimage

from medrl.core.dataset import check_dataset, open_dataset
from medrl.core.errors import ConfigError
from medrl.core.phantoms.abdomen import Scene, draw, is_free, write_abdomen
from medrl.core.volume import read_volume

SMALL = {"shape": (24, 24, 16), "radius": (2.0, 3.0)}


def rng(seed=0):
    return np.random.default_rng(seed)


def test_volume_has_the_intensities_of_its_organs():
    image, label = draw(rng(), Scene(noise=0.0, bias=0.0))
    assert image.shape == label.shape == (64, 64, 48)
    assert 100 <= np.median(image[label == 1]) <= 120
    assert image[label == 2].min() >= 45
    assert image[label == 2].max() <= 65
    assert image.min() == -1000


def test_distractors_look_like_tumours_and_lie_outside_the_liver():
    for seed in range(6):
        image, label = draw(rng(seed), Scene(noise=0.0, bias=0.0), free=True)
        assert not (label == 2).any()
        like = (image >= 45) & (image <= 65)
        assert like.sum() >= 50
        assert not (like & (ndimage.binary_dilation(label > 0))).any()


def test_noise_has_the_standard_deviation_asked_for():
    image, label = draw(rng(3), Scene(noise=15.0, bias=0.0), free=True)
    assert abs(image[label == 1].std() - 15.0) < 0.5


def test_most_tumours_fill_less_than_half_of_a_window():
    sizes = []
    for seed in range(24):
        parts, count = ndimage.label(draw(rng(seed))[1] == 2)
        sizes += ndimage.sum(np.ones(parts.shape), parts, range(1, count + 1)).tolist()
    assert 0.6 <= np.mean(np.array(sizes) < 16 * 16 * 8 / 2) <= 0.9


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 3), (0.5, 6), (1.0, 12)])
def test_share_of_free_cases_is_exact(share, count):
    assert sum(is_free(index, share) for index in range(12)) == count


def test_files_are_a_dataset_with_labels_of_images(tmp_path):
    root = write_abdomen(tmp_path / "ct", cases=4, test_cases=2, **SMALL)
    assert check_dataset(root).ok
    dataset = open_dataset(root)
    assert dataset.labels == {"background": 0, "liver": 1, "tumour": 2}
    rows = list(csv.DictReader((root / "presence.csv").open()))
    assert [row["case_id"] for row in rows] == [case.id for case in dataset.cases]
    for case, row in zip(dataset.cases, rows, strict=True):
        found = (read_volume(case.label, kind="label").data == 2).any()
        assert found == (row["label"] == "1")
    assert len(dataset.test_cases) == 2


def test_same_seed_gives_the_same_bytes(tmp_path):
    def digest(name, **change):
        root = write_abdomen(tmp_path / name, cases=2, test_cases=1, **SMALL, **change)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    assert digest("a") == digest("b")
    assert digest("a") != digest("c", seed=1)


def test_case_does_not_depend_on_how_many_there_are(tmp_path):
    few = write_abdomen(tmp_path / "few", cases=1, test_cases=0, **SMALL)
    many = write_abdomen(tmp_path / "many", cases=3, test_cases=1, **SMALL)
    name = "imagesTr/abdomen_000_0000.nii.gz"
    assert (few / name).read_bytes() == (many / name).read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"shape": (8, 24, 16)}, {"radius": (3.0, 2.0)}, {"tumours": (0, 1)}, {"free": 1.5}, {"cases": 0}],
)
def test_impossible_settings_are_refused(tmp_path, change):
    with pytest.raises(ConfigError):
        write_abdomen(tmp_path / "ct", **{**SMALL, "cases": 1, **change})
