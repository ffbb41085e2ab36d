import logging
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from medrl.core import cache_entry
from medrl.core.cache import Cache, make_key
from medrl.core.errors import RuntimeFault

KEY = make_key("content", {}, "1")
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """Forget which entries were verified, as a new process would."""
    monkeypatch.setattr(cache_entry, "_verified", set())


def contents(seed=0):
    return {"a": np.random.default_rng(seed).normal(size=(20, 30)).astype(np.float32)}


def write_at_once(root, barrier, seed, results):
    cache = Cache(root)
    barrier.wait()
    for _ in range(30):
        cache.put(KEY, contents(seed))
    results.put(cache.get(KEY)["a"][0, 0].item())


def make_at_once(root, barrier, results):
    def make():
        results.put(os.getpid())
        return contents()

    barrier.wait()
    np.testing.assert_array_equal(Cache(root).get_or_create(KEY, make)["a"], contents()["a"])


def start(target, count, *arguments):
    workers = [FORK.Process(target=target, args=[*arguments]) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return [worker.exitcode for worker in workers]


def test_two_writers_at_once_leave_one_whole_entry(tmp_path):
    barrier, results = FORK.Barrier(2), FORK.Queue()
    workers = [FORK.Process(target=write_at_once, args=(tmp_path, barrier, seed, results)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    seen = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    candidates = [contents(seed)["a"] for seed in (1, 2)]
    assert seen <= {array[0, 0].item() for array in candidates}
    found = Cache(tmp_path).get(KEY)["a"]
    assert any(np.array_equal(found, array) for array in candidates)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{KEY}.mrc"]


def test_four_processes_that_miss_together_make_the_entry_once(tmp_path):
    barrier, results = FORK.Barrier(4), FORK.Queue()
    assert start(make_at_once, 4, tmp_path, barrier, results) == [0] * 4
    results.get(timeout=10)
    assert results.empty()


def test_every_flipped_byte_is_detected_and_the_entry_removed_and_made_again(cache, caplog):
    cache.put(KEY, contents(), {"note": "x"})
    path = cache.path(KEY)
    whole = path.read_bytes()
    rng = random.Random(0)
    places = [0, 9, 20, 60, len(whole) - 1, *rng.sample(range(len(whole)), 45)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="medrl.cache"):
            assert cache.get(KEY) is None, place
        assert "damaged" in caplog.text
        assert str(path) in caplog.text
        assert not path.exists()
        np.testing.assert_array_equal(cache.get_or_create(KEY, contents)["a"], contents()["a"])


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.05, 0.5, 0.999])
def test_a_truncated_entry_is_detected_and_made_again(cache, kept):
    cache.put(KEY, contents())
    path = cache.path(KEY)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert cache.get(KEY) is None
    np.testing.assert_array_equal(cache.get_or_create(KEY, contents)["a"], contents()["a"])


def test_an_entry_with_bytes_added_is_detected(cache):
    cache.put(KEY, contents())
    with cache.path(KEY).open("ab") as file:
        file.write(b"x")
    assert cache.get(KEY) is None


def test_another_process_verifies_the_entry_for_itself(cache):
    cache.put(KEY, contents())
    path = cache.path(KEY)
    status = path.stat()
    damaged = bytearray(path.read_bytes())
    damaged[-70] ^= 1
    with path.open("r+b") as file:  # the same file, size and time: only the digest can tell
        file.write(damaged)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    code = textwrap.dedent(
        f"""
        from pathlib import Path
        from medrl.core.cache import Cache
        raise SystemExit(7 if Cache(Path({str(cache.root)!r})).get({KEY!r}) is None else 0)
        """
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 7


def test_an_entry_replaced_while_the_process_lives_is_verified_again(cache):
    cache.put(KEY, contents())
    assert cache.get(KEY) is not None
    path = cache.path(KEY)
    damaged = bytearray(path.read_bytes())
    damaged[-70] ^= 1
    path.unlink()
    path.write_bytes(damaged)
    assert cache.get(KEY) is None


def test_a_pickle_in_place_of_an_entry_is_never_executed(cache, tmp_path):
    path = cache.path(KEY)
    path.parent.mkdir(parents=True)
    canary = tmp_path / "canary"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    assert cache.get(KEY) is None
    assert not canary.exists()


def test_a_writer_that_is_killed_leaves_the_old_entry_whole(tmp_path):
    cache = Cache(tmp_path)
    cache.put(KEY, contents(1))

    def die_while_writing():
        type(tmp_path).replace = lambda *_: os.kill(os.getpid(), 9)
        Cache(tmp_path).put(KEY, contents(2))

    worker = FORK.Process(target=die_while_writing)
    worker.start()
    worker.join(60)
    assert worker.exitcode == -9
    np.testing.assert_array_equal(cache.get(KEY)["a"], contents(1)["a"])
    assert cache.info().temporary == 1
    for path in tmp_path.rglob(".*.tmp"):
        os.utime(path, (1.0, 1.0))
    assert cache.clean().temporary == 1
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_file_that_cannot_grow_is_an_error_with_path_and_bytes_and_leaves_nothing(tmp_path):
    def write_with_limit():
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        cache = Cache(tmp_path)
        with pytest.raises(RuntimeFault, match=r"2432 bytes could not be written") as caught:
            cache.put(KEY, contents())
        if KEY not in str(caught.value):
            os._exit(3)
        if cache.get_or_create(KEY, contents)["a"].shape != (20, 30):
            os._exit(4)

    worker = FORK.Process(target=write_with_limit)
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_forked_worker_does_not_verify_again_what_its_parent_did(cache, monkeypatch):
    cache.put(KEY, contents())
    calls = []
    original = cache_entry.hashlib.sha256
    monkeypatch.setattr(
        cache_entry.hashlib, "sha256", lambda *data: calls.append(len(data[0])) or original(*data)
    )
    cache.get(KEY)
    assert max(calls) < 2400  # only the header
    cache_entry._verified.clear()
    cache.get(KEY)
    assert max(calls) >= 2400
