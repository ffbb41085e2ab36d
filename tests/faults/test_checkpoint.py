"""Faults of checkpoints: kills, full disks, damage, malice, and files that belong elsewhere."""

import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from medrl.core.checkpoint import CheckpointStore, load_checkpoint, load_foreign, read_meta
from medrl.core.checkpoint import file as checkpoint_file
from medrl.core.errors import CheckpointError, RuntimeFault

sys.path.insert(0, str(Path(__file__).parents[1] / "core" / "ranks"))
import toy_run as toy

FACTS = {
    "method": "toy",
    "api": 1,
    "distribution": "",
    "plugin_version": "1.0",
    "config": {"train": {"lr": 0.1}},
}
LABELS = {"background": 0, "lesion": 1}


def store_at(folder, *, width=2, facts=FACTS, labels=LABELS, name="net"):
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    store, net = CheckpointStore(folder, facts), nn.Linear(width, 1)
    store.register(**{name: net})
    store.describe(label_names=labels)
    return store, net


def fill(net, value):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)


@pytest.fixture
def saved(tmp_path):
    """A store with the states of steps 1 and 2, each filled with its step."""
    store, net = store_at(tmp_path / "c")
    for step in (1, 2):
        fill(net, step)
        store.save(step)
    return tmp_path / "c"


def resumed(folder, **options):
    store, net = store_at(folder, **options)
    return store.resume(), net


# -- kill during save ---------------------------------------------------------------------------------


def save_for_ever(folder, started):
    store, net = store_at(folder, width=300_000)
    step = store.resume()
    while True:
        step += 1
        fill(net, step)
        store.save(step)
        started.set()


def test_a_run_killed_ten_times_while_saving_never_loses_its_last_completed_save(tmp_path):
    context = multiprocessing.get_context("fork")
    delays = random.Random(3)
    before = 0
    for _ in range(10):
        started = context.Event()
        process = context.Process(target=save_for_ever, args=(tmp_path / "c", started))
        process.start()
        assert started.wait(60)
        time.sleep(delays.uniform(0.0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        files = list((tmp_path / "c").glob("*.pt"))
        assert [path for path in files if not intact(path)] == []
        step, net = resumed(tmp_path / "c", width=300_000)
        assert step > before
        assert torch.equal(net.weight, torch.full_like(net.weight, step))
        before = step


def intact(path):
    try:
        return read_meta(path)["step"] > 0
    except CheckpointError:
        return False


def test_a_kill_between_a_state_and_its_pointer_loses_nothing(saved):
    (saved / "last.pt").unlink()
    os.link(saved / "step_000001.pt", saved / "last.pt")
    assert resumed(saved)[0] == 2


# -- disk full ----------------------------------------------------------------------------------------


def save_with_limit(folder, answer):
    store, net = store_at(folder, width=100_000)
    fill(net, 1)
    store.save(1)
    limit = 200_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        store.save(2)
        answer.put(None)
    except RuntimeFault as error:
        answer.put((str(error), error.do))


def test_a_file_that_cannot_grow_is_a_clear_error_and_the_old_state_is_kept(tmp_path):
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=save_with_limit, args=(tmp_path / "c", answer))
    process.start()
    process.join(60)
    text, advice = answer.get()
    assert str(tmp_path / "c" / "step_000002.pt") in text
    assert "File too large" in text
    assert "bytes" in text
    assert "earlier checkpoints are kept" in advice
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["last.pt", "step_000001.pt"]
    assert resumed(tmp_path / "c", width=100_000)[0] == 1


def test_too_little_space_is_noticed_before_a_byte_is_written(saved, monkeypatch):
    store, _ = store_at(saved)
    monkeypatch.setattr(
        checkpoint_file.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 1)
    )
    with pytest.raises(
        RuntimeFault,
        match=r"step_000003\.pt cannot be written: it needs about \d+ bytes and the disk has 1 left",
    ):
        store.save(3)
    assert resumed(saved)[0] == 2


class FullDisk:
    """A file on a disk that is full: it accepts nothing."""

    def __init__(self, path):
        self.file = io.FileIO(path, "w")
        self.full = io.FileIO("/dev/full", "w")

    def write(self, data):
        return self.full.write(data)

    def flush(self):
        pass

    def fileno(self):
        return self.file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.file.close()
        self.full.close()


def test_a_full_device_is_a_clear_error_and_no_temporary_file_stays(saved, monkeypatch):
    store, _ = store_at(saved)
    opened = Path.open

    def open_full(path, mode="r", *args, **options):
        return (
            FullDisk(path)
            if path.name.endswith(".tmp") and mode == "wb"
            else opened(path, mode, *args, **options)
        )

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(RuntimeFault, match="No space left on device; it needs about"):
        store.save(3)
    monkeypatch.undo()
    assert sorted(path.name for path in saved.iterdir()) == ["last.pt", "step_000001.pt", "step_000002.pt"]


def test_a_folder_that_was_removed_is_a_clear_error(saved):
    store, _ = store_at(saved)
    shutil.rmtree(saved)
    with pytest.raises(RuntimeFault, match="cannot be written"):
        store.save(3)


# -- damage -------------------------------------------------------------------------------------------


def damage_and_refuse(folder, damaged):
    """Replace the newest state by damaged bytes; loading refuses it and names the previous one."""
    path = folder / "step_000002.pt"
    path.write_bytes(damaged)  # last.pt is the same file
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert "step_000002.pt" in caught.value.what
    assert "step_000001.pt, which is intact" in caught.value.do
    with pytest.raises(CheckpointError):
        read_meta(folder / "last.pt")
    step, net = resumed(folder)
    assert step == 1
    assert net.weight.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("part", [0.0, 0.25, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused_and_the_previous_one_named(saved, part):
    content = (saved / "step_000002.pt").read_bytes()
    damage_and_refuse(saved, content[: int(len(content) * part)])


def test_fifty_flipped_bits_are_each_refused(saved):
    content = (saved / "step_000002.pt").read_bytes()
    places = random.Random(1)
    positions = {places.randrange(len(content) * 8) for _ in range(44)}
    positions |= {
        (len(content) - offset) * 8 for offset in (1, 33, 40, 49, 57, 64)
    }  # every field of the footer
    assert len(positions) == 50
    for position in sorted(positions):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << (position % 8)
        damage_and_refuse(saved, bytes(flipped))


def test_the_fallback_is_told(saved, caplog):
    (saved / "step_000002.pt").write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING, "medrl"):
        assert resumed(saved)[0] == 1
    assert "step_000002.pt is damaged" in caplog.text
    assert "going on from step_000001.pt (step 1)" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_never_restarts_silently(saved):
    for path in saved.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no checkpoint in .* is usable"):
        resumed(saved)


def test_the_abandoned_states_after_a_fallback_are_removed_by_the_next_save(saved):
    (saved / "step_000002.pt").write_bytes(b"damaged")
    store, _ = store_at(saved)
    store.resume()
    store.save(2)
    assert all(intact(path) for path in saved.glob("*.pt"))


# -- malice -------------------------------------------------------------------------------------------


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').close()",)


def malicious(folder, kind):
    """Write a file whose unpickling would create `folder/hit`."""
    path, canary = folder / f"{kind}.pt", Canary(folder / "hit")
    content = {"states": {"net": {"weight": torch.ones(1)}, "canary": canary}}
    if kind == "zip":
        torch.save(content, path)
    elif kind == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif kind == "raw":
        path.write_bytes(pickle.dumps(content))
    elif kind == "raw protocol 0":
        path.write_bytes(pickle.dumps(canary, protocol=0))
    else:  # a zip archive with the canary in another place
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(canary, protocol=2))
            archive.writestr("archive/version", "3")
    return path


KINDS = ["zip", "legacy", "raw", "raw protocol 0", "bare zip"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_of_a_foreign_file_is_executed(tmp_path, kind, trust):
    path = malicious(tmp_path, kind)
    if trust and kind in {"zip", "legacy"}:
        assert load_foreign(path, trust=True)["states"]["net"]["weight"].item() == 1
    else:
        with pytest.raises(CheckpointError):
            load_foreign(path, trust=trust)
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_of_a_file_with_a_correct_digest_is_executed(tmp_path, kind):
    path = malicious(tmp_path, kind)
    sign(path, {"schema": 1, "method": "toy", "api": 1})
    assert read_meta(path)["method"] == "toy"
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(path)
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_a_digest_is_not_unpickled_at_all(tmp_path, kind, monkeypatch):
    path = malicious(tmp_path, kind)
    monkeypatch.setattr(torch, "load", lambda *_args, **_options: pytest.fail("unpickled"))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_the_canary_works(tmp_path):
    pickle.loads(malicious(tmp_path, "raw").read_bytes())
    assert (tmp_path / "hit").exists()


def sign(path, meta):
    """Append meta, footer and a correct digest, as an attacker could who knows the format."""
    import hashlib

    content, text = path.read_bytes(), json.dumps(meta).encode()
    signed = content + text + struct.pack("<8sQQ8x", b"medrl-ck", len(content), len(text))
    path.write_bytes(signed + hashlib.sha256(signed).digest())


def test_torch_load_is_called_in_the_checkpoint_package_only_and_always_safely():
    import ast

    import medrl.core

    root = Path(medrl.core.__file__).parents[1]
    calls = []
    for folder in ("core", "cli", "plugins"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                    calls.append((path.relative_to(root).as_posix(), options.get("weights_only")))
                    if options.get("weights_only") != "True":
                        assert options["pickle_module"] == "_stubbing_pickle()"
    assert sorted(calls) == [
        ("core/checkpoint/file.py", "True"),
        ("core/checkpoint/foreign.py", "False"),
        ("core/checkpoint/foreign.py", "True"),
    ]


# -- files that belong elsewhere ----------------------------------------------------------------------


def rewritten(folder, **changes):
    """Change meta of the states, with correct digests; a value of None removes the key."""
    for path in folder.glob("step_*.pt"):
        found = load_checkpoint(path)
        meta = {key: value for key, value in {**found.meta, **changes}.items() if value is not None}
        content = path.read_bytes()
        length = struct.unpack("<8sQQ8x", content[-64:-32])[1]
        path.write_bytes(content[:length])
        sign(path, meta)
    (folder / "last.pt").unlink()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schema": 2}, "has schema 2"),
        ({"schema": None}, "has schema None"),
        ({"method": "other"}, "belongs to method 'other'"),
        ({"api": 99}, "plugin API 99"),
        ({"config": {"train": {"lr": 0.2}}}, r"train\.lr: 0\.2 → 0\.1"),
        ({"label_names": {"background": 0, "a": 1, "b": 2}}, r"other label names: 3 there"),
        ({"step": "two"}, "its step is 'two'"),
        ({"step": -1}, "its step is -1"),
    ],
)
def test_a_state_of_something_else_is_refused_and_the_difference_named(saved, changes, expected):
    rewritten(saved, **changes)
    with pytest.raises(CheckpointError, match=expected):
        resumed(saved)


def test_the_method_is_checked_when_a_file_is_loaded(saved):
    assert load_checkpoint(saved / "last.pt", method="toy").meta["step"] == 2
    with pytest.raises(CheckpointError, match="belongs to method 'toy'") as caught:
        load_checkpoint(saved / "last.pt", method="graft")
    assert "method 'graft' was asked for" in str(caught.value)


def test_the_missing_plugin_is_named_with_its_install_command(saved):
    rewritten(saved, distribution="medrl-never-installed", plugin_version="2.5")
    with pytest.raises(CheckpointError, match="package medrl-never-installed is not installed") as caught:
        load_checkpoint(saved / "step_000002.pt")
    assert caught.value.do == "pip install 'medrl-never-installed==2.5'"


def test_another_version_of_the_plugin_is_told(saved, caplog):
    with caplog.at_level(logging.WARNING, "medrl"):
        assert resumed(saved, facts={**FACTS, "plugin_version": "1.1"})[0] == 2
    assert "written by version 1.0 of the plugin, this is 1.1" in caplog.text


def test_another_shape_is_refused_with_the_first_differences(saved):
    with pytest.raises(
        CheckpointError, match=r"'net'.*weight: \(1, 2\) in the checkpoint, \(1, 5\) in the model"
    ):
        resumed(saved, width=5)


def test_other_registered_objects_are_refused(saved):
    with pytest.raises(CheckpointError, match="missing: student; unknown: net"):
        resumed(saved, name="student")


def test_an_optimiser_of_other_parameters_is_refused(tmp_path):
    def run(parameters):
        folder = tmp_path / "c"
        folder.mkdir(exist_ok=True)
        store = CheckpointStore(folder, FACTS)
        store.register(optimizer=torch.optim.SGD(parameters, lr=0.1))
        return store

    run([nn.Parameter(torch.ones(2))]).save(1)
    with pytest.raises(CheckpointError, match="'optimizer' does not fit"):
        run([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]).resume()


def test_a_checkpoint_of_another_program_is_no_checkpoint(tmp_path):
    torch.save({"net": torch.ones(1)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_text("x" * 1000)
    (tmp_path / "c.pt").mkdir()
    for name, text in (
        ("a", "is damaged"),
        ("b", "is no checkpoint"),
        ("c", "cannot be read"),
        ("d", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=text):
            load_checkpoint(tmp_path / f"{name}.pt")


def test_a_whole_run_with_a_damaged_newest_state_equals_one_that_never_stopped(tmp_path):
    toy.train(tmp_path / "a", 6)
    toy.train(tmp_path / "b", 4)
    newest = tmp_path / "b" / "checkpoints" / "step_000004.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    toy.train(tmp_path / "b", 6)
    assert toy.state_of(tmp_path / "a") == toy.state_of(tmp_path / "b")
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == (tmp_path / "b" / "metrics.jsonl").read_text()
