from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from medrl.core.errors import ConfigError, DataError
from medrl.plugins.graft import data_commands
from medrl.plugins.graft.duties import open_split
from medrl.plugins.graft.features import LOGITS, Expected, open_teacher, open_teachers
from medrl.plugins.graft.planning import divisor_of, resolve_plan
from medrl.plugins.graft.regions import (
    BINARY,
    BINARY_CLASSES,
    THREE_CLASS,
    make_target,
    teacher_probabilities,
)
from medrl.plugins.graft.samples import CaseStore, SampleSet
from medrl.plugins.graft.upstream import (
    VALID,
    Place,
    UpstreamTeacher,
    family_of,
    find_file,
    find_place,
    fitted,
    placed,
    read_upstream,
    student_logits,
)
from medrl.plugins.graft.upstream.importing import import_features
from medrl.plugins.graft.windows import Window, centre_window, mask_window

NNUNET = UpstreamTeacher("fold0", (), "nnunet", "pt")
PROVICNET = UpstreamTeacher("provicnet", (), "provicnet", "pt")
ATLAS = UpstreamTeacher("prostatlasdiff", (), "prostatlasdiff", "npz")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(window: Window, shape: tuple[int, int, int]) -> Expected:
    return Expected(case_id="c", window=window, shape=shape, spacing=(0.5, 0.5, 3.0))


def whole(depth: int = 20, plane: int = 16) -> Expected:
    """A window that is the whole image."""
    size = (depth, plane, plane)
    return expected(centre_window(size, size), size)


def save(path: Path, arrays: dict[str, Tensor], *, nested: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
    else:
        torch.save({"features": arrays, "case_id": "c"} if nested else arrays, path)
    return path


# -- the three families ------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nnunet_files_keep_their_order_and_lose_a_leading_one(tmp_path, leading, dtype):
    neg1, neg2, logits = noise(32, 20, 16, 16), noise(64, 20, 8, 8), noise(2, 20, 16, 16)
    arrays = {"feature_neg1": neg1, "feature_neg2": neg2, "logits": logits}
    stored = {name: (array[None] if leading else array).to(dtype) for name, array in arrays.items()}
    path = save(tmp_path / "features_c.pt", stored)
    found = read_upstream(path, NNUNET, "c", ("neg1", "neg2"))
    assert {name: tuple(array.shape) for name, array in found.items()} == {
        "neg1": (32, 20, 16, 16),
        "neg2": (64, 20, 8, 8),
        "logits": (2, 20, 16, 16),
    }
    assert found["neg1"].dtype == dtype
    assert torch.equal(found["neg2"], neg2.to(dtype))


def test_a_one_channel_map_of_nnunet_is_no_leading_one(tmp_path):
    path = save(
        tmp_path / "features_c.pt", {"feature_neg1": noise(1, 20, 4, 4), "logits": noise(2, 20, 4, 4)}
    )
    assert read_upstream(path, NNUNET, "c")["neg1"].shape == (1, 20, 4, 4)


@pytest.mark.parametrize("suffix", ["pt", "npz"])
def test_provicnet_files_turn_slices_and_channels(tmp_path, suffix):
    neg1, logits = noise(20, 32, 8, 8), noise(20, 4, 8, 8)
    path = save(tmp_path / f"features_c.{suffix}", {"feature_neg1": neg1, "logits": logits}, nested=True)
    found = read_upstream(path, PROVICNET, "c")
    assert found["neg1"].shape == (32, 20, 8, 8)
    assert torch.equal(found["neg1"][5, 7], neg1[7, 5])
    assert torch.equal(found["logits"][3, 2], logits[2, 3])


def test_prostatlasdiff_files_put_three_slices_into_channels(tmp_path):
    neg1, logits = noise(20, 5, 3, 8, 8), noise(20, 1, 3, 8, 8)
    path = save(tmp_path / "diffusion_features_c.npz", {"feature_neg1": neg1, "logits": logits})
    found = read_upstream(path, ATLAS, "c")
    assert found["neg1"].shape == (15, 20, 8, 8)
    assert torch.equal(found["neg1"][3 * 4 + 2, 11], neg1[11, 4, 2])
    assert found["logits"].shape == (3, 20, 8, 8)
    assert torch.equal(found["logits"][1, 6], logits[6, 0, 1])


def test_the_family_is_told_by_the_name_and_gives_the_file_name():
    assert [family_of(name) for name in ("ProViCNet_2", "prostatlasdiff", "fold0")] == [
        "provicnet",
        "prostatlasdiff",
        "nnunet",
    ]
    assert ATLAS.stem("10795_1000811") == "diffusion_features_10795_1000811"
    assert NNUNET.stem("a") == "features_a"


# -- finding a file ----------------------------------------------------------------------------------------


def test_the_configured_format_comes_first_then_npz_then_pt_in_each_folder(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    teacher = UpstreamTeacher("fold0", (a, b), "nnunet", "pt")
    b.mkdir()
    a.mkdir()
    (b / "features_c.pt").write_bytes(b"x")
    assert find_file(teacher, "c") == b / "features_c.pt"
    (a / "features_c.npz").write_bytes(b"x")  # another format, but in the first folder
    assert find_file(teacher, "c") == a / "features_c.npz"
    (a / "features_c.pt").write_bytes(b"x")
    assert find_file(teacher, "c") == a / "features_c.pt"
    assert find_file(UpstreamTeacher("fold0", (a, b), "nnunet", "npz"), "c") == a / "features_c.npz"


def test_a_file_of_a_case_whose_name_begins_alike_is_not_taken(tmp_path):
    (tmp_path / "features_100.pt").write_bytes(b"x")
    with pytest.raises(DataError, match="case 10, teacher fold0: no file features_10.pt"):
        find_file(UpstreamTeacher("fold0", (tmp_path,), "nnunet", "pt"), "10")


def test_a_file_smaller_than_asked_for_counts_as_missing_unless_another_folder_has_one(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    (a / "features_c.pt").write_bytes(b"x" * 10)
    teacher = UpstreamTeacher("fold0", (a, b), "nnunet", "pt")
    with pytest.raises(DataError, match=r"features_c.pt has 10 bytes, fewer than 100"):
        find_file(teacher, "c", min_bytes=100)
    (b / "features_c.pt").write_bytes(b"x" * 100)
    assert find_file(teacher, "c", min_bytes=100).parent == b


# -- damaged and malicious files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"feature_neg1": noise(4, 20, 4, 4)}, r"no 'logits', it has \['feature_neg1'\]"),
        ({"logits": noise(2, 20, 4, 4)}, "no 'feature_neg1'"),
        ({"feature_neg1": noise(4, 20, 4), "logits": noise(2, 20, 4, 4)}, r"has shape \[4, 20, 4\]"),
        (
            {"feature_neg1": noise(2, 4, 20, 4, 4), "logits": noise(2, 20, 4, 4)},
            r"has shape \[2, 4, 20, 4, 4\]",
        ),
        ({"feature_neg1": noise(4, 20, 4, 4), "logits": noise(2, 19, 4, 4)}, "different depths"),
        ({"feature_neg1": noise(4, 20, 4, 4), "logits": noise(2, 20, 4, 4) / 0}, "not finite"),
        ({"feature_neg1": noise(4, 20, 4, 4).long(), "logits": noise(2, 20, 4, 4)}, "floating-point"),
    ],
)
def test_a_file_that_does_not_fit_names_itself_its_case_and_why(tmp_path, arrays, why):
    for suffix in ("pt", "npz"):
        path = save(tmp_path / f"features_case7.{suffix}", arrays)
        with pytest.raises(DataError, match=why) as caught:
            read_upstream(path, NNUNET, "case7")
        assert str(path) in str(caught.value)
        assert caught.value.case == "case7"


def test_a_missing_second_tap_is_an_error_only_if_it_is_asked_for(tmp_path):
    path = save(
        tmp_path / "features_c.pt", {"feature_neg1": noise(4, 20, 4, 4), "logits": noise(2, 20, 4, 4)}
    )
    assert set(read_upstream(path, NNUNET, "c")) == {"neg1", "logits"}
    with pytest.raises(DataError, match="no 'feature_neg2'"):
        read_upstream(path, NNUNET, "c", ("neg1", "neg2"))


@pytest.mark.parametrize("suffix", ["pt", "npz"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, suffix, part):
    arrays = {"feature_neg1": noise(4, 20, 8, 8), "logits": noise(2, 20, 8, 8)}
    path = save(tmp_path / f"features_c.{suffix}", arrays)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(DataError, match=f"case c: .*features_c.{suffix}"):
        read_upstream(path, NNUNET, "c")


def test_a_flipped_bit_in_an_npz_is_noticed(tmp_path):
    path = save(
        tmp_path / "features_c.npz", {"feature_neg1": noise(4, 20, 8, 8), "logits": noise(2, 20, 8, 8)}
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_upstream(path, NNUNET, "c")


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("trust", [False, True])
def test_nothing_of_a_file_is_executed(tmp_path, trust):
    canary = tmp_path / "executed"
    arrays = {"feature_neg1": noise(4, 20, 4, 4), "logits": noise(2, 20, 4, 4)}
    torch.save({**arrays, "extra": Canary(canary)}, tmp_path / "features_c.pt")
    np.savez(
        tmp_path / "features_c.npz", feature_neg1=np.array([Canary(canary)], dtype=object), logits=np.ones(1)
    )
    with (tmp_path / "features_raw.pt").open("wb") as file:
        pickle.dump(Canary(canary), file, protocol=2)
    if trust:
        assert set(read_upstream(tmp_path / "features_c.pt", NNUNET, "c", trust=True)) == {"neg1", "logits"}
    else:
        with pytest.raises(DataError, match="features_c.pt"):
            read_upstream(tmp_path / "features_c.pt", NNUNET, "c")
    for name in ("features_c.npz", "features_raw.pt"):
        with pytest.raises(DataError, match=name):
            read_upstream(tmp_path / name, NNUNET, "c", trust=trust)
    assert not canary.exists()


# -- logits of the student's channels ----------------------------------------------------------------------


def test_three_regions_of_nnunet_become_two_by_the_larger_cancer():
    logits = torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1, 1)
    found, said = student_logits(logits, "nnunet", BINARY)
    assert found.flatten().tolist() == [1.0, 3.0]
    assert said == (True, True)
    assert torch.equal(student_logits(logits, "nnunet", THREE_CLASS)[0], logits)


@pytest.mark.parametrize("target", [BINARY, THREE_CLASS])
def test_provicnet_logits_mean_the_same_probabilities_even_where_they_are_extreme(target):
    logits = 30.0 * noise(4, 3, 5, 5, seed=2)
    found, said = student_logits(logits, "provicnet", target)
    wanted = teacher_probabilities(logits[None], target, "provicnet")[0]
    assert torch.allclose(torch.sigmoid(found), wanted, atol=1e-6)
    assert bool(torch.isfinite(found).all())
    assert all(said)


def test_provicnet_classes_serve_a_softmax_target():
    logits = noise(4, 2, 3, 3)
    four = make_target("classes", {"background": 0, "prostate": 1, "PCa": 2, "csPCa": 3})
    p = torch.softmax(logits, dim=0)
    assert torch.allclose(torch.softmax(student_logits(logits, "provicnet", four)[0], 0), p, atol=1e-6)
    three = torch.softmax(student_logits(logits, "provicnet", BINARY_CLASSES)[0], 0)
    assert torch.allclose(three, torch.stack((p[0], p[1], p[2] + p[3])), atol=1e-6)


def test_prostatlasdiff_calls_cancer_above_a_tenth_of_its_clipped_scale_in_the_centre_slice():
    logits = noise(3, 4, 6, 6, seed=1) * 3
    found, said = student_logits(logits, "prostatlasdiff", BINARY)
    p = torch.sigmoid(logits)
    scaled = (p[1] / p.max() / 0.2).clamp(0, 1)
    assert torch.equal(found[1] > 0, scaled > 0.1)
    assert bool((found[1] > 0).any())
    assert bool((found[1] < 0).any())
    assert said == (False, True)


@pytest.mark.parametrize(
    ("family", "channels", "target"),
    [
        ("nnunet", 4, BINARY),
        ("nnunet", 2, THREE_CLASS),
        ("provicnet", 3, BINARY),
        ("prostatlasdiff", 2, BINARY),
        ("provicnet", 4, make_target("separate", {"a": 1})),
    ],
)
def test_logits_of_other_channels_are_refused(family, channels, target):
    with pytest.raises(DataError, match=f"{channels} channels"):
        student_logits(noise(channels, 2, 3, 3), family, target)


# -- where a file lies in the student's window -------------------------------------------------------------


def organ(z0: int, depth: int, image: int = 30, plane: int = 16, size: int = 20) -> Expected:
    """A window around an organ of some slices."""
    mask = np.zeros((image, plane, plane), dtype=np.uint8)
    mask[z0 : z0 + depth] = 1
    return expected(mask_window(mask, (size, plane, plane)), (image, plane, plane))


def test_a_file_of_the_windows_depth_is_the_window():
    assert find_place((2, 20, 16, 16), organ(5, 13), "auto", Path("f")) == Place(0, 0, 20, False)


def test_a_file_of_the_images_depth_is_cut_where_the_image_is_cut():
    """The original takes slices 5 to 24 of every file, wherever the organ lies."""
    where = organ(2, 13)
    assert find_place((2, 30, 16, 16), where, "auto", Path("f")) == Place(2, 3, 13, False)
    array = torch.arange(30.0).view(1, 30, 1, 1).expand(1, 30, 16, 16)
    cut = placed(array, find_place((1, 30, 16, 16), where, "image", Path("f")), where, Path("f"))
    image = where.window.cut(array.numpy())
    assert np.array_equal(cut.numpy(), image)


def test_a_file_of_the_organs_depth_is_padded_as_the_image_is():
    assert find_place((2, 13, 16, 16), organ(2, 13), "auto", Path("f")) == Place(0, 3, 13, False)


def test_a_depth_that_fits_nothing_is_an_error_that_names_all_three():
    with pytest.raises(DataError, match=r"its 17 slices .*window \(20\).*\(13\).*image \(30\)") as caught:
        find_place((2, 17, 16, 16), organ(2, 13), "auto", Path("f.pt"))
    assert "case c: f.pt" in str(caught.value)
    assert "--align centre" in caught.value.do


def test_a_depth_that_fits_twice_must_be_told():
    """Twenty slices of an image of twenty slices: the image itself, or the window around its organ?"""
    where = organ(8, 10, image=20)
    with pytest.raises(DataError, match="may be the window or the image"):
        find_place((2, 20, 16, 16), where, "auto", Path("f"))
    assert find_place((2, 20, 16, 16), where, "window", Path("f")) == Place(0, 0, 20, False)
    assert find_place((2, 20, 16, 16), where, "image", Path("f")) == Place(8, 5, 10, False)
    assert find_place((2, 20, 16, 16), whole(), "auto", Path("f")).count == 20


@pytest.mark.parametrize(("depth", "place"), [(27, Place(3, 0, 20, False)), (13, Place(0, 3, 13, False))])
def test_centre_crops_and_pads_as_the_original(depth, place):
    assert find_place((2, depth, 16, 16), organ(0, 20), "centre", Path("f")) == place


def test_padded_logits_are_background_and_do_not_count():
    arrays = {"neg1": noise(4, 13, 16, 16), LOGITS: noise(2, 13, 16, 16)}
    found = fitted(arrays, NNUNET, organ(2, 13), BINARY, Path("f"), "auto")
    inside = found[VALID][:, :, 0, 0].bool()
    assert inside[0].tolist() == [False] * 3 + [True] * 13 + [False] * 4
    assert float(torch.sigmoid(found[LOGITS][:, ~inside[0]]).max()) < 1e-6
    assert torch.equal(found[LOGITS][:, inside[0]], arrays[LOGITS])
    assert torch.equal(found["neg1"][:, inside[0]], arrays["neg1"])
    softmax = fitted({LOGITS: noise(3, 13, 16, 16)}, NNUNET, organ(2, 13), BINARY_CLASSES, Path("f"), "auto")
    assert float(torch.softmax(softmax[LOGITS], 0)[0, ~inside[0]].min()) > 1 - 1e-6


def test_a_teacher_that_knows_no_prostate_says_nothing_of_it():
    found = fitted({LOGITS: noise(3, 20, 16, 16)}, ATLAS, whole(), THREE_CLASS, Path("f"), "auto")
    assert found[VALID].flatten(1).amax(1).tolist() == [0.0, 1.0, 1.0]


def test_coarser_features_keep_their_plane_and_coarser_logits_are_enlarged():
    flat = noise(4, 20, 1, 1).expand(4, 20, 8, 8)
    arrays = {"neg1": noise(4, 20, 8, 8), "neg2": noise(4, 20, 4, 4), LOGITS: flat}
    found = fitted(arrays, PROVICNET, whole(), BINARY, Path("f"), "auto")
    assert found["neg1"].shape == (4, 20, 8, 8)
    assert found["neg2"].shape == (4, 20, 4, 4)
    assert found[LOGITS].shape == found[VALID].shape == (2, 20, 16, 16)
    small, _ = student_logits(flat, "provicnet", BINARY)
    assert torch.allclose(found[LOGITS], small[..., :1, :1].expand(2, 20, 16, 16), atol=1e-6)


def test_a_window_smaller_than_the_image_is_cut_out_of_each_plane():
    where = expected(centre_window((20, 32, 32), (20, 16, 16)), (20, 32, 32))
    arrays = {"neg1": noise(2, 20, 32, 32), "neg2": noise(2, 20, 16, 16), LOGITS: noise(2, 20, 32, 32)}
    found = fitted(arrays, NNUNET, where, BINARY, Path("f"), "auto")
    assert torch.equal(found["neg1"], arrays["neg1"][:, :, 8:24, 8:24])
    assert torch.equal(found["neg2"], arrays["neg2"][:, :, 4:12, 4:12])
    assert bool(found[VALID].all())


def test_a_plane_that_may_be_window_or_coarse_image_must_be_told():
    where = expected(centre_window((20, 32, 32), (20, 16, 16)), (20, 32, 32))
    with pytest.raises(DataError, match="may be the image's"):
        find_place((2, 20, 16, 16), where, "auto", Path("f"))
    assert find_place((2, 20, 16, 16), where, "window", Path("f")).plane is False
    assert find_place((2, 20, 16, 16), where, "image", Path("f")).plane is True


@pytest.mark.parametrize("plane", [(12, 12), (16, 8), (32, 32)])
def test_a_plane_that_is_no_whole_fraction_is_refused(plane):
    with pytest.raises(DataError, match="no whole fraction"):
        fitted({LOGITS: noise(2, 20, *plane)}, NNUNET, whole(), BINARY, Path("f"), "auto")


# -- import ------------------------------------------------------------------------------------------------


def write_teacher(
    folder: Path, manager, cfg, *, family: str = "nnunet", suffix: str = "pt"
) -> dict[str, Tensor]:
    """Feature files of all training cases on the student's window; returns the logits as stored."""
    dataset, split = open_split(cfg)
    plan = resolve_plan(cfg, dataset, split.train, divisor_of(cfg, manager, dataset), None)
    depth, height, width = plan.size
    logits = {}
    for k, case in enumerate(split.train):
        prefix = "diffusion_features" if family == "prostatlasdiff" else "features"
        shapes = {
            "nnunet": ((6, depth, height, width), (3, depth, height, width)),
            "provicnet": ((depth, 6, height // 2, width // 2), (depth, 4, height // 2, width // 2)),
            "prostatlasdiff": ((depth, 2, 3, height, width), (depth, 1, 3, height, width)),
        }[family]
        arrays = {"feature_neg1": noise(*shapes[0], seed=k), "logits": noise(*shapes[1], seed=100 + k)}
        save(folder / f"{prefix}_{case.id}.{suffix}", arrays, nested=family == "provicnet" and suffix == "pt")
        logits[case.id] = arrays["logits"]
    return logits


def test_imported_files_are_read_by_training_with_the_values_of_the_source(make_job, manager, tmp_path):
    cfg = make_job(tmp_path / "run").config
    logits = write_teacher(tmp_path / "fold0", manager, cfg)
    write_teacher(tmp_path / "pvc", manager, cfg, family="provicnet")
    write_teacher(tmp_path / "pad", manager, cfg, family="prostatlasdiff", suffix="npz")
    teachers = [
        UpstreamTeacher("fold0", (tmp_path / "nothing", tmp_path / "fold0"), "nnunet", "pt"),
        UpstreamTeacher("provicnet", (tmp_path / "pvc",), "provicnet", "pt"),
        UpstreamTeacher("prostatlasdiff", (tmp_path / "pad",), "prostatlasdiff", "pt"),
    ]
    done = import_features(
        manager, cfg, tmp_path / "features", teachers=teachers, dtype="fp32", align="window"
    )
    dataset, split = open_split(cfg)
    assert (done.written, done.kept, done.skipped) == (3 * len(split.train), 0, ())
    plan = resolve_plan(cfg, dataset, split.train, divisor_of(cfg, manager, dataset), None)
    opened = open_teachers(
        [tmp_path / "features"], taps=["neg1"], target=plan.target_kind, labels=plan.labels
    )
    assert [teacher.name for teacher in opened] == ["fold0", "prostatlasdiff", "provicnet"]
    samples = SampleSet(CaseStore(dataset, plan, None), split.train, teachers=opened, taps=["neg1"])
    sample = samples[1]
    source = logits[split.train[1].id]
    assert torch.equal(sample["logits"][0], torch.stack((source[0], source[1:].amax(0))))
    assert [tuple(item.shape) for item in sample["features"]["neg1"]] == [
        (6, 8, 32, 32),
        (6, 8, 32, 32),
        (6, 8, 16, 16),
    ]
    assert all(item.shape == sample["logits"][0].shape for item in sample["logits"])


def test_an_import_keeps_what_fits_and_rewrites_what_changed(make_job, manager, tmp_path):
    cfg = make_job(tmp_path / "run").config
    write_teacher(tmp_path / "fold0", manager, cfg)
    teachers = [UpstreamTeacher("fold0", (tmp_path / "fold0",), "nnunet", "pt")]

    def run():
        return import_features(manager, cfg, tmp_path / "features", teachers=teachers, align="window")

    count = run().written
    again = run()
    assert (again.written, again.kept) == (0, count)
    path = sorted((tmp_path / "fold0").iterdir())[0]
    arrays = torch.load(path, weights_only=True)
    save(path, {name: array + 1 for name, array in arrays.items()})
    assert (run().written, run().written) == (1, 0)


def test_missing_files_are_an_error_or_are_left_out_by_name(make_job, manager, tmp_path):
    cfg = make_job(tmp_path / "run").config
    write_teacher(tmp_path / "a", manager, cfg)
    write_teacher(tmp_path / "b", manager, cfg)
    files = sorted((tmp_path / "b").iterdir())
    files[0].unlink()
    files[1].write_bytes(b"short")
    teachers = [UpstreamTeacher(name, (tmp_path / name,), "nnunet", "pt") for name in "ab"]
    lost = [path.stem.removeprefix("features_") for path in files[:2]]
    options = {"teachers": teachers, "min_bytes": 1000, "align": "window"}
    with pytest.raises(DataError, match=f"case {lost[0]}, teacher b: no file .*and 1 more cases"):
        import_features(manager, cfg, tmp_path / "features", **options)
    done = import_features(manager, cfg, tmp_path / "features", skip_missing=True, **options)
    assert done.skipped == tuple(lost)
    assert (
        open_teacher(tmp_path / "features" / "a").cases() == open_teacher(tmp_path / "features" / "b").cases()
    )


def test_a_damaged_file_stops_the_import_by_name_and_leaves_the_others(make_job, manager, tmp_path):
    cfg = make_job(tmp_path / "run").config
    write_teacher(tmp_path / "a", manager, cfg)
    last = sorted((tmp_path / "a").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-2000])
    teachers = [UpstreamTeacher("a", (tmp_path / "a",), "nnunet", "pt")]
    with pytest.raises(DataError, match=last.name):
        import_features(manager, cfg, tmp_path / "features", teachers=teachers, align="window")
    assert len(open_teacher(tmp_path / "features" / "a").cases()) == len(list((tmp_path / "a").iterdir())) - 1


def test_a_case_with_other_channels_is_refused(make_job, manager, tmp_path):
    cfg = make_job(tmp_path / "run").config
    write_teacher(tmp_path / "a", manager, cfg)
    last = sorted((tmp_path / "a").iterdir())[-1]
    arrays = torch.load(last, weights_only=True)
    save(last, arrays | {"feature_neg1": arrays["feature_neg1"][:4]})
    teachers = [UpstreamTeacher("a", (tmp_path / "a",), "nnunet", "pt")]
    with pytest.raises(DataError, match=f"{last.name}: neg1 has 4 channels, the other cases have 6"):
        import_features(manager, cfg, tmp_path / "features", teachers=teachers, align="window")


def test_an_import_without_teachers_or_with_two_of_one_name_is_refused(make_job, manager, tmp_path):
    cfg = make_job(tmp_path / "run").config
    with pytest.raises(ConfigError, match="no feature files are named"):
        import_features(manager, cfg, tmp_path / "features")
    twice = [UpstreamTeacher("a", (tmp_path,)), UpstreamTeacher("a", (tmp_path,))]
    with pytest.raises(ConfigError, match="two have one name"):
        import_features(manager, cfg, tmp_path / "features", teachers=twice)
    with pytest.raises(DataError, match="teacher a: no such folder"):
        import_features(
            manager, cfg, tmp_path / "features", teachers=[UpstreamTeacher("a", (tmp_path / "no",))]
        )


def test_the_command_imports_and_says_what_it_did(make_job, manager, phantoms, tmp_path):
    cfg = make_job(tmp_path / "run").config
    write_teacher(tmp_path / "x", manager, cfg, family="provicnet")
    (sorted((tmp_path / "x").iterdir())[0]).unlink()
    options = ["--set", "model.name=graft.tiny", "--set", "model.features=[4,8]", "--set", "data.folds=3"]
    options += ["--set", "sample.size=[8,32,32]", "--data", str(phantoms), "-o", str(tmp_path / "out")]
    options += [
        "--teacher",
        f"t={tmp_path / 'x'}",
        "--family",
        "t=provicnet",
        "--skip-missing",
        "--align",
        "window",
    ]
    result = CliRunner().invoke(data_commands.import_features, options, obj=manager)
    assert result.exit_code == 0, result.output
    assert "3 cases written, 0 kept" in result.output
    assert "1 cases lack features" in result.output
    assert json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert open_teacher(tmp_path / "out" / "t").channels == {"neg1": 6, "logits": 2, "valid": 2}
    wrong = CliRunner().invoke(data_commands.import_features, [*options, "--family", "u=nnunet"], obj=manager)
    assert isinstance(wrong.exception, ConfigError)
