"""Weights of training cases: every set of labels as often as any other; read from JSON only, and checked."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from medrl.core.errors import ConfigError, DataError
from medrl.plugins.kspace.cases import Cases, initial_lines, possible_lines
from medrl.plugins.kspace.sampler import digest, label_bits, make_weights, read_weights


def cases_with(sets):
    """Cases of 4² pixels that hold the given labels."""
    labels = torch.zeros(len(sets), 4, 4, dtype=torch.uint8)
    for number, values in enumerate(sets):
        for place, value in enumerate(values):
            labels[number, 0, place] = value
    return Cases(
        ids=tuple(f"case{number}" for number in range(len(sets))),
        kspace=torch.zeros(len(sets), 4, 4, dtype=torch.complex64),
        target=torch.zeros(len(sets), 4, 4),
        labels=labels,
        possible=possible_lines(len(sets), 4),
        initial=initial_lines(len(sets), 4, 0),
    )


def test_bits_are_those_of_the_labels_that_occur():
    assert label_bits(cases_with([[], [1], [2], [3], [1, 2, 3], [2, 3]])).tolist() == [0, 1, 2, 4, 7, 6]


def test_rare_and_frequent_sets_are_drawn_equally_often():
    found = make_weights(cases_with([[1]] * 90 + [[2, 3]] * 10))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(found.tensor(), 10_000, replacement=True, generator=generator)
    assert 4800 <= int((drawn < 90).sum()) <= 5200


def test_a_written_file_is_read_again(tmp_path):
    cases = cases_with([[1], [2], [1]])
    made = make_weights(cases)
    made.write(tmp_path / "sampler.json")
    assert read_weights(tmp_path / "sampler.json", cases) == made
    assert made.weights == (0.5, 1.0, 0.5)


def test_other_cases_and_changed_labels_are_refused(tmp_path):
    cases = cases_with([[1], [2]])
    make_weights(cases).write(tmp_path / "sampler.json")
    with pytest.raises(DataError, match="other cases"):
        read_weights(tmp_path / "sampler.json", cases_with([[1], [2], [3]]))
    changed = cases_with([[1], [3]])
    assert digest(changed) != digest(cases)
    with pytest.raises(DataError, match="have changed"):
        read_weights(tmp_path / "sampler.json", changed)


def test_a_pickled_sampler_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / "knee_sampler.p").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="never opened"):
        read_weights(tmp_path / "knee_sampler.p", cases_with([[1]]))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schema": 2}, "schema"),
        ({"weights": [1.0]}, "1 weights of 2"),
        ({"weights": [1.0, -1.0]}, "positive"),
        ({"weights": [1.0, float("nan")]}, "positive"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, why):
    cases = cases_with([[1], [2]])
    make_weights(cases).write(tmp_path / "sampler.json")
    content = json.loads((tmp_path / "sampler.json").read_text())
    (tmp_path / "sampler.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(DataError, match=why):
        read_weights(tmp_path / "sampler.json", cases)


def test_a_missing_file_and_missing_labels_are_refused(tmp_path):
    from dataclasses import replace

    with pytest.raises(ConfigError, match="does not exist"):
        read_weights(tmp_path / "none.json", cases_with([[1]]))
    with pytest.raises(DataError, match="no labels"):
        make_weights(replace(cases_with([[1]]), labels=None))
