import json
import logging
import os

import numpy as np
import pytest
import torch

from medrl.core.cache import Cache, cache_root, file_hash, make_key
from medrl.core.errors import ConfigError

KEY = make_key("content", {"size": 3}, "1")


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def key_of(number):
    return make_key("content", {"number": number}, "1")


def test_arrays_and_meta_come_back_as_they_were_put(cache):
    arrays = {
        "image": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "label": np.array([[0, 1], [255, 3]], dtype=np.uint8),
        "flag": np.array([True, False]),
        "scalar": np.array(7, dtype=np.int64),
        "none": np.zeros((0, 3), dtype=np.float16),
        "kspace": np.array([1 + 2j], dtype=np.complex64),
    }
    meta = {"spacing": [0.5, 0.5, 3.0], "name": "a", "deep": {"ok": True, "nothing": None}}
    cache.put(KEY, arrays, meta)
    found = cache.get(KEY)
    assert found.meta == meta
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_found_arrays_are_mapped_from_the_file_and_read_only(cache):
    cache.put(KEY, {"a": np.ones((4, 4), dtype=np.float32)})
    found = cache.get(KEY)["a"]
    assert isinstance(found, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 5


def test_a_missing_entry_is_none(cache):
    assert cache.get(KEY) is None


def test_transposed_and_big_endian_arrays_keep_their_values(cache):
    transposed = np.arange(6, dtype=np.float64).reshape(2, 3).T
    big = np.arange(5, dtype=">i4")
    cache.put(KEY, {"t": transposed, "b": big})
    np.testing.assert_array_equal(cache.get(KEY)["t"], transposed)
    np.testing.assert_array_equal(cache.get(KEY)["b"], big)


def test_a_bfloat16_tensor_comes_back_bit_for_bit(cache):
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    cache.put(KEY, {"t": tensor, "f": tensor.float()})
    found = cache.get(KEY)
    assert found.types == {"t": "bfloat16", "f": "float32"}
    assert found["t"].dtype == np.uint16
    assert found.tensor("t").dtype == torch.bfloat16
    assert torch.equal(found.tensor("t"), tensor)
    assert torch.equal(found.tensor("f"), tensor.float())


def test_writing_to_a_tensor_changes_neither_the_file_nor_the_next_reader(cache):
    cache.put(KEY, {"a": np.zeros(1000, dtype=np.float32)})
    before = cache.path(KEY).read_bytes()
    cache.get(KEY).tensor("a").fill_(9.0)
    assert cache.path(KEY).read_bytes() == before
    assert cache.get(KEY).tensor("a").sum() == 0


def test_an_entry_is_made_once_and_then_found(cache):
    calls = []

    def make():
        calls.append(1)
        return {"a": np.full(3, 2.0)}, {"n": 1}

    first, second = cache.get_or_create(KEY, make), cache.get_or_create(KEY, make)
    assert calls == [1]
    assert first.meta == second.meta == {"n": 1}
    np.testing.assert_array_equal(first["a"], second["a"])


def test_meta_may_be_left_out(cache):
    assert cache.get_or_create(KEY, lambda: {"a": np.zeros(1)}).meta == {}


def test_when_making_fails_nothing_is_stored_and_the_next_try_works(cache):
    def fail():
        raise KeyError("no")

    with pytest.raises(KeyError):
        cache.get_or_create(KEY, fail)
    assert cache.info().entries == 0
    assert cache.get_or_create(KEY, lambda: {"a": np.ones(1)})["a"][0] == 1
    assert [path.suffix for path in cache.root.rglob("*") if path.is_file()] == [".mrc"]


@pytest.mark.parametrize(
    "other",
    [
        make_key("content!", {"size": 3}, "1"),
        make_key("content", {"size": 4}, "1"),
        make_key("content", {"size": 3.0}, "1"),
        make_key("content", {"size": True}, "1"),
        make_key("content", {"size": "3"}, "1"),
        make_key("content", {"size": 3, "more": None}, "1"),
        make_key("content", {"size": [3]}, "1"),
        make_key("content", {"size": 3}, "2"),
    ],
)
def test_any_change_of_content_parameters_or_code_gives_another_key(other):
    assert other != KEY


def test_the_key_does_not_depend_on_order_or_on_numpy_scalars():
    one = make_key("c", {"a": 1, "b": {"x": (1, 2), "y": 0.5}}, "1")
    two = make_key("c", {"b": {"y": np.float64(0.5), "x": [1, 2]}, "a": np.int32(1)}, "1")
    assert one == two


def test_a_key_is_the_same_in_every_version(tmp_path):
    assert make_key("c", {"a": 1}, "v") == "81b2854eaeb2f4848c3c391a5e9c92c7bad1ec3bb26c7a9e4512f4ccf27323f6"


@pytest.mark.parametrize("bad", [{"a": object()}, {"a": [{1, 2}]}, {"a": {3: 1}}])
def test_a_parameter_that_is_no_plain_value_is_named(bad):
    with pytest.raises(ConfigError, match=r"params\.a"):
        make_key("c", bad, "1")


@pytest.mark.parametrize("bad", ["", "short", "../../../../etc/passwd", "A" * 64, "0" * 64 + "/x"])
def test_what_is_no_key_is_refused(cache, bad):
    with pytest.raises(ConfigError, match="no key"):
        cache.get(bad)


def test_an_array_of_objects_is_refused(cache):
    with pytest.raises(ConfigError, match="'a' has type object"):
        cache.put(KEY, {"a": np.array([{}], dtype=object)})


def test_meta_that_is_no_plain_value_is_refused(cache):
    with pytest.raises(ConfigError, match=r"meta\.x"):
        cache.put(KEY, {}, {"x": object()})


def test_the_entries_used_least_recently_are_evicted(tmp_path):
    cache = Cache(tmp_path, max_bytes=14_000)
    for number in range(3):
        cache.put(key_of(number), {"a": np.zeros(1000, dtype=np.float32)})
        os.utime(cache.path(key_of(number)), ns=(number * 10**9, number * 10**9))
    assert cache.get(key_of(0)) is not None  # now the most recent
    cache.put(key_of(3), {"a": np.zeros(1000, dtype=np.float32)})
    assert [cache.get(key_of(number)) is not None for number in range(4)] == [True, False, True, True]
    assert cache.info().bytes <= 14_000


def test_an_entry_larger_than_the_limit_survives_until_the_next(tmp_path):
    cache = Cache(tmp_path, max_bytes=100)
    cache.put(key_of(0), {"a": np.zeros(1000)})
    assert cache.get(key_of(0)) is not None
    cache.put(key_of(1), {"a": np.zeros(1000)})
    assert cache.get(key_of(0)) is None


def test_an_evicted_array_that_is_open_stays_readable(tmp_path):
    cache = Cache(tmp_path, max_bytes=100)
    held = cache.put(key_of(0), {"a": np.arange(1000)})
    cache.put(key_of(1), {"a": np.zeros(1000)})
    assert not held.path.exists()
    assert held["a"].sum() == 499500


def test_a_limit_that_is_not_positive_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_bytes"):
        Cache(tmp_path, max_bytes=0)


def test_info_counts_the_caches_of_all_datasets_below_it(tmp_path):
    Cache(tmp_path / "one").put(key_of(0), {"a": np.zeros(10)})
    Cache(tmp_path / "two").put(key_of(1), {"a": np.zeros(10)})
    info = Cache(tmp_path).info()
    assert info.entries == 2
    assert info.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.mrc"))


def test_info_and_clean_of_a_folder_that_does_not_exist_are_empty(tmp_path):
    cache = Cache(tmp_path / "nothing")
    assert (cache.info().entries, cache.clean().entries) == (0, 0)
    assert not cache.root.exists()


def test_clean_removes_entries_and_leaves_foreign_files(cache):
    cache.put(KEY, {"a": np.zeros(10)})
    foreign = [cache.root / "notes.txt", cache.path(KEY).parent / "image.nii", cache.root / f"{KEY}.mrc"]
    for path in foreign:
        path.write_text("mine")
    removed = cache.clean()
    assert removed.entries == 1
    assert removed.bytes > 80
    assert cache.get(KEY) is None
    assert all(path.read_text() == "mine" for path in foreign)


def test_clean_can_keep_what_was_used_lately(cache):
    cache.put(key_of(0), {"a": np.zeros(10)})
    cache.put(key_of(1), {"a": np.zeros(10)})
    os.utime(cache.path(key_of(0)), (1.0, 1.0))
    assert cache.clean(unused_s=3600).entries == 1
    assert cache.get(key_of(1)) is not None


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MEDRL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "medrl"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "medrl"
    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"


def test_two_datasets_of_one_name_have_two_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDRL_CACHE", str(tmp_path))
    one, two = cache_root(tmp_path / "a" / "Set 1"), cache_root(tmp_path / "b" / "Set 1")
    assert one != two
    assert one.parent == two.parent == tmp_path
    assert one.name.startswith("Set_1-")


def test_file_hash_is_the_sha256_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_hash(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_entries_hold_no_pickle(cache):
    cache.put(KEY, {"a": np.zeros(3)}, {"b": [1]})
    raw = cache.path(KEY).read_bytes()
    assert raw[:8] == b"MEDRLC01"
    length = int.from_bytes(raw[8:16], "little")
    assert json.loads(raw[48 : 48 + length])["meta"] == {"b": [1]}


def test_an_unwritable_cache_slows_down_and_does_not_stop(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = Cache(blocked / "cache")
    with caplog.at_level(logging.WARNING, logger="medrl.cache"):
        found = [
            cache.get_or_create(KEY, lambda: ({"a": torch.ones(2, dtype=torch.bfloat16)}, {"m": 1}))
            for _ in range(2)
        ]
    assert [item.path for item in found] == [None, None]
    assert torch.equal(found[0].tensor("a"), torch.ones(2, dtype=torch.bfloat16))
    assert found[0].meta == {"m": 1}
    assert len([record for record in caplog.records if "not used" in record.message]) == 1
