"""Arrays that stay in their files: passed between processes by name, verified once for all of them."""

from __future__ import annotations

import multiprocessing
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from medrl.core.errors import DataError
from medrl.core.runtime import ResumableLoader
from medrl.plugins.graft import features
from medrl.plugins.graft.mapped import Stored, Verified, by_name, by_value
from medrl.plugins.graft.samples import collate, in_files
from medrl.plugins.graft.windows import centre_window

SHAPE = (4, 8, 8)
CASES = 5


def expected(number):
    return features.Expected(f"case_{number}", centre_window(SHAPE, SHAPE), SHAPE, (1.0, 1.0, 3.0))


def arrays(number, channels=3):
    torch.manual_seed(number)
    return {"neg1": torch.randn(channels, *SHAPE), "logits": torch.randn(2, *SHAPE)}


class Samples(torch.utils.data.Dataset):
    """What one teacher says about each case."""

    def __init__(self, folder):
        self.teacher = features.open_teacher(folder)

    def __len__(self):
        return CASES

    def __getitem__(self, number):
        found = self.teacher.read(expected(number), ["neg1", "logits"])
        return {
            "case_id": f"case_{number}",
            "image": torch.full((1, *SHAPE), float(number)),
            "views": [],
            "label": torch.zeros(SHAPE, dtype=torch.int64),
            "mask": torch.ones(SHAPE, dtype=torch.uint8),
            "labelled": True,
            "features": {"neg1": [found["neg1"]]},
            "logits": [found["logits"]],
            "valid": [torch.ones(1, 1, 1, 1)],
        }


def write(folder, *, channels=3, dtype="bf16"):
    writer = features.FeatureWriter(
        folder,
        teacher="f" * 64,
        source="run",
        channels={"neg1": channels, "logits": 2},
        target="classes",
        labels={"background": 0, "organ": 1},
        dtype=dtype,
    )
    for number in range(CASES):
        writer.write(expected(number), arrays(number, channels))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "teacher")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_batches_of_loading_processes_hold_the_stored_values(folder, workers, size):
    loader = ResumableLoader(
        Samples(folder), batch_size=size, shuffle=True, seed=1, collate=in_files, workers=workers
    )
    seen = set()
    for samples in loader.epoch():
        batch = collate(samples)
        for k, name in enumerate(batch.case_ids):
            number = int(name.removeprefix("case_"))
            stored = arrays(number)
            assert torch.equal(batch.features["neg1"][0][k], stored["neg1"].bfloat16())
            assert torch.equal(batch.logits[0][k], stored["logits"].bfloat16())
            assert batch.image[k].unique().tolist() == [number]
            seen.add(number)
    assert seen == set(range(CASES))


def test_what_is_passed_on_does_not_grow_with_the_features(tmp_path):
    sizes = []
    for channels in (1, 64):
        samples = Samples(write(tmp_path / str(channels), channels=channels))
        sizes.append(len(bytes(ForkingPickler.dumps(in_files([samples[0]])))))
    assert abs(sizes[1] - sizes[0]) < 100
    assert sizes[1] < 64 * 2 * np.prod(SHAPE)


def test_a_single_sample_is_not_copied_and_several_are_stacked(folder):
    samples = Samples(folder)
    first, second = samples[0], samples[1]
    assert collate([first]).features["neg1"][0].data_ptr() == first["features"]["neg1"][0].data_ptr()
    both = collate([first, second])
    alone = torch.cat([collate([first]).logits[0], collate([second]).logits[0]])
    assert torch.equal(both.logits[0], alone)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_only_whole_arrays_are_passed_by_name(tmp_path, dtype):
    found = features.open_teacher(write(tmp_path / dtype, dtype=dtype)).read(expected(0), ["neg1"])["neg1"]
    assert isinstance(by_name(found), Stored)
    assert torch.equal(by_value(pickle.loads(pickle.dumps(by_name(found)))), found)
    part = found[:1]
    assert by_name(part) is part
    assert by_value(part) is part


def test_a_file_that_goes_while_training_is_an_error_that_names_it(folder):
    samples = in_files([Samples(folder)[0]])
    (folder / "case_0" / "neg1.npy").unlink()
    with pytest.raises(DataError, match="neg1.npy"):
        collate(samples)


def test_a_file_verified_by_one_process_is_not_verified_by_the_others(folder, monkeypatch):
    teacher = features.open_teacher(folder)
    worker = multiprocessing.get_context("fork").Process(
        target=teacher.read, args=(expected(0), ["neg1", "logits"])
    )
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    read = []
    digest = features._digest
    monkeypatch.setattr(features, "_digest", lambda array: read.append(array.shape) or digest(array))
    teacher.read(expected(0), ["neg1", "logits"])
    assert read == []
    teacher.read(expected(1), ["neg1", "logits"])
    assert read == [(3, *SHAPE), (2, *SHAPE)]


def test_a_file_that_changes_after_it_was_verified_is_verified_again(folder):
    teacher = features.open_teacher(folder)
    teacher.read(expected(0), ["neg1"])
    path = folder / "case_0" / "neg1.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="its content changed"):
        teacher.read(expected(0), ["neg1"])


def test_another_digest_of_the_same_file_is_not_taken_for_verified(folder):
    path = folder / "case_0" / "neg1.npy"
    verified = Verified()
    verified.add(path, "a")
    assert verified.has(path, "a")
    assert not verified.has(path, "b")
    assert not verified.has(folder / "case_1" / "neg1.npy", "a")


def test_many_files_are_remembered(folder):
    path = folder / "case_0" / "neg1.npy"
    verified = Verified()
    for number in range(4000):
        verified.add(path, str(number))
    assert all(verified.has(path, str(number)) for number in range(4000))
