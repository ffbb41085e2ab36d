"""Sequences as training sees them: windows, padding, splits, labels on the grid, the wall around labels."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medrl.core.errors import ConfigError, DataError
from medrl.core.phantoms.echo import make_sequence
from medrl.plugins.rl4seg3d import data
from medrl.plugins.rl4seg3d.config import Rl4seg3dConfig
from medrl.plugins.rl4seg3d.data import SequenceSet, label_on_grid
from medrl.plugins.rl4seg3d.domains import draw, load_domains, windows_of
from medrl.plugins.rl4seg3d.io import EchoSequence, Plan, prepare


def sequences(*lengths, size=(4, 4)):
    """Sequences whose voxels hold the number of their frame."""
    images = tuple(torch.arange(n, dtype=torch.uint8).expand(1, 4, 4, n).contiguous() for n in lengths)
    return SequenceSet(
        ids=tuple(f"s{n}" for n in range(len(lengths))),
        subjects=tuple(f"p{n}" for n in range(len(lengths))),
        images=images,
        labels=tuple(image[0] % 3 for image in images),
        spacing_mm=torch.ones(len(lengths), 2, dtype=torch.float64),
        label_names={"background": 0, "LV": 1, "MYO": 2},
        size=size,
    )


def rank(number=0, world=1):
    return SimpleNamespace(rank=number, world_size=world, device=torch.device("cpu"))


def frames_of(batch, row):
    return (batch.images[row, 0, 0, 0] * 255).round().int().tolist()


def test_windows_begin_anywhere_and_reach_the_last_start():
    cfg = Rl4seg3dConfig(method="rl4seg3d")
    whole = sequences(7)
    firsts = set()
    for step in range(1, 60):
        batch = draw(rank(), whole, cfg, stage="source", step=step, size=1)
        first, *rest = frames_of(batch, 0)
        assert rest == [first + 1, first + 2, first + 3]
        assert batch.ids == [f"s0_t{first:03d}"]
        firsts.add(first)
    assert firsts == {0, 1, 2, 3}


def test_a_step_draws_the_same_windows_again_and_ranks_draw_different_sequences():
    cfg = Rl4seg3dConfig(method="rl4seg3d")
    whole = sequences(6, 8, 5, 9)
    one, two = (draw(rank(), whole, cfg, stage="ppo", step=3, size=2) for _ in range(2))
    assert one.ids == two.ids
    assert torch.equal(one.images, two.images)
    parts = [draw(rank(number, 2), whole, cfg, stage="ppo", step=1, size=2) for number in (0, 1)]
    assert set(parts[0].index).isdisjoint(parts[1].index)
    assert set(parts[0].index) | set(parts[1].index) == {0, 1, 2, 3}


def test_short_sequences_repeat_their_last_frame():
    batch = draw(rank(), sequences(2), Rl4seg3dConfig(method="rl4seg3d"), stage="a", step=1, size=1)
    assert frames_of(batch, 0) == [0, 1, 1, 1]


def test_all_windows_cover_every_frame_and_some_are_spread():
    whole = sequences(4, 7, 3)
    seen = {(number, frame) for number, frames in whole.all_windows() for frame in frames}
    assert seen == {(0, t) for t in range(4)} | {(1, t) for t in range(7)} | {(2, t) for t in range(3)}
    assert whole.some_windows(2).ids == ("s0_t000", "s1_t003")


@pytest.mark.parametrize("size", [(8, 6), (2, 4)])
def test_frames_are_filled_up_or_cut_about_their_centre(size):
    image = torch.arange(16, dtype=torch.uint8).view(1, 4, 4, 1).expand(1, 4, 4, 4).contiguous()
    whole = sequences(4, size=size)
    whole = SequenceSet(**{**vars(whole), "images": (image,)})
    cut = (whole.windows([(0, (0, 1, 2, 3))]).images[0, 0, :, :, 0] * 255).round().int()
    assert tuple(cut.shape) == size
    if size == (8, 6):
        assert torch.equal(cut[2:6, 1:5], image[0, :, :, 0].int())
        assert int(cut.sum()) == int(image[0, :, :, 0].int().sum())
    else:
        assert torch.equal(cut, image[0, 1:3, :, 0].int())


def test_labels_lie_where_their_frames_lie():
    phantom = make_sequence(3, 0, size=(40, 48), frames=2)
    bright = (phantom.label > 0).astype(np.float32)
    sequence = EchoSequence(frames=bright, spacing_mm=(0.5, 0.6), frame_time_s=None, volume=None, time_axis=3)
    prepared = prepare(sequence, Plan(spacing_mm=(0.37, 0.37), equalise="off"))
    found = label_on_grid(phantom.label, sequence, prepared, {0: 0, 1: 1, 2: 2})
    assert found.shape == prepared.images.shape
    both = ((found > 0) & (prepared.images > 0.5)).sum()
    assert 2 * both / ((found > 0).sum() + (prepared.images > 0.5).sum()) > 0.98


def test_target_labels_are_none_by_default_and_refused_without_permission(make_job, tmp_path, manager):
    cfg = make_job(tmp_path / "run").config
    domains = load_domains(cfg, manager)
    assert domains.target.train.labels is None
    assert domains.target.val.labels is None
    assert domains.source.train.labels is not None
    assert domains.shape == (32, 32, 4)
    with pytest.raises(ConfigError, match="target labels"):
        data.load_target(cfg, domains.plan, labels="train")
    assert data.load_target(cfg, domains.plan, labels="test").test.labels is not None


def test_no_patient_is_on_two_sides(make_job, tmp_path, manager):
    domains = load_domains(make_job(tmp_path / "run").config, manager)
    for domain in (domains.source, domains.target):
        parts = [set(part.subjects) for part in (domain.train, domain.val, domain.test) if part is not None]
        assert sum(map(len, parts)) == len(set().union(*parts))


def test_a_plan_comes_back_from_a_checkpoint(make_job, tmp_path, manager):
    plan = load_domains(make_job(tmp_path / "run").config, manager).plan
    assert data.SequencePlan.from_meta(plan.to_meta()) == plan


@pytest.fixture
def original(tmp_path, hearts):
    """The layout of the original, with a split column."""
    import shutil

    rows = []
    for number, image in enumerate(sorted((hearts["source"] / "imagesTr").iterdir())):
        name = image.name.removesuffix("_0000.nii.gz")
        for folder, source, ending in (
            ("img", image, "_0000.nii.gz"),
            ("segmentation", hearts["source"] / "labelsTr" / f"{name}.nii.gz", ".nii.gz"),
        ):
            place = tmp_path / folder / f"study{number // 2}" / "a4c" / f"{name}{ending}"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place)
        part = ("train", "train", "val")[number // 2]
        size = {"H": 100, "W": 50, "dx": 0.037, "dy": 0.037 * (1 + number)}
        rows.append(
            {"study": f"study{number // 2}", "view": "A4C", "dicom_uuid": name, "lm_split2": part, **size}
        )
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_the_layout_of_the_original_is_read_with_its_own_split(original):
    cfg = Rl4seg3dConfig(
        method="rl4seg3d",
        data={"root": original},
        sample={"spacing_mm": (0, 0), "equalise": "off"},
    )
    before = (original / "table.csv").read_bytes()
    domain = data.load_source(cfg)
    assert (len(domain.train), len(domain.val), domain.test) == (4, 2, None)
    assert set(domain.train.subjects) == {"study0", "study1"}
    assert (original / "table.csv").read_bytes() == before


@pytest.mark.parametrize(("limit", "kept"), [(0, 6), (5000, 1), (16000, 3), (600000, 6)])
def test_large_frames_of_the_original_are_left_out(original, limit, kept):
    """Frames of 100 x 50 pixels of 0.37 mm, one to six times as high."""
    assert len(data.open_original(original, max_image_area=limit).images) == kept


def test_an_area_without_columns_is_refused(original):
    table = original / "table.csv"
    table.write_text(table.read_text().replace(",dx,", ",other,"))
    with pytest.raises(ConfigError, match="does not tell H, W, dx and dy"):
        data.open_original(original, max_image_area=600000)


@pytest.mark.parametrize(("part", "kept"), [(1.0, 5), (0.5, 2), (0.01, 1), (3.0, 3), (100.0, 5)])
def test_part_of_the_target_trains(hearts, part, kept):
    cfg = Rl4seg3dConfig(
        method="rl4seg3d",
        data={"root": hearts["source"]},
        target={"root": hearts["target"], "subset_frac": part},
        sample={"spacing_mm": (0, 0), "equalise": "off"},
    )
    found = data.load_target(cfg, data.load_source(cfg).plan)
    assert (len(found.train), len(found.val), len(found.test)) == (kept, 1, 2)


@pytest.mark.parametrize(
    ("sample", "each"),
    [({}, 1), ({"windows": 3}, 3), ({"windows": 0, "max_tensor_volume": 160}, 2), ({"windows": 0}, 78125)],
)
def test_a_sequence_gives_as_many_windows_as_are_asked_for_or_have_room(sample, each):
    cfg = Rl4seg3dConfig(method="rl4seg3d", sample=sample)
    assert windows_of(cfg, (4, 4)) == each
    if each < 9:
        batch = draw(rank(), sequences(30, 40), cfg, stage="ppo", step=1, size=2)
        assert len(batch.ids) == len(batch.images) == 2 * each
        assert [name[:2] for name in batch.ids] == [f"s{n}" for n in batch.index]
        assert all(batch.index[row] == batch.index[row - row % each] for row in range(2 * each))
        assert len(set(batch.ids)) == 2 * each


def test_known_windows_come_once_among_several_of_a_sequence():
    cfg = Rl4seg3dConfig(method="rl4seg3d", sample={"windows": 3})
    batch = draw(rank(), sequences(30), cfg, stage="ppo", step=1, size=1, known=["s0_t007"])
    assert batch.ids[0] == "s0_t007"
    assert batch.ids.count("s0_t007") == 1


def test_a_missing_image_of_the_original_is_named(original):
    next((original / "img").rglob("*.nii.gz")).unlink()
    with pytest.raises(DataError, match="is missing"):
        data.open_original(original)
