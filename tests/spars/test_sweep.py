"""The matrix of experiments: complete, resumable, one table."""

from __future__ import annotations

import pytest

from medrl.core.config import Layer, resolve_method
from medrl.core.errors import ConfigError
from medrl.plugins.spars import sweep
from medrl.plugins.spars.sweep import Entry, matrix


@pytest.fixture
def resolve(manager, tiny):
    def make(values):
        layers = [Layer("tiny", tiny()), Layer("entry", dict(values))]
        return resolve_method(manager, "spars", layers=layers)

    return make


def test_the_matrix_is_that_of_the_specification():
    names = {}
    for entry in matrix():
        names.setdefault(entry.part, []).append(entry.name)
    assert names["patients"] == ["8", "12", "16", "20", "24"]
    assert len(names["window"]) == 5
    assert (names["window"][0], names["window"][-1]) == ("8 × 8 × 8", "64 × 64 × 32")
    assert names["tau"] == ["0.2", "0.3", "0.4", "0.5", "0.6"]
    assert names["label-source"] == ["image", "crop"]
    assert names["map"] == ["sum", "mean", "max"]
    assert names["opponents"] == ["live", "frozen", "pool"]
    assert len({entry.folder for entry in matrix()}) == len(matrix())


def test_a_sweep_writes_one_table_and_does_nothing_twice(manager, resolve, tmp_path):
    entries = [
        Entry("base", "as configured", trains_classifier=True),
        Entry("window", "64 × 64 × 32", {"score": {"window": [64, 64, 32]}}),
        Entry("map", "mean", {"map": {"paint": "coarse", "aggregate": "mean"}}, trains_policy=False),
        Entry("opponents", "live", {"opponents": {"kind": "live"}}),
    ]
    said = []
    path = sweep.run(manager, resolve, tmp_path / "out", entries=entries, say=said.append)
    assert len(said) == 4
    table = path.read_text().splitlines()
    rows = [line for line in table if line.startswith("| ") and not line.startswith("| part")]
    assert [row.split("|")[1].strip() for row in rows[1:]] == ["base", "window", "map", "opponents"]
    assert "does not fit" in rows[2]
    before = path.read_bytes()
    sweep.run(manager, resolve, tmp_path / "out", entries=entries, say=said.append)
    assert len(said) == 4
    assert path.read_bytes() == before


def test_an_unknown_part_is_named(manager, resolve, tmp_path):
    with pytest.raises(ConfigError, match="windw"):
        sweep.run(manager, resolve, tmp_path, only=["windw"])
