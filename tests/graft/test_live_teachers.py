"""Teachers that are asked while the student trains: the answers of their files, on augmented batches too."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from medrl.core.cache import Cache
from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.config import Layer, resolve_method
from medrl.core.errors import CheckpointError, ConfigError
from medrl.plugins.graft import data, teachers, train
from medrl.plugins.graft.augment import augmented
from medrl.plugins.graft.config_data import AugmentConfig
from medrl.plugins.graft.samples import collate
from medrl.plugins.graft.teachers.live import LiveTeachers

STILL = {"scale": 0, "shift": 0}


def fit(job, change=None):
    with job.runtime() as rt:
        found = data.load(rt, job.config)
        if change is not None:
            change(found)
        train.fit(rt, job.config, found)
    return job.run_dir


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def states(run):
    return load_checkpoint(find_checkpoint(run, "last")).states


def live(teacher_runs, **over):
    return {"teachers": {"features": [str(teacher_runs)], "source": "live"}, "augment": STILL, **over}


@pytest.fixture(scope="module")
def stored(tmp_path_factory, manager, resolve, teacher_runs):
    """The teachers' features by precision of the files."""
    root = tmp_path_factory.mktemp("stored")
    runs = teachers.find_teachers(teacher_runs)
    for dtype in ("fp32", "bf16"):
        teachers.extract(manager, resolve([]).config, runs, root / dtype, taps=["neg1", "neg2"], dtype=dtype)
    return root


def batch_of(found, cases=2):
    samples = found.samples(found.labelled[:cases], teachers=True)
    return found.complete(collate([samples[k] for k in range(cases)]))


def gathered(job, tmp_path):
    return data.gather_data(job.config, job.manager, Cache(tmp_path / "cache"))


# -- equal to files --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2.0**-8)])
def test_live_teachers_say_what_their_files_say(make_job, tmp_path, teacher_runs, stored, dtype, tolerance):
    taps = {"distill": {"taps": ["neg1", "neg2"]}}
    a = batch_of(gathered(make_job(tmp_path / "a", live(teacher_runs, **taps)), tmp_path))
    files = {"teachers": {"features": [str(stored / dtype)]}, **taps}
    b = batch_of(gathered(make_job(tmp_path / "b", files), tmp_path))
    assert a.case_ids == b.case_ids
    pairs = list(zip(a.logits, b.logits, strict=True))
    for name in ("neg1", "neg2"):
        pairs += zip(a.features[name], b.features[name], strict=True)
    assert len(pairs) == 6
    for asked, read in pairs:
        assert torch.allclose(asked, read.float(), rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
@pytest.mark.parametrize("mode", ["uniform", "quality", "probe"])
def test_the_losses_of_a_run_are_those_with_files(
    make_job, tmp_path, teacher_runs, stored, mode, dtype, tolerance
):
    over = {"weighting": {"mode": mode}, "distill": {"taps": ["neg1", "neg2"], "logit_weight": 1.0}}
    files = {"teachers": {"features": [str(stored / dtype)]}, "augment": STILL, **over}
    run = fit(make_job(tmp_path / "a", live(teacher_runs, **over)))
    asked = [row for row in records(run) if "loss" in row]
    read = [row for row in records(fit(make_job(tmp_path / "b", files))) if "loss" in row]
    assert [row["step"] for row in asked] == [1, 2, 3]
    for one, two in zip(asked, read, strict=True):
        for key in ("loss_features", "loss_logits", "loss_supervised"):
            assert one[key] == pytest.approx(two[key], abs=tolerance)
    first = [key for key in asked[0] if key.startswith("weights_")]
    assert first
    assert all(asked[0][key] == pytest.approx(read[0][key], abs=tolerance) for key in first)


@pytest.mark.parametrize(
    "over",
    [
        {
            "weighting": {"mode": "reinforce"},
            "agent": {"policy": "state", "interval": 1},
            "split": {"reward": 0.4},
        },
        {"weighting": {"mode": "align", "align_every": 1}, "split": {"reward": 0.4}},
        {"weighting": {"mode": "meta"}},
        {"weighting": {"mode": "legacy"}, "agent": {"interval": 2}},
    ],
    ids=["reinforce", "align", "meta", "legacy"],
)
def test_every_weighting_takes_live_teachers(make_job, tmp_path, teacher_runs, over):
    rows = records(fit(make_job(tmp_path / "run", live(teacher_runs, **over))))
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert all(row["weights_neg1/teacher_0"] >= 0 for row in rows if "loss" in row)


def test_the_teachers_answer_in_the_precision_of_the_run(make_job, tmp_path, teacher_runs):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        job = make_job(tmp_path / precision, live(teacher_runs, train={"precision": precision}))
        batch = batch_of(gathered(job, tmp_path))
        assert {item.dtype for item in (*batch.features["neg1"], *batch.logits)} == {dtype}


def test_the_teachers_are_frozen_and_in_no_checkpoint(make_job, tmp_path, teacher_runs):
    kept = []
    run = fit(make_job(tmp_path / "run", live(teacher_runs)), kept.append)
    before = load_checkpoint(teachers.find_teachers(teacher_runs)[0]).states["student"]
    network = kept[0].live.teachers[0].network.network
    assert not network.training
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    held = states(run)
    assert set(held["live_teachers"]) == {"teachers"}
    assert len(held["live_teachers"]["teachers"]) == 2


# -- resume ----------------------------------------------------------------------------------------


def test_a_run_that_falls_goes_on_bit_for_bit(make_job, tmp_path, teacher_runs, monkeypatch):
    over = live(teacher_runs, train={"max_steps": 6, "checkpoint_every": 3})
    over["augment"] = {"mirror": ["width"], "rotate": 10, "zoom": 0.1}
    over |= {"weighting": {"mode": "reinforce", "prior": "quality"}, "split": {"reward": 0.4}}
    straight = fit(make_job(tmp_path / "straight", over))
    original = train.set_rate

    def fall(optimizer, cfg, step):
        if step == 5:
            raise CheckpointError("the machine goes away")
        return original(optimizer, cfg, step)

    with monkeypatch.context() as patch:
        patch.setattr(train, "set_rate", fall)
        with pytest.raises(CheckpointError, match="goes away"):
            fit(make_job(tmp_path / "fell", over))
    for path in (tmp_path / "fell" / "checkpoints").glob("*.pt"):
        if path.name != "step_000003.pt":
            path.unlink()
    fell = fit(make_job(tmp_path / "fell", over))
    a, b = states(straight), states(fell)
    for name in ("student", "projections"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name])
    assert (straight / "metrics.jsonl").read_text() == (fell / "metrics.jsonl").read_text()


def test_a_run_does_not_go_on_with_another_teacher(make_job, tmp_path, teacher_runs):
    runs = tmp_path / "runs"
    shutil.copytree(teacher_runs, runs)
    over = live(runs, train={"max_steps": 4, "checkpoint_every": 2})
    fit(make_job(tmp_path / "run", over))
    shutil.rmtree(runs / "teacher_0")
    shutil.copytree(runs / "teacher_1", runs / "teacher_0")
    (tmp_path / "run" / "checkpoints" / "step_000004.pt").unlink()
    (tmp_path / "run" / "checkpoints" / "last.pt").unlink()
    with pytest.raises(CheckpointError, match="another network than the one that this run began with"):
        fit(make_job(tmp_path / "run", over))


# -- what only live teachers allow -----------------------------------------------------------------


def test_the_teachers_see_the_augmented_image(make_job, tmp_path, teacher_runs):
    job = make_job(tmp_path / "run", live(teacher_runs))
    found = gathered(job, tmp_path)
    samples = found.samples(
        found.labelled[:1], teachers=True, augment=AugmentConfig(scale=0.3, mirror=("height", "width"))
    )
    torch.manual_seed(5)
    batch = found.complete(collate([samples[0]]))
    still = batch_of(found, 1)
    assert not torch.equal(batch.image, still.image)
    alone = found.live.teachers[1].network.run(batch.image, ("neg1",))
    assert torch.equal(batch.features["neg1"][1], alone["neg1"])
    assert torch.equal(batch.logits[1], alone["logits"])


def test_a_teacher_of_another_normalisation_gets_its_own_view_with_the_same_draws(
    make_job, tmp_path, teacher_runs
):
    other = {"sample": {"normalization": "volume"}}
    found = gathered(make_job(tmp_path / "run", live(teacher_runs, **other)), tmp_path)
    assert [teacher.view for teacher in found.live.teachers] == [1, 1]
    assert len(found.views) == 1
    augment = AugmentConfig(scale=0.2, shift=0.5, mirror=("width",), rotate=20.0)
    samples = found.samples(found.labelled[:1], teachers=True, augment=augment)
    torch.manual_seed(3)
    batch = collate([samples[0]])
    # Inside the organ, away from the padding, both views are one image up to gain and offset of a channel.
    case = found.labelled[0]
    plain = [store.get(case).image for store in (found.store, found.views[0])]
    assert plain[0].std() != pytest.approx(plain[1].std(), rel=1e-2)
    inside = batch.mask[0] > 0
    both = torch.stack([batch.image[0, 0][inside], batch.views[0][0, 0][inside]])
    assert torch.corrcoef(both)[0, 1] > 0.9999
    said = found.complete(batch)
    alone = found.live.teachers[0].network.run(batch.views[0], ("neg1",))
    assert torch.equal(said.features["neg1"][0], alone["neg1"])


def test_moving_voxels_moves_image_label_and_mask_alike():
    torch.manual_seed(0)
    image = torch.zeros(1, 4, 12, 16)
    image[0, 0:2, 2:6, 3:9] = 1.0
    label = image[0].long()
    cfg = AugmentConfig(scale=0, shift=0, mirror=("depth", "height", "width"))
    seen = set()
    for _ in range(20):
        (moved,), shifted, mask = augmented([image], label, label.to(torch.uint8), cfg)
        assert torch.equal(moved[0].long(), shifted)
        assert torch.equal(mask.long(), shifted)
        assert int(shifted.sum()) == int(label.sum())
        seen.add(tuple(torch.nonzero(shifted)[0].tolist()))
    assert len(seen) > 4


def test_a_rotation_turns_about_the_centre_whatever_the_shape():
    image = torch.zeros(1, 1, 20, 40)
    image[0, 0, 10:12, 24:28] = 1.0  # right of the centre
    cfg = AugmentConfig(scale=0, shift=0, rotate=90.0)
    torch.manual_seed(1)
    (moved,), label, _ = augmented([image], image[0].long(), image[0].long(), cfg)
    torch.manual_seed(1)
    angle = 90.0 * float(2 * torch.rand(5)[0] - 1)
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(40.0), indexing="ij")
    weight = moved[0, 0] / moved.sum()
    offset = torch.stack([(rows * weight).sum() - 9.5, (columns * weight).sum() - 19.5])
    start = torch.tensor([10.5 - 9.5, 25.5 - 19.5])
    assert offset.norm() == pytest.approx(float(start.norm()), abs=0.1)
    turned = torch.rad2deg(torch.atan2(offset[0], offset[1]) - torch.atan2(start[0], start[1]))
    assert float(turned) == pytest.approx(-angle, abs=2.0)
    assert int(label.sum()) > 0


def test_feature_files_refuse_moved_voxels(manager, features):
    values = {"teachers": {"features": [str(features)]}, "augment": {"mirror": ["width"]}}
    with pytest.raises(ConfigError) as error:
        resolve_method(manager, "graft", layers=[Layer("test", values)])
    assert "source=live" in "\n".join(error.value.problems)


# -- what does not fit -----------------------------------------------------------------------------


def test_a_teacher_of_another_window_or_target_is_refused(make_job, tmp_path, teacher_runs):
    job = make_job(tmp_path / "run", live(teacher_runs, target={"kind": "3class"}))
    with pytest.raises(CheckpointError, match="its target is binary, the student has 3class"):
        gathered(job, tmp_path)


def test_without_teachers_live_is_supervised_training(make_job, tmp_path):
    rows = records(fit(make_job(tmp_path / "run", {"teachers": {"source": "live"}})))
    assert not any("loss_features" in row for row in rows)


def test_pickled_numbers_in_a_live_teacher_need_trust(make_job, tmp_path):
    from .test_nnunet_teachers import network, write

    path = write(tmp_path / "fold_0" / "checkpoint_best.pth", network(), _best_ema=np.float64(0.9))
    over = {"features": [str(path)], "source": "live"}
    with pytest.raises(CheckpointError) as error:
        gathered(make_job(tmp_path / "a", {"teachers": over}), tmp_path)
    assert "--trust-teachers" in error.value.do
    found = gathered(make_job(tmp_path / "b", {"teachers": {**over, "trust": True}}), tmp_path)
    assert found.teacher_names == ("fold_0",)


def test_nnunet_checkpoints_teach_live(make_job, tmp_path, monkeypatch):
    from .test_nnunet_teachers import network, write

    paths = [str(write(tmp_path / f"fold_{k}" / "checkpoint_best.pth", network())) for k in range(2)]
    over = {"teachers": {"features": paths, "source": "live"}, "weighting": {"mode": "quality"}}
    kept = []
    rows = records(fit(make_job(tmp_path / "run", over), kept.append))
    assert [row["step"] for row in rows if "loss_features" in row] == [1, 2, 3]
    assert isinstance(kept[0].live, LiveTeachers)
    assert kept[0].teacher_names == ("fold_0", "fold_1")
    assert len(kept[0].views) == 1
