"""Pairs: split by subject, shards and manifest, synthetic pairs, pairs from predictions."""

from __future__ import annotations

import filecmp
import json
import math
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medrl.core.errors import ConfigError, DataError
from medrl.core.learned_reward import (
    PairSet,
    PairWriter,
    PredictionRecipe,
    RewardNet,
    SubjectSplit,
    SyntheticRecipe,
    build_corrector,
    draw,
    held_out_quality,
    prediction_pairs,
    synthetic_pairs,
)
from medrl.core.learned_reward.pairs import MANIFEST, PairOrigin, with_contrast, with_noise

CLASSES = 3


def source(n=12, shape=(24, 20), channels=1, seed=0):
    """Noisy images of blocks, their labels, ids and subjects (two images each)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(n, *shape, dtype=torch.uint8)
    for i in range(n):
        labels[i, 4 + i % 4 : -5, 5:-4] = 2
        labels[i, 8 + i % 4 : -5, 8:-7] = 1
    level = torch.tensor([0.2, 0.5, 0.8])[labels.long()]
    images = level[:, None] + 0.1 * torch.randn(n, channels, *shape, generator=generator)
    return (
        images.clamp(0, 1),
        labels,
        [f"p{i // 2}_{i % 2}" for i in range(n)],
        [f"p{i // 2}" for i in range(n)],
    )


class Levels(nn.Module):
    """Classifies by intensity; with batch norm and dropout, so that modes and buffers matter."""

    def __init__(self, classes=CLASSES, channels=1, dims=2):
        super().__init__()
        kind, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.scale = kind(channels, classes, 1)
        self.norm = norm(classes, affine=False)
        self.drop = nn.Dropout(0.5)
        with torch.no_grad():
            centre = torch.tensor([0.2, 0.5, 0.8])[:classes]
            self.scale.weight.copy_((2 * centre).view(-1, *[1] * (dims + 1)).expand_as(self.scale.weight))
            self.scale.weight.div_(channels)
            self.scale.bias.copy_(-(centre**2))
        self.eval()

    def forward(self, images):
        return 60 * self.drop(self.norm(self.scale(images)))


def writer(folder, subjects, **options):
    split = options.pop("split", None) or SubjectSplit.of(subjects, validation=0.2, seed=1)
    return PairWriter(folder, classes=options.pop("classes", CLASSES), split=split, **options)


def write_synthetic(folder, count=40, seed=3, **options):
    images, labels, ids, subjects = source()
    actors = options.pop("actors", "one")
    with writer(folder, subjects) as out:
        synthetic_pairs(
            out,
            count=count,
            images=images,
            labels=labels,
            ids=ids,
            subjects=subjects,
            actors={"source": Levels()} if actors == "one" else actors,
            targets=options.pop("targets", source(5, seed=9)[0]),
            seed=seed,
            **options,
        )
    return PairSet(folder)


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}, [
        part.training for part in module.modules()
    ]


def unchanged(module, before):
    state, modes = before
    return modes == [part.training for part in module.modules()] and all(
        torch.equal(value, state[name]) for name, value in module.state_dict().items()
    )


def same_folder(a, b):
    names = sorted(path.name for path in a.iterdir())
    equal, _, _ = filecmp.cmpfiles(a, b, names, shallow=False)
    return names == sorted(path.name for path in b.iterdir()) and sorted(equal) == names


# -- split ------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 40),
    seed=st.integers(0, 500),
    validation=st.sampled_from([0.0, 0.1, 0.3]),
    test=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=150, deadline=None)
def test_training_is_never_empty_and_validation_only_with_a_single_subject(n, seed, validation, test):
    names = [f"s{i}" for i in range(n)]
    split = SubjectSplit.of(names, validation=validation, test=test, seed=seed)
    parts = [split.part(name) for name in names]
    assert "train" in parts
    if validation and n >= 2:
        assert "val" in parts
    if validation and test and n >= 5:
        assert "test" in parts
    assert validation > 0 or "val" not in parts
    assert test > 0 or "test" not in parts


def test_five_subjects_give_a_non_empty_training_part_for_every_seed():
    for seed in range(300):
        split = SubjectSplit.of([f"s{i}" for i in range(5)], validation=0.1, test=0.1, seed=seed)
        assert any(split.part(f"s{i}") == "train" for i in range(5))


def test_a_subject_keeps_its_part_whatever_the_order_and_without_its_population():
    names = [f"patient{i:04d}" for i in range(200)]
    split = SubjectSplit.of(names, validation=0.2, test=0.1, seed=4)
    again = SubjectSplit.of(reversed(names), validation=0.2, test=0.1, seed=4)
    plain = SubjectSplit(validation=0.2, test=0.1, seed=4)
    assert [split.part(n) for n in names] == [again.part(n) for n in names] == [plain.part(n) for n in names]
    shares = [sum(split.part(n) == part for n in names) / 200 for part in ("val", "test")]
    assert shares == pytest.approx([0.2, 0.1], abs=0.08)
    assert any(SubjectSplit(0.2, 0.1, 5).part(n) != split.part(n) for n in names)


def test_shares_that_leave_no_training_are_refused():
    with pytest.raises(ConfigError, match="leave nothing for training"):
        SubjectSplit(validation=0.6, test=0.4)


# -- store ------------------------------------------------------------------------------------------


def test_pairs_are_read_as_they_were_written_across_shards(tmp_path):
    images, labels, ids, subjects = source(10)
    with writer(tmp_path / "pairs", subjects, shard_size=4, provenance={"actor": "abc"}) as out:
        for i in range(10):
            origin = PairOrigin(id=ids[i], subject=subjects[i], kind="true", domain="source", number=i)
            row = out.add(images[i], labels[i].roll(1, 0), labels[i], origin)
            assert row.shard == i // 4
    pairs = PairSet(tmp_path / "pairs")
    assert len(pairs) == 10
    assert pairs.shape == (1, 24, 20)
    assert pairs.classes == 3
    assert pairs.provenance == [{"actor": "abc"}]
    order = [7, 0, 9, 3, 7]
    batch = pairs.batch(order)
    assert torch.equal(batch.images, (images[order] * 255).round() / 255)
    assert torch.equal(batch.truths, labels[order].long())
    assert torch.equal(batch.actions, labels[order].roll(1, 1).long())
    assert (batch.images.dtype, batch.actions.dtype) == (torch.float32, torch.int64)
    assert torch.equal(pairs[3].truths[0], labels[3].long())
    copied = pickle.loads(pickle.dumps(pairs))
    assert torch.equal(copied.batch(order).images, batch.images)


def test_names_tell_pairs_apart_and_the_same_pair_twice_is_refused(tmp_path):
    images, labels, ids, subjects = source(2)
    out = writer(tmp_path, subjects)
    origin = PairOrigin(id=ids[0], subject=subjects[0], kind="contrast", domain="target", strength=0.7)
    out.add(images[0], labels[0], labels[0], origin)
    with pytest.raises(DataError, match=r"contrast 0\.7 of iteration 0 came twice"):
        out.add(images[0], labels[0], labels[0], origin)
    changed = [
        PairOrigin(**{**vars(origin), **change})
        for change in ({"strength": 0.8}, {"iteration": 1}, {"kind": "swap"}, {"number": 1}, {"seed": 2})
    ]
    assert len({origin.name(), *(other.name() for other in changed)}) == 6


def test_what_does_not_fit_is_refused(tmp_path):
    images, labels, _, subjects = source(4)
    out = writer(tmp_path, subjects)

    def add(image, action, truth, **changes):
        values = {"id": "x", "subject": subjects[0], "kind": "k", "domain": "source", **changes}
        out.add(image, action, truth, PairOrigin(**values))

    add(images[0], labels[0], labels[0])
    with pytest.raises(DataError, match="the first image was"):
        add(images[0, :, :10], labels[0, :10], labels[0, :10], number=1)
    with pytest.raises(DataError, match="label maps"):
        add(images[0], labels[0, :10], labels[0], number=1)
    with pytest.raises(DataError, match="labels from 0 to 3 for 3 classes"):
        add(images[0], labels[0] + (labels[0] == 2), labels[0], number=1)
    split = SubjectSplit.of(["a", "b"], validation=0.5)
    leaking = writer(tmp_path / "other", [], split=split)
    with pytest.raises(DataError, match="would leak"):
        leaking.add(
            images[0],
            labels[0],
            labels[0],
            PairOrigin(id="x", subject="a", partner="b", kind="swap", domain="target"),
        )


def test_an_unfinished_or_damaged_folder_is_refused(tmp_path):
    pairs = write_synthetic(tmp_path / "pairs", 8)
    assert len(pairs) == 8
    images, labels, ids, subjects = source(2)
    origin = PairOrigin(id=ids[0], subject=subjects[0], kind="true", domain="source")
    out = writer(tmp_path / "pairs", subjects)
    out.add(images[0], labels[0], labels[0], origin)
    with pytest.raises(DataError, match="came twice"), out:
        out.add(images[0], labels[0], labels[0], origin)
    with pytest.raises(DataError, match="has no manifest"):
        PairSet(tmp_path / "pairs")
    pairs = write_synthetic(tmp_path / "pairs", 8)
    shard = next((tmp_path / "pairs").glob("*.shard"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="damaged shard"):
        PairSet(tmp_path / "pairs").batch([0])
    (tmp_path / "pairs" / MANIFEST).write_text('{"format": "medrl reward pairs", "version": 1}')
    with pytest.raises(DataError, match="damaged manifest"):
        PairSet(tmp_path / "pairs")
    (tmp_path / "pairs" / MANIFEST).write_text('{"format": "something", "version": 1}')
    with pytest.raises(DataError, match="expected 'medrl reward pairs'"):
        PairSet(tmp_path / "pairs")


def test_a_rewritten_folder_holds_the_new_pairs_only(tmp_path):
    write_synthetic(tmp_path / "a", 20)
    write_synthetic(tmp_path / "a", 10, seed=4)
    write_synthetic(tmp_path / "b", 10, seed=4)
    assert same_folder(tmp_path / "a", tmp_path / "b")


def test_pairs_of_several_iterations_are_joined_and_the_newest_can_be_told(tmp_path):
    first = write_synthetic(tmp_path / "1", 20, iteration=1)
    second = write_synthetic(tmp_path / "2", 6, iteration=2)
    both = PairSet([tmp_path / "1", tmp_path / "2"])
    assert len(both) == 26
    assert torch.equal(both.batch([25]).images, second.batch([5]).images)
    assert torch.equal(both.batch([5]).images, first.batch([5]).images)
    assert both.numbers(iterations=[2]).tolist() == list(range(20, 26))
    newest = both.newest()
    assert {both.rows[i].id for i in newest} == {row.id for row in both.rows}
    renewed = {row.id for row in second.rows}
    assert newest.tolist() == [i for i, row in enumerate(both.rows) if (i >= 20) or (row.id not in renewed)]
    assert min(newest) < 20
    assert both.fingerprint() != first.fingerprint()
    names = {row.name for row in both.rows}
    assert len(names) == 26


def test_no_subject_is_in_two_parts_also_across_iterations(tmp_path):
    for iteration in (1, 2):
        write_synthetic(tmp_path / str(iteration), 30, iteration=iteration)
    both = PairSet([tmp_path / "1", tmp_path / "2"])
    subjects = {
        part: {both.rows[i].subject for i in both.numbers(part)}
        | {both.rows[i].origin.partner for i in both.numbers(part)} - {""}
        for part in ("train", "val", "test")
    }
    assert subjects["train"]
    assert subjects["val"]
    assert not subjects["train"] & subjects["val"]
    assert not subjects["test"]
    images, labels, ids, names = source()
    other = SubjectSplit.of(names, validation=0.5, seed=77)
    with writer(tmp_path / "3", names, split=other) as out:
        synthetic_pairs(out, count=24, images=images, labels=labels, ids=ids, subjects=names, iteration=3)
    with pytest.raises(DataError, match="is in train and in val"):
        PairSet([tmp_path / "1", tmp_path / "3"])


def test_folders_of_other_images_are_not_joined(tmp_path):
    write_synthetic(tmp_path / "a", 4)
    images, labels, ids, subjects = source(4, shape=(20, 16))
    with writer(tmp_path / "b", subjects) as out:
        synthetic_pairs(out, count=4, images=images, labels=labels, ids=ids, subjects=subjects)
    with pytest.raises(DataError, match="the pairs before have"):
        PairSet([tmp_path / "a", tmp_path / "b"])


@given(count=st.integers(1, 30), size=st.integers(1, 12), world=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_steps_pass_over_all_pairs_equally_often_and_ranks_share_them(count, size, world):
    numbers = np.arange(100, 100 + count)
    steps = 2 * count
    drawn = [
        draw(numbers, size, seed=1, step=step, rank=rank, world=world)
        for step in range(steps)
        for rank in range(world)
    ]
    seen = np.bincount(np.concatenate(drawn) - 100, minlength=count)
    assert seen.sum() == steps * world * size
    assert seen.max() - seen.min() <= 1
    alone = draw(numbers, size * world, seed=1, step=3)
    shared = np.concatenate([draw(numbers, size, seed=1, step=3, rank=r, world=world) for r in range(world)])
    assert np.array_equal(alone, shared)


def test_nothing_to_draw_from_is_an_error():
    with pytest.raises(DataError, match="no pair to draw from"):
        draw(np.zeros(0, np.int64), 2, seed=0, step=0)


def test_reading_2560_pairs_of_64_by_64_takes_less_than_a_second(tmp_path):
    subjects = [f"s{i}" for i in range(80)]
    image = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    with writer(tmp_path, subjects) as out:
        for i in range(2560):
            origin = PairOrigin(id=str(i), subject=subjects[i % 80], kind="true", domain="source")
            out.add(image, mask, mask, origin)
    started = time.process_time()
    pairs = PairSet(tmp_path)
    numbers = pairs.numbers()
    for step in range(160):
        pairs.batch(draw(numbers, 16, seed=0, step=step))
    assert time.process_time() - started < 1.0


# -- synthetic pairs --------------------------------------------------------------------------------


def test_kinds_have_exactly_the_shares_of_the_recipe_and_images_are_used_equally(tmp_path):
    pairs = write_synthetic(tmp_path, 120)
    assert pairs.counts() == {"corrupted": 36, "predicted": 54, "swapped": 6, "true": 12, "warped": 12}
    used = [row.id for row in pairs.rows]
    assert {used.count(name) for name in set(used)} == {10}
    batch = pairs.batch(pairs.numbers(kinds=["true"]))
    assert torch.equal(batch.actions, batch.truths)
    for kind in ("corrupted", "warped"):
        batch = pairs.batch(pairs.numbers(kinds=[kind]))
        assert float((batch.actions != batch.truths).float().mean()) > 0.01
    labels = dict(zip(source()[2], source()[1], strict=True))
    for number in range(120):
        assert torch.equal(pairs[number].truths[0], labels[pairs.rows[number].id].long())


def test_provenance_tells_maker_temperature_partner_and_style(tmp_path):
    pairs = write_synthetic(tmp_path, 120, actors={"source": Levels(), "style": Levels()})
    origins = [row.origin for row in pairs.rows]
    predicted = [o for o in origins if o.kind == "predicted"]
    assert {o.maker for o in predicted} == {"source", "style"}
    sampled = [o.strength for o in predicted if o.strength > 0]
    assert len(sampled) / len(predicted) == pytest.approx(0.5, abs=0.25)
    assert all(1.0 <= strength <= 2.7 for strength in sampled)
    assert all(bool(o.partner) == (o.kind == "swapped") for o in origins)
    assert all(o.partner != o.subject for o in origins)
    assert {o.style_target for o in origins} == {-1, 0, 1, 2, 3, 4}
    assert {o.domain for o in origins} == {"source"}


def test_without_actors_predictions_become_corruptions(tmp_path):
    assert write_synthetic(tmp_path, 20, actors=None).counts() == {
        "corrupted": 15,
        "swapped": 1,
        "true": 2,
        "warped": 2,
    }


def test_a_rerun_of_synthetic_pairs_is_byte_identical_and_touches_nothing(tmp_path):
    actor = Levels().train()
    before, stream, numbers = (
        snapshot(actor),
        torch.get_rng_state(),
        np.random.get_state(legacy=True)[1].copy(),
    )
    write_synthetic(tmp_path / "a", 40, actors={"a": actor})
    assert unchanged(actor, before)
    assert torch.equal(stream, torch.get_rng_state())
    assert np.array_equal(numbers, np.random.get_state(legacy=True)[1])
    torch.manual_seed(123)
    write_synthetic(tmp_path / "b", 40, actors={"a": actor})
    assert same_folder(tmp_path / "a", tmp_path / "b")
    write_synthetic(tmp_path / "c", 40, actors={"a": actor}, seed=8)
    write_synthetic(tmp_path / "d", 40, actors={"a": actor}, iteration=1)
    assert not same_folder(tmp_path / "a", tmp_path / "c")
    assert not same_folder(tmp_path / "a", tmp_path / "d")


def test_the_actor_predicts_from_the_stored_bytes(tmp_path):
    recipe = SyntheticRecipe(true=0, corrupted=0, predicted=1, swapped=0, warped=0, greedy=1.0)
    pairs = write_synthetic(tmp_path, 12, recipe=recipe)
    batch = pairs.batch(pairs.numbers())
    assert torch.equal(Levels()(batch.images).argmax(1), batch.actions)


@pytest.mark.parametrize("classes", [2, 5])
def test_windows_and_other_numbers_of_classes_and_channels(tmp_path, classes):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 2, 14, 10, 4, generator=generator)
    labels = torch.randint(0, classes, (4, 14, 10, 4), generator=generator)
    ids = list("abcd")
    network = nn.Conv3d(2, 1 if classes == 2 else classes, 1)
    with writer(tmp_path, ids, classes=classes) as out:
        synthetic_pairs(
            out,
            count=20,
            images=images,
            labels=labels,
            ids=ids,
            subjects=ids,
            actors={"net": network},
            targets=torch.rand(2, 2, 9, 9, 4, generator=generator),
        )
    pairs = PairSet(tmp_path)
    batch = pairs.batch(range(20))
    assert batch.images.shape == (20, 2, 14, 10, 4)
    assert int(batch.actions.max()) < classes


def test_a_recipe_without_sense_and_lengths_that_differ_are_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        SyntheticRecipe(swapped=-0.1, greedy=2, temperature=(0.0, 1.0))
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="all shares are 0"):
        SyntheticRecipe(true=0, corrupted=0, predicted=0, swapped=0, warped=0)
    images, labels, ids, subjects = source(4)
    with pytest.raises(DataError, match="3 ids"):
        synthetic_pairs(
            writer(tmp_path, subjects), count=2, images=images, labels=labels, ids=ids[:3], subjects=subjects
        )


def test_synthetic_pairs_of_64_by_64_are_made_at_300_a_cpu_second(tmp_path):
    images, labels, ids, subjects = source(16, shape=(64, 64))
    best = 0.0
    for turn in range(3):  # the machine may be busy
        started = time.process_time()
        with writer(tmp_path / str(turn), subjects) as out:
            synthetic_pairs(
                out, count=192, images=images, labels=labels, ids=ids, subjects=subjects, targets=images
            )
        best = max(best, 192 / (time.process_time() - started))
        if best >= 300:
            break
    assert best >= 300


def test_a_reward_net_trained_on_synthetic_pairs_finds_errors(tmp_path):
    pairs = write_synthetic(tmp_path, 160)
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(12, 3, 1),
    )
    net = RewardNet([body], classes=3)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    own = pairs.numbers("train")
    for step in range(80):
        loss = net.loss(*pairs.batch(draw(own, 16, seed=0, step=step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held = [pairs.batch(pairs.numbers("val"))]
    (temperature,) = net.calibrate(held)
    found = held_out_quality(net.reward, held)
    assert 0.1 < temperature < 10.0
    assert found["near"].auroc > 0.75
    assert found["near"].ece < 0.2


# -- pairs from predictions -------------------------------------------------------------------------


def all_valid(masks):
    return [True] * len(masks)


def none_valid(masks):
    return [False] * len(masks)


def predict(
    folder, n=6, valid=all_valid, corrector=None, network=None, recipe=None, shape=(24, 20), **options
):
    images, _, ids, subjects = source(n, shape)
    with writer(folder, subjects) as out:
        report = prediction_pairs(
            out,
            network=network or Levels(),
            images=images,
            ids=ids,
            subjects=subjects,
            valid=valid,
            corrector=corrector or build_corrector("none", classes=CLASSES),
            recipe=recipe or PredictionRecipe(),
            **options,
        )
    return PairSet(folder), report


def test_one_valid_image_gives_exactly_nine_distinct_pairs(tmp_path):
    pairs, report = predict(tmp_path, n=1)
    assert len(pairs) == 9
    assert len({row.name for row in pairs.rows}) == 9
    assert sorted((row.origin.kind, row.origin.strength) for row in pairs.rows) == [
        ("contrast", 0.7),
        ("contrast", 0.8),
        ("image_noise", 0.05),
        ("image_noise", 0.1),
        ("swap", 0.0),
        ("weight_noise", 0.005),
        ("weight_noise", 0.01),
        ("weight_noise", 0.015),
        ("weight_noise", 0.02),
    ]
    batch = pairs.batch(range(9))
    greedy = Levels()(source(1)[0]).argmax(1)
    assert torch.equal(batch.truths, greedy.expand(9, -1, -1))
    assert torch.equal(batch.images, ((source(1)[0] * 255).round() / 255).expand(9, -1, -1, -1))
    assert report.counts() == {"images": 1, "valid": 1, "plausible": 1, "corrected": 0, "dropped": 0}
    assert torch.equal(report.pseudo_labels["p0_0"].long(), greedy[0])


def test_nine_pairs_of_each_of_six_images_and_swaps_stay_in_their_part(tmp_path):
    pairs, _ = predict(tmp_path)
    assert pairs.counts() == {"contrast": 12, "image_noise": 12, "swap": 6, "weight_noise": 24}
    split = SubjectSplit.of(source(6)[3], validation=0.2, seed=1)
    for row in pairs.rows:
        if row.origin.kind == "swap":
            assert split.part(row.origin.partner) == row.part
    assert {row.part for row in pairs.rows} == {"train", "val"}


def test_a_rerun_is_byte_identical_and_weights_modes_and_global_streams_stay(tmp_path):
    network = Levels().train()
    before, stream, numbers = (
        snapshot(network),
        torch.get_rng_state(),
        np.random.get_state(legacy=True)[1].copy(),
    )
    predict(tmp_path / "a", network=network)
    assert unchanged(network, before)
    assert torch.equal(stream, torch.get_rng_state())
    assert np.array_equal(numbers, np.random.get_state(legacy=True)[1])
    torch.manual_seed(5)
    predict(tmp_path / "b", network=network)
    assert same_folder(tmp_path / "a", tmp_path / "b")
    predict(tmp_path / "c", network=network, batch=2)
    predict(tmp_path / "d", network=network, iteration=1)
    assert same_folder(tmp_path / "a", tmp_path / "c")
    assert not same_folder(tmp_path / "a", tmp_path / "d")


def test_weight_noise_starts_from_clean_weights_and_images_are_perturbed_with_clean_ones(tmp_path):
    images = source(6)[0]
    strengths = (0.5, 5.0)
    pairs, _ = predict(tmp_path, recipe=PredictionRecipe(weight_noise=strengths, skip_empty=False))
    noisy = pairs.batch(pairs.numbers(kinds=["weight_noise"]))
    assert float((noisy.actions != noisy.truths).float().mean()) > 0.05
    for row in (pairs.rows[i] for i in pairs.numbers(kinds=["contrast"])):
        index = source(6)[2].index(row.id)
        seen = with_contrast(images[index : index + 1], row.origin.strength)
        number = pairs.rows.index(row)
        assert torch.equal(pairs[number].actions, Levels()(seen).argmax(1))


def test_an_invalid_prediction_with_a_valid_correction_gives_one_pair_and_without_none(tmp_path):
    broken = source(6)[0].clone()
    corrector = build_corrector("morphology", classes=CLASSES)
    calls = []

    def valid_if_corrected(masks):
        calls.append(len(masks))
        fixed = corrector.correct(masks)
        return (fixed == masks).flatten(1).all(1)

    del broken
    pairs, report = predict(tmp_path / "a", valid=valid_if_corrected, corrector=corrector, n=6)
    corrected = [row for row in pairs.rows if row.origin.kind == "correction"]
    assert len(corrected) == int(report.corrected.sum())
    assert not bool((report.plausible & report.corrected).any())
    for row in corrected:
        index = report.ids.index(row.id)
        truth = pairs[pairs.rows.index(row)].truths
        assert torch.equal(truth, corrector.correct(report.greedy[index : index + 1].long()))
    assert corrected
    nothing, dropped = predict(tmp_path / "b", valid=none_valid)
    assert len(nothing) == 0
    assert dropped.counts()["dropped"] == 6
    assert dropped.pseudo_labels == {}


def test_a_valid_prediction_far_from_its_correction_is_corrected_instead(tmp_path):
    atlas = torch.zeros(1, 24, 20, dtype=torch.uint8)
    atlas[0, 2:8, 2:8] = 1
    atlas[0, 12:16, 2:8] = 2
    corrector = build_corrector("atlas", classes=CLASSES, masks=atlas)
    pairs, report = predict(tmp_path, corrector=corrector)
    assert bool(report.valid.all())
    assert not bool(report.plausible.any())
    assert pairs.counts() == {"correction": 6}
    assert torch.equal(pairs.batch(range(6)).truths, atlas.long().expand(6, -1, -1))
    off, _ = predict(tmp_path / "off", corrector=corrector, recipe=PredictionRecipe(corrections=False))
    assert len(off) == 0


def test_toggles_leave_kinds_out(tmp_path):
    recipe = PredictionRecipe(swap=False, weight_noise=(), contrast=(), image_noise=(0.05,))
    assert predict(tmp_path, recipe=recipe)[0].counts() == {"image_noise": 6}


def test_empty_perturbed_predictions_are_skipped(tmp_path):
    recipe = PredictionRecipe(contrast=(0.0,), image_noise=(), weight_noise=(), swap=False)
    images, _, ids, subjects = source(2)

    class Bright(nn.Module):
        def forward(self, seen):
            return torch.cat((torch.full_like(seen, 0.7), seen, torch.zeros_like(seen)), dim=1)

    for skip, expected in ((True, 0), (False, 2)):
        with writer(tmp_path / str(skip), subjects) as out:
            prediction_pairs(
                out,
                network=Bright(),
                images=images.pow(0.5),
                ids=ids,
                subjects=subjects,
                valid=all_valid,
                corrector=build_corrector("none", classes=CLASSES),
                recipe=PredictionRecipe(**{**vars(recipe), "skip_empty": skip}),
            )
        assert len(PairSet(tmp_path / str(skip))) == expected


def test_relative_noise_scales_with_each_parameter(tmp_path):
    absolute, _ = predict(tmp_path / "a", recipe=PredictionRecipe(weight_noise=(0.3,)))
    relative, _ = predict(
        tmp_path / "r", recipe=PredictionRecipe(weight_noise=(0.3,), noise_scale="relative")
    )
    a = absolute.batch(absolute.numbers(kinds=["weight_noise"]))
    r = relative.batch(relative.numbers(kinds=["weight_noise"]))
    assert not torch.equal(a.actions, r.actions)


def test_the_dice_of_the_original_looks_at_the_highest_label_only(tmp_path):
    class Swap12(nn.Module):
        classes = CLASSES
        learned = False

        def correct(self, masks, probabilities=None):
            return torch.where(masks == 1, 0, masks)

        def probabilities(self, masks):
            return nn.functional.one_hot(self.correct(masks), CLASSES).movedim(-1, 1).float()

    mean = predict(tmp_path / "m", corrector=Swap12())[1]
    highest = predict(tmp_path / "h", corrector=Swap12(), recipe=PredictionRecipe(dice="highest"))[1]
    assert mean.agreement.tolist() == pytest.approx([0.5] * 6)
    assert highest.agreement.tolist() == pytest.approx([1.0] * 6)
    assert bool(highest.plausible.all())
    assert not bool(mean.plausible.any())


def test_windows_are_predicted_like_images(tmp_path):
    images, labels, ids, subjects = source(2, (12, 12))
    del labels
    window = images.unsqueeze(-1).expand(2, 1, 12, 12, 4)
    with writer(tmp_path, subjects) as out:
        prediction_pairs(
            out,
            network=Levels(dims=3),
            images=window,
            ids=ids,
            subjects=subjects,
            valid=lambda masks: torch.ones(len(masks), dtype=torch.bool),
            corrector=build_corrector("none", classes=CLASSES),
        )
    assert len(PairSet(tmp_path)) == 18
    assert PairSet(tmp_path).shape == (1, 12, 12, 4)


def test_recipes_lengths_and_verdicts_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        PredictionRecipe(minimum_dice=2, contrast=(0.7, 0.7), dice="first", weight_draws=0)
    assert len(caught.value.problems) == 4
    images, _, ids, subjects = source(4)
    none = build_corrector("none", classes=CLASSES)

    def run(**changes):
        values = {"images": images, "ids": ids, "subjects": subjects, "valid": all_valid, **changes}
        prediction_pairs(writer(tmp_path, subjects), network=Levels(), corrector=none, **values)

    with pytest.raises(DataError, match="3 different of 4 ids"):
        run(ids=["a", "a", "b", "c"])
    with pytest.raises(DataError, match="verdicts for 4 masks"):
        run(valid=lambda masks: [True])


def test_contrast_blends_with_the_mean_and_noise_is_divided_by_the_maximum():
    image = torch.tensor([0.0, 0.2, 0.4, 1.0]).view(1, 1, 2, 2)
    assert with_contrast(image, 0.5).flatten().tolist() == pytest.approx([0.2, 0.3, 0.4, 0.7])
    noise = torch.tensor([0.1, 0.0, 0.0, 0.25]).view(1, 1, 2, 2)
    assert with_noise(image, noise).flatten().tolist() == pytest.approx([0.08, 0.16, 0.32, 1.0])
    dark = with_noise(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), -0.1))
    assert math.isfinite(float(dark.sum()))


def test_the_manifest_names_shards_and_hashes_and_no_place_or_time(tmp_path):
    predict(tmp_path / "folder", n=1)
    text = (tmp_path / "folder" / MANIFEST).read_text()
    content = json.loads(text)
    assert str(tmp_path) not in text
    assert len(content["shards"]) == 1
    assert content["shards"][0]["pairs"] == 9
    assert {"id", "subject", "iteration", "kind", "strength", "seed"} <= set(content["pairs"][0]["origin"])
    assert all(len(row[name]) == 64 for row in content["pairs"] for name in ("image", "action", "truth"))
